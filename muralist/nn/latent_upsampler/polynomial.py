"""Polynomials around all source positions (ours, beside LUVE's implicit function): the linear part of enlarging a latent.

    z_up(p) = sum_q w(p, q) sum_k m_k(p - q, r) (W_k * z)(q),    r: source size / target size

Monomials m_k of the offset and of r, 3x3x3 convolutions W_k at the *source* size. The source positions q on either side of p are weighted as bilinear
interpolation weights them (LIIF's local ensemble, arXiv 2012.09161): of the nearest one alone, the result would leap wherever that is another one, and
refinement draws these leaps as a grid. All of it is linear in W, so least squares find it in closed form (`train/objectives/least_squares.py`): what a
latent's 48 channels say of where inside their patch something lies is a linear map that gradient descent on a network of the same reach does not come
near. Factors below WHOLE_FROM were not fitted: there it fades, to nothing at 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

# Powers of the offset along y, along x, and of r. Squares times r would take another 1 % off the error.
MONOMIALS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (2, 0, 0), (0, 2, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1))
POWERS = 3  # of an offset, from 0
VALUES = 1 << 25  # of the maps of some frames and of what becomes of them, alive at a time, if one frame alone has no more
WHOLE_FROM = 1.5  # factors; whole at 1.125 it is no better than interpolation, at 1.25 worse than a part of it


def ratio(source: tuple[int, int], target: tuple[int, int]) -> float:
    """r of two sizes (h, w): the mean along both sides."""
    return (source[0] / target[0] + source[1] / target[1]) / 2


def share(source: tuple[int, int], target: tuple[int, int]) -> float:
    """Of it that counts between two sizes."""
    return min((1 - ratio(source, target)) / (1 - 1 / WHOLE_FROM), 1.0) ** 0.5


def axis(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [target, source] of bilinear interpolation along one axis, and the offset of each pair in half source positions, in double precision."""
    weights = F.interpolate(torch.eye(source, dtype=torch.float64)[None], size=target, mode="linear", align_corners=False)[0].T
    place = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
    return weights, 2 * (place[:, None] - torch.arange(source))


def values(channels: int, source: tuple[int, int], target: tuple[int, int]) -> int:
    """Alive for a frame: its maps, what they are weighted and summed to along y, and of each power what it adds, beside the sums before and after."""
    return channels * (len(MONOMIALS) * math.prod(source) + 4 * target[0] * source[1] + 3 * math.prod(target))


class LocalPolynomial(nn.Module):
    """[B, C, T, h, w] -> [B, C, T, H, W], some frames at a time; a new one gives zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, len(MONOMIALS) * channels, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        source: tuple[int, int] = tuple(z.shape[-2:])
        some = max(VALUES // (len(z) * values(z.shape[1], source, size)), 1)
        axes, padded = [_powers(*sides, z) for sides in zip(source, size)], F.pad(z, (1, 1, 1, 1, 1, 1))
        starts, counts = range(0, z.shape[2], some), share(source, size)
        return torch.cat([self._frames(padded[:, :, start : start + some + 2], axes, ratio(source, size)) * counts for start in starts], dim=2)

    def _frames(self, padded: torch.Tensor, axes: list[list[torch.Tensor]], r: float) -> torch.Tensor:
        """Of those in the middle of [B, C, t + 2, h + 2, w + 2]."""
        maps, (down, across), result = self.conv(padded).unflatten(1, (len(MONOMIALS), -1)), axes, 0
        for power, of_x in enumerate(across):
            same = sum(r**of_r * (down[along_y] @ maps[:, k]) for k, (along_y, along_x, of_r) in enumerate(MONOMIALS) if along_x == power)
            result = result + same @ of_x.T
        return result


def _powers(source: int, target: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Matrices [target, source] that weight what a power of the offset is multiplied by, for every power."""
    weights, offset = axis(source, target)
    return [(weights * offset**power).to(like) for power in range(POWERS)]
