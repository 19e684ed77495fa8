"""proxy -> guide: the proxy's latent on the target's grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from muralist.errors import UserError
from muralist.nn.enlarge import EnlargedPixels, between, enlarged
from muralist.nn.kinds import LARGEST
from muralist.nn.out_of_memory import in_less
from muralist.stages.decode_options import DecodeOptions
from muralist.tiling import latent_boxes
from muralist.types import Geometry, Grid, LatentVideo

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from muralist.base import Base

log = logging.getLogger("muralist")
Progress = Callable[[int, int], object]
PROXY_DECODE = DecodeOptions(order="tile", tile=256, memory_bytes=1 << 40)  # a proxy is small: in tiles, one after another, it takes little at any level
NARROWEST = 64  # pixels: the smallest tile that is encoded
LATENT_SCALE = 2.0  # of the guide that `cascade` makes and its adapter is trained on: encoding then costs a quarter, and outlines stay as smooth
LEARNED_SCALE = 3.0  # the largest that the upsampler of LUVE is trained for; farther, pixels lead to where it begins


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
        if not 1 <= min(self.tile) <= max(self.tile) <= LARGEST or not 0 <= min(self.overlap) <= max(self.overlap) <= LARGEST:
            fix = f"use tiles of at least 1 and overlaps of at least 0, both at most {LARGEST}"
            raise UserError(f"tile {self.tile}, overlap {self.overlap}", where="upsample", fix=fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelInterpolation:
    """Decode, interpolate pixels, encode again, exactly, in tiles of at most `tile` pixels.

    A latent says how things move in its own pixels, so one that is enlarged by itself tells of slower things and bent edges; one made of enlarged
    pixels does not (LUVE, Table 5). A proxy of fewer frames is brought to the target's rate as pixels too: its frames are closer than its latents.
    `latent_scale`: pixels are enlarged to the target's size over this, and their latent by `rest` to the target; 1 encodes as many pixels as the result
    has. A proxy that is as large already, and has the target's rate, is not decoded where `rest` is learned: the base's upsampler starts from latents.
    """

    mode: Literal["bilinear", "bicubic"] = "bicubic"
    tile: int = 768
    latent_scale: float = 1.0
    rest: LatentInterpolation | LearnedUpsampling = LatentInterpolation()

    def __post_init__(self):
        if not NARROWEST <= self.tile <= LARGEST or self.tile % NARROWEST:
            raise UserError(f"tile {self.tile}", where="upsample", fix=f"use a multiple of {NARROWEST} pixels, such as 768")
        if not 1 <= self.latent_scale <= 64:
            raise UserError(f"latent_scale {self.latent_scale}", where="upsample", fix="use a number from 1, all by pixels, such as 2")

    def size(self, proxy: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
        """Latent rows and columns that are encoded, for those of a proxy and of the target."""
        return tuple(between(small, large, self.latent_scale) for small, large in zip(proxy, target))

    def decodes(self, proxy: Grid, target: Grid, geometry: Geometry) -> bool:
        """Whether it goes through pixels at all."""
        small, large = (geometry.latent_shape(grid)[2:] for grid in (proxy, target))
        return self.size(small, large) != small or proxy.fps != target.fps or not isinstance(self.rest, LearnedUpsampling)


Upsampling = LatentInterpolation | LearnedUpsampling | PixelInterpolation


def upsample(
    proxy: LatentVideo, to: Grid, base: Base, method: Upsampling, on_piece: Progress = lambda done, total: None, *, scratch: Path | None = None
) -> LatentVideo:
    """[1, C, F, h, w] -> [1, C, F', H', W'] of the legal grid `to`; samples stand at pixel centres, latent frames at their times.

    `scratch`: a folder for what a killed process has decoded; without one, a temporary folder serves until the call ends.
    """
    _, frames, *size = base.info.geometry.latent_shape(to)
    match method:
        case PixelInterpolation():
            return LatentVideo(_by_pixels(proxy, to, tuple(size), base, method, on_piece, scratch), to)
        case _:
            return LatentVideo(_by_latents(_in_time(proxy, frames, to.fps), tuple(size), base, method, on_piece), to)


def _by_pixels(
    proxy: LatentVideo, to: Grid, size: tuple[int, int], base: Base, method: PixelInterpolation, on_piece: Progress, scratch: Path | None
) -> torch.Tensor:
    if not method.decodes(proxy.grid, to, base.info.geometry):
        return _by_latents(proxy.z, size, base, method.rest, on_piece)
    encoded = method.size(proxy.z.shape[-2:], size)
    tiles = len(latent_boxes(*encoded, method.tile, base.info.geometry.spatial_factor))
    more = pieces(method, proxy.grid, to, base.info.geometry) - tiles

    def on_tile(done: int, total: int) -> None:
        nonlocal tiles
        tiles = total  # there are more of them after memory has run out
        on_piece(done, tiles + more)

    z = _through_pixels(base.vae(), proxy, to, encoded, method, on_tile, scratch)
    return z if encoded == size else _by_latents(z, size, base, method.rest, lambda done, _: on_piece(tiles + done, tiles + more))


def _by_latents(z: torch.Tensor, size: tuple[int, int], base: Base, method: LatentInterpolation | LearnedUpsampling, on_piece: Progress) -> torch.Tensor:
    """A latent [1, C, F, h, w] of `size` [H, W], its rate as it is."""
    match method:
        case LatentInterpolation():
            made = enlarged(z, size, method.mode)
            on_piece(1, 1)
            return made
        case LearnedUpsampling() if tuple(z.shape[-2:]) == size:  # its networks would change what is there already
            on_piece(1, 1)
            return z.float()
        case LearnedUpsampling():
            from muralist.nn.latent_upsampler.tiles import upsample_in_tiles

            return upsample_in_tiles(base.latent_upsampler(), z.float(), size, method.tile, method.overlap, on_piece)


def _in_time(proxy: LatentVideo, frames: int, fps: float) -> torch.Tensor:
    """The proxy at another rate: linear between its latent frames, frame f of the target at f * (the proxy's rate) / (the target's)."""
    if proxy.grid.fps == fps:
        assert proxy.z.shape[2] == frames, f"{proxy.z.shape[2]} latent frames for a grid of {frames}"
        return proxy.z
    place = torch.arange(frames, device=proxy.z.device) * (proxy.grid.fps / fps)
    before = place.floor().long().clamp(max=proxy.z.shape[2] - 1)
    after = (before + 1).clamp(max=proxy.z.shape[2] - 1)
    return torch.lerp(proxy.z[:, :, before], proxy.z[:, :, after], (place - before).to(proxy.z.dtype)[:, None, None])


def _through_pixels(
    vae: AutoencoderKLWan, proxy: LatentVideo, to: Grid, size: tuple[int, int], method: PixelInterpolation, on_piece: Progress, scratch: Path | None
) -> torch.Tensor:
    """[1, C, F, h, w] -> [1, C, F', H, W] of `size` and the rate and frames of `to`; the decoded proxy is held, the enlarged one never."""
    pixels = tuple(side * vae.config.scale_factor_spatial for side in size)
    video = EnlargedPixels(_decoded(vae, proxy, scratch), pixels, method.mode, vae.device, rate=proxy.grid.fps / to.fps)
    return _encoded_in_less(vae, video, to.num_frames, pixels, method.tile, on_piece)


def _decoded(vae: AutoencoderKLWan, proxy: LatentVideo, scratch: Path | None) -> torch.Tensor:
    """[T, h, w, 3] in half precision, which is finer than a file's ten bits."""
    from muralist.stages.decode import plan_decode
    from muralist.stages.decode_in_less import decode_in_less

    grid = proxy.grid
    video = torch.empty(grid.num_frames, grid.height, grid.width, 3, dtype=torch.half)
    for chunk in decode_in_less(proxy, vae, plan_decode(vae.config, grid, PROXY_DECODE, dtype=vae.dtype), scratch=scratch):
        video[chunk.start : chunk.start + len(chunk.frames)] = chunk.frames
    return video


def _encoded_in_less(vae: AutoencoderKLWan, video: EnlargedPixels, frames: int, size: tuple[int, int], tile: int, on_piece: Progress) -> torch.Tensor:
    """The latents of `frames` of `video`, of `size` [H, W] pixels; again in tiles of half the size whenever memory runs out: tiles are exact.

    Raises:
        UserError: there is too little memory for the smallest tiles.
    """
    from muralist.nn.encoder import StreamingEncoder

    def encode(tile: int) -> torch.Tensor:
        return StreamingEncoder(vae).encode(video, frames, size, tile, on_piece)

    return in_less(encode, tile, lambda tile: _smaller(min(tile, max(size))))


def _smaller(tile: int) -> int:
    if tile <= NARROWEST:
        fix = "use --memory low, a smaller --size, or end what else uses the device"
        raise UserError(f"too little for tiles of {tile} pixels", where="memory, upsample", fix=fix)
    smaller = max(tile // 2, NARROWEST)
    log.warning("muralist: note: memory ran out in encoding; again in tiles of %d pixels", smaller)
    return smaller


def pieces(method: Upsampling, proxy: Grid, target: Grid, geometry: Geometry) -> int:
    """Units of work of the stage."""
    small, large = geometry.latent_shape(proxy)[1:], geometry.latent_shape(target)[1:]
    match method:
        case PixelInterpolation() if not method.decodes(proxy, target, geometry):
            return _latent_pieces(method.rest, small, large)
        case PixelInterpolation():
            encoded = method.size(small[1:], large[1:])
            more = _latent_pieces(method.rest, (large[0], *encoded), large) if encoded != large[1:] else 0
            return len(latent_boxes(*encoded, method.tile, geometry.spatial_factor)) + more
        case _:
            return _latent_pieces(method, small, large)


def _latent_pieces(method: LatentInterpolation | LearnedUpsampling, shape: tuple[int, int, int], target: tuple[int, int, int]) -> int:
    """From a latent video of `shape` (F, h, w) to one of `target` (F, H, W)."""
    match method:
        case LatentInterpolation():
            return 1
        case LearnedUpsampling() if shape[1:] == target[1:]:
            return 1
        case LearnedUpsampling():
            from muralist.nn.latent_upsampler.tiles import pieces as cut

            return math.prod(len(spans) for spans in cut(shape, target, method.tile, method.overlap))


def upsampler_in(method: Upsampling | None) -> LearnedUpsampling | None:
    """The base's upsampler, where it serves: for all of the way, or for the rest of it, if there is any."""
    learned = method.rest if isinstance(method, PixelInterpolation) and method.latent_scale > 1 else method
    return learned if isinstance(learned, LearnedUpsampling) else None
