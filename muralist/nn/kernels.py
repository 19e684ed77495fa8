"""How a transformer is computed, apart from what it computes: the attention kernel, the compiler, and in how many bits linear layers multiply.

Changes the time and the last bits, nothing else; of 8-bit kernels (`sage`, `fp8`) the last bits are a few percent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from muralist.errors import UserError
from muralist.nn import compiled, fp8
from muralist.nn.attention import backends


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """`attention`: a backend's name, `auto` the fastest exact one that is installed. `compile`: `blocks` compiles what treats tokens alone.

    `linears`: `fp8` multiplies in 8 bits in the linear layers of blocks. It is `Base` that makes them so, as it loads them: no graft can.
    """

    attention: backends.Name = "auto"
    compile: Literal["off", "blocks"] = "off"
    linears: Literal["plain", "fp8"] = "plain"

    def __post_init__(self) -> None:
        for name, known in (("attention", backends.NAMES), ("compile", ("off", "blocks")), ("linears", ("plain", "fp8"))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} {value!r:.40}", where=name, fix=f"use one of {', '.join(known)}")

    def settled(self, device: torch.device, dtype: torch.dtype, head_dim: int, sides: tuple[int, int]) -> tuple[Kernels, list[str]]:
        """What this machine will compute with, and a note for each thing that was asked for and is not there; `sides`: the width of a base and of its FFN."""
        attention, note = backends.settle(self.attention, device, dtype, head_dim)
        linears, less = fp8.settle(self.linears, device, dtype, sides)
        notes = [told for told in (note, less) if told is not None]
        lacking = compiled.why_not(device) if self.compile == "blocks" else None
        if lacking:
            notes.append(f"compile {self.compile}: {lacking}; blocks run as they are")
        return replace(self, attention=attention, compile="off" if lacking else self.compile, linears=linears), notes

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Compute with these inside the block."""
        with ExitStack() as stack:
            if self.attention not in ("auto", "sdpa"):
                stack.enter_context(backends.use(self.attention))
            if self.compile == "blocks":
                stack.enter_context(compiled.compiling())
            yield


PLAIN = Kernels(attention="sdpa")
