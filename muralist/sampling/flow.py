"""Flow matching: the noise schedule, the Euler step, guidance and re-noising.

Conventions (Wan, rectified flow, arXiv 2209.03003 and 2403.03206): x_sigma = (1 - sigma) x_0 + sigma eps, the network predicts
the velocity v = dx/dsigma = eps - x_0, and time runs from sigma = 1 (noise) to sigma = 0 (data). The timestep that the
network reads is 1000 sigma. Thresholds are always on sigma, never on a step's index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch

from muralist.errors import UserError

# (z [B, C, F, h, w], sigma) -> velocity of z's shape
Velocity = Callable[[torch.Tensor, float], torch.Tensor]
Interval = tuple[float, float]  # of sigma, both ends included
WHOLE: Interval = (0.0, 1.0)
U = TypeVar("U", float, torch.Tensor)


def sigmas(num_inference_steps: int, flow_shift: float) -> list[float]:
    """The `num_inference_steps + 1` noise levels from 1 to 0: sigma = s u / (1 + (s - 1) u), u uniform (arXiv 2403.03206, eq. 23)."""
    if not 1 <= num_inference_steps <= 1000:
        raise UserError(f"{num_inference_steps} steps", where="num_inference_steps", fix="use 1 to 1000")
    if not 0.01 <= flow_shift < 1000:  # far below, a schedule that starts at 1 is lost in rounding
        raise UserError(f"{flow_shift}", where="flow_shift", fix="use a number from 0.01 to below 1000, such as 5")
    uniform = [1 - i / num_inference_steps for i in range(num_inference_steps + 1)]
    return [shifted(u, flow_shift) for u in uniform]


def shifted(u: U, flow_shift: float) -> U:
    """Noise levels of the shares `u` of a schedule that are still to come, numbers or a tensor in [0, 1] (eq. 23)."""
    return flow_shift * u / (1 + (flow_shift - 1) * u)


def euler_step(z: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """One Euler step of dz/dsigma = v."""
    return z + (sigma_next - sigma) * velocity


def clean_estimate(z: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """The predicted clean latent x_0 = z - sigma v."""
    return z - sigma * velocity


def velocity_of_sample(z: torch.Tensor, sample: torch.Tensor, sigma: float) -> torch.Tensor:
    """The velocity that a predicted clean latent stands for: v = (z - x_0) / sigma, sigma > 0."""
    return (z - sample) / sigma


GUIDANCE = ("guidance_scale", "guidance_interval", "guidance_mean_interval")  # fields of every part that is guided


def guidance_of(part: object) -> dict[str, object]:
    """How a part is guided, by the names of `velocity_field`."""
    return {name: getattr(part, name) for name in GUIDANCE}


def check_interval(interval: Interval) -> None:
    """Raises UserError for what is no interval of noise levels."""
    if len(interval) != 2 or any(type(end) not in (int, float) for end in interval) or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"{list(interval)}", where="guidance_interval", fix="use two noise levels from 0 to 1, the lower one first, such as [0.3, 0.9]")


def passes(sigma: float, guidance_scale: float, interval: Interval = WHOLE) -> int:
    """Forwards of the network that a step at sigma takes: two where guidance works, one where it does not."""
    return 2 if guidance_scale != 1 and interval[0] <= sigma <= interval[1] else 1


def guided(conditional: Velocity, unconditional: Velocity, guidance_scale: float, interval: Interval = WHOLE, mean_interval: Interval = WHOLE) -> Velocity:
    """Classifier-free guidance v = v_u + g (v_c - v_u) (arXiv 2207.12598) on an interval of sigma (arXiv 2404.07724).

    Outside the interval, and everywhere at g = 1, the unconditional pass is not computed: v = v_c. Outside of `mean_interval` guidance leaves the mean
    of each channel [B, C, F, h, w] as it is in v_c: at high noise it would overshoot the tone of the whole picture, while place and motion, which are
    decided there, want guidance. (Ours; as in APG, arXiv 2410.02416, a part of v_c - v_u is left out.)
    """

    def field(z: torch.Tensor, sigma: float) -> torch.Tensor:
        positive = conditional(z, sigma)
        if passes(sigma, guidance_scale, interval) == 1:
            return positive
        velocity = torch.lerp(unconditional(z, sigma), positive, guidance_scale)
        if mean_interval[0] <= sigma <= mean_interval[1]:
            return velocity
        return velocity + (positive - velocity).mean(dim=(-3, -2, -1), keepdim=True)

    return field


def renoise(z: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Put a clean latent at noise level sigma: (1 - sigma) z + sigma eps."""
    return (1 - sigma) * z + sigma * noise


def keyed_noise(shape: tuple[int, ...], *, seed: int, stage: str, step: int = 0) -> torch.Tensor:
    """Gaussian noise, float32 on the CPU, a function of (seed, stage, step) and the shape alone: the same on every device and at every resume."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def denoise(velocity: Velocity, z: torch.Tensor, levels: list[float], *, start: int = 0, after_step: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
    """Euler steps `start`, start + 1, ... over `levels`; `after_step(k, z)` is told that k steps are done.

    Raises FloatingPointError when a step leaves the finite numbers, so that nothing broken is ever stored.
    """
    for step in range(start, len(levels) - 1):
        z = euler_step(z, velocity(z, levels[step]), levels[step], levels[step + 1])
        if not torch.isfinite(z).all():
            raise FloatingPointError(f"the latent is not finite after step {step + 1} of {len(levels) - 1}")
        after_step(step + 1, z)
    return z
