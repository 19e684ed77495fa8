"""text -> proxy: the small latent video that fixes layout and motion, denoised at the base's own size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from muralist.base import Base
from muralist.errors import UserError
from muralist.nn.block_cache import FirstBlockCache
from muralist.nn.kernels import PLAIN, Kernels
from muralist.nn.kinds import LARGEST, require_whole
from muralist.sampling import flow
from muralist.types import Geometry, Grid, LatentVideo, TextCond
from muralist.velocity import velocity_field


@dataclass(frozen=True, slots=True, kw_only=True)
class LowResolutionProxy:
    """Pixel height and width of the proxy, how it is sampled, and the base's adapter that paints it, if one does; it has the target's frames.

    `guidance_interval`: noise levels (low, high) between which guidance works, `guidance_mean_interval`: also on channels' means (`flow.guided`).
    `token_chunk`: tokens computed at a time, None: all.
    `cache`: a threshold for `nn/block_cache.py`, None: every step is computed in full.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    adapter: str | None = None
    guidance_interval: flow.Interval = flow.WHOLE
    guidance_mean_interval: flow.Interval = flow.WHOLE
    token_chunk: int | None = None
    cache: float | None = None

    def __post_init__(self):
        flow.sigmas(self.num_inference_steps, self.flow_shift)
        check_guidance(self.guidance_scale, self.guidance_interval, self.guidance_mean_interval)
        check_chunk(self.token_chunk)
        check_cache(self.cache)
        if not (16 <= self.height <= 16384 and 16 <= self.width <= 16384):
            raise UserError(f"{self.width}x{self.height}", where="proxy", fix="use 16 to 16384 pixels, such as 448x256")

    @property
    def time_scale(self) -> float:
        """Latent frames of the target from one of the proxy to the next."""
        return 1.0

    def settled(self, target: Grid) -> LowResolutionProxy:
        """The proxy of a target of this length."""
        return self

    def grid(self, target: Grid, geometry: Geometry) -> Grid:
        """The proxy's own legal grid for a target."""
        return geometry.legal(self._sized(target))

    def _sized(self, target: Grid) -> Grid:
        """Its own area, the target's shape: a portrait target gets a portrait proxy of the same number of pixels."""
        area, shape = self.height * self.width, target.width / target.height
        if abs(shape / (self.width / self.height) - 1) < 0.05:
            return target.resized(height=self.height, width=self.width)
        return target.resized(height=max(round((area / shape) ** 0.5), 1), width=max(round((area * shape) ** 0.5), 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowFrameRateProxy(LowResolutionProxy):
    """A proxy that also has fewer frames: one latent frame where the target has `every`, at its place on the target's time axis.

    A base that makes F latent frames then spans every * (F - 1) + 1 of them. `spanned`: a target of at most so many frames, which the base spans by
    itself, gets a proxy with all of them, without the adapter: in few slow frames a base moves things too little. 0: no target does.
    """

    every: int = 4
    spanned: int = 0

    def __post_init__(self):
        LowResolutionProxy.__post_init__(self)
        if not 1 <= self.every <= 16:
            raise UserError(f"every {self.every} latent frames", where="proxy.every", fix="use 1 to 16, such as 4")
        require_whole("proxy.spanned", self.spanned, 0, LARGEST)

    @property
    def time_scale(self) -> float:
        return float(self.every)

    def settled(self, target: Grid) -> LowResolutionProxy:
        if target.num_frames > self.spanned:
            return self
        shared = {field.name: getattr(self, field.name) for field in fields(LowResolutionProxy)}
        return LowResolutionProxy(**shared | {"adapter": None})

    def grid(self, target: Grid, geometry: Geometry) -> Grid:
        """Its last latent frame stands at the target's last one or after it."""
        factor = geometry.temporal_factor
        latent = -(-((target.num_frames - 1) // factor) // self.every) + 1
        return geometry.legal(replace(self._sized(target), num_frames=(latent - 1) * factor + 1, fps=target.fps / self.every))


def check_guidance(guidance_scale: float, *intervals: flow.Interval) -> None:
    if not 0 <= guidance_scale <= 100:
        raise UserError(f"{guidance_scale}", where="guidance_scale", fix="use 1 (off) to about 10")
    for interval in intervals:
        flow.check_interval(interval)


def check_chunk(token_chunk: int | None) -> None:
    if token_chunk is not None and token_chunk < 1:
        raise UserError(f"{token_chunk} tokens", where="token_chunk", fix="give at least 1, or null for all at once")


def check_cache(threshold: float | None) -> None:
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"a threshold of {threshold}", where="cache", fix="use a number between 0 and 1, such as 0.1, or null for no cache")


def make_proxy(
    base: Base,
    text: TextCond,
    proxy: LowResolutionProxy,
    target: Grid,
    *,
    seed: int,
    saved: tuple[int, torch.Tensor] | None,
    after_step: Callable[[int, torch.Tensor], None],
    kernels: Kernels = PLAIN,
    cache: FirstBlockCache | None = None,
) -> LatentVideo:
    """Denoise pure noise [1, C, F, h, w] on the proxy's grid; `saved` is (steps done, latent) of an interrupted run."""
    from muralist.nn.rope import RopeScale
    from muralist.nn.transformer import Graft

    grid = proxy.grid(target, base.info.geometry)
    levels = flow.sigmas(proxy.num_inference_steps, proxy.flow_shift)
    start, z = saved or (0, flow.keyed_noise((1, *base.info.geometry.latent_shape(grid)), seed=seed, stage="proxy"))
    graft = Graft(rope=RopeScale(t=proxy.time_scale), token_chunk=proxy.token_chunk, kernels=kernels)
    velocity = velocity_field(base, text, **flow.guidance_of(proxy), graft=graft, adapter=proxy.adapter, cache=cache)
    z = flow.denoise(velocity, z.to(base.device), levels, start=start, after_step=after_step)
    return LatentVideo(z, grid)
