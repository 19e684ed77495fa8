"""How stages tell what they do: one small protocol, so that neither a bar nor a log is known to the library."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch


class Observer(Protocol):
    """Told when a stage begins (with its number of units of work), moves and ends."""

    def begin(self, stage: str, total: int) -> None: ...

    def advance(self, stage: str, done: int) -> None: ...

    def end(self, stage: str, report: StageReport) -> None: ...


class Silent:
    """An observer that only keeps the reports."""

    def __init__(self):
        self.reports: list[StageReport] = []

    def begin(self, stage: str, total: int) -> None:
        """Nothing to show."""

    def advance(self, stage: str, done: int) -> None:
        """Nothing to show."""

    def end(self, stage: str, report: StageReport) -> None:
        self.reports.append(report)


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a stage cost: wall seconds, peak resident memory of the process in bytes, peak device memory in bytes (0 on a CPU)."""

    stage: str
    seconds: float
    peak_rss: int
    peak_device: int


@contextmanager
def measured(observer: Observer, stage: str, total: int) -> Iterator[None]:
    """Announce a stage, watch its memory, report when it is through."""
    observer.begin(stage, total)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    with _peak_rss() as peak:
        yield
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    observer.end(stage, StageReport(stage, time.monotonic() - started, peak(), device))


@contextmanager
def _peak_rss(period: float = 0.1) -> Iterator:
    """Sample the resident set in a thread: the kernel's own high-water mark covers the whole process life, not one stage."""
    process, done, highest = psutil.Process(), threading.Event(), [0]

    def sample() -> None:
        while True:
            highest[0] = max(highest[0], process.memory_info().rss)
            if done.wait(period):
                return

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield lambda: max(highest[0], process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
