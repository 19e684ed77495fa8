"""One switch for `torch.compile`: the pieces of a block that treat tokens alone, each compiled once for all blocks, chunks and windows.

Compiled are functions of a block and tensors, not whole blocks: chunks, windows and the attention kernel between them stay plain Python, so
that a graph knows nothing of how many there are. The number of tokens is a symbol in it (`dynamic`), hence ragged windows and last chunks
share one. Weights are inputs: all blocks of a transformer share it too. Without the switch the same function runs as it is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch

_compiling = False


def regional(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is compiled, at its first call, wherever `compiling` is on."""

    @cache
    def compiled() -> Callable[..., Any]:  # torch's compiler takes seconds to import
        return torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def either(*arguments: Any) -> Any:
        return compiled()(*arguments) if _compiling else function(*arguments)

    return either


@contextmanager
def compiling() -> Iterator[None]:
    """Run regional functions compiled inside the block (a plain global: backward threads must see it too)."""
    global _compiling
    previous, _compiling = _compiling, True
    try:
        yield
    finally:
        _compiling = previous


def why_not(device: torch.device) -> str | None:
    """What this machine lacks to compile for a device; None: nothing."""
    if device.type == "cuda":
        return None if find_spec("triton") else "triton is not installed"
    return None if any(map(shutil.which, ("g++", "clang++"))) else "there is no C++ compiler"
