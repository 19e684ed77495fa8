"""Pixels in [0, 1] as whole numbers in a file, little endian, as fine as the arithmetic that made them: 24 bits of float32, else 16."""

from __future__ import annotations

import numpy as np
import torch


def value_bytes(dtype: torch.dtype) -> int:
    """Of one stored value that a decoder of this type has made."""
    return 3 if dtype.itemsize >= torch.float32.itemsize else 2


def packed(pixels: torch.Tensor, width: int) -> np.ndarray:
    """[...] in [0, 1] -> uint8 [..., width]; `pixels` is overwritten."""
    whole = pixels.mul_(_most(width)).round_().to(torch.int32).cpu().numpy()
    return np.ascontiguousarray(whole.astype("<i4", copy=False)[..., None].view(np.uint8)[..., :width])


def unpacked(stored: np.ndarray) -> torch.Tensor:
    """uint8 [..., width] -> float32 [...] in [0, 1]."""
    width = stored.shape[-1]
    whole = np.zeros((*stored.shape[:-1], 4), np.uint8)
    whole[..., :width] = stored
    return torch.from_numpy(whole.view("<i4")[..., 0].astype(np.float32)).div_(_most(width))


def _most(width: int) -> int:
    return (1 << 8 * width) - 1
