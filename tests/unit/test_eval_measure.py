"""The runner and `muralist eval`: one pass feeds all, what cannot be measured is skipped and says why, results to JSON and CSV."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch

from muralist.errors import UserError
from muralist.eval import measure
from muralist.eval.registry import Metric, Setup, Unavailable
from muralist.eval.source import find_sources
from muralist.stages.encode import EncodeOptions
from muralist.types import Grid
from tests.shell import muralist
from tests.unit.test_video import make

GRID = Grid(num_frames=5, height=144, width=176)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two files, and their references: a.mp4 coarser, b.mp4 of another length."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("ours", "theirs"):
        (root / name).mkdir()
    make(root / "ours" / "a.mp4", GRID, metadata={"request": {"prompt": "a red ball moves right over grass"}})
    make(root / "ours" / "b.mp4", GRID)
    make(root / "theirs" / "a.mp4", GRID, EncodeOptions(crf=40))
    make(root / "theirs" / "b.mp4", Grid(num_frames=9, height=144, width=176))
    return root


class Counting:
    """A meter that says what it saw; it gives up at frame `until`."""

    def __init__(self, until: int = 99):
        self.until, self.frames, self.videos = until, [], 0

    def start(self, source):
        self.frames, self.videos = [], self.videos + 1

    def add(self, *frames):
        if len(self.frames) == self.until:
            raise Unavailable("seen enough")
        assert all(f.shape == (144, 176, 3) and f.dtype == torch.float32 for f in frames)
        self.frames.append(frames[0].mean().item())

    def result(self):
        return {"count": float(len(self.frames)), "mean": sum(self.frames) / len(self.frames)}

    def features(self):
        return torch.tensor(self.frames)[:, None]

    def distance(self, features, reference):
        return {"n": float(len(features)), "m": float(len(reference)), "videos": float(self.videos)}


def metric(name, kind, start):
    return Metric(name=name, kind=kind, summary="-", unit="", better="neither", origin="-", start=start)


def refuse(setup, source):
    raise Unavailable("no weights")


def test_one_pass_feeds_all(folders, monkeypatch):
    sources, references = (find_sources([folders / name]) for name in ("ours", "theirs"))
    opened = []
    read = type(sources[0]).frames
    monkeypatch.setattr(type(sources[0]), "frames", lambda self: opened.append(self.path) or read(self))
    metrics = [
        metric("video", "video", lambda setup, source: Counting()),
        metric("tired", "video", lambda setup, source: Counting(until=3)),
        metric("absent", "video", refuse),
        metric("pair", "pair", lambda setup, source: Counting()),
        metric("set", "set", lambda setup, source: Counting()),
        metric("absent set", "set", refuse),
    ]
    report = measure.measure(sources, metrics, references=references)
    found = {(row.metric, row.file and row.file.name): row for row in report.rows}
    assert found["video", "a.mp4"].values["count"] == 5 and found["video", "a.mp4"].value == 5
    assert found["tired", "a.mp4"].skipped == "seen enough" and not found["tired", "b.mp4"].values
    assert found["absent", "a.mp4"].skipped == found["absent set", None].skipped == "no weights"
    assert found["pair", "a.mp4"].values["count"] == 5
    assert found["pair", "b.mp4"].skipped == "the reference has 9 frames of 176x144, the file 5 of 176x144"
    assert found["set", None].values == {"n": 10, "m": 14, "videos": 4}
    # a's reference is read beside it for the pair, and both once more for the set
    assert len(opened) == 2 + 1 + 2 and opened.count(sources[0].path) == 1


def test_nothing_to_compare_with(folders):
    metrics = [metric("pair", "pair", lambda setup, source: Counting()), metric("set", "set", lambda setup, source: Counting())]
    report = measure.measure(find_sources([folders / "ours" / "a.mp4"]), metrics)
    assert [row.skipped for row in report.rows] == ["no reference of this name", "no reference videos"]


def test_choice():
    assert [m.name for m in measure.chosen(["psnr", "ssim", "psnr"], reference=False)] == ["psnr", "ssim"]
    usual = {m.name for m in measure.chosen(None, reference=False)}
    assert {"hd_mse", "effective_resolution", "spectrum"} <= usual and not {"psnr", "latent_mse", "lpips"} & usual
    assert {"psnr", "latent_mse[miniature]"} <= {m.name for m in measure.chosen(None, reference=True)}
    with pytest.raises(UserError, match="unknown metric 'nonsense'"):
        measure.chosen(["psnr", "nonsense"], reference=False)


def test_command(folders, tmp_path):
    names = "psnr,ssim,hd_mse,temporal_flickering,world_adherence,effective_resolution,latent_mse"
    done = muralist("eval", folders / "ours", "--metrics", names, "--reference", folders / "theirs", "-o", tmp_path / "new" / "out")
    assert done.code == 0 and "psnr" in done.out and "skipped" in done.out and "--weights vae=FOLDER" in done.out
    record = json.loads((tmp_path / "new" / "out" / "eval.json").read_text())
    results = {(r["metric"], r["file"].split("/")[-1]): r for r in record["results"]}
    assert results["psnr", "a.mp4"]["value"] > 20 and results["psnr", "b.mp4"]["value"] is None and "9 frames" in results["psnr", "b.mp4"]["skipped"]
    assert record["files"][0]["prompt"] == "a red ball moves right over grass" and record["files"][0]["num_frames"] == 5
    assert results["world_adherence", "b.mp4"]["skipped"] == "the file's metadata names no prompt"
    lines = list(csv.DictReader(io.StringIO((tmp_path / "new" / "out" / "eval.csv").read_text())))
    assert {line["metric"] for line in lines} == set(names.split(","))
    assert float(next(line["value"] for line in lines if line["name"] == "ssim")) == results["ssim", "a.mp4"]["values"]["ssim"]


def test_json_lines(folders):
    events = muralist("eval", folders / "ours" / "a.mp4", "--metrics", "hd_mse,mhd_mse", "--json").events
    assert [e["metric"] for e in events] == ["hd_mse", "mhd_mse"] and events[0]["value"] == pytest.approx(3 * events[1]["value"])
    assert {"psnr", "hd_mse"} <= {e["name"] for e in muralist("eval", "--list", "--json").events}


def test_mistakes_are_one_line(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    good = folders / "ours" / "a.mp4"
    (tmp_path / "file").write_text("")
    for options, words in {
        (): "no files",
        (tmp_path / "empty",): "no videos in this folder",
        (tmp_path / "missing.mp4",): "no such file",
        (tmp_path / "file",): "not a readable video",
        (good, "--metrics", "nonsense"): "unknown metric",
        (good, "--metrics", ""): "unknown metric",
        (good, "--reference", tmp_path / "empty"): "no videos",
        (good, "--weights", "lpips"): "NAME=PATH",
        (good, "--weights", "lpips=/nowhere/x"): "no such file",
        (good, "--output", tmp_path / "file"): "is a file",
        (good, "--device", "tpu"): "unknown device",
    }.items():
        assert words in muralist("eval", *options).error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_device_and_prompts_reach_the_meters(folders):
    seen = []
    source = find_sources([folders / "ours" / "a.mp4"])
    setup = Setup(prompts={source[0].path: "a blue cube falls over sand"})
    measure.measure(source, [metric("m", "video", lambda setup, s: seen.append((setup.prompts[s.path], s.prompt)) or Counting())], setup=setup)
    assert seen == [("a blue cube falls over sand", "a red ball moves right over grass")]
