"""What tests of linear layers in 8 bits share."""

from __future__ import annotations

import pytest
import torch

from muralist.nn.kernels import Kernels

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FP8 = Kernels(attention="sdpa", linears="fp8")


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is exact."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()
