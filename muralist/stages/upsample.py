"""proxy -> guide: the proxy's latent on the target's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from muralist.errors import UserError
from muralist.types import Geometry, Grid, LatentVideo

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelInterpolation:
    """Decode, interpolate pixels, encode again, in tiles of `tile` pixels (of patches, where the VAE has them), blended over a quarter of their side.

    What the others save: it costs as much as decoding the result, and keeps what the VAE keeps.
    """

    mode: Literal["bilinear", "bicubic"] = "bicubic"
    tile: int = 512

    def __post_init__(self):
        if self.tile < 64 or self.tile % 64:
            raise UserError(f"tile {self.tile}", where="upsample", fix="use a multiple of 64 pixels, such as 512")


Upsampling = LatentInterpolation | LearnedUpsampling | PixelInterpolation


def upsample(proxy: LatentVideo, to: Grid, base: Base, method: Upsampling, on_piece: Progress = lambda done, total: None) -> LatentVideo:
    """[1, C, F, h, w] -> [1, C, F', H', W'] of the legal grid `to`; samples stand at pixel centres, latent frames at their times."""
    _, frames, height, width = base.info.geometry.latent_shape(to)
    proxy = _in_time(proxy, frames, to.fps)
    match method:
        case LatentInterpolation():
            images = F.interpolate(rearrange(proxy.z, "1 c f h w -> f c h w"), size=(height, width), mode=method.mode, align_corners=False)
            return LatentVideo(rearrange(images, "f c h w -> 1 c f h w"), to)
        case LearnedUpsampling():
            from muralist.nn.latent_upsampler.tiles import upsample_in_tiles

            return LatentVideo(upsample_in_tiles(base.latent_upsampler(), proxy.z.float(), (height, width), method.tile, method.overlap, on_piece), to)
        case PixelInterpolation():
            return LatentVideo(_through_pixels(base.vae(), proxy, to, method), to)


def _in_time(proxy: LatentVideo, frames: int, fps: float) -> LatentVideo:
    """The proxy at another rate: linear between its latent frames, frame f of the target at f * (the proxy's rate) / (the target's)."""
    if proxy.grid.fps == fps:
        assert proxy.z.shape[2] == frames, f"{proxy.z.shape[2]} latent frames for a grid of {frames}"
        return proxy
    place = torch.arange(frames, device=proxy.z.device) * (proxy.grid.fps / fps)
    before = place.floor().long().clamp(max=proxy.z.shape[2] - 1)
    after = (before + 1).clamp(max=proxy.z.shape[2] - 1)
    z = torch.lerp(proxy.z[:, :, before], proxy.z[:, :, after], (place - before).to(proxy.z.dtype)[:, None, None])
    return LatentVideo(z, replace(proxy.grid, num_frames=(frames - 1) * ((proxy.grid.num_frames - 1) // max(proxy.z.shape[2] - 1, 1)) + 1, fps=fps))


def _through_pixels(vae: AutoencoderKLWan, proxy: LatentVideo, to: Grid, method: PixelInterpolation) -> torch.Tensor:
    from muralist.data.latents import encode
    from muralist.stages.decode import plan_decode
    from muralist.stages.decode_in_less import decode_in_less

    def enlarged(frames: torch.Tensor) -> torch.Tensor:
        images = F.interpolate(rearrange(frames, "t h w c -> t c h w"), size=(to.height, to.width), mode=method.mode, align_corners=False)
        return rearrange(images.clamp(0, 1).to(vae.dtype), "t c h w -> 1 t h w c")

    chunks = decode_in_less(proxy, vae, plan_decode(vae.config, proxy.grid, dtype=vae.dtype))
    video = torch.cat([enlarged(chunk.frames) for chunk in chunks], dim=1).to(vae.device)
    side, stride = method.tile, method.tile * 3 // 4
    vae.enable_tiling(tile_sample_min_height=side, tile_sample_min_width=side, tile_sample_stride_height=stride, tile_sample_stride_width=stride)
    try:
        return encode(vae, video)
    finally:
        vae.disable_tiling()


def pieces(method: Upsampling, proxy: Grid, geometry: Geometry) -> int:
    """Units of work of the stage."""
    if not isinstance(method, LearnedUpsampling):
        return 1
    from muralist.nn.latent_upsampler.tiles import pieces as cut

    frames, rows, columns = cut(geometry.latent_shape(proxy)[1:], method.tile, method.overlap)
    return len(frames) * len(rows) * len(columns)
