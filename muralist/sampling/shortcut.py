"""Few large steps by a network that knows their size (shortcut models, arXiv 2410.12557; PixelWizard, section 3.4).

A step from sigma to sigma' is one Euler step with the average velocity over it, s(z, sigma, sigma - sigma'). Sizes are given on the scale of
timesteps, 1000 (sigma - sigma'), rounded to an even number of at least 2, as they are in training, where a step has a middle.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from muralist.errors import UserError

MOST_STEPS = 16  # beyond it steps are smaller than what is learned beyond plain flow matching, and plain steps do as well


@dataclass(frozen=True, slots=True)
class PlainSteps:
    """Euler steps with the velocity at their start."""

    def sizes(self, levels: list[float]) -> dict[float, float] | None:
        return None


@dataclass(frozen=True, slots=True)
class ShortcutSteps:
    """Euler steps with the average velocity over them; the base needs the part `step_size`."""

    def sizes(self, levels: list[float]) -> dict[float, float]:
        """The size of the step that starts at each noise level of a schedule. Raises UserError for more steps than are learned."""
        if len(levels) - 1 > MOST_STEPS:
            raise UserError(f"{len(levels) - 1} shortcut steps", where="num_inference_steps", fix=f"use 1 to {MOST_STEPS}, such as 4, or plain steps")
        return {start: step_size(start, end) for start, end in itertools.pairwise(levels)}


def step_size(sigma: float, sigma_next: float) -> float:
    """On the scale of timesteps, even, at least 2."""
    return float(max(2 * round(500 * (sigma - sigma_next)), 2))
