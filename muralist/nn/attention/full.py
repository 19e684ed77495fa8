"""Every token attends to every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange

from muralist.nn.attention.backends import attention
from muralist.nn.windows import Partition, Shape, partition


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Attention over the whole sequence: cost grows with N^2; what the base was trained with."""

    def partitions(self, token_shape: Shape) -> tuple[Partition, ...]:
        """One window that covers the grid, in raster order."""
        return (partition(token_shape, token_shape),)


def attend_full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, n, H, d], k and v [B, m, H, d] -> [B, n, H, d]; q may be any part of the sequence, k and v are all of it."""
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    return rearrange(attention(q, k, v), "b h n d -> b n h d")
