"""Flow matching on cached latents: the objective of every denoiser here.

x_sigma = (1 - sigma) x_0 + sigma eps; the error is that of the velocity, whatever the network predicts. A network whose width is
close to the size of its tokens cannot carry the noise through to its output, so the embedded base predicts the clean sample and
the velocity follows as (x_sigma - x_0) / sigma ("Back to basics", arXiv 2511.13720: x-prediction with v-loss).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from muralist.base import mixed_precision
from muralist.nn.attention import Within
from muralist.nn.kernels import Kernels
from muralist.nn.rope import RopeScale
from muralist.nn.transformer import Graft
from muralist.sampling import flow

SIGMA_FLOOR = 0.3  # below it the weight of the clean sample's error, 1 / sigma^2, is held
FOCUS = 5.0  # the weight of the errors around the object: a tenth of the picture, and what the caption is about
FOCUS_BELOW = 0.9  # sigma up to which the noisy latents show where the object is; above, a weight that follows it would multiply objects


@dataclass(frozen=True, slots=True)
class Batch:
    """Latents `x` [B, C, F, h, w], their captions, and where the object of the caption is: `focus` [B, F, h, w], bool, or None.

    `first` and `stride` are the latent frames' places in the full clip, `spacing` the distance of neighbouring tokens in a frame, in tokens of the
    base's own size; `shift` multiplies that of the noise levels. `proxy` [B, C, F', h', w'], for objectives that use it, is the same clip on a
    coarse grid; `within`: where each clip lies in what its proxy shows, if that is more. `guide`, of the shape of `x`: what replaces the first
    `skip_share` of a schedule's steps (`from_guide`). `step`: one of sampling, for windows that travel.
    """

    x: torch.Tensor
    captions: Sequence[str]
    focus: torch.Tensor | None = None
    first: int = 0
    stride: int = 1
    spacing: float = 1.0
    shift: float = 1.0
    proxy: torch.Tensor | None = None
    within: Sequence[Within] | None = None
    guide: torch.Tensor | None = None
    skip_share: float = 0.0
    step: int = 0


class Source(Protocol):
    """Gives the batch of a step; randomness from `rng` alone."""

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """sigma = shift u / (1 + (shift - 1) u), u uniform in (0, 1), then moved into (min, max); captions are dropped at rate `drop` for guidance.

    `graft`: the transformer's configuration while it learns, but for the positions, which are the batch's. Its kernels are left to whoever starts the
    training (`Kernels.at_work`), hence blocks are never the stock ones, which no compiler is asked for.
    """

    prediction: str = "sample"
    shift: float = 2.0
    min_sigma: float = 0.0
    max_sigma: float = 1.0
    drop: float = 0.1
    graft: Graft = field(default_factory=lambda: Graft(kernels=Kernels()))
    seed: int = 0


class FlowMatching:
    """`module` holds what is trained; `embed` turns captions into [B, L, D_text]; `transformer` is called as diffusers' is."""

    def __init__(
        self,
        module: nn.Module,
        transformer: nn.Module,
        embed: Callable[[Sequence[str]], torch.Tensor],
        source: Source,
        config: FlowConfig,
        device: torch.device,
    ):
        self.module, self.transformer, self.embed, self.source, self.config, self.device = module, transformer, embed, source, config, device

    def loss(self, step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        c = self.config
        rng = np.random.Generator(np.random.Philox(key=[c.seed, step]))
        batch = self.source(rng, progress)
        x = batch.x.to(self.device, torch.float32)
        captions = ["" if drop else text for text, drop in zip(batch.captions, rng.random(len(x)) < c.drop)]
        shift, share = c.shift * batch.shift, 1 - batch.skip_share
        sigma = self._sigmas(rng, len(x), shift, share).to(self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noise = from_guide(x, batch_noise(x.shape, c.seed, step).to(self.device), batch, flow.shifted(share, shift))
        output = self._at(batch, (1 - level) * x + level * noise, sigma, self.embed(captions))
        each = self._errors(batch, output, x if c.prediction == "sample" else noise - x, level)
        return each.mean(), {name: each.detach()[mask].mean().item() for name, mask in _thirds(sigma)}

    def _at(self, batch: Batch, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, **extra: torch.Tensor) -> torch.Tensor:
        """The network's answer in float32."""
        with mixed_precision(self.device), warnings.catch_warnings():
            # weights of norms stay in float32 there: torch says that it takes two kernels instead of one
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            return self._predict(batch, noisy, sigma, text, **extra).float()

    def _predict(self, batch: Batch, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, **extra: torch.Tensor) -> torch.Tensor:
        self.transformer.configure(self._graft(batch))
        return self.transformer(noisy, 1000 * sigma, text, return_dict=False, attention_kwargs=extra)[0]

    def _graft(self, batch: Batch) -> Graft:
        between = (batch.spacing - 1) / 2  # a coarse token stands in the middle of the tokens that it covers
        rope = RopeScale(t=float(batch.stride), y=batch.spacing, x=batch.spacing, offset=(float(batch.first), between, between))
        return replace(self.config.graft, rope=rope)

    def _errors(self, batch: Batch, output: torch.Tensor, wanted: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Mean square error of the velocity that each output stands for, [B]; `level`: noise levels, [B, 1, 1, 1, 1]."""
        scale = level.clamp(min=SIGMA_FLOOR) if self.config.prediction == "sample" else 1.0
        error = ((output - wanted) / scale).square().mean(dim=1)  # [B, F, h, w]
        if batch.focus is not None:
            error = error * (1 + (FOCUS - 1) * (batch.focus.to(self.device) & (level[:, 0] < FOCUS_BELOW)))
        return error.mean(dim=(1, 2, 3))

    def _sigmas(self, rng: np.random.Generator, count: int, shift: float, share: float) -> torch.Tensor:
        """Of the last `share` of a schedule."""
        # one draw in each of `count` equal parts: the same distribution with less variance from batch to batch
        u = torch.from_numpy((rng.permutation(count) + rng.random(count)) / count).float() * share
        sigma = flow.shifted(u, shift)
        return self.config.min_sigma + (self.config.max_sigma - self.config.min_sigma) * sigma.clamp(1e-3, 1)


def from_guide(x: torch.Tensor, noise: torch.Tensor, batch: Batch, start: float) -> torch.Tensor:
    """What stands for noise on the path that refinement takes, which begins at sigma `start` = S in a re-noised guide g, (1 - S) g + S eps.

    The straight path from there to the video x is x_sigma = (1 - sigma) x + sigma (eps + (1 - S) / S (g - x)): the noise also carries what is wrong
    with the guide. Training on plain noise never meets a guide's errors. (Ours.)
    """
    return noise if batch.skip_share == 0 else noise + (1 - start) / start * (batch.guide.to(noise.device) - x)


def batch_noise(shape: tuple[int, ...], seed: int, step: int) -> torch.Tensor:
    """The noise of a step, on the CPU: the same whichever device trains, and after a resume."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))


def _thirds(sigma: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return [("low_noise", sigma < 1 / 3), ("mid_noise", (sigma >= 1 / 3) & (sigma < 2 / 3)), ("high_noise", sigma >= 2 / 3)]
