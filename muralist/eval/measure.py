"""Measure videos: one pass over each file feeds all meters, so memory is that of a few frames whatever the length.

A metric that cannot be measured here is skipped and says why; a file that cannot be read stops everything, since a table with a silent
hole is worse than none.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from muralist.errors import UserError
from muralist.eval.registry import Metric, Setup, Unavailable, available
from muralist.eval.source import Source
from muralist.store import atomic

Progress = Callable[[Source, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one file (of all files together where `file` is None): its named values, the first one its own, or why there are none."""

    metric: str
    file: Path | None
    values: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def value(self) -> float:
        """The metric's own value; NaN where it was skipped."""
        return next(iter(self.values.values()), math.nan)

    def record(self) -> dict[str, Any]:
        """JSON form; what is not a number is null."""
        values = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        file = None if self.file is None else str(self.file)
        return {"metric": self.metric, "file": file, "value": next(iter(values.values()), None), "values": values, "skipped": self.skipped}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows, the metrics they are of, and what the files are."""

    rows: list[Row]
    metrics: list[Metric]
    sources: list[Source]

    def record(self) -> dict[str, Any]:
        """JSON form."""
        about = {m.name: {"kind": m.kind, "summary": m.summary, "unit": m.unit, "better": m.better, "origin": m.origin} for m in self.metrics}
        files = [asdict(source.info) | {"file": str(source.path), "prompt": source.prompt} for source in self.sources]
        results = [row.record() for row in self.rows]
        return {"files": [_without_tags(file) for file in files], "metrics": about, "results": results, "versions": atomic.versions()}

    def csv(self) -> str:
        """A line for every named value, and one for every skipped metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("file", "metric", "name", "value", "skipped"))
        for row in self.rows:
            for name, value in row.values.items() or [("", "")]:
                writer.writerow((row.file or "", row.metric, name, value, row.skipped or ""))
        return text.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """`eval.json` and `eval.csv` in `folder`, which is made if need be. UserError if it cannot be."""
        with atomic.reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "eval.json", folder / "eval.csv"]
        atomic.write_json(paths[0], self.record())
        atomic.write_file(paths[1], self.csv().encode("utf-8", "replace"))
        return paths


def _without_tags(file: dict[str, Any]) -> dict[str, Any]:
    """Facts of a file without all that its tags hold."""
    return {key: value for key, value in file.items() if key not in ("metadata", "tags")}


def chosen(names: Sequence[str] | None, *, reference: bool) -> list[Metric]:
    """Metrics by name; None: all that need nothing, those against a reference only where there is one.

    Raises:
        UserError: an unknown name.
    """
    every = available()
    if names is None:
        return [metric for metric in every.values() if not metric.needs and (reference or metric.kind == "video")]
    for name in names:
        if name not in every:
            raise UserError(f"unknown metric {name!r}", where="metrics", fix="see `muralist eval --list`")
    return [every[name] for name in dict.fromkeys(names)]


def measure(
    sources: Sequence[Source],
    metrics: Sequence[Metric],
    *,
    references: Sequence[Source] = (),
    setup: Setup | None = None,
    progress: Progress = lambda source, frame: None,
) -> Report:
    """Measure every metric of every source.

    Args:
        references: what `pair` metrics compare a source with, by file name, and `set` metrics all sources with all of.
        progress: called after each frame with the file and the frame's number.

    Raises:
        UserError: a file cannot be read to its end.
    """
    setup = setup or Setup()
    rows: list[Row] = []
    sets = [_SetJob(metric, setup, references) for metric in metrics if metric.kind == "set"]
    for source in sources:
        reference = _partner(source, references)
        jobs = [_FileJob(metric, setup, source, reference) for metric in metrics if metric.kind != "set"]
        for job in sets:
            job.start(source, job.of_files)
        _one_pass(source, reference, [*jobs, *sets], setup, progress)
        rows += [job.row() for job in jobs]
    for reference in references if any(job.alive for job in sets) else ():
        for job in sets:
            job.start(reference, job.of_references)
        _one_pass(reference, None, sets, setup, progress)
    return Report(rows=rows + [job.row() for job in sets], metrics=list(metrics), sources=list(sources))


