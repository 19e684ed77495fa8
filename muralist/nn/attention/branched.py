"""Local windows with compressed branches beside them: what a base needs to paint a large video at once (Hu et al., arXiv 2510.18775)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from muralist.errors import UserError
from muralist.nn.kinds import LARGEST, require_whole
from muralist.nn.windows import TRAVEL, Partition, Shape, WindowAttention, partition, partition_evenly, traveled


@dataclass(frozen=True, slots=True)
class BranchedWindows:
    """Attention in K x K windows of all frames, fused with the base's compressed branches (`nn/branches.py`), those of them that are named.

    `odd`: what blocks with an odd number do to let information cross the borders: one window more along each side (`more`, equation 9), windows
    shifted by half a side (`shifted`), nothing (`same`). `plain`: numbers of blocks with full attention and no branches.
    `travel`: windows, those among pooled tokens too, stand elsewhere at every step (`nn/windows.split_evenly`); not the paper's, whose stand still, and
    where objects are cut along their borders. It is for branches that were trained so.
    `place`: which of four places they stand at in a forward, which is refinement's to say.
    """

    windows: int = 4
    odd: Literal["more", "shifted", "same"] = "more"
    branches: tuple[str, ...] = ()
    plain: tuple[int, ...] = ()
    travel: bool = False
    place: int = 0

    def __post_init__(self) -> None:
        require_whole("attention.windows", self.windows, 1, LARGEST)
        for number in self.plain:
            require_whole("attention.plain", number, 0, LARGEST)
        require_whole("attention.place", self.place, 0, len(TRAVEL) - 1)
        for name, values in (("branches", self.branches), ("plain", self.plain)):
            if len(set(values)) != len(values):
                raise UserError(", ".join(map(str, values)), where=f"attention.{name}", fix="name each once")
        if self.odd not in ("more", "shifted", "same"):
            raise UserError(f"odd {self.odd!r:.40}", where="attention.odd", fix="use more, shifted or same")

    def partitions(self, token_shape: Shape) -> tuple[Partition, ...]:
        """Of blocks with even and with odd numbers. Raises UserError for more windows than there are rows or columns."""
        self.require_fit(token_shape)
        if self.odd == "shifted":
            windows = self.swin(token_shape)
            return tuple(partition(token_shape, windows.size, shifted=shifted, start=windows.start) for shifted in (False, True))
        return tuple(partition_evenly(token_shape, (1, count, count), self.place, shifted) for count, shifted in self.kinds)

    @property
    def kinds(self) -> tuple[tuple[int, bool], ...]:
        """How many windows blocks with even and with odd numbers have along a side, and if those that travel stand half a side further."""
        return (self.windows, False), (self.windows + (self.odd == "more"), self.odd == "more")

    def at(self, step: int) -> BranchedWindows:
        """Where windows stand at a denoising step."""
        return replace(self, place=step % len(TRAVEL)) if self.travel else self

    def swin(self, token_shape: Shape) -> WindowAttention:
        """Windows that odd blocks shift by half a side."""
        return traveled(WindowAttention(self.largest(token_shape)), self.place)

    def largest(self, token_shape: Shape) -> Shape:
        """Sides of the largest of K x K windows."""
        frames, rows, columns = token_shape
        return (frames, math.ceil(rows / self.windows), math.ceil(columns / self.windows))

    def require_fit(self, token_shape: Shape) -> None:
        """UserError for more windows than there are rows or columns."""
        most = self.windows + (self.odd == "more")
        if most > min(token_shape[1:]):
            what = f"{most} windows along {min(token_shape[1:])} tokens"
            raise UserError(what, where="attention.windows", fix="use fewer windows or a larger size")
