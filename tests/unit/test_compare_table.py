"""What a comparison tells of its runs and files: what they cost, the table, the pictures."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from muralist.compare import child, media, table
from muralist.compare.journal import Costs, Journal, StageCost, read_costs
from muralist.compare.table import Entry, Scene
from muralist.errors import UserError
from muralist.eval.source import open_source
from muralist.stages.encode import EncodeOptions, encode
from muralist.store.video_read import VideoInfo
from muralist.types import FrameChunk, Grid
from tests.comparison import compare, only_brightness


@pytest.fixture(autouse=True)
def one_metric(monkeypatch):
    only_brightness(monkeypatch)


def write_video(path: Path, frames: torch.Tensor, **options) -> Path:
    """[T, H, W, 3] in [0, 1]."""
    shape = Grid(num_frames=len(frames), height=frames.shape[1], width=frames.shape[2], fps=8)
    return encode(iter([FrameChunk(frames, 0)]), shape, path, EncodeOptions(**options))


# --- what a run cost --------------------------------------------------------------------------------------------------------------


def test_costs_add_up_over_attempts(tmp_path, monkeypatch):
    path, now = tmp_path / "journal.jsonl", [100.0]
    monkeypatch.setattr("muralist.compare.journal.time.monotonic", lambda: now[0])

    def at(moment, journal, **event):
        now[0] = moment
        journal(event)

    first = Journal(path)
    at(101, first, event="begin", stage="prompt", total=1)
    at(103, first, event="end", stage="prompt", seconds=2.0, peak_rss=500, peak_device=0)
    at(103, first, event="begin", stage="refine", total=4)
    at(107, first, event="advance", stage="refine", done=1)
    at(107.5, first, event="advance", stage="refine", done=1)  # tiles: the same number of whole frames, and killed after this, in the midst of the next
    with open(path, "a") as handle:
        handle.write('{"event": "adva')  # in the middle of a line
    now[0] = 200.0
    second = Journal(path)
    at(201, second, event="begin", stage="refine", total=4)
    at(210, second, event="end", stage="refine", seconds=9.0, peak_rss=700, peak_device=9)
    costs = read_costs(path)
    assert costs.attempts == 2 and (costs.seconds, costs.peak_rss, costs.peak_device) == (2 + 4.5 + 9, 700, 9)
    assert [stage.stage for stage in costs.stages] == ["prompt", "refine"]
    assert read_costs(tmp_path / "none").stages == ()


@pytest.mark.parametrize(
    ("code", "errors", "told"),
    [
        (2, "muralist: note: x\nmuralist: error: size: 3 pixels; use more\n", "size: 3 pixels; use more"),
        (1, "Traceback\n  File x\nZeroDivisionError: division by zero\nmuralist: this is a bug\n", "ZeroDivisionError: division by zero"),
        (-9, "", "killed by signal SIGKILL (out of memory?)"),
        (3, "", "exit code 3"),
        (1, "bell \x07 \x1b[31m", "bell    [31m"),
    ],
)
def test_a_failure_has_one_line(code, errors, told):
    assert child.reason(code, errors) == told


def test_a_run_in_a_process_of_its_own_hands_over_its_events(tmp_path):
    events = []
    assert child.run(["recipes", "--json"], tmp_path, events.append) is None
    assert {event["name"] for event in events} >= {"cascade", "direct"}
    assert "no such option" in child.run(["recipes", "--nonsense"], tmp_path, events.append).lower()


# --- the table --------------------------------------------------------------------------------------------------------------------


def entries(**sides):
    """Entries of a measure `q` by side and scene; None: failed."""
    return [Entry(side=side, scene=i, values={} if q is None else {"q": q}) for side, values in sides.items() for i, q in enumerate(values)]


def row(better):
    return {"q": table.Measure(label="q", group="Quality", unit="", better=better, summary="")}


def test_means_are_over_the_scenes_that_all_have():
    summary = table.summarise(entries(a=[1.0, 9.0], b=[2.0, None]), ["a", "b"], ["q"])
    assert summary["a"]["q"] == {"mean": 1.0, "error": None, "n": 1} and summary["b"]["q"]["mean"] == 2.0
    summary = table.summarise(entries(a=[1.0, 3.0], b=[None, None]), ["a", "b"], ["q"])
    assert summary["a"]["q"]["mean"] == 2.0 and summary["b"] == {}


@pytest.mark.parametrize(("better", "sides"), [("higher", ["b"]), ("lower", ["a"]), ("neither", None)])
def test_the_best_goes_by_the_direction(better, sides):
    found = entries(a=[1.0], b=[2.0])
    winners = table.best(found, table.summarise(found, ["a", "b"], ["q"]), row(better))
    assert winners.get("q", {}).get("sides") == sides


def test_a_lead_within_the_noise_is_not_clear():
    for values, clear in (({"a": [1.0, 2.0, 3.0], "b": [1.1, 1.9, 3.1]}, False), ({"a": [1.0, 2.0, 3.0], "b": [1.5, 2.5, 3.6]}, True)):
        found = entries(**values)
        assert table.best(found, table.summarise(found, ["a", "b"], ["q"]), row("higher"))["q"] == {"sides": ["b"], "clear": clear}
    found = entries(a=[1.0, 2.0], b=[1.0, 2.0])
    assert table.best(found, table.summarise(found, ["a", "b"], ["q"]), row("higher")) == {}


def test_csv_cannot_be_taken_for_formulas(tmp_path):
    costs = Costs((StageCost(stage="refine", seconds=2.0, peak_rss=3, peak_device=0),), 1)
    entry = Entry(side="a", scene=0, costs=costs, values={"q": 1.5}, failure='=HYPERLINK("x")')
    (line,) = csv.DictReader(table.csv_text([entry], [Scene("@SUM(1)\n,", 3)]).splitlines(keepends=True))
    assert (
        line["prompt"] == "'@SUM(1)\n," and line["failure"].startswith("'=") and line["q"] == "1.5" and line["seconds.refine"] == "2.0" and line["seed"] == "3"
    )


# --- pictures ---------------------------------------------------------------------------------------------------------------------


def test_files_are_compared_and_10_bit_h265_gets_a_preview(tmp_path):
    frames = torch.rand(5, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    a = write_video(tmp_path / "a.mp4", frames, codec="h265", bit_depth=10)
    b = write_video(tmp_path / "b.mp4", frames * 0.5)
    answer = compare(a, b, "--output", tmp_path / "out")
    assert answer.code == 0, answer.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["best"]["brightness"] == {"sides": ["a"], "clear": True} and results["sides"] == ["a", "b"]
    folders = sorted((tmp_path / "out" / "media").iterdir())
    preview = open_source(folders[0] / "preview.mp4")
    assert (preview.info.codec, preview.info.bit_depth, preview.info.width, preview.info.num_frames) == ("h264", 8, 96, 5)
    assert (folders[1] / "original.mp4").read_bytes() == b.read_bytes()
    middle = list(open_source(a).frames())[2]
    still = torch.from_numpy(np.array(Image.open(folders[0] / "still.png"))) / 255
    assert (still - middle).abs().max() <= 0.5 / 255 + 1e-6


def test_files_of_the_same_name_keep_their_paths_apart(tmp_path):
    frames = torch.zeros(5, 32, 32, 3)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "v.mp4", frames)
    assert compare(tmp_path / "x", tmp_path / "y", "--output", tmp_path / "out").code == 0
    assert len(set(json.loads((tmp_path / "out" / "results.json").read_text())["sides"])) == 2


def test_the_spectrum_peaks_where_a_wave_is(tmp_path):
    wave = 0.5 + 0.4 * torch.sin(2 * math.pi * 0.2 * torch.arange(240.0))
    file = write_video(tmp_path / "a.mp4", wave[None, None, :, None].expand(5, 160, -1, 3))
    spectrum = media.make_media(open_source(file), tmp_path, "a").spectrum
    assert max(spectrum, key=lambda point: point[1])[0] == pytest.approx(0.2, rel=0.1) and 0 < spectrum[0][0] < spectrum[-1][0] < 0.5


def test_a_file_cut_between_checks_is_a_failure_of_its_own(tmp_path, monkeypatch):
    frames = torch.rand(5, 32, 32, 3)
    files = [write_video(tmp_path / name, frames) for name in ("a.mp4", "b.mp4")]

    def cut(source, root, name, make=media.make_media):
        if source.path.name == "a.mp4":
            raise UserError("not a readable video (cut)", where=str(source.path), fix="write it again")
        return make(source, root, name)

    monkeypatch.setattr("muralist.compare.report.make_media", cut)
    assert compare(*files, "--output", tmp_path / "out").code == 0
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert "cut" in cells[0]["failure"] and cells[1]["failure"] is None


def test_what_browsers_play():
    def info(codec, pixel_format):
        known = {name: "" for name in VideoInfo.__dataclass_fields__ if name not in ("metadata", "tags")}
        return VideoInfo(**known | {"codec": codec, "pixel_format": pixel_format})

    assert media.plays_in_browsers(Path("a.mp4"), info("h264", "yuv420p"))
    for path, codec, pixels in (("a.mkv", "h264", "yuv420p"), ("a.mp4", "h265", "yuv420p"), ("a.mp4", "h264", "yuv420p10le"), ("a.mp4", "h264", "yuv444p")):
        assert not media.plays_in_browsers(Path(path), info(codec, pixels))
