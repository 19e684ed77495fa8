"""Effective resolution tells true 4K renders of the world from enlarged ones, and says the height that was enlarged."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from muralist.data import world
from muralist.eval.metrics.resolution import EffectiveResolution
from muralist.eval.registry import Unavailable
from muralist.eval.source import open_source
from muralist.stages.encode import encode
from muralist.types import FrameChunk, Grid

HEIGHTS = (720, 1080, 1440, 2160)
KERNELS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def frame(scene: world.Scene, height: int, kernel: str, size: int = 2160) -> torch.Tensor:
    """The middle frame of a render of `height` rows at 16:9, enlarged by Pillow to `size` rows."""
    render = world.render(scene, Grid(num_frames=29, height=height, width=height * 16 // 9), frames=range(14, 15))
    picture = next(iter(render))
    if height == size:
        return picture
    channels = [Image.fromarray(c.contiguous().numpy(), mode="F").resize((size * 16 // 9, size), KERNELS[kernel]) for c in picture.unbind(-1)]
    return torch.stack([torch.from_numpy(np.asarray(c).copy()) for c in channels], dim=-1).clamp_(0, 1)


def rows(*frames: torch.Tensor) -> float:
    meter = EffectiveResolution(len(frames))
    for picture in frames:
        meter.add(picture)
    return meter.result()["effective_resolution"]


def nearest(found: float) -> int:
    """The height that is nearest by ratio."""
    return min(HEIGHTS, key=lambda height: abs(np.log(max(found, 1) / height)))


def through_codec(picture: torch.Tensor, folder) -> torch.Tensor:
    """As H.265 at the default quality, and back."""
    grid = Grid(num_frames=1, height=picture.shape[0], width=picture.shape[1])
    return next(open_source(encode(iter([FrameChunk(picture[None], 0)]), grid, folder / "a.mp4")).frames())


def cases(count: int):
    """(scene, height, kernel): one in two true, the others through the six ways to enlarge; the grounds in turn."""
    rng = np.random.default_rng(1)
    ways, grounds = itertools.cycle(itertools.product(HEIGHTS[:-1], KERNELS)), itertools.cycle(world.GROUNDS)
    for number in range(count):
        drawn = world.sample_scene(rng)
        scene = world.Scene(colour=drawn.colour, shape=drawn.shape, motion=drawn.motion, camera=drawn.camera, ground=next(grounds), seed=drawn.seed)
        yield (scene, 2160, "") if number % 2 else (scene, *next(ways))


@pytest.mark.parametrize("scene, height, kernel", list(cases(2)), ids=lambda value: str(value) if isinstance(value, int | str) else value.ground)
def test_a_few(scene, height, kernel, tmp_path):
    assert nearest(rows(through_codec(frame(scene, height, kernel), tmp_path))) == height


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred(tmp_path):
    """At least 98 of 100, after the codec."""
    wrong = []
    for scene, height, kernel in cases(100):
        found = rows(through_codec(frame(scene, height, kernel), tmp_path))
        if nearest(found) != height:
            wrong.append(f"{world.caption(scene)}, {height} {kernel}: {found:.0f}")
    assert len(wrong) <= 2, "\n".join(wrong)


def test_small_videos_and_noise():
    """The same holds for 720 rows, and noise of the codec's size changes nothing."""
    scene = world.parse("a green star moves right over rock", seed=3)
    noise = 0.004 * torch.randn(720, 1280, 3, generator=torch.Generator().manual_seed(0))
    for height, kernel in ((720, ""), (360, "bicubic"), (480, "lanczos")):
        picture = frame(scene, height, kernel, size=720)
        assert abs(np.log(rows(picture) / height)) < 0.15 and abs(np.log(rows(picture + noise) / height)) < 0.2


def test_nothing_to_tell_from():
    with pytest.raises(Unavailable, match="no edge"):
        rows(torch.full((256, 256, 3), 0.5))
    with pytest.raises(Unavailable, match="too short"):
        rows(torch.rand(100, 100, 3))
