"""Comparisons: the grid of runs, its page, and the mistakes that can be made in asking for one; on tiny random pipelines."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from muralist.compare import child, grid
from muralist.compare.page import render
from muralist.compare.seams import decode_borders
from muralist.errors import UserError
from muralist.eval.source import open_source
from muralist.store import weights
from tests import inside
from tests.comparison import Brightness, compare, only_brightness
from tests.shell import muralist

PROMPTS = 'a red ball moves right\n\n# a comment\n</script><script>alert("1")</script> & a blue star\n'
SIZE = ("--size", "160x96", "--num-frames", 5)


@pytest.fixture(autouse=True)
def one_metric(monkeypatch):
    only_brightness(monkeypatch)


@pytest.fixture(scope="module")
def grid_folder(tiny22, tmp_path_factory):
    """A finished comparison of two recipes on two prompts: (directory, command)."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.txt").write_text(PROMPTS)
    command = ("--recipes", "cascade,direct", "--prompts", folder / "prompts.txt", "--model", tiny22, *SIZE, "--output", folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "run", inside.run)
        only_brightness(patch)
        answer = compare(*command)
    assert answer.code == 0, answer.err
    return folder / "out", command


# --- the grid ---------------------------------------------------------------------------------------------------------------------


def test_the_grid_holds_every_recipe_on_every_scene(grid_folder):
    results = json.loads((grid_folder[0] / "results.json").read_text())
    assert results["sides"] == ["cascade", "direct"] and len(results["scenes"]) == 2 and len(results["cells"]) == 4
    for cell in results["cells"]:
        assert cell["failure"] is None and cell["attempts"] == 1 and cell["values"]["peak_rss"] > 1e6 and math.isfinite(cell["values"]["brightness"])
        stages = [stage["stage"] for stage in cell["stages"]]
        assert stages[0] == "prompt" and stages[-2:] == ["refine", "decode"] and ("proxy" in stages) == (cell["side"] == "cascade")
        assert cell["values"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in cell["stages"]))
        assert (grid_folder[0] / cell["path"] / "run" / "request.json").is_file()
    assert results["summary"]["direct"]["seconds"]["n"] == 2 and results["best"]["seconds"]["sides"]


def test_variants_are_columns_of_their_own(tiny22, tmp_path, monkeypatch):
    import shlex

    monkeypatch.setattr(child, "run", inside.run)
    (tmp_path / "p.txt").write_text("a red ball\n")
    variants = (
        "--variant",
        "fewer steps: direct refine.num_inference_steps=2",
        "--variant",
        "guided: direct refine.num_inference_steps=2 refine.guidance_scale=4",
    )
    answer = compare("--recipes", "direct", *variants, "--prompts", tmp_path / "p.txt", "--model", tiny22, *SIZE, "--output", tmp_path / "out")
    assert answer.code == 0, answer.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sides"] == ["direct", "fewer steps", "guided"]
    words = [shlex.split(cell["command"]) for cell in results["cells"]]
    settings = [[b for a, b in itertools.pairwise(line) if a == "--set"] for line in words]
    assert settings == [[], ["refine.num_inference_steps=2"], ["refine.num_inference_steps=2", "refine.guidance_scale=4"]]
    assert len({cell["path"] for cell in results["cells"]}) == 3


def test_settings_of_a_variant_are_taken_as_they_are():
    (side,) = grid.read_sides(None, ['two parts: luve refine.experts=["low", "high"] upsample={"kind": "LearnedUpsampling", "chunk": 2}'])
    assert side == grid.Side("two parts", "luve", ('refine.experts=["low", "high"]', 'upsample={"kind": "LearnedUpsampling", "chunk": 2}'))
    for value in ("2", "null", "detail", '"a word=3 inside"', "[1, 2]", '{"kind": "Windows", "tokens": 64}', "2abc", ""):
        (side,) = grid.read_sides(None, [f"x: luve  a.b={value} refine.Z=1"])
        assert side.settings == (f"a.b={value}", "refine.Z=1")
    for text in (
        "no colon",
        ": luve",
        "name:",
        "name: =3",
        "name: luve and words",
        "a: luve x=2 y",
        "a: luve x=" + "[" * 100_000 + " y",
        "a: luve x=null --set y=3",
    ):
        with pytest.raises(UserError, match="is no variant"):
            grid.read_sides(None, [text])


def test_the_command_of_a_cell_makes_its_video_again(grid_folder, tmp_path, monkeypatch):
    import shlex

    cell = json.loads((grid_folder[0] / "results.json").read_text())["cells"][2]
    monkeypatch.chdir(tmp_path)
    assert muralist(*shlex.split(cell["command"])[1:]).code == 0
    assert (tmp_path / "video.mp4").read_bytes() == (grid_folder[0] / cell["path"] / "video.mp4").read_bytes()


