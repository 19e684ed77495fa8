"""Pixels in [0, 1] as whole numbers in a file, little endian, as fine as the arithmetic that made them: 24 bits of float32, else 16."""

from __future__ import annotations

import numpy as np
import torch


def value_bytes(dtype: torch.dtype) -> int:
    """Of one stored value that a decoder of this type has made."""
    return 3 if dtype.itemsize >= torch.float32.itemsize else 2


def packed(pixels: torch.Tensor, width: int) -> np.ndarray:
    """[...] in [0, 1] -> uint8 [..., width]; `pixels` is overwritten."""
    whole = pixels.mul_(_most(width)).round_().to(torch.int32).cpu()
    return whole.view(torch.uint8).unflatten(-1, (-1, 4))[..., :width].contiguous().numpy()


def unpacked(stored: np.ndarray) -> torch.Tensor:
    """uint8 [..., width] -> float32 [...] in [0, 1]."""
    *lower, highest = range(stored.shape[-1])
    whole = stored[..., highest].astype(np.float32)  # which holds 24 bits exactly
    for byte in reversed(lower):
        whole *= 256
        whole += stored[..., byte]
    return torch.from_numpy(whole).div_(_most(stored.shape[-1]))


def _most(width: int) -> int:
    return (1 << 8 * width) - 1
