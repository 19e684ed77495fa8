"""I3D (Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017), RGB, Kinetics-400: the network of FVD.

Parameters carry the names of the pytorch-i3d weights. The features are the 400 logits averaged over time, as in FVD's own code. Padding is
TensorFlow's SAME: as much as makes the output ceil(size / stride), the odd one behind.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from muralist.eval.features.weights import load_into, read

WIDTH = 400
SIDE = 224

# width in; widths of the branches: 1x1, 3x3 (reduced, out), 3x3 (reduced, out), pool
MIXED = {
    "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64), "4c": (512, 160, 112, 224, 24, 64, 64), "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64), "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128), "5c": (832, 384, 192, 384, 48, 128, 128),
}  # fmt: skip


def _same(x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    pads: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride):
        total = max(k - (size % s or s), 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


def _largest(x: torch.Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> torch.Tensor:
    # zeros are as good as nothing behind a ReLU
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


class Unit3D(nn.Module):
    """Convolution with SAME padding, batch norm, ReLU."""

    def __init__(self, i: int, o: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(i, o, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(o, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv3d(_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, i: int, one: int, small_in: int, small: int, large_in: int, large: int, pool: int):
        super().__init__()
        self.b0 = Unit3D(i, one)
        self.b1a, self.b1b = Unit3D(i, small_in), Unit3D(small_in, small, 3)
        self.b2a, self.b2b = Unit3D(i, large_in), Unit3D(large_in, large, 3)
        self.b3b = Unit3D(i, pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(_largest(x, (3, 3, 3), (1, 1, 1)))], dim=1)


class I3D(nn.Module):
    """[B, 3, T, 224, 224] in [0, 1], T at least 9, to [B, 400]."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7, self.Conv3d_2b_1x1, self.Conv3d_2c_3x3 = Unit3D(3, 64, 7, 2), Unit3D(64, 64), Unit3D(64, 192, 3)
        for name, widths in MIXED.items():
            setattr(self, f"Mixed_{name}", Mixed(*widths))
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(1024, WIDTH, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = _largest(self.Conv3d_1a_7x7(2 * x - 1), (1, 3, 3), (1, 2, 2))
        h = _largest(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(h)), (1, 3, 3), (1, 2, 2))
        h = _largest(self.Mixed_3c(self.Mixed_3b(h)), (3, 3, 3), (2, 2, 2))
        h = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(h)))))
        h = self.Mixed_5c(self.Mixed_5b(_largest(h, (2, 2, 2), (2, 2, 2))))  # [B, 1024, ceil(T / 8), 7, 7]
        h = self.logits["conv3d"](F.avg_pool3d(h, (2, 7, 7), stride=1))
        return h.mean(dim=(2, 3, 4))


@lru_cache(maxsize=1)
def load_i3d(path: Path, device: torch.device) -> I3D:
    """FVD's network. Raises UserError for another file."""
    return load_into(I3D(), read(path), path).to(device)
