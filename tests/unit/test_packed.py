"""Pixels as whole numbers in files."""

from __future__ import annotations

import pytest
import torch

from muralist.nn.packed import packed, unpacked, value_bytes


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 3), (torch.bfloat16, 2), (torch.float16, 2)], ids=str)
def test_pixels_come_back_as_fine_as_they_were_made(dtype, width):
    assert value_bytes(dtype) == width
    pixels = torch.cat([torch.rand(1000), torch.tensor([0.0, 1.0])])
    stored = packed(pixels.clone(), width)
    assert stored.shape == (1002, width) and stored.nbytes == 1002 * width
    back = unpacked(stored)
    assert (back - pixels).abs().max() <= 0.5 / (256**width - 1) + 6e-8 and back[-2:].tolist() == [0.0, 1.0]
    assert torch.equal(unpacked(packed(back.clone(), width)), back), "a second time changes something"
