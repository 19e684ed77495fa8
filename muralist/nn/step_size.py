"""A transformer that knows how far the next step goes: the step's size, embedded as the noise level is and added to it.

Shortcut models (arXiv 2410.12557) predict the average velocity over a step. The embedding is a sinusoid, two linear layers and zero at the
start, so that a transformer that was just given one computes what it did before; step size 0 means the velocity at the point. It is added to
the noise level's embedding before that is projected for the blocks, and so reaches the head as well (as in the release of PixelWizard).

A part of kind `step_size` (`store/parts.py`) holds its four tensors and its width.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from muralist.nn.kinds import FREQUENCIES


class StepSizeEmbedding(nn.Module):
    """Step sizes [B] on the scale of timesteps (0 to 1000) -> [B, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(FREQUENCIES, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, step_size: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(waves(step_size).to(self.linear_1.weight.dtype))))


def waves(timestep: torch.Tensor) -> torch.Tensor:
    """The sinusoids of timesteps, or of step sizes, [B] -> [B, FREQUENCIES], as Wan embeds its timesteps."""
    return get_timestep_embedding(timestep, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