def test_a_second_start_runs_and_measures_nothing_again(grid_folder, monkeypatch):
    monkeypatch.setattr(child, "run", lambda *_: pytest.fail("a finished cell ran again"))
    monkeypatch.setattr(Brightness, "add", lambda *_: pytest.fail("a measured file was measured again"))
    before = json.loads((grid_folder[0] / "results.json").read_text())
    assert compare(*grid_folder[1]).code == 0
    assert json.loads((grid_folder[0] / "results.json").read_text()) == before


def test_another_seed_joins_the_finished_cells(grid_folder, monkeypatch):
    ran = []
    monkeypatch.setattr(child, "run", lambda arguments, folder, on_event: ran.append(folder.name) or "not now")
    answer = compare(*grid_folder[1], "--seeds", "0-1", "--json")
    assert len(ran) == 4 and all("-s1-" in name for name in ran)
    assert answer.code == 0 and answer.events[-1]["failed"] == 4
    with monkeypatch.context() as patch:
        patch.setattr(child, "run", lambda *_: pytest.fail("ran"))
        assert compare(*grid_folder[1]).code == 0


def test_a_failed_cell_is_told_and_does_not_stop_the_grid(tiny22, tmp_path, monkeypatch):
    def sometimes(arguments, folder, on_event):
        return "memory: the memory does not suffice; use less" if "cascade" in folder.name else inside.run(arguments, folder, on_event)

    monkeypatch.setattr(child, "run", sometimes)
    (tmp_path / "p.txt").write_text("a ball\n")
    answer = compare("--recipes", "cascade,direct", "--prompts", tmp_path / "p.txt", "--model", tiny22, *SIZE, "--output", tmp_path / "out")
    assert answer.code == 0 and "failed: memory: the memory does not suffice" in answer.err
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert [cell["failure"] for cell in cells] == ["memory: the memory does not suffice; use less", None]
    assert "does not suffice" in (tmp_path / "out" / "report.html").read_text()


def test_when_nothing_succeeds_the_first_reason_is_the_line(tiny22, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "run", lambda *_: "the disk is full")
    (tmp_path / "p.txt").write_text("a ball\n")
    answer = compare("--recipes", "direct", "--prompts", tmp_path / "p.txt", "--model", tiny22, *SIZE, "--output", tmp_path / "out", "--json")
    assert answer.code == 2 and "no run succeeded (the disk is full)" in answer.err


def test_a_begun_cell_goes_on_where_and_in_the_memory_that_was_said(tiny22, tmp_path, monkeypatch):
    asked = []

    def begin(arguments, folder, on_event):
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / "request.json").touch()
        asked.append(arguments)
        return "not now"

    monkeypatch.setattr(child, "run", begin)
    (tmp_path / "p.txt").write_text("a ball\n")
    where = ("--device", "cpu", "--memory", "low", "--vram-limit", "12.5")
    for _ in range(2):
        compare("--recipes", "direct", "--prompts", tmp_path / "p.txt", "--model", tiny22, *SIZE, *where, "--output", tmp_path / "out")
    assert asked[0][0] == "generate" and asked[1] == ("resume", "--json", "run", "--keep-run", *where)


@pytest.mark.parametrize("text", ["0", "0,1", "3-5", " 7 , 7,1"])
def test_seeds(text):
    assert grid.read_seeds(text) == {"0": [0], "0,1": [0, 1], "3-5": [3, 4, 5], " 7 , 7,1": [7, 1]}[text]


