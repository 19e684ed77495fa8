"""Unsharp masking: what the high-frequency expert's training data go through (LUVE, section 3.4).

The paper names neither radius nor amount: these are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from muralist.data.degrade import blur


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsharp:
    """x + amount (x - blur(x)), clamped to [0, 1]; `radius`: standard deviation of the Gaussian in pixels."""

    radius: float = 2.0
    amount: float = 0.6

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """[T, H, W, 3] in [0, 1] -> the same, with steeper edges and stronger texture."""
        soft = torch.cat([blur(frame[None], self.radius) for frame in video.permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)
        return (video + self.amount * (video - soft)).clamp(0, 1)
