"""The guides of crops that `uhr` and `detail-uhr` are trained on are those that refinement is given there."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.data import latents
from muralist.data.latents import PoolConfig
from muralist.data.sources import World
from muralist.nn.enlarge import EnlargedPixels, enlarged
from muralist.stages.upsample import LATENT_SCALE, LEARNED_SCALE, LatentInterpolation, LearnedUpsampling, PixelInterpolation, upsample
from muralist.tiling import Box
from muralist.types import Grid, LatentVideo
from tests.training import CPU


@pytest.mark.parametrize(("fps", "frames"), [(16, 17), (4, 5)], ids=["of every frame", "of every fourth"])
@pytest.mark.parametrize(
    ("scale", "rest", "factor", "most"),  # random networks enlarge what half precision rounds, here and there tenfold
    [
        (LATENT_SCALE, LatentInterpolation(), 2, 0.01),
        (LEARNED_SCALE, LearnedUpsampling(), 4, 0.2),
        (LEARNED_SCALE, LearnedUpsampling(), 2, 0.2),
        (LEARNED_SCALE, LearnedUpsampling(), 1, 0.01),
    ],
    ids=["enlarged", "by the upsampler", "by the upsampler alone", "as large"],
)
def test_a_guide_of_training_is_the_guide_of_refinement(scale, rest, factor, most, fps, frames, tiny22):
    """A crop that is the whole frame has the guide that the stage makes of the same small video."""
    small, large = Grid(num_frames=frames, height=64, width=96, fps=fps), Grid(num_frames=17, height=64 * factor, width=96 * factor, fps=16)
    base = Base(inspect_base(str(tiny22)), CPU, torch.float32)
    torch.manual_seed(0)
    proxy = latents.encode(base.vae(), torch.rand(1, frames, small.height, small.width, 3))
    config = PoolConfig(name="p", count=1, grid=large, crop=(large.height, large.width), proxy=small, guide_scale=scale)
    upsampler = base.latent_upsampler() if isinstance(rest, LearnedUpsampling) else None
    trained = latents._Guides(base.vae(), config, upsampler)(proxy, (4 * factor, 6 * factor), (0.0, 0.0, 1.0, 1.0)).float()
    refined = upsample(LatentVideo(proxy, small), large, base, PixelInterpolation(latent_scale=scale, rest=rest)).z
    assert refined.shape[2] == 5 and trained.shape == refined.shape
    off = (trained - refined) / refined.std()
    assert off.pow(2).mean().sqrt() < 0.003 and off.abs().max() < most


@pytest.mark.parametrize("large", [(768, 1024), (320, 448)], ids=["over twice its own size", "less"])
@pytest.mark.parametrize("named", [1.0, 1.07], ids=["", "footage that is smaller than the grid"])
@pytest.mark.parametrize("learned", [False, True], ids=["enlarged", "by the upsampler"])
def test_the_guide_of_a_crop_is_that_part_of_the_guide_of_the_whole(large, named, learned, tiny22, monkeypatch):
    vae = Base(inspect_base(str(tiny22)), CPU, torch.float32).vae()
    video = torch.rand(5, 192, 256, 3)

    def detailed(z, linear):  # networks that would show a false place
        return linear + enlarged(z, tuple(linear.shape[-2:]), "bilinear")

    upsampler = SimpleNamespace(linear=lambda z, size: enlarged(z, size, "bicubic"), detailed=detailed) if learned else None

    def pooled(encoder, video):  # an encoder that looks at nothing beside its latents: what is left is where they lie
        return torch.nn.functional.avg_pool2d(video.permute(0, 3, 1, 2), 16).permute(1, 0, 2, 3)[None]

    monkeypatch.setattr(latents, "_encode", pooled)
    monkeypatch.setattr(latents, "_decode", lambda decoder, z: video)
    target = tuple(side // 16 for side in large)
    encoded = PixelInterpolation(latent_scale=LATENT_SCALE).size((12, 16), target)
    pixels = EnlargedPixels(video, tuple(16 * side for side in encoded), "bicubic", CPU)
    source = pooled(None, pixels(range(5), Box.whole(*(16 * side for side in encoded))))
    whole = enlarged(source, target, "bicubic") + (enlarged(source, target, "bilinear") if learned and encoded != target else 0)

    side = 192
    top, left = large[0] - side - 32, large[1] - side - 32  # far enough from the first row and column for a false start to show
    place = (top / large[0], left / large[1], side / large[0], side / large[1])
    grid = Grid(num_frames=5, height=round(large[0] * named), width=round(large[1] * named))
    config = PoolConfig(name="p", count=1, grid=grid, crop=(side, side), proxy=grid, guide_scale=LATENT_SCALE)
    proxy = pooled(None, video)
    guide = latents._Guides(vae, config, upsampler)(proxy, (side // 16, side // 16), place).float()
    part = whole[..., top // 16 : (top + side) // 16, left // 16 : (left + side) // 16]
    assert guide.shape == part.shape and (guide - part).abs().max() < 0.03 * part.std() + 2e-3
    assert (guide - part.roll(1, dims=-1)).abs().max() > 0.1 * part.std()


def test_the_guide_of_a_crop_is_encoded_with_what_lies_around_it():
    """With trained weights: random ones let what is far away through."""
    vae = Base(inspect_base("miniature"), CPU, torch.float32).vae()
    video, grid = torch.rand(5, 192, 256, 3), Grid(num_frames=5, height=768, width=1024)
    proxy = latents.encode(vae, video[None])

    def guide(crop, place):
        config = PoolConfig(name="p", count=1, grid=grid, crop=crop, proxy=grid, guide_scale=LATENT_SCALE)
        return latents._Guides(vae, config)(proxy, tuple(side // 16 for side in crop), place).float()

    whole = guide((768, 1024), (0.0, 0.0, 1.0, 1.0))
    part = guide((192, 256), (288 / 768, 384 / 1024, 0.25, 0.25))
    assert (part - whole[..., 18:30, 24:40]).abs().max() < 0.02 * whole.std()


@pytest.mark.parametrize("factor", [2, 4], ids=["from the proxy's latent", "from pixels"])
def test_the_upsamplers_guide_of_a_crop_is_that_part_of_the_stages(factor):
    """With trained weights. Their networks add little to the linear part: where networks look is shown above, by one that adds much."""
    base = Base(inspect_base("miniature"), CPU, torch.float32)
    small, large = (Grid(num_frames=5, height=128 * times, width=224 * times, fps=16) for times in (1, factor))
    proxy = latents.encode(base.vae(), World().draw(np.random.default_rng(3), PoolConfig(name="p", count=1, grid=small)).pixels()[None])
    whole = upsample(LatentVideo(proxy, small), large, base, PixelInterpolation(latent_scale=LEARNED_SCALE, rest=LearnedUpsampling())).z
    config = PoolConfig(name="p", count=1, grid=large, crop=(64, 96), proxy=small, guide_scale=LEARNED_SCALE, guide_rest="learned")
    top, left = 32 * factor, 96 * factor - 32
    place = (top / large.height, left / large.width, 64 / large.height, 96 / large.width)
    guide = latents._Guides(base.vae(), config, base.latent_upsampler())(proxy, (4, 6), place).float()
    part = whole[..., top // 16 : top // 16 + 4, left // 16 : left // 16 + 6]
    assert (guide - part).pow(2).mean().sqrt() < 0.005 * whole.std()
    assert (guide - part.roll(1, dims=-1)).pow(2).mean().sqrt() > 0.1 * part.std()


def test_a_cache_says_which_upsampler_made_it(tiny22):
    base = Base(inspect_base(str(tiny22)), CPU, torch.float32)
    config = PoolConfig(name="p", count=1, grid=Grid(num_frames=5, height=64, width=96), guide_scale=LEARNED_SCALE, guide_rest="learned")
    first = latents.stamp(base.vae(), config, World(), base.latent_upsampler())
    with torch.no_grad():
        next(base.latent_upsampler().parameters()).add_(1)
    assert latents.stamp(base.vae(), config, World(), base.latent_upsampler()) != first
    with pytest.raises(ValueError, match="no upsampler"):
        latents.build_pool(base.vae(), config, None)
