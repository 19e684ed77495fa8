"""Temporal mutual self-attention on shifted windows of a video: the building block of VRT (Liang et al., arXiv 2201.12288, section 3.2).

A window of T x H x W positions attends to itself with a learnt bias by relative position. With `mutual`, windows are two frames long and
each frame also queries the other one, which lets a frame take what it needs from its neighbour without estimating motion. Odd blocks shift
the windows by half; positions that the cyclic shift brings together from opposite borders are masked from each other.

Activations are [B, T, H, W, D]. Parameter names follow the published VRT, so that weights trained with it load.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

Shape = tuple[int, int, int]
ALIGNED = {"cuda": 8}  # widths of heads are padded to multiples: of others (the released one has 30) PyTorch's GPU kernels take none, and scores fill memory

SCORES = 1 << 24  # that are added to those of windows at a time


class MutualSelfAttention(nn.Module):
    """Attention inside windows: x [B * W, n, D] -> the same, n = prod(window) positions in (t, y, x) order."""

    def __init__(self, dim: int, window: Shape, heads: int, mutual: bool):
        super().__init__()
        self.heads, self.mutual = heads, mutual
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(2 * side - 1 for side in window), heads))
        self.register_buffer("relative_position_index", _relative_index(window), persistent=False)
        self.qkv_self = nn.Linear(dim, 3 * dim)
        if mutual:
            self.register_buffer("position_bias", sine_positions(window[1:], dim // 2), persistent=False)
            self.qkv_mut = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(2 * dim if mutual else dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`mask` [B * W, n, n]: 0 where a pair may attend and a large negative number where not; None where all may."""
        n = x.shape[1]
        index = self.relative_position_index[:n, :n]
        bias = self.relative_position_bias_table[index.flatten()].view(n, n, -1).permute(2, 0, 1)[None]  # [1, H, n, n]
        query, key, value = self._split(self.qkv_self(x))
        result = self._attend(query, key, value, bias if mask is None else bias + mask[:, None])
        if self.mutual:
            query, key, value = self._split(self.qkv_mut(x + self.position_bias[:, : n // 2].repeat(1, 2, 1)))
            (q1, q2), (k1, k2), (v1, v2) = (part.chunk(2, dim=2) for part in (query, key, value))
            between = None if mask is None else mask[:, None, : n // 2, : n // 2]
            pair = [self._attend(q2, k1, v1, between), self._attend(q1, k2, v2, between)]
            result = torch.cat([torch.cat(pair, dim=1), result], dim=2)
        return self.proj(result)

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads).unbind(0)

    @staticmethod
    def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Each [B * W, H, n, d]; bias [B * W or 1, H or 1, n, n] -> [B * W, n, H * d]."""
        width = query.shape[-1]
        if missing := -width % ALIGNED.get(query.device.type, 1):
            query, key, value = (F.pad(x, (0, missing)) for x in (query, key, value))
        result = F.scaled_dot_product_attention(query, key, value, None if bias is None else bias.to(query.dtype), scale=width**-0.5)
        return rearrange(result[..., :width], "b h n d -> b n (h d)")


class GatedMlp(nn.Module):
    """gelu(fc11 x) * fc12 x, then fc2 (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc11, self.fc12, self.fc2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc11(x)) * self.fc12(x))


class TmsaBlock(nn.Module):
    """Pre-norm window attention and gated MLP, each with a residual: [B, T, H, W, D] -> the same."""

    def __init__(self, dim: int, window: Shape, heads: int, mlp_ratio: float, *, shifted: bool, mutual: bool):
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = MutualSelfAttention(dim, window, heads, mutual)
        self.mlp = GatedMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._windows(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        size: Shape = x.shape[1:4]
        window, shift = fitted(size, self.window, self.shifted)
        if self.attn.mutual:  # two frames, also where a video has one: it is padded, like the last of an odd number
            window = (self.window[0], *window[1:])
        padded: Shape = tuple(math.ceil(length / side) * side for length, side in zip(size, window))
        pads = [pad for length, full in zip(reversed(size), reversed(padded)) for pad in (0, full - length)]
        x = torch.roll(F.pad(x, (0, 0, *pads)), [-s for s in shift], dims=(1, 2, 3))
        masks = shift_masks(padded, window, shift) if any(shift) else None
        axes = dict(zip(("t", "y", "x"), window))
        counts = dict(zip(("a", "b", "c"), (full // side for full, side in zip(padded, window))))
        rows = rearrange(x, "n (a t) (b y) (c x) d -> (n a b c) (t y x) d", **axes)
        x = rearrange(self._attended(rows, masks), "(n a b c) (t y x) d -> n (a t) (b y) (c x) d", **counts, **axes)
        x = torch.roll(x, shift, dims=(1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]

    def _attended(self, rows: torch.Tensor, masks: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Windows with a mask some at a time: each has scores of its own to add, which would take more memory than all else here."""
        if masks is None:
            return self.attn(rows, None)
        some = max(SCORES // (self.attn.heads * rows.shape[1] ** 2), 1)
        kinds, of_window = (part.to(rows.device) for part in masks)
        of_row = of_window.repeat(len(rows) // len(of_window))  # the windows of one video after those of another
        return torch.cat([self.attn(part, kinds[of_part]) for part, of_part in zip(rows.split(some), of_row.split(some))])


class TmsaGroup(nn.Module):
    """`depth` blocks, every second one shifted."""

    def __init__(self, dim: int, depth: int, window: Shape, heads: int, mlp_ratio: float, *, mutual: bool):
        super().__init__()
        self.blocks = nn.ModuleList(TmsaBlock(dim, window, heads, mlp_ratio, shifted=bool(i % 2), mutual=mutual) for i in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def fitted(size: Shape, window: Shape, shifted: bool) -> tuple[Shape, Shape]:
    """The window and its shift for a video of `size`: an axis that one window covers gets a window of its own length and no shift."""
    sides = tuple(min(length, side) for length, side in zip(size, window))
    shift = tuple(side // 2 if shifted and length > side else 0 for length, side in zip(size, window))
    return sides, shift


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # autograd takes no inference tensors
def shift_masks(size: Shape, window: Shape, shift: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks [8, n, n] and for each window which of them is its own [W]: 0 for pairs that lie together in the unshifted video, -100 for pairs that only
    the cyclic shift brings together, which it does in the last window along an axis. On the CPU: a plan that walks through the network without values
    must not leave masks without values to who computes."""
    kinds, of_window = torch.zeros(8, *window, device="cpu"), torch.zeros(1, dtype=torch.long, device="cpu")
    for axis, (length, side, by) in enumerate(zip(size, window, shift)):
        behind = (torch.arange(side, device="cpu") >= side - by).view([-1 if i == axis else 1 for i in range(3)])
        last = (torch.arange(8, device="cpu") >> (2 - axis)) % 2 == 1
        kinds = 2 * kinds + (last[:, None, None, None] & behind)
        count = length // side
        of_window = (2 * of_window[:, None] + (torch.arange(count, device="cpu") == count - 1)).flatten()
    rows = kinds.flatten(1)
    return torch.where(rows[:, :, None] == rows[:, None, :], 0.0, -100.0), of_window


def _relative_index(window: Shape) -> torch.Tensor:
    """[n, n]: the row of the bias table for each pair of positions, by their offsets along t, y, x."""
    places = torch.stack(torch.meshgrid(*(torch.arange(side) for side in window), indexing="ij")).flatten(1)  # [3, n]
    offset = places[:, :, None] - places[:, None, :] + torch.tensor(window)[:, None, None] - 1
    _, y, x = (2 * side - 1 for side in window)
    return offset[0] * y * x + offset[1] * x + offset[2]


def sine_positions(window: tuple[int, int], half: int, temperature: float = 10000.0) -> torch.Tensor:
    """[1, H * W, 2 * half]: sines and cosines of rows, then of columns, with places scaled to (0, 2 pi] (DETR, arXiv 2005.12872, appendix A.4)."""
    axes = [torch.arange(1, side + 1) / (side + 1e-6) * 2 * math.pi for side in window]
    rates = temperature ** (2 * (torch.arange(half) // 2) / half)
    waves = [torch.stack([(a := axis[:, None] / rates)[:, 0::2].sin(), a[:, 1::2].cos()], dim=2).flatten(1) for axis in axes]
    rows, columns = waves[0][:, None].expand(*window, half), waves[1][None].expand(*window, half)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)[None]
