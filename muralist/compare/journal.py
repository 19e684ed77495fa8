"""What a run cost, told by its own events: a file that only grows, one JSON object a line.

A run that is killed loses the line it was writing and nothing else, so the costs of a run that took several attempts are the sum over
them, of the work that was kept: of an interrupted stage that is the time up to its last finished unit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Wall seconds of a stage, and the highest resident and device memory in bytes while it ran (0: unknown, or no device)."""

    stage: str
    seconds: float
    peak_rss: int
    peak_device: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Stages in the order they ran; `attempts`: processes that worked on them. After more than one, weights were loaded more than once."""

    stages: tuple[StageCost, ...]
    attempts: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_rss(self) -> int:
        return max((stage.peak_rss for stage in self.stages), default=0)

    @property
    def peak_device(self) -> int:
        return max((stage.peak_device for stage in self.stages), default=0)


class Journal:
    """Appends the events of one attempt (`begin`, `advance`, `end` of `muralist generate --json`), each with its moment."""

    def __init__(self, path: Path):
        self._path, self._start = path, time.monotonic()
        self._write({"event": "attempt"})

    def __call__(self, event: dict[str, Any]) -> None:
        if event.get("event") in ("begin", "advance", "end"):
            self._write(event)

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps(event | {"t": round(time.monotonic() - self._start, 3)}, sort_keys=True)
        with open(self._path, "a+b") as handle:
            torn = handle.tell() and (handle.seek(-1, 2), handle.read(1))[1] != b"\n"
            handle.write((b"\n" if torn else b"") + line.encode() + b"\n")


def read_costs(path: Path) -> Costs:
    """The costs of all attempts together; none where there is no journal."""
    stages: dict[str, StageCost] = {}
    attempts, begun, kept = 0, {}, {}  # of this attempt: when each stage began, its seconds up to the last finished unit
    for event in _events(path):
        kind, stage = event["event"], event.get("stage")
        if kind == "attempt":
            _add(stages, kept)
            attempts, begun, kept = attempts + 1, {}, {}
        elif kind == "begin":
            begun[stage], kept[stage] = event["t"], 0.0
        elif kind == "advance" and stage in begun:
            kept[stage] = event["t"] - begun[stage]
        elif kind == "end":
            kept.pop(stage, None)
            _add(stages, {stage: event["seconds"]}, event)
    _add(stages, kept)
    return Costs(tuple(stages.values()), attempts)


def _add(stages: dict[str, StageCost], seconds: dict[str, float], peaks: dict[str, Any] | None = None) -> None:
    for stage, took in seconds.items():
        old = stages.get(stage, StageCost(stage=stage, seconds=0.0, peak_rss=0, peak_device=0))
        highest = {name: max(getattr(old, name), (peaks or {}).get(name, 0)) for name in ("peak_rss", "peak_device")}
        stages[stage] = StageCost(stage=stage, seconds=old.seconds + took, **highest)


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal; a torn one is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("t"), int | float):
            yield event
