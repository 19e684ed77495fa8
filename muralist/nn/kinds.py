"""What parts of a base say of themselves, apart from the networks: checking a folder must not import diffusers, which takes seconds."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muralist.errors import UserError

INJECTOR = "injector"  # kinds of part (`store/parts.py`)
STEP_SIZE = "step_size"
Gate = Literal["channel", "scalar", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectorConfig:
    """Latent channels, the base's width, the blocks before which the anchor is added, and how it is gated.

    `gate` none: alpha is 0. `refined` False: the anchor is only projected to the width (element-wise addition, an ablation).
    """

    channels: int
    dim: int
    blocks: tuple[int, ...] = (1,)
    gate: Gate = "channel"
    refined: bool = True

    def __post_init__(self) -> None:
        if self.gate not in typing.get_args(Gate):
            raise UserError(f"gate {self.gate!r}", where="injector", fix=f"use one of {', '.join(typing.get_args(Gate))}")
        if not self.blocks or min(self.blocks) < 0 or len(set(self.blocks)) != len(self.blocks):
            raise UserError(f"blocks {self.blocks}", where="injector", fix="name different blocks, from 0")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> InjectorConfig:
        """Back from `dataclasses.asdict`, also after a trip through JSON. Raises UserError."""
        try:
            return cls(**{**record, "blocks": tuple(record["blocks"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"the injector's configuration lacks or misnames {error}", where="part", fix="restore its config.json") from None
