"""Inception-v3 (Szegedy et al., CVPR 2016) as FID uses it: 2048 means over positions before the classifier ("pool3").

Parameters carry the names of the pytorch-fid weights. That network differs from the usual one: its average pools leave the border out of
their count, and the last block's pool is a maximum. The published weights belong to exactly this form.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from muralist.errors import UserError
from muralist.eval.features.weights import load_into, read

WIDTH = 2048
SIDE = 299  # pixels that the network sees


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, i: int, o: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, double 3x3, pool."""

    def __init__(self, i: int, pool: int):
        super().__init__()
        self.branch1x1 = Unit(i, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Unit(i, 48, 1), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit(i, 64, 1), Unit(64, 96, 3, padding=1), Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(i, pool, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_mean(x))], dim=1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, i: int):
        super().__init__()
        self.branch3x3 = Unit(i, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit(i, 64, 1), Unit(64, 96, 3, padding=1), Unit(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17x17: 7x7 as a row and a column, once and twice."""

    def __init__(self, i: int, c: int):
        super().__init__()
        row, column = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Unit(i, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Unit(i, c, 1), Unit(c, c, **row), Unit(c, 192, **column)
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = Unit(i, c, 1), Unit(c, c, **column), Unit(c, c, **row)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Unit(c, c, **column), Unit(c, 192, **row)
        self.branch_pool = Unit(i, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_mean(x))], dim=1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, i: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(i, 192, 1), Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(i, 192, 1), Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, (7, 1), padding=(3, 0)), Unit(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8x8: 3x3 as a row and a column side by side; `largest`: pool by the maximum instead of the mean."""

    def __init__(self, i: int, *, largest: bool):
        super().__init__()
        row, column = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.largest = largest
        self.branch1x1 = Unit(i, 320, 1)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Unit(i, 384, 1), Unit(384, 384, **row), Unit(384, 384, **column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 448, 1), Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(384, 384, **row), Unit(384, 384, **column)
        self.branch_pool = Unit(i, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.largest else _mean(x)
        sides = [self.branch3x3_2a(once), self.branch3x3_2b(once), self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *sides, self.branch_pool(pooled)], dim=1)


class Inception(nn.Module):
    """[B, 3, H, W] in [0, 1] to [B, 2048]; resized to 299x299 as pytorch-fid does (bilinear, no antialiasing)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Unit(3, 32, 3, stride=2), Unit(32, 32, 3), Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80, 1), Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (BlockC(768, c) for c in (128, 160, 160, 192))
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = BlockD(768), BlockE(1280, largest=False), BlockE(2048, largest=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1
        h = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h))), 3, stride=2)
        h = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h)), 3, stride=2)  # [B, 192, 35, 35]
        h = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(h))))  # [B, 768, 17, 17]
        h = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(h))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(h))).mean(dim=(2, 3))  # [B, 2048, 8, 8] to [B, 2048]


@lru_cache(maxsize=1)
def load_inception(path: Path, device: torch.device) -> Inception:
    """FID's network. Raises UserError for another file, the ImageNet classifier of the same name included."""
    tensors = read(path)
    if any(name.startswith("AuxLogits.") for name in tensors):
        raise UserError("this is the ImageNet classifier, not FID's network", where=str(path), fix="convert pytorch-fid's pt_inception weights")
    return load_into(Inception(), {name: t for name, t in tensors.items() if not name.startswith("fc.")}, path).to(device)
