"""When work in progress is worth saving again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

TIMES = 10.0  # of what a save took, the least time of work between two: they cost a tenth at most, and a kill loses no more than ten saves would take


class Pace:
    """Saves that take seconds come seldom, those that take milliseconds often: the work since the last one must have taken `TIMES` as long as it did."""

    def __init__(self) -> None:
        self._saved_at, self._took = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= TIMES * self._took

    @contextmanager
    def saving(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._took = self._saved_at - begun
