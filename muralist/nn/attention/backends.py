"""The one place where softmax(q k^T / sqrt(d)) v is computed: a switch around PyTorch's kernel.

`F.scaled_dot_product_attention` is always there and already chooses the best built-in kernel of the device. Faster kernels are
optional: `register` one under a name and select it with `use`. All of them must agree with `reference` (a test holds them to it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from muralist.errors import UserError
from muralist.nn.attention.reference import reference_attention

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_kernels: dict[str, Kernel] = {"sdpa": F.scaled_dot_product_attention, "reference": reference_attention}
_active = "sdpa"


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, H, n, d], k and v [B, H, m, d] -> [B, H, n, d]. Four dimensions always: with five PyTorch's CPU kernel silently takes a slow path."""
    return _kernels[_active](q, k, v)


def register(name: str, kernel: Kernel) -> None:
    """Make a kernel with the signature of `attention` selectable."""
    _kernels[name] = kernel


def unregister(name: str) -> None:
    """Forget a kernel; `sdpa` stays, it is the default."""
    if name == "sdpa":
        raise ValueError("sdpa is the default attention backend and cannot be unregistered")
    del _kernels[name]


def available() -> tuple[str, ...]:
    return tuple(_kernels)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Select a kernel for all attention of this process inside the block (a plain global: backward threads must see it too)."""
    global _active
    if name not in _kernels:
        raise UserError(f"no attention backend {name!r}", where="attention backend", fix=f"use one of {', '.join(_kernels)}")
    previous, _active = _active, name
    try:
        yield
    finally:
        _active = previous
