"""Noise-span aligned shortcut training (PixelWizard, section 3.4): flow matching, and in some batches self-consistency of large steps.

In a batch of self-consistency every video gets a timestep T and a step size dT, both on the scale of 1000 sigma; the network's answer for
the whole step is held to the mean of its own answers for the two halves (equations 4 and 7.6), which gets no gradient:

    s(x, T, dT)  ~  SG[ (s(x, T, dT / 2) + s(x', T - dT / 2, dT / 2)) / 2 ],    x' = x - dT / 2000 s(x, T, dT / 2)

- T is one of `anchors`; dT = floor(T / 2^k), k = 0 .. K - 1, with p(k) ~ exp(-beta k) (equations 5 and 6), made even so that it has a middle.
  T counts noise, not indices of a schedule, as in the release: both halves then span the same noise and the plain mean is exact.
- The error is weighted by (dT / 1000)^p (equations 7 and 8). The release divides by the mean over the batch, which undoes the weight where
  a batch is one video; here it is divided by its expectation under the distribution above, which needs no state and acts at any size.
- `guidance`: the two halves of the smallest steps are guided ones, so that what is learned by doubling needs no second pass (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from muralist.errors import UserError
from muralist.sampling import flow
from muralist.train.objectives.flow import Batch, FlowMatching, batch_noise


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortcutConfig:
    """`rate`: share of batches of self-consistency; `beta` 0 draws k uniformly; `power` 0 weighs all spans alike; `guidance` 1 is off."""

    rate: float = 0.3
    anchors: tuple[int, ...] = (500, 600, 700, 800)
    scales: int = 6
    beta: float = 0.7
    power: float = 0.5
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or not 1 <= self.scales <= 8 or not self.anchors or not all(2**self.scales <= t <= 1000 for t in self.anchors):
            raise UserError(f"shortcut training of {self}", where="shortcut", fix=f"use a rate from 0 to 1, 1 to 8 scales, anchors of {2**self.scales} to 1000")


def sizes(timestep: int, config: ShortcutConfig) -> list[int]:
    """The candidates of equation 5, largest first, made even."""
    return [max(timestep // 2**k // 2 * 2, 2) for k in range(config.scales)]


def chances(config: ShortcutConfig) -> list[float]:
    """p(k) of equation 6."""
    weights = [math.exp(-config.beta * k) for k in range(config.scales)]
    return [weight / sum(weights) for weight in weights]


def draw(rng: np.random.Generator, count: int, config: ShortcutConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(T, dT, k), each [count]."""
    k = rng.choice(config.scales, size=count, p=chances(config))
    timestep = rng.choice(config.anchors, size=count)
    return tuple(torch.tensor(v) for v in (timestep, [sizes(int(t), config)[int(i)] for t, i in zip(timestep, k)], k))


def span_weights(step: torch.Tensor, config: ShortcutConfig) -> torch.Tensor:
    """Equation 8 over its expectation: mean 1 over what `draw` gives."""
    expected = np.mean([sum(p * (size / 1000) ** config.power for p, size in zip(chances(config), sizes(t, config))) for t in config.anchors])
    return (step / 1000) ** config.power / float(expected)


class ShortcutMatching(FlowMatching):
    """Objective of a transformer with a step-size embedding; `shortcut` says how it learns large steps."""

    def __init__(self, *arguments, shortcut: ShortcutConfig):
        super().__init__(*arguments)
        self.shortcut = shortcut

    def loss(self, step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.Generator(np.random.Philox(key=[self.config.seed + 1, step]))
        if rng.random() >= self.shortcut.rate:
            return super().loss(step, progress)
        batch = self.source(rng, progress)
        timestep, size, k = (v.to(self.device) for v in draw(rng, len(batch.x), self.shortcut))
        return self._self_consistency(batch, timestep, size, k == self.shortcut.scales - 1, step)

    def _self_consistency(
        self, batch: Batch, timestep: torch.Tensor, size: torch.Tensor, smallest: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        x, sigma = batch.x.to(self.device, torch.float32), timestep / 1000
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * x + level * batch_noise(x.shape, self.config.seed, step).to(self.device)
        text = self.embed(batch.captions)
        with torch.no_grad():
            velocity = self._two_halves(batch, noisy, sigma, size, text, smallest)
        wanted = noisy - level * velocity if self.config.prediction == "sample" else velocity
        errors = self._errors(batch, self._at(batch, noisy, sigma, text, size), wanted, level)
        loss = (span_weights(size, self.shortcut) * errors).mean()
        return loss, {"shortcut": loss.item()}

    def _two_halves(
        self, batch: Batch, noisy: torch.Tensor, sigma: torch.Tensor, size: torch.Tensor, text: torch.Tensor, smallest: torch.Tensor
    ) -> torch.Tensor:
        """The mean velocity of two steps of half the size."""
        half = size / 2
        first = self._velocity(batch, noisy, sigma, half, text, smallest)
        middle = noisy - (half / 1000).view(-1, 1, 1, 1, 1) * first
        second = self._velocity(batch, middle, sigma - half / 1000, half, text, smallest)
        return (first + second) / 2

    def _velocity(self, batch: Batch, z: torch.Tensor, sigma: torch.Tensor, size: torch.Tensor, text: torch.Tensor, smallest: torch.Tensor) -> torch.Tensor:
        """Of steps of `size`; guided ones at a point, where they are the smallest and guidance is to be learned."""
        g = self.shortcut.guidance
        size = torch.where(smallest & (g != 1), 0.0, size.float())
        velocity = self._as_velocity(self._at(batch, z, sigma, text, size), z, sigma)
        if g == 1 or not smallest.any():
            return velocity
        empty = self._as_velocity(self._at(batch, z, sigma, self.embed([""] * len(z)), size), z, sigma)
        return torch.where(smallest.view(-1, 1, 1, 1, 1), torch.lerp(empty, velocity, g), velocity)

    def _as_velocity(self, output: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self.config.prediction != "sample":
            return output
        return flow.velocity_of_sample(z, output, sigma.view(-1, 1, 1, 1, 1).clamp(min=1e-3))

    def _at(self, batch: Batch, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        return super()._at(batch, noisy, sigma, text, step_size=torch.zeros_like(sigma) if size is None else size.float())
