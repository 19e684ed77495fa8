"""Measure the videos of a comparison, and keep what was measured beside their pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muralist.errors import UserError
from muralist.eval.measure import Row, chosen, measure
from muralist.eval.registry import Metric, Setup
from muralist.eval.source import Source
from muralist.store import atomic


def pick(text: str | None, *, reference: bool) -> list[Metric]:
    """Metrics as typed, separated by commas; None: all that need nothing. UserError on an unknown name, or on one without its reference."""
    names = None if text is None else [name.strip() for name in text.split(",") if name.strip()]
    metrics = chosen(names, reference=reference)
    if lonely := [metric.name for metric in metrics if metric.kind != "video" and not reference]:
        raise UserError(f"{lonely[0]} compares with references", where="metrics", fix="give --reference DIR, or leave it out")
    return metrics


def of_video(source: Source, metrics: Sequence[Metric], setup: Setup, references: Sequence[Source], kept: Path, skipped: dict[str, str]) -> dict[str, float]:
    """Values of one video by name, of the metrics that look at single videos.

    Args:
        kept: where values are kept; what stands there from an earlier start, for the same files, is not measured again.
        skipped: gets the reason of each metric that cannot be measured.
    """
    metrics = [metric for metric in metrics if metric.kind != "set"]
    files = (source.path, *(one.path for one in references), *(Path(setup.weights[name]) for name in sorted(setup.weights)))
    stamp = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.exists()]
    found = _kept(kept, stamp)
    if missing := [metric for metric in metrics if metric.name not in found]:
        for row in measure([source], missing, references=references, setup=setup).rows:
            found |= _values(row, skipped)
        atomic.write_json(kept, {"stamp": stamp, "values": found})
    return {key: value for metric in metrics for key, value in found.get(metric.name, {}).items()}


def of_side(sources: Sequence[Source], metrics: Sequence[Metric], setup: Setup, references: Sequence[Source], skipped: dict[str, str]) -> dict[str, float]:
    """The distances between all videos of a side and all references, by metric."""
    metrics = [metric for metric in metrics if metric.kind == "set"]
    if not metrics or not sources:
        return {}
    rows = measure(sources, metrics, references=references, setup=setup).rows
    return {row.metric: row.value for row in rows if _values(row, skipped) and math.isfinite(row.value)}


def _values(row: Row, skipped: dict[str, str]) -> dict[str, dict[str, float]]:
    """{metric: {name: value}} of a row, every name beginning with the metric's; nothing if it was skipped."""
    if row.skipped is not None:
        skipped[row.metric] = row.skipped
        return {}
    named = {name if name.startswith(row.metric) else f"{row.metric}.{name}": value for name, value in row.values.items()}
    return {row.metric: {name: value for name, value in named.items() if math.isfinite(value)}}


def _kept(path: Path, stamp: list[Any]) -> dict[str, dict[str, float]]:
    try:
        kept = atomic.read_json(path)
        return kept["values"] if kept["stamp"] == stamp else {}
    except (UserError, KeyError, TypeError):
        return {}
