"""What a check hands back: one finding, and the curve it was read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One kind of artifact in one file.

    `found` is None where it could not be told, and `value` then may be None; else it says whether `value` has passed `threshold` (and the
    check's other conditions, which the sentence names). `where` holds positions in pixels or frames, by name.
    """

    name: str
    value: float | None
    unit: str
    threshold: float
    found: bool | None
    sentence: str
    where: dict[str, list[int]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A curve `y` over `x`, with the threshold as a level and places of interest as marks."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    y: Sequence[float]
    level: float | None = None
    marks: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A finding and what may be drawn of it."""

    finding: Finding
    plots: tuple[Plot, ...] = ()


def untold(name: str, unit: str, threshold: float, why: str) -> Result:
    """Nothing can be said; `why` completes the sentence "cannot be told: ..."."""
    return Result(Finding(name=name, value=None, unit=unit, threshold=threshold, found=None, sentence=f"Cannot be told: {why}."))
