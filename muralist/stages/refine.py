"""guide -> latent: denoising on the target's grid, from pure noise or from a re-noised guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from muralist.base import Base
from muralist.errors import UserError
from muralist.nn.attention import BranchedWindows, CloseRemote, FullAttention, GuidedWindows, Middle, Near
from muralist.nn.attention.close_remote import MOST
from muralist.nn.block_cache import FirstBlockCache
from muralist.nn.kernels import PLAIN, Kernels
from muralist.nn.kinds import require_whole
from muralist.nn.windows import WindowAttention, choose_window, traveled
from muralist.sampling import flow
from muralist.sampling.shortcut import PlainSteps, ShortcutSteps
from muralist.stages.proxy import LowResolutionProxy, check_cache, check_chunk, check_guidance
from muralist.types import Geometry, Grid, LatentVideo, TextCond
from muralist.velocity import NOTHING, ProxyView, Sight, velocity_field

if TYPE_CHECKING:
    from muralist.nn.transformer import Graft


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Local attention: windows of about `tokens` tokens, their sides chosen for the grid, shifted by half a window in every other layer.

    `travel`: they stand elsewhere at every step (`nn/windows.traveled`), else their borders show. `max_frames`: a window spans at most this many latent
    frames (the base's own length in training), None: no limit.
    """

    tokens: int = 512
    shift: bool = True
    travel: bool = True
    max_frames: int | None = None

    def __post_init__(self):
        require_whole("window", self.tokens, 8, MOST)
        if self.max_frames is not None and self.max_frames < 1:
            raise UserError(f"windows of {self.max_frames} frames", where="window", fix="use at least 1, or null for no limit")