def test_tile_borders_are_those_of_the_decoder(grid_folder, tiny22, monkeypatch):
    cell = json.loads((grid_folder[0] / "results.json").read_text())["cells"][0]
    metadata = open_source(grid_folder[0] / cell["path"] / "video.mp4").info.metadata
    assert cell["borders"] == {"x": [], "y": []}
    metadata["request"]["config"]["decode"] |= {"order": "tile", "tile": 64}
    assert decode_borders(metadata, str(tiny22)) == {"x": [48, 96], "y": [48]}
    metadata["request"] |= {"model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "revision": "0" * 40}
    monkeypatch.setattr(weights, "_download", lambda *_: pytest.fail("a file had a model downloaded"))
    assert decode_borders(metadata) is None
    for unusable in ("~nosuchuser/wan", "/proc/1/root/models/wan", "x" * 300):
        metadata["request"]["model"] = unusable
        assert decode_borders(metadata) is None
    assert decode_borders({}) is None and decode_borders({"request": {"prompt": 1}}) is None


# --- the page ---------------------------------------------------------------------------------------------------------------------


class Structure(HTMLParser):
    """Open elements, ids, and every attribute that could load something."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.text = [], [], [], {}
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.loads += [values[name] for name in ("src", "href") if name in values]
        if tag not in self.VOID:
            self.open.append((tag, values.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text[self.open[-1] if self.open else None] = data


def test_the_page_is_whole_and_asks_nothing_of_the_network(grid_folder):
    text = (grid_folder[0] / "report.html").read_text()
    page = Structure(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.loads)
    assert "default-src 'none'" in text and "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    data = json.loads(page.text["script", "data"])
    assert data["scenes"][1]["prompt"] == '</script><script>alert("1")</script> & a blue star'
    assert all((grid_folder[0] / cell["media"][name]).is_file() for cell in data["cells"] for name in ("video", "still"))
    assert all(cell["media"]["thumb"].startswith("data:image/png;base64,") for cell in data["cells"])


def test_every_id_that_the_script_asks_for_is_in_the_page():
    import re

    folder = Path(child.__file__).parent
    ids = set(Structure((folder / "page.html").read_text()).ids)
    script = (folder / "page.js").read_text()
    asked = set(re.findall(r'\$\("([a-z-]+)"\)', script)) | {f"{stem}-{side}" for stem in re.findall(r"\$\(`([a-z]+)-\$\{which\}`\)", script) for side in "ab"}
    assert asked <= ids, asked - ids
    assert "innerHTML" not in script and "eval(" not in script and "document.write" not in script


def test_no_text_can_leave_its_place():
    results = {"cells": [], "sides": ["/*{script}*/ </script> \u2028 <!--"]}
    page = Structure(render(results, []))
    assert json.loads(page.text["script", "data"])["sides"] == results["sides"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_draws_it_without_a_complaint(grid_folder, tmp_path):
    import subprocess

    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run([*command, "--dump-dom", (grid_folder[0] / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    for told in ("brightness", "Time by stage", "Spectra", "2 columns × 2 prompts × 1 seed"):
        assert told in done.stdout
    assert done.stdout.count("&lt;/script&gt;&lt;script&gt;alert") >= 2


# --- mistakes ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(tmp_path):
    """Files that can be typed by mistake."""
    files = {
        "empty": b"",
        "comments": b"# nothing\n\n",
        "binary": bytes(range(256)),
        "control": b"a ball\x00\x1b[0m\n",
        "long": b"a" * 5000,
        "good": b"a ball\n",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("hands off")
    return tmp_path


MISTAKES = [
    ["--recipes", "nonsense", "--prompts", "good"], ["--recipes", "", "--prompts", "good"], ["--recipes", "cascade,,direct", "--prompts", "good"],
    *(["--recipes", "direct", "--prompts", name] for name in ("empty", "comments", "binary", "control", "long", "missing", "folder", "/dev/zero", "x" * 5000)),
    *(["--recipes", "direct", "--prompts", "good", "--seeds", text] for text in ("", "-1", "1.5", "a", "3-1", "0-99999", "1" * 40, "99999999999999999999")),
    *(["--recipes", "direct", "--prompts", "good", "--output", name] for name in ("good", "used", "good/x", "/dev/null/x", "/proc/x", "x" * 5000)),
    *(["--variant", text, "--prompts", "good"] for text in ("", "a", "a:", ": direct", "a: direct 3", "a: 'direct", "a\n: direct", "a: nonsense")),
    *(["--recipes", "direct", "--variant", text, "--prompts", "good"] for text in ("direct: direct", "a: direct nonsense=3", "a: direct refine.skip_steps=x")),
    *(["--recipes", "direct", "--prompts", "good", *more] for more in (["--metrics", "nonsense"], ["--size", "0x0"], ["--model", "nowhere"], ["--seed", "1"])),
    [], ["--recipes", "direct"], ["--prompts", "good"], ["good"], ["missing.mp4"], ["folder"], ["good", "--recipes", "direct"], ["--reference", "folder"],
    ["--recipes", "direct", "--prompts", "good", "--reference", "folder"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda arguments: " ".join(arguments)[:50] or "nothing")
def test_mistakes_are_one_line(arguments, typed, tiny22, monkeypatch):
    monkeypatch.chdir(typed)
    monkeypatch.setattr(child, "run", lambda *_: pytest.fail("a run was started"))
    model = [] if "--model" in arguments or not {"--recipes", "--variant"} & set(arguments) else ["--model", tiny22]
    assert compare(*arguments, *model).error
    assert not (typed / "compare").exists() and sorted(path.name for path in (typed / "used").iterdir()) == ["letter.txt"]


def test_a_directory_of_another_kind_is_refused(grid_folder, tmp_path):
    run = next((grid_folder[0] / "cells").glob("*/run"))
    assert "this run was started with comparison = null" in compare(*grid_folder[1], "--output", run).error


def test_prompts_may_have_a_byte_order_mark_and_windows_lines(tmp_path):
    (tmp_path / "p").write_bytes("\ufeffa ball\r\na ball\r\n ein grüner Stern \r\n".encode())
    assert grid.read_prompts(tmp_path / "p") == ["a ball", "ein grüner Stern"]
