"""Frequency experts: low-rank branches beside a block's attention and beside its FFN that see one band of its tokens (LUVE, section 3.3).

    y = Attention(x) + up(LowPass(down(x)))         y = FFN(x) + up(HighPass(down(x)))

The paper writes LoRA(LowPass(x)). The filter works along the grid and `down` along the channels, so the two commute, and filtering `rank`
channels instead of the model's width costs a tenth or less. x is what the branch beside it sees: the normed and modulated tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from muralist.nn.filters import RadialFilter
from muralist.nn.windows import Partition, reorder

Place = Literal["attention", "ffn"]


class FrequencyExpert(nn.Module):
    """`up` (zero at the start, so that a new expert changes nothing) after `down`, scaled by alpha / rank."""

    def __init__(self, dim: int, place: Place, band: RadialFilter, *, rank: int, alpha: float):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        self.place, self.band, self.scale = place, band, alpha / rank
        nn.init.zeros_(self.up.weight)


@dataclass(slots=True)
class Branch:
    """An expert at work in one forward of one block: chunks go in while the layer beside it runs, the update comes out after it.

    `partition` says in which order the tokens come; the filter sees them in raster order.
    """

    expert: FrequencyExpert
    partition: Partition
    raster: Partition
    parts: list[torch.Tensor] = field(default_factory=list)

    def see(self, normed: torch.Tensor) -> None:
        """The next chunk [B, n, D] of the tokens, in order."""
        self.parts.append(self.expert.down(normed))

    def filtered(self) -> torch.Tensor:
        """[B, N, rank] in the partition's order, once all chunks have been seen."""
        x = reorder(torch.cat(self.parts, dim=1), self.partition, self.raster)
        return reorder(self.expert.band(x, self.partition.token_shape), self.raster, self.partition)

    def update(self, filtered: torch.Tensor) -> torch.Tensor:
        """[B, n, rank] -> [B, n, D]"""
        return self.expert.up(filtered) * self.expert.scale
