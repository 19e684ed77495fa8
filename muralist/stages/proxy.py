"""text -> proxy: the small latent video that fixes layout and motion, denoised at the base's own size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from muralist.base import Base
from muralist.errors import UserError
from muralist.sampling import flow
from muralist.types import Grid, LatentVideo, TextCond


@dataclass(frozen=True, slots=True, kw_only=True)
class LowResolutionProxy:
    """Pixel height and width of the proxy and how it is sampled; it has the target's frames."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float

    def __post_init__(self):
        flow.sigmas(self.num_inference_steps, self.flow_shift)
        check_guidance(self.guidance_scale)

    def grid(self, target: Grid) -> Grid:
        """The proxy's grid: its own area, the target's shape. A portrait target gets a portrait proxy of the same number of pixels."""
        area, shape = self.height * self.width, target.width / target.height
        if abs(shape / (self.width / self.height) - 1) < 0.05:
            return target.resized(height=self.height, width=self.width)
        return target.resized(height=max(round((area / shape) ** 0.5), 1), width=max(round((area * shape) ** 0.5), 1))


def check_guidance(guidance_scale: float) -> None:
    if not 0 <= guidance_scale <= 100:
        raise UserError(f"{guidance_scale}", where="guidance_scale", fix="use 1 (off) to about 10")


def make_proxy(
    base: Base,
    text: TextCond,
    proxy: LowResolutionProxy,
    target: Grid,
    *,
    seed: int,
    saved: tuple[int, torch.Tensor] | None,
    after_step: Callable[[int, torch.Tensor], None],
) -> LatentVideo:
    """Denoise pure noise [1, C, F, h, w] on the proxy's grid; `saved` is (steps done, latent) of an interrupted run."""
    from muralist.nn.transformer import Graft

    grid = base.info.geometry.legal(proxy.grid(target))
    levels = flow.sigmas(proxy.num_inference_steps, proxy.flow_shift)
    start, z = saved or (0, flow.keyed_noise((1, *base.info.geometry.latent_shape(grid)), seed=seed, stage="proxy"))
    velocity = base.velocity(text, guidance_scale=proxy.guidance_scale, graft=Graft(), adapter=None)
    z = flow.denoise(velocity, z.to(base.device), levels, start=start, after_step=after_step)
    return LatentVideo(z, grid)
