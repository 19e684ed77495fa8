"""A polynomial around every source position (ours, beside LUVE's implicit function): the linear part of enlarging a latent.

    z_up(p) = sum_k m_k(p - q, r) (W_k * z)(q),    q: the source position nearest to p,    r: source size / target size

Monomials m_k of the offset and of r, 3x3x3 convolutions W_k at the *source* size. It is linear in W, so least squares find it in closed form
(`train/objectives/least_squares.py`): what a latent's 48 channels say of where inside their patch something lies is a linear map that gradient
descent on a network of the same reach does not come near. Factors below WHOLE_FROM were not fitted: there it fades, to nothing at 1.
"""

from __future__ import annotations

import torch
from torch import nn

from muralist.nn.latent_upsampler.implicit import nearest

# Powers of the offset along y, along x, and of r. Squares times r would take another 1 % off the error.
MONOMIALS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (2, 0, 0), (0, 2, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1))

WHOLE_FROM = 1.5  # factors; whole at 1.125 it is no better than interpolation, at 1.25 worse than a part of it


def monomials(dy: torch.Tensor, dx: torch.Tensor, ratio: float) -> torch.Tensor:
    """Offsets [a] and [b] in half source positions -> values [len(MONOMIALS), a, b], which fade with factors near 1."""
    share = min((1 - ratio) / (1 - 1 / WHOLE_FROM), 1.0) ** 0.5
    return torch.stack([share * ratio**of_ratio * dy[:, None] ** along_y * dx**along_x for along_y, along_x, of_ratio in MONOMIALS])


def ratio(source: tuple[int, int], target: tuple[int, int]) -> float:
    """r of two sizes (h, w): the mean along both sides."""
    return (source[0] / target[0] + source[1] / target[1]) / 2


class LocalPolynomial(nn.Module):
    """[B, C, T, h, w] -> [B, C, T, H, W]; a new one gives zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, len(MONOMIALS) * channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        source = tuple(z.shape[-2:])
        y, dy = nearest(source[0], size[0], z)
        x, dx = nearest(source[1], size[1], z)
        maps = self.conv(z).unflatten(1, (len(MONOMIALS), -1)).unbind(1)
        result = 0
        for coefficients, value in zip(maps, monomials(dy, dx, ratio(source, size))):
            result = result + coefficients[..., y, :][..., x] * value
        return result
