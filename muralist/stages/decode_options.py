"""What a configuration says about decoding; apart from `decode`, so that checking a request does not import diffusers (seconds)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from muralist.nn.kinds import LARGEST, require_whole

MOST_BYTES = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """What a configuration says about decoding.

    `memory_bytes` bounds the decoder's own memory. It is a number of the configuration, not of the moment: the plan decides the last bits of
    the frames, so a resumed run must find the same plan. `order` and `tile` (pixels) overrule the planner.
    """

    memory_bytes: int = 4 << 30
    order: Literal["auto", "time", "tile"] = "auto"
    tile: int | None = None

    def __post_init__(self) -> None:
        require_whole("decode.memory_bytes", self.memory_bytes, 1, MOST_BYTES)
        if self.tile is not None:
            require_whole("decode.tile", self.tile, 1, LARGEST)