def _partner(source: Source, references: Sequence[Source]) -> Source | None:
    """The reference of the same file name, else the one of the same name but for the suffix."""
    same = [r for r in references if r.path.name == source.path.name] or [r for r in references if r.path.stem == source.path.stem]
    return same[0] if same else None


def _one_pass(source: Source, reference: Source | None, jobs: Sequence[_Job], setup: Setup, progress: Progress) -> None:
    """Read a file once, and its reference beside it where a job wants that."""
    others = reference.frames() if any(job.alive and job.pair for job in jobs) else itertools.repeat(None, source.info.num_frames)
    # strict: both readers run to their ends, where they check that nothing is missing
    for number, (frame, other) in enumerate(zip(source.frames(), others, strict=True)):
        frame, other = frame.to(setup.device), None if other is None else other.to(setup.device)
        for job in jobs:
            job.add(frame, other)
        progress(source, number)
    for job in jobs:
        job.finish()


class _Job:
    """A metric at work: its meter, or the reason why there is none."""

    def __init__(self, metric: Metric, skipped: str | None):
        self.metric, self.pair, self.meter, self.skipped = metric, metric.kind == "pair", None, skipped

    @property
    def alive(self) -> bool:
        return self.skipped is None

    def add(self, frame: torch.Tensor, other: torch.Tensor | None) -> None:
        self.guard(lambda: self.meter.add(frame, other) if self.pair else self.meter.add(frame))

    def guard(self, step: Callable[[], Any]) -> Any:
        """Take a step, unless the metric is out; `Unavailable` takes it out. Returns what the step returns, else None."""
        try:
            return step() if self.alive else None
        except Unavailable as reason:
            self.skipped = str(reason)
            return None


class _FileJob(_Job):
    """A `video` or `pair` metric of one file."""

    def __init__(self, metric: Metric, setup: Setup, source: Source, reference: Source | None):
        super().__init__(metric, _mismatch(source, reference) if metric.kind == "pair" else None)
        self.file, self.values = source.path, {}
        self.meter = self.guard(lambda: metric.start(setup, source))

    def finish(self) -> None:
        self.values = self.guard(lambda: self.meter.result()) or {}
        self.meter = None  # its memory is the next file's

    def row(self) -> Row:
        return Row(metric=self.metric.name, file=self.file, values=self.values if self.alive else {}, skipped=self.skipped)


class _SetJob(_Job):
    """A `set` metric: one meter for all files, whose features gather in two heaps."""

    def __init__(self, metric: Metric, setup: Setup, references: Sequence[Source]):
        super().__init__(metric, None if references else "no reference videos")
        self.of_files: list[torch.Tensor] = []
        self.of_references: list[torch.Tensor] = []
        self.heap = self.of_files
        self.meter = self.guard(lambda: metric.start(setup, None))

    def start(self, source: Source, heap: list[torch.Tensor]) -> None:
        self.heap = heap
        self.guard(lambda: self.meter.start(source))

    def finish(self) -> None:
        self.guard(lambda: self.heap.append(self.meter.features()))

    def row(self) -> Row:
        values = self.guard(lambda: self.meter.distance(torch.cat(self.of_files), torch.cat(self.of_references)))
        return Row(metric=self.metric.name, file=None, values=values or {}, skipped=self.skipped)


def _mismatch(source: Source, reference: Source | None) -> str | None:
    """Why a file and its reference cannot be compared frame by frame."""
    if reference is None:
        return "no reference of this name"
    a, b = source.info, reference.info
    if (a.width, a.height, a.num_frames) == (b.width, b.height, b.num_frames):
        return None
    return f"the reference has {b.num_frames} frames of {b.width}x{b.height}, the file {a.num_frames} of {a.width}x{a.height}"
