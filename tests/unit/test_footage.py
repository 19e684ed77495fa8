"""Footage: a folder of videos with captions and scores."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from muralist.data.latents import PairConfig, PoolConfig
from muralist.data.sharpen import Unsharp
from muralist.data.sources import Footage, read_footage
from muralist.errors import UserError
from muralist.types import Grid
from tests.shell import muralist
from tests.training import SIZE, quiet, write


def test_an_excerpt_is_what_the_file_shows_there(videos):
    footage = Footage(read_footage(videos).clips[:1])
    half = Grid(num_frames=5, height=48, width=80, fps=8)  # every second frame, at half the size
    drawn = footage.draw(np.random.default_rng(3), PoolConfig(name="p", count=1, grid=half, crop=(32, 32), frames=3))
    pixels = drawn.pixels()
    assert pixels.shape == (3, 32, 32, 3) and drawn.caption == "a red ball" and drawn.near_object(16, 4) is None
    red = torch.linspace(0.1, 0.9, 21)[drawn.first : drawn.first + 5 : 2]
    assert (pixels[..., 0].mean(dim=(1, 2)) - red).abs().max() < 0.02
    left = (8 + drawn.crop.left) / 96  # the grid is the middle of the file's wider picture
    assert pixels[0, 0, 0, 2].item() == pytest.approx(left, abs=0.04) and pixels[0, 0, -1, 2].item() == pytest.approx(left + 1 / 3, abs=0.04)


def test_a_pair_is_one_clip_at_two_sizes(videos):
    low, high = read_footage(videos).pair(
        np.random.default_rng(0), PairConfig(name="p", count=1, low=SIZE.resized(height=48, width=80), scale=2.0, side=32, frames=5)
    )
    assert low.shape == (5, 32, 32, 3) and high.shape == (5, 64, 64, 3)
    assert (low - high.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean(dim=(2, 4))).abs().max() < 0.05


def test_footage_is_chosen_by_score(videos):
    told = []
    assert [clip.caption for clip in read_footage(videos, min_score=6.5, report=told.append).clips] == ["a red ball"]
    assert told == ["1 of 2 clips have a score of at least 6.5"]
    assert read_footage(videos).identity != read_footage(videos, min_score=6.5, report=quiet).identity


def test_footage_that_is_too_small_is_not_enlarged(videos):
    slow = PoolConfig(name="p", count=1, grid=Grid(num_frames=3, height=48, width=80, fps=24))
    with pytest.raises(UserError, match="with 3 frames at 24 fps"):
        read_footage(videos).draw(np.random.default_rng(0), slow)
    with pytest.raises(UserError, match="hardly a clip has 3840x2160"):
        read_footage(videos).draw(np.random.default_rng(0), PoolConfig(name="p", count=1, grid=Grid(num_frames=5, height=2160, width=3840, fps=16)))


def test_footage_of_the_height_that_was_asked_for_serves_though_a_grid_is_rounded_up(videos):
    footage = read_footage(videos)
    asked = PoolConfig(name="p", count=1, grid=Grid(num_frames=5, height=100, width=200, fps=16), crop=(64, 96), frames=3)
    drawn = footage.draw(np.random.default_rng(0), asked)
    assert (drawn.grid.height, drawn.grid.width) == (96, 192) and drawn.pixels().shape == (3, 64, 96, 3)
    with pytest.raises(UserError, match="hardly"):
        footage.draw(np.random.default_rng(0), replace(asked, grid=replace(asked.grid, height=120, width=240)))


def test_crops_larger_than_the_picture_are_told(videos, tmp_path):
    answer = muralist("train", "uhr", "--from", "miniature", "--data", videos, "--height", 96, "-o", tmp_path / "run")
    assert answer.code == 2 and ("do not fit" in answer.error or "hardly a clip" in answer.error)


@pytest.mark.parametrize(
    "options, told",
    [
        (("uhr", "--height", 720), "it is about footage"),
        (("proxy", "--data", "DIR", "--height", 720), "whole clips"),
        (("features", "--data", "DIR"), "its own videos"),
    ],
)  # fmt: skip
def test_options_without_a_use_are_refused(options, told, videos, tmp_path):
    options = [str(videos) if option == "DIR" else option for option in options]
    model = () if options[0] == "features" else ("--from", "miniature")
    answer = muralist("train", *options, *model, "-o", tmp_path / "run")
    assert answer.code == 2 and told in answer.error, answer.error


@pytest.mark.parametrize(
    "rows, columns, told",
    [
        ([("a.mp4", "a ball", "high")], ("file", "caption", "score"), "line 2: the score 'high' is no number"),
        ([("a.mp4", "a ball", "nan")], ("file", "caption", "score"), "is no number"),
        ([("a.mp4", "a ball")], ("file", "caption"), "no column 'score'"),
        ([("a.mp4", "", "7")], ("file", "caption", "score"), "line 2: the caption is empty"),
        ([("z.mp4", "a ball", "7")], ("file", "caption", "score"), "no file 'z.mp4'"),
        ([("../a.mp4", "a ball", "7")], ("file", "caption", "score"), "is not a plain name"),
        ([("a.mp4", "a ball", "2")], ("file", "caption", "score"), "no clip of a score of at least 6.5"),
        ([("a.mp4", "a ball", " rolling", "7")], ("file", "caption", "score"), "line 2: more or fewer cells"),
        ([("a.mp4", "a ball")], ("file", "caption", "score"), "line 2: more or fewer cells"),
    ],
)
def test_a_wrong_manifest_is_told_in_one_line(rows, columns, told, videos, tmp_path):
    shutil.copy(videos / "a.mp4", tmp_path)
    write(tmp_path, rows, columns)
    answer = muralist("train", "uhr", "--from", "miniature", "--data", tmp_path, "--min-score", 6.5, "-o", tmp_path / "run")
    assert answer.code == 2 and told in answer.error, answer.error


def test_unsharp_masking_steepens_edges_and_keeps_flat_parts():
    video = torch.full((2, 16, 16, 3), 0.4)
    video[:, :, 8:] = 0.6
    sharp = Unsharp(radius=1.0, amount=0.5)(video)
    assert sharp[0, 0, 7, 0] < 0.38 and sharp[0, 0, 8, 0] > 0.62
    assert (sharp[:, :, [0, 15]] - video[:, :, [0, 15]]).abs().max() < 1e-4
    assert Unsharp(amount=100.0)(video).amin() == 0 and Unsharp(amount=100.0)(video).amax() == 1


# --- scores -------------------------------------------------------------------------------------------------------------------------


def test_scores_fill_the_column_where_there_is_none(videos, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(videos / name, tmp_path)
    write(tmp_path, [("a.mp4", "a red ball", "7"), ("b.mp4", "a blue star", "")])
    answer = muralist("score", tmp_path, "--metric", "temporal_flickering")
    assert answer.code == 0, answer.err
    first, second = read_footage(tmp_path).clips
    assert first.score == 7 and 0 < second.score <= 100 and second.scored_by == "temporal_flickering"
    assert "holds scores of temporal_flickering" in muralist("score", tmp_path, "--metric", "hd_mse").error


def test_a_clip_that_cannot_be_measured_costs_no_other(videos, tmp_path):
    shutil.copy(videos / "a.mp4", tmp_path)
    (tmp_path / "b.mp4").write_bytes((videos / "b.mp4").read_bytes()[:2000])
    write(tmp_path, [("b.mp4", "a blue star"), ("a.mp4", "a red ball")], ("file", "caption"))
    answer = muralist("score", tmp_path, "--metric", "temporal_flickering")
    assert answer.code == 0 and "b.mp4: not measured" in answer.out and "1 clips scored" in answer.out and "1 could not be" in answer.out
    assert [clip.score is None for clip in read_footage(tmp_path).clips] == [True, False]


def test_a_tool_that_is_not_there_is_told_in_one_line(videos, tmp_path, monkeypatch):
    monkeypatch.delenv("MURALIST_EVAL_ENV", raising=False)
    videos = shutil.copytree(videos, tmp_path / "videos")
    write(videos, [("a.mp4", "a red ball", "")])
    answer = muralist("score", videos)
    assert answer.code == 2 and "hpsv3 runs in an environment of its own" in answer.error
    assert "no metric 'beauty'" in muralist("score", videos, "--metric", "beauty").error
