"""One switch for `torch.compile`: the pieces of a block that treat tokens alone, each compiled once for all blocks, chunks and windows.

Compiled are functions of a block and tensors, not whole blocks: chunks, windows and the attention kernel between them stay plain Python, so
that a graph knows nothing of how many there are. The number of tokens is a symbol in it (`dynamic`), hence ragged windows and last chunks
share one. Weights are inputs: all blocks of a transformer share it too. Without the switch the same function runs as it is written.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# PyTorch allows 8 of a function, and one more ends a run, since nothing here may fall back to eager code: adapters, bases, types and numbers of windows
# each ask for graphs of their own, and a process may see many of them.
GRAPHS = 64
_compiling = False


def regional(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is compiled, at its first call, wherever `compiling` is on."""

    @cache
    def compiled() -> Callable[..., Any]:  # torch's compiler takes seconds to import
        return torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def either(*arguments: Any) -> Any:
        if not _compiling:
            return function(*arguments)
        _allow_graphs()
        return compiled()(*arguments)

    return either


def _allow_graphs() -> None:
    """Before every call, since PyTorch keeps what is set here for the thread that set it."""
    config = torch._dynamo.config
    if config.recompile_limit < GRAPHS:
        config.recompile_limit = GRAPHS


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
        if not find_spec("triton"):
            return "triton is not installed"
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.is_file():
            return f"there is no {header} (python3-dev)"
        return _missing("C", (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang"))  # triton builds the launchers of its kernels
    return _missing("C++", (os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"),))


def _missing(language: str, compilers: Sequence[str]) -> str | None:
    """`compilers` are those that PyTorch or triton would try: it takes no other one, even if it is there."""
    return None if any(map(shutil.which, compilers)) else f"there is no {language} compiler ({' or '.join(compilers)})"
