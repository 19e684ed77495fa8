"""Scores for the clips of a folder of footage, written into its `videos.csv`: what training chooses by."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from muralist.data.sources import Clip, Footage
from muralist.errors import UserError
from muralist.eval.registry import Metric, Setup, Unavailable, available
from muralist.eval.source import open_source
from muralist.store import atomic

SCORE, METRIC = "score", "scored_by"  # columns


def score_footage(manifest: Path, footage: Footage, name: str, tell: Callable[[str], object]) -> tuple[int, int]:
    """Measure every clip without a score and write each number at once; returns how many were measured, and how many could not be.

    Raises UserError for an unknown metric, one that is not of a single video, and scores of another metric in the column.
    """
    metric = available().get(name)
    if metric is None or metric.kind != "video":
        known = ", ".join(key for key, value in available().items() if value.kind == "video")
        raise UserError(f"no metric {name!r} of a single video", where="metric", fix=f"use one of {known}")
    if others := sorted({clip.scored_by for clip in footage.clips if clip.score is not None and clip.scored_by} - {name}):
        raise UserError(f"{manifest} holds scores of {others[0]}", where="metric", fix=f"use --metric {others[0]}, or empty the column")
    todo = [clip for clip in footage.clips if clip.score is None]
    missing = 0
    for done, clip in enumerate(todo, start=1):
        try:
            value = _measure(metric, clip)
        except (Unavailable, UserError) as reason:
            missing += 1
            if missing == done == len(todo) or (missing == done and isinstance(reason, Unavailable) and metric.needs):
                raise UserError(str(reason), where=name, fix="set up what it needs, or use another --metric") from None
            tell(f"[{done}/{len(todo)}] {clip.name}: not measured, {reason}")
            continue
        _write(manifest, clip, value, name)
        tell(f"[{done}/{len(todo)}] {clip.name}: {value:.4g}")
    return len(todo) - missing, missing


def _measure(metric: Metric, clip: Clip) -> float:
    source = open_source(clip.path)
    meter = metric.start(Setup(prompts={source.path: clip.caption}), source)
    for frame in source.frames():
        meter.add(frame)
    return meter.result()[metric.name]


def _write(manifest: Path, clip: Clip, value: float, metric: str) -> None:
    """Replace the file as a whole: a stop leaves the old one or the new one. Lines are found by their file, whoever edits the rest meanwhile."""
    with open(manifest, newline="", encoding="utf-8-sig") as handle:
        rows = csv.DictReader(handle)
        columns, records = list(rows.fieldnames or []), list(rows)
    for record in records:
        if record["file"] == clip.name and record["caption"].strip() == clip.caption:
            record |= {SCORE: f"{value:.6g}", METRIC: metric}
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[*columns, *(name for name in (SCORE, METRIC) if name not in columns)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    atomic.write_file(manifest, text.getvalue().encode())
