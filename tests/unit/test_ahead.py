"""Items made ahead: the same ones in the same order, errors at their place, and nobody left behind when the reader goes."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from muralist import pipeline
from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.cli import _bars
from muralist.errors import UserError
from muralist.stages import encode as stage
from muralist.stages.ahead import Ahead, Stopped
from muralist.stages.decode import TimeMajor, decode
from muralist.stages.encode import encode
from muralist.store.atomic import file_sha256
from muralist.store.colour import rgb_to_planes
from muralist.types import FrameChunk, Grid, LatentVideo
from tests.shell import muralist

counts = pytest.mark.parametrize("count", [0, 1, 3])


def makers() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


@counts
def test_the_same_items_in_the_same_order(count):
    items = [0, None, 2, "three", ()]
    assert list(Ahead(count)(iter(items))) == items and makers() == 0


@counts
def test_an_error_is_raised_at_its_place(count):
    def broken():
        yield 1
        yield 2
        raise FloatingPointError("tile 3")

    seen = []
    with pytest.raises(FloatingPointError, match="tile 3"):
        for item in Ahead(count)(broken()):
            seen.append(item)
    assert seen == [1, 2] and makers() == 0


def test_no_more_than_the_count_are_made_in_advance():
    made = []
    items = Ahead(2)(made.append(i) or i for i in range(10))
    assert next(items) == 0
    time.sleep(0.3)
    assert len(made) == 4  # one read, two in the queue, one in the maker's hand
    items.close()
    assert makers() == 0


def test_a_reader_that_leaves_stops_a_maker_in_the_midst_of_long_work():
    ahead, stopped = Ahead(1), []

    def slow():
        yield 0
        try:
            while True:
                time.sleep(0.01)
                ahead.check()
        except Stopped:
            stopped.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        for _ in ahead(slow()):
            raise KeyboardInterrupt
    assert stopped == [True] and makers() == 0


def test_a_file_has_the_same_bytes(tmp_path):
    grid = Grid(num_frames=13, height=64, width=96)
    video = torch.rand(13, 64, 96, 3, generator=torch.Generator().manual_seed(0))

    def chunks():
        yield FrameChunk(video[:1], 0)
        for start in range(1, 13, 4):
            yield FrameChunk(video[start : start + 4], start)

    plain, ahead = tmp_path / "plain.mp4", tmp_path / "ahead.mp4"
    encode(chunks(), grid, plain)
    encode(chunks(), grid, ahead, ahead=Ahead(3))
    assert plain.read_bytes() == ahead.read_bytes()


def test_a_full_disk_while_frames_are_made_ahead_is_reported_and_leaves_no_thread(tmp_path, monkeypatch):
    def full(*_):
        raise UserError("the disk is full", where="disk", fix="free some")

    monkeypatch.setattr(stage.LiveFile, "append", full)
    frames = (FrameChunk(torch.rand(4, 64, 96, 3), start) for start in range(0, 4000, 4))
    with pytest.raises(UserError, match="the disk is full"):
        encode(frames, Grid(num_frames=4001, height=64, width=96), tmp_path / "a.mp4", ahead=Ahead(3))
    assert makers() == 0


SMALL = ("--size", "128x66", "--num-frames", 29, "--seed", 1)


def paint(base, output):
    return muralist("generate", "a red ball", "--model", base, "-o", output, *SMALL)


def test_a_whole_run_has_the_same_bytes_also_when_it_was_interrupted(tiny22, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.mp4", tmp_path / "broken.mp4"
    assert paint(tiny22, whole).code == 0
    monkeypatch.setitem(pipeline.AHEAD, "cpu", 3)
    seen = []

    def interrupt(self, stage, done, advance=_bars.Bars.advance):
        advance(self, stage, done)
        if stage == "decode":
            seen.append(done)
            if done > 20:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(_bars.Bars, "advance", interrupt)
        assert paint(tiny22, broken).code == 130
    assert makers() == 0 and seen and not broken.exists()
    assert muralist("resume", f"{broken}.run").code == 0
    assert file_sha256(broken) == file_sha256(whole)


@pytest.mark.gpu
def test_frames_that_stay_on_the_gpu_give_the_same_code_values(tiny22):
    device = torch.device("cuda")
    base = Base(inspect_base(str(tiny22)), device)
    latent = LatentVideo(torch.randn(1, 48, 2, 4, 8, generator=torch.Generator().manual_seed(0)), Grid(num_frames=5, height=64, width=128))
    there, here = ([chunk.frames for chunk in decode(latent, base.vae(), TimeMajor(tile=64), where=torch.device(name))] for name in ("cuda", "cpu"))
    for a, b in zip(there, here, strict=True):
        assert a.device.type == "cuda" and torch.equal(a.cpu(), b)
        for depth in (8, 10):  # the matrix may be rounded another way where it is fused
            assert all((x.int() - y.int()).abs().max() <= 1 for x, y in zip(rgb_to_planes(a[0], depth), rgb_to_planes(b[0], depth)))
