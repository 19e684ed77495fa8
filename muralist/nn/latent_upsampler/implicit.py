"""Continuous upsampling of features by an implicit function (LIIF, arXiv 2012.09161, without local ensemble; LUVE, appendix C.2).

Each target position looks up the nearest source position and asks an MLP for the value there, given the features of the 3x3x3 neighbourhood,
the offset to that source position and the size of the target's cell. The first layer is linear, so its part that sees features is a
convolution at the *source* size, looked up afterwards: the same function for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

ROWS = 1 << 22  # target positions times hidden width computed at a time


class Mlp(nn.Module):
    """ReLU layers of the given widths; names as in LIIF (`layers.0`, `layers.2`, ...)."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int):
        super().__init__()
        widths = [inputs, *hidden, outputs]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])


class ImplicitUpsampler(nn.Module):
    """Features [B, T, h, w, D] -> values [B, T, H, W, C] for any H, W; time is kept.

    Input order of the first layer: features (time offset, channel, row offset, column offset), then the relative coordinate and the cell,
    each as (t, y, x) in units of half a source position.
    """

    def __init__(self, dim: int, channels: int, hidden: Sequence[int]):
        super().__init__()
        self.dim = dim
        self.imnet = Mlp(27 * dim + 6, hidden, channels)

    def forward(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        first, *rest = self.imnet.layers
        kernel = first.weight[:, : 27 * self.dim].view(-1, 3, self.dim, 3, 3).transpose(1, 2)
        source = F.conv3d(features.permute(0, 4, 1, 2, 3), kernel, first.bias, padding=1).permute(0, 2, 3, 4, 1)  # [B, T, h, w, hidden]
        y, dy = nearest(features.shape[2], size[0], features)
        x, dx = nearest(features.shape[3], size[1], features)
        cell = features.new_tensor([2.0, 2 * features.shape[2] / size[0], 2 * features.shape[3] / size[1]])
        place, constant = first.weight[:, 27 * self.dim : -3].T, cell @ first.weight[:, -3:].T
        along_y = dy[:, None] * place[1]  # [H, hidden]; the offset along time is zero
        along_x = dx[:, None] * place[2] + constant
        parts = []
        for rows in self._strips(size, source):
            hidden = source[:, :, y[rows]][:, :, :, x] + along_y[rows][:, None] + along_x
            for layer in rest:
                hidden = layer(hidden)
            parts.append(hidden)
        return torch.cat(parts, dim=2)

    @staticmethod
    def _strips(size: tuple[int, int], source: torch.Tensor) -> Iterator[slice]:
        row = source.shape[0] * source.shape[1] * size[1] * source.shape[-1]
        step = max(ROWS // row, 1)
        return (slice(start, min(start + step, size[0])) for start in range(0, size[0], step))


def nearest(source: int, target: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `target` positions the nearest of `source` positions, and the offset to it in half source positions (within [-1, 1])."""
    at = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target  # in source positions, from the border
    index = at.floor().clamp_(0, source - 1)
    return index.long().to(like.device), ((at - index - 0.5) * 2).to(like)
