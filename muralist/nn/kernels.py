"""How a transformer is computed, apart from what it computes: the attention kernel and the compiler. Changes the last bits and the time, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from muralist.errors import UserError
from muralist.nn import compiled
from muralist.nn.attention import backends


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """`attention`: a backend's name, `auto` the fastest exact one that is installed. `compile`: `blocks` compiles what treats tokens alone."""

    attention: backends.Name = "auto"
    compile: Literal["off", "blocks"] = "off"

    def __post_init__(self) -> None:
        for name, value, known in (("attention", self.attention, backends.NAMES), ("compile", self.compile, ("off", "blocks"))):
            if value not in known:
                raise UserError(f"{name} {value!r:.40}", where=name, fix=f"use one of {', '.join(known)}")

    def settled(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Kernels, list[str]]:
        """What this machine will compute with, and a note for each thing that was asked for and is not there."""
        attention, note = backends.settle(self.attention, device, dtype, head_dim)
        notes = [] if note is None else [note]
        lacking = compiled.why_not(device) if self.compile == "blocks" else None
        if lacking:
            notes.append(f"compile {self.compile}: {lacking}; blocks run as they are")
        return replace(self, attention=attention, compile="off" if lacking else self.compile), notes

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
