"""How much memory a run may take, as a person says it; apart from the plan, so that checking an option imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from muralist.errors import UserError

if TYPE_CHECKING:
    from muralist.cost.machine import Machine

MODES = ("auto", "high", "balanced", "low")


@dataclass(frozen=True, slots=True)
class Budget:
    """`mode`: a level of `cost/levels.py`, or the first that fits; `gigabytes`: a limit where the models compute, None: what is free there."""

    mode: str = "auto"
    gigabytes: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"{self.mode!r:.60}", where="memory", fix=f"use one of {', '.join(MODES)}")
        if self.gigabytes is not None and not 0 < self.gigabytes < 1e6:
            raise UserError(f"{self.gigabytes} GB", where="vram_limit", fix="use gigabytes above 0, such as 16")

    def cut(self, machine: Machine) -> Machine:
        """The machine with no more memory than this where the models compute."""
        if self.gigabytes is None:
            return machine
        name = "memory_bytes" if machine.device_bytes is None else "device_bytes"
        return replace(machine, **{name: min(int(self.gigabytes * 1e9), getattr(machine, name))})
