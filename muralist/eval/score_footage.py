"""Scores for the clips of a folder of footage, written into its `videos.csv`: what training chooses by."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from muralist.data.sources import Footage
from muralist.errors import UserError
from muralist.eval.registry import Setup, Unavailable, available
from muralist.eval.source import open_source
from muralist.store import atomic

COLUMN = "score"


def score_footage(manifest: Path, footage: Footage, name: str, tell: Callable[[str], object]) -> int:
    """Measure every clip without a score and write each number at once; returns how many were measured.

    Raises UserError for an unknown metric, one that is not of a single video, and one whose tool or weights are not there.
    """
    metric = available().get(name)
    if metric is None or metric.kind != "video":
        known = ", ".join(key for key, value in available().items() if value.kind == "video")
        raise UserError(f"no metric {name!r} of a single video", where="metric", fix=f"use one of {known}")
    todo = [(line, clip) for line, clip in enumerate(footage.clips) if clip.score is None]
    for done, (line, clip) in enumerate(todo, start=1):
        source = open_source(clip.path)
        try:
            meter = metric.start(Setup(prompts={source.path: clip.caption}), source)
            for frame in source.frames():
                meter.add(frame)
            value = meter.result()[name]
        except Unavailable as reason:
            raise UserError(str(reason), where=name, fix="set up what it needs, or use another --metric") from None
        _write(manifest, line, value)
        tell(f"[{done}/{len(todo)}] {clip.path.name}: {value:.4g}")
    return len(todo)


def _write(manifest: Path, line: int, value: float) -> None:
    """Replace the file as a whole: a stop leaves the old one or the new one."""
    with open(manifest, newline="", encoding="utf-8-sig") as handle:
        rows = csv.DictReader(handle)
        columns, records = list(rows.fieldnames or []), list(rows)
    records[line][COLUMN] = f"{value:.6g}"
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns if COLUMN in columns else [*columns, COLUMN], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    atomic.write_file(manifest, text.getvalue().encode())
