"""Attention the slow and obvious way, to check every fast way against.

Nothing here knows about orders, groups or batches of windows: scores of all pairs are computed, and whether two tokens share a
window is decided pair by pair from their coordinates. Cost and memory grow with N^2; meant for a few hundred tokens.
"""

from __future__ import annotations

import math

import torch


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in float64, over the keys where `mask` [n, m] is True; q [B, H, n, d], k and v [B, H, m, d] -> [B, H, n, d] in q's type."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v.double()).to(q.dtype)


def window_mask(token_shape: tuple[int, int, int], size: tuple[int, int, int], *, shifted: bool = False) -> torch.Tensor:
    """[N, N] bool: do tokens n and m (raster order) share a window?

    Along an axis a token at i lies in window floor(i / side), or floor((i - side // 2) / side) when shifted; a side that
    covers the axis is one window. Two tokens share a window if they do so along all three axes.
    """
    grid = torch.cartesian_prod(*(torch.arange(length) for length in token_shape)).view(-1, 3)
    shared = torch.ones(len(grid), len(grid), dtype=torch.bool)
    for axis, (length, side) in enumerate(zip(token_shape, size)):
        if side < length:
            window = torch.div(grid[:, axis] - (side // 2 if shifted else 0), side, rounding_mode="floor")
            shared &= window[:, None] == window[None, :]
    return shared
