"""The world: captions and scenes are the same thing, and a scene is the same at every size, crop and order."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from muralist.data import shapes, world
from muralist.data.latents import PoolConfig
from muralist.data.sources import World
from muralist.data.world import (
    CAMERAS,
    COLOURS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    Crop,
    Scene,
    all_scenes,
    caption,
    combination,
    is_held_out,
    layout,
    near_object,
    object_on,
    parse,
    render,
    render_clip,
    sample_scene,
)
from muralist.errors import UserError
from muralist.types import Grid

SMALL = Grid(num_frames=29, height=256, width=448)
LARGE = Grid(num_frames=29, height=2160, width=3840)

scenes = st.builds(
    Scene,
    colour=st.sampled_from(list(COLOURS)),
    shape=st.sampled_from(SHAPES),
    motion=st.sampled_from(list(MOTIONS)),
    ground=st.sampled_from(list(GROUNDS)),
    camera=st.sampled_from([None, *CAMERAS]),
    seed=st.integers(0, 2**31 - 1),
)


@given(scenes)
def test_parse_inverts_caption(scene):
    assert parse(caption(scene), seed=scene.seed) == scene


@pytest.mark.parametrize("text", ["", "a red ball", "red ball falls over sand", "a red ball falls over mud", "a red ball falls over sand, camera spins"])
def test_parse_refuses_what_it_does_not_know(text):
    with pytest.raises(UserError):
        parse(text)


@given(scenes)
def test_held_out_rule(scene):
    c, s = list(COLOURS).index(scene.colour), SHAPES.index(scene.shape)
    g, m = list(GROUNDS).index(scene.ground), list(MOTIONS).index(scene.motion)
    assert is_held_out(scene) == ((((c * 5 + s) * 6 + g) * 5 + m) % 7 == 3)


def test_all_scenes_are_split_in_two():
    train, held = ([combination(s) for s in all_scenes(held_out=flag)] for flag in (False, True))
    assert sorted(train + held) == list(range(8 * 5 * 6 * 5))
    assert all(index % 7 == 3 for index in held)


def test_sample_scene_keeps_to_its_side():
    rng = np.random.default_rng(0)
    assert not any(is_held_out(sample_scene(rng)) for _ in range(200))
    assert all(is_held_out(sample_scene(rng, held_out=True)) for _ in range(50))


def test_deterministic_by_seed():
    scene = parse("a cyan star moves left over rock, camera zooms in", seed=5)
    first, again = (next(render(scene, SMALL)) for _ in range(2))
    other = next(render(parse(caption(scene), seed=6), SMALL))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.01


def test_frames_do_not_depend_on_order():
    scene = parse("a green cube rises over water, camera pans left", seed=1)
    forward = render_clip(scene, SMALL, frames=range(0, 29, 14))
    backward = render_clip(scene, SMALL, frames=range(28, -1, -14))
    assert torch.equal(forward, backward.flip(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_is_a_slice_of_the_frame(shape):
    scene = Scene(colour="orange", shape=shape, motion="stays still", ground="grass", camera="zooms in", seed=3)
    x, y = layout(scene).start
    # a crop whose corner is near the object's middle, so that it cuts the object
    crop = Crop(min(max(int((y + 0.5) * 256), 8), 180), min(max(int((x / 1.75 + 0.5) * 448), 8), 380), 60, 50)
    whole = render_clip(scene, SMALL, frames=range(0, 29, 14))[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    part = render_clip(scene, SMALL, crop=crop, frames=range(0, 29, 14))
    assert (whole - part).abs().max() < 1e-4


def test_crop_outside_the_frame_is_refused():
    scene = parse("a red ball falls over sand")
    with pytest.raises(UserError):
        next(render(scene, SMALL, crop=Crop(200, 0, 57, 10)))


@settings(deadline=None, max_examples=200)
@given(scenes, st.floats(0, 1))
def test_object_stays_within_the_frame(scene, moment):
    place = layout(scene)
    pan, zoom = CAMERAS.get(scene.camera, (0, 0))
    scale = world.ZOOM ** (zoom * moment)
    x, y = ((a + (b - a) * moment) for a, b in zip(place.start, place.end))
    x = x - pan * world.PAN * (moment - 0.5)
    assert abs(x) * scale + shapes.REACH * place.radius * scale <= world.ASPECT / 2 + 1e-6
    assert abs(y) * scale + shapes.REACH * place.radius * scale <= 0.5 + 1e-6


@given(scenes)
def test_motion_is_relative_to_the_ground(scene):
    place = layout(scene)
    travel = np.subtract(place.end, place.start)
    assert np.allclose(np.sign(np.round(travel, 6)), MOTIONS[scene.motion])
    if scene.motion != "stays still":
        assert np.abs(travel).max() > 0.2


@pytest.fixture(scope="module")
def pair():
    """The same moment at 4K and at 448x256; one 4K frame takes seconds."""
    scene = parse("a purple star moves right over grass", seed=11)
    return [next(render(scene, grid, frames=range(14, 15))) for grid in (LARGE, SMALL)]


@pytest.mark.slow
def test_4k_render_averages_to_the_small_one(pair):
    large, small = pair
    averaged = F.interpolate(large.movedim(-1, 0)[None], (256, 448), mode="area")[0].movedim(0, -1)
    psnr = -10 * math.log10(float((averaged - small).square().mean()))
    assert psnr >= 35


@pytest.mark.slow
def test_4k_render_has_detail_up_to_nyquist(pair):
    """Power per octave of frequency falls steadily: an upscaled picture would drop by orders of magnitude."""
    grey = pair[0].mean(-1)[:2048, :2048]
    window = torch.hann_window(2048)
    power = torch.fft.fft2((grey - grey.mean()) * window[:, None] * window).abs().square()
    frequency = torch.fft.fftfreq(2048)
    radius = torch.hypot(frequency[:, None], frequency)
    edges = [0.5 / 2**k for k in range(7, -1, -1)]
    bands = [float(power[(radius >= low) & (radius < high)].mean()) for low, high in itertools.pairwise(edges)]
    falls = [above / below for below, above in itertools.pairwise(bands)]
    # white noise on a lattice at gain .78 per octave falls by .78^2 / 4 = .15 per octave of density
    assert min(falls) > 0.03


@pytest.mark.parametrize("camera", [None, "pans left", "zooms in"])
def test_near_object_holds_every_pixel_that_the_object_changes(camera):
    scene = Scene(colour="red", shape="star", motion="moves right", ground="snow", camera=camera, seed=5)
    bare = replace(scene, colour="cyan")  # differs in the object alone
    grid, crop = Grid(num_frames=9, height=256, width=448), Crop(0, 64, 256, 320)
    near = near_object(scene, grid, cell=16, crop=crop, frames=range(2, 7))
    assert near.shape == (5, 16, 20) and 0.02 < near.float().mean() < 0.4
    for cells, one, other in zip(near, render(scene, grid, crop=crop, frames=range(2, 7)), render(bare, grid, crop=crop, frames=range(2, 7))):
        changed = (one != other).any(dim=-1).unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).any(dim=3).any(dim=1)
        assert not (changed & ~cells).any()
        assert changed.any()


@pytest.mark.parametrize("camera", ["pans left", "zooms in"])
def test_object_on_is_where_the_object_is_painted(camera):
    scene = Scene(colour="red", shape="ball", motion="moves right", ground="snow", camera=camera, seed=5)
    grid = Grid(num_frames=9, height=256, width=448)
    for frame in (0, 8):
        one, other = (next(iter(render(s, grid, frames=range(frame, frame + 1)))) for s in (scene, replace(scene, colour="cyan")))
        rows, columns = (one != other).any(dim=-1).nonzero().float().unbind(1)
        x, y, reach = object_on(scene, grid, frame)
        assert abs(columns.mean() - x) < 1 and abs(rows.mean() - y) < 1
        assert reach / 1.3 < (columns.max() - columns.min()) / 2 <= reach


def test_aimed_crops_lie_on_the_object_and_inside_the_picture():
    large = Grid(num_frames=5, height=2176, width=3808)
    config = PoolConfig(name="aimed", count=1, grid=large, frames=5, crop=(256, 448), aimed=1.0)
    for seed in range(8):
        drawn = World().draw(np.random.default_rng(seed), config)
        crop = drawn.crop
        assert crop.top % 32 == crop.left % 32 == 0 and 0 <= crop.top <= 2176 - 256 and 0 <= crop.left <= 3808 - 448
        assert drawn.near_object(16, 4).any()