MOST_TOKENS = 1024  # of a window in sight of a proxy: with 64 of the proxy about 1,100 keys a query
MOST_FRAMES = 8  # latent ones: 8 x 8 x 16 tokens
PROXY_SHRINK = 2  # training at a base's own size: the proxy of a clip has the clip's sides divided by this


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyWindows(Windows):
    """Windows whose queries also see the proxy around them (`nn/attention/guided.py`).

    `near`: proxy tokens a window sees along time, height and width; `reach`: how far from the window's middle their places may be, in
    tokens; `pool`: blocks of tokens whose means are a level between window and proxy, seen in the same number, None: no such level.
    `proxy_noise`: the proxy is seen clean at every step, which costs one pass for the whole video, or at the step's own noise level.
    """

    near: tuple[int, int, int] = (4, 4, 4)
    reach: tuple[float, float, float] = (16.0, 16.0, 24.0)
    pool: tuple[int, int, int] | None = None
    proxy_noise: Literal["clean", "same"] = "clean"

    @classmethod
    def trained(cls, own: tuple[int, int, int]) -> ProxyWindows:
        """Those that a base of the token grid `own` (f, y, x) is trained in at its own resolution: at most an eighth of its tokens, half of its frames.

        The proxy's sides are those of the clip over PROXY_SHRINK: so far from a window's middle are the places that it sees, and no further at any size.
        """
        windows = cls.at_most(math.prod(own) // 8, own[0] // 2)._within_frames(own[0])
        return replace(windows, reach=(windows.reach[0], *(count * PROXY_SHRINK / 2 for count in windows.near[1:])))

    @classmethod
    def of_crops(cls, own: tuple[int, int, int]) -> ProxyWindows:
        """Those of crops of large videos: at most half of the base's tokens, as whole frames. A crop has the base's own frames, its picture is all sizes'."""
        frames = max(own[0] // 2, 1)
        return cls.at_most(frames * own[1] * own[2], frames)._within_frames(own[0])

    def _within_frames(self, frames: int) -> ProxyWindows:
        """The same, with no place further from a token in time than so many latent frames: all that a clip of training has."""
        return replace(self, reach=(min(self.reach[0], frames - (self.max_frames - 1) / 2), *self.reach[1:]))

    @classmethod
    def at_most(cls, tokens: int, frames: int) -> ProxyWindows:
        """No larger than any that large videos are painted in: what is trained is what is painted."""
        return cls(tokens=min(max(tokens, 8), MOST_TOKENS), max_frames=min(max(frames, 1), MOST_FRAMES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Refine:
    """How the target grid is denoised.

    `skip_steps`: the first steps that the guide replaces; `adapter`: a named adapter of the base; `experts`: names of its experts, each of
    which works on its own noise levels; `steps`: what a step's velocity is; `anchor`: the proxy is added to the tokens by the base's injector.
    `guidance_interval`: noise levels (low, high) between which guidance works, `guidance_mean_interval`: also on channels' means (`flow.guided`).
    `token_chunk`: tokens computed at a time, None: all.
    `cache`: a threshold for `nn/block_cache.py`, None: every step is computed in full.
    """

    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    skip_steps: int = 0
    attention: FullAttention | Windows | ProxyWindows | BranchedWindows | CloseRemote = field(default_factory=FullAttention)
    adapter: str | None = None
    experts: tuple[str, ...] = ()
    steps: PlainSteps | ShortcutSteps = field(default_factory=PlainSteps)
    anchor: Literal["none", "injected"] = "none"
    token_chunk: int | None = 8192
    guidance_interval: flow.Interval = flow.WHOLE
    guidance_mean_interval: flow.Interval = flow.WHOLE
    cache: float | None = None

    def __post_init__(self):
        self.steps.sizes(flow.sigmas(self.num_inference_steps, self.flow_shift))
        check_guidance(self.guidance_scale, self.guidance_interval, self.guidance_mean_interval)
        check_chunk(self.token_chunk)
        check_cache(self.cache)
        if len(set(self.experts)) != len(self.experts):
            raise UserError(f"{', '.join(self.experts)}", where="experts", fix="name each once")
        if isinstance(self.attention, BranchedWindows) and self.attention.place:
            raise UserError(f"place {self.attention.place}", where="attention.place", fix="leave it out: windows that travel stand elsewhere at every step")
        if not 0 <= self.skip_steps < self.num_inference_steps:
            raise UserError(f"{self.skip_steps} of {self.num_inference_steps} steps", where="skip_steps", fix="skip fewer than all steps")

    def require_fit(self, token_shape: tuple[int, int, int]) -> None:
        """UserError for windows that the token grid has no place for."""
        if isinstance(self.attention, BranchedWindows | CloseRemote):
            self.attention.require_fit(token_shape)

    def graft(self, token_shape: tuple[int, int, int], step: int = 0) -> Graft:
        """The transformer's configuration for a token grid (f, y, x) at a step; with a cache, which compares steps, it is the same at all of them."""
        from muralist.nn.transformer import Graft

        self.require_fit(token_shape)
        if isinstance(self.attention, FullAttention):
            return Graft(token_chunk=self.token_chunk, experts=self.experts)
        if isinstance(self.attention, CloseRemote):
            return Graft(attention=self.attention, token_chunk=self.token_chunk, experts=self.experts)
        if isinstance(self.attention, BranchedWindows):
            return Graft(attention=self.attention.at(step if self.cache is None else 0), token_chunk=self.token_chunk, experts=self.experts)
        windows = WindowAttention(size=window_size(self.attention, token_shape), shift=self.attention.shift)
        windows = traveled(windows, step) if self.attention.travel and self.cache is None else windows
        attention = _guided(self.attention, windows) if isinstance(self.attention, ProxyWindows) else windows
        return Graft(attention=attention, token_chunk=self.token_chunk, experts=self.experts)


def _guided(asked: ProxyWindows, windows: WindowAttention) -> GuidedWindows:
    near = Near(asked.near, asked.reach)
    return GuidedWindows(windows, near, None if asked.pool is None else Middle(asked.pool, near))


def window_size(windows: Windows, token_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Sides (t, y, x) for a grid: as much time as allowed, and what is left of the tokens as a near square."""
    frames = min(token_shape[0], windows.max_frames or token_shape[0])
    _, rows, columns = choose_window((1, *token_shape[1:]), max(windows.tokens // frames, 1))
    return (frames, rows, columns)


def sight(how: Refine, part: LowResolutionProxy | None, proxy: LatentVideo | None, *, seed: int) -> Sight:
    """What refinement is told of the proxy, and of its own steps, while it works."""
    levels = flow.sigmas(how.num_inference_steps, how.flow_shift)
    view = None
    if isinstance(how.attention, ProxyWindows):
        view = ProxyView(proxy.z, part.time_scale, part.adapter, how.attention.proxy_noise, seed)
    return Sight(view, proxy.z if how.anchor == "injected" else None, how.steps.sizes(levels))


def refine(
    base: Base,
    text: TextCond,
    guide: LatentVideo | None,
    grid: Grid,
    how: Refine,
    *,
    sight: Sight = NOTHING,
    seed: int,
    saved: tuple[int, torch.Tensor] | None,
    after_step: Callable[[int, torch.Tensor], None],
    kernels: Kernels = PLAIN,
    cache: FirstBlockCache | None = None,
) -> LatentVideo:
    """Denoise [1, C, F, h, w] on the legal `grid`; with a guide from x = (1 - sigma_S) guide + sigma_S eps at step S, by what is in its `sight`."""
    geometry: Geometry = base.info.geometry
    levels = flow.sigmas(how.num_inference_steps, how.flow_shift)
    start, z = saved or (how.skip_steps, _start(guide, (1, *geometry.latent_shape(grid)), levels[how.skip_steps], seed))
    shape = geometry.token_shape(grid)
    graft, *others = (replace(how.graft(shape, step), kernels=kernels) for step in range(how.num_inference_steps))
    to_come = dict(list(zip(levels, (graft, *others)))[start:])
    velocity = velocity_field(base, text, **flow.guidance_of(how), graft=graft, grafts=to_come, adapter=how.adapter, sight=sight, cache=cache)
    z = flow.denoise(velocity, z.to(base.device), levels, start=start, after_step=after_step)
    return LatentVideo(z, grid)


def _start(guide: LatentVideo | None, shape: tuple[int, ...], sigma: float, seed: int) -> torch.Tensor:
    noise = flow.keyed_noise(shape, seed=seed, stage="refine")
    return noise if guide is None else flow.renoise(guide.z.cpu().float(), noise, sigma)
