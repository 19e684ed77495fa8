"""The judge of the world: right on true renders, robust to soft ones, and silent where there is nothing to see."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage

from muralist.data import world
from muralist.data.score import Observation, Score, compare, measure, score
from muralist.data.score_object import outline
from muralist.data.world import SHAPES, Scene, parse, render_clip, sample_scene
from muralist.errors import UserError
from muralist.types import Grid

SMALL = Grid(num_frames=29, height=256, width=448)
LARGE = Grid(num_frames=29, height=2160, width=3840)
SPAN = range(0, 29, 7)
WORDS = ("colour", "shape", "ground", "motion", "camera")


def clip(scene: Scene, grid: Grid = SMALL, frames: range = SPAN) -> torch.Tensor:
    return render_clip(scene, grid, frames=frames)


def blurred(video: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(video.numpy(), (0, sigma, sigma, 0)))


def test_right_on_true_renders():
    rng = np.random.default_rng(2024)
    scenes = [sample_scene(rng, held_out=i % 3 == 0, camera_share=0.5) for i in range(40)]
    scores = [score(clip(scene), scene) for scene in scenes]
    for word in WORDS:
        assert sum(getattr(s, word) for s in scores) >= 39, word
    assert sum(s.num_objects == 1 for s in scores) >= 39


def test_right_on_soft_noisy_renders():
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    scenes = [sample_scene(rng, camera_share=0.5) for _ in range(10)]
    videos = [blurred(clip(scene), 2.5) for scene in scenes]
    scores = [score(video + 0.03 * torch.randn(video.shape), scene) for video, scene in zip(videos, scenes)]
    for word in WORDS:
        assert sum(getattr(s, word) for s in scores) >= 9, word


@pytest.mark.slow
def test_right_on_a_4k_render():
    scene = parse("a yellow ring moves left over sand, camera zooms in", seed=4)
    assert score(clip(scene, LARGE, range(0, 29, 7)), scene).right


def test_independent_of_the_number_of_frames():
    scene = parse("a blue triangle falls over rock, camera pans right", seed=9)
    assert all(score(clip(scene, frames=frames), scene).right for frames in (range(29), range(0, 29, 2), range(0, 29, 7)))


@pytest.mark.parametrize("colour, ground", [("white", "snow"), ("orange", "lava"), ("green", "grass"), ("cyan", "water"), ("yellow", "sand")])
def test_objects_of_the_grounds_own_colour(colour, ground):
    scene = Scene(colour=colour, shape="cube", motion="moves right", ground=ground, seed=8)
    assert score(clip(scene), scene).right


def test_a_wrong_caption_is_wrong_only_where_it_is():
    scene = parse("a red ball moves right over grass", seed=2)
    seen = measure(clip(scene))
    wrong = {"colour": "blue", "shape": "star", "ground": "sand", "motion": "falls", "camera": "pans left"}
    for word, value in wrong.items():
        judged = compare(seen, dataclasses.replace(scene, **{word: value}))
        assert {w: getattr(judged, w) for w in WORDS} == {w: w != word for w in WORDS}
        assert not judged.right


@pytest.fixture
def bare(monkeypatch):
    """Renders scenes without their object."""

    def view(scene: Scene) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(world._Stage, "_draw_object", lambda *args: None)
            return clip(scene)

    return view


@pytest.mark.parametrize("ground", ["grass", "lava", "snow"])
@pytest.mark.parametrize("camera", [None, "pans right", "zooms in"])
def test_bare_ground_shows_no_object(ground, camera, bare):
    seen = measure(bare(Scene(colour="red", shape="ball", motion="falls", ground=ground, camera=camera, seed=21)))
    assert (seen.num_objects, seen.colour, seen.shape, seen.motion) == (0, None, None, None)
    assert (seen.ground, seen.camera) == (ground, camera or "static")


def test_no_picture_no_guess():
    torch.manual_seed(0)
    for video in (torch.rand(9, 256, 448, 3), torch.zeros(9, 256, 448, 3), torch.full((9, 64, 64, 3), float("nan"))):
        seen = measure(video)
        assert (seen.num_objects, seen.colour, seen.shape, seen.motion, seen.ground) == (0, None, None, None, None)


def test_counts_two_objects(bare, monkeypatch):
    scene = Scene(colour="red", shape="ball", motion="stays still", ground="water", seed=1)
    other = dataclasses.replace(scene, colour="yellow", shape="star")
    monkeypatch.setattr(world, "layout", lambda s: world.Layout(0.2, *[(-0.45 if s.colour == "red" else 0.45, 0.05)] * 2))
    first, second, empty = clip(scene), clip(other), bare(scene)
    both = torch.where((first - empty).abs().amax(-1, keepdim=True) > 0.01, first, second)
    assert [measure(video).num_objects for video in (empty, first, second, both)] == [0, 1, 1, 2]
    assert not score(both, scene).right


def test_an_unknown_camera_move_is_none():
    scene = parse("a red ball stays still over rock, camera zooms in", seed=3)
    assert measure(clip(scene).flip(0)).camera is None  # zooms out
    assert measure(clip(parse("a red ball stays still over rock, camera pans left", seed=3)).flip(0)).camera == "pans right"


@pytest.mark.parametrize("ground", ["sand", "snow"])
def test_what_is_painted_beyond_an_outline_is_no_move_of_the_camera(ground):
    """Dark scraps at an object's corners, outside of what any shape of the list covers, fall with it."""
    scene = Scene(colour="cyan", shape="cube", motion="falls", ground=ground, seed=1)
    video = clip(scene)
    for picture, frame in zip(video, SPAN):
        x, y, reach = world.object_on(scene, SMALL, frame)
        for across, down in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            rows, columns = (slice(max(int(at) - 10, 0), max(int(at) + 10, 0)) for at in (y + 0.95 * down * reach, x + 0.95 * across * reach))
            picture[rows, columns] = torch.tensor([0.03, 0.2, 0.22])
    seen = measure(video)
    assert (seen.camera, seen.motion, seen.num_objects) == ("static", "falls", 1)


def test_one_frame_has_no_motion():
    seen = measure(clip(parse("a cyan star falls over sand", seed=1), frames=range(1)))
    assert (seen.colour, seen.shape, seen.ground, seen.motion, seen.camera) == ("cyan", "star", "sand", None, None)


def test_other_shapes_are_refused():
    for bad in (torch.zeros(5, 3, 64, 64), torch.zeros(64, 64, 3), torch.zeros(0, 64, 64, 3)):
        with pytest.raises(UserError):
            measure(bad)


def test_results_are_values():
    assert dataclasses.fields(Score) and dataclasses.fields(Observation)
    with pytest.raises(dataclasses.FrozenInstanceError):
        measure(torch.zeros(5, 64, 112, 3)).colour = "red"


def test_outlines_have_the_symmetry_of_their_words():
    y, x = np.mgrid[-1.2:1.2:97j, -1.2:1.2:97j]
    for shape in SHAPES:
        inside = outline(shape, x, y)
        assert 0.1 < inside.mean() < 0.7
        if shape != "cube":
            assert (inside == inside[:, ::-1]).mean() > 0.99
    assert not outline("ring", np.zeros(1), np.zeros(1)).any()
