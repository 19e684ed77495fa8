"""proxy -> guide: the proxy's latent on the target's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from einops import rearrange

from muralist.errors import UserError
from muralist.types import Geometry, Grid, LatentVideo

if TYPE_CHECKING:
    from muralist.base import Base

Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentInterpolation:
    """Interpolate every latent frame by itself; time is not changed."""

    mode: Literal["bilinear", "bicubic"] = "bicubic"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedUpsampling:
    """The base's latent upsampler, in overlapping pieces of at most `tile` source positions (latent frames, rows, columns)."""

    tile: tuple[int, int, int] = (13, 96, 160)
    overlap: tuple[int, int, int] = (4, 16, 16)

    def __post_init__(self):
        if min(self.tile) < 1 or min(self.overlap) < 0:
            raise UserError(f"tile {self.tile}, overlap {self.overlap}", where="upsample", fix="use tiles of at least 1 and overlaps of at least 0")


Upsampling = LatentInterpolation | LearnedUpsampling


def upsample(proxy: LatentVideo, to: Grid, base: Base, method: Upsampling, on_piece: Progress = lambda done, total: None) -> LatentVideo:
    """[1, C, F, h, w] -> [1, C, F, H', W'] of the legal grid `to`; samples stand at pixel centres."""
    _, frames, height, width = base.info.geometry.latent_shape(to)
    assert proxy.z.shape[2] == frames, f"{proxy.z.shape[2]} latent frames for a grid of {frames}"
    match method:
        case LatentInterpolation():
            images = F.interpolate(rearrange(proxy.z, "1 c f h w -> f c h w"), size=(height, width), mode=method.mode, align_corners=False)
            return LatentVideo(rearrange(images, "f c h w -> 1 c f h w"), to)
        case LearnedUpsampling():
            from muralist.nn.latent_upsampler.tiles import upsample_in_tiles

            return LatentVideo(upsample_in_tiles(base.latent_upsampler(), proxy.z.float(), (height, width), method.tile, method.overlap, on_piece), to)


def pieces(method: Upsampling, proxy: Grid, geometry: Geometry) -> int:
    """Units of work of the stage."""
    if isinstance(method, LatentInterpolation):
        return 1
    from muralist.nn.latent_upsampler.tiles import pieces as cut

    frames, rows, columns = cut(geometry.latent_shape(proxy)[1:], method.tile, method.overlap)
    return len(frames) * len(rows) * len(columns)
