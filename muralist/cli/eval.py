"""`muralist eval`: measure video files of any origin."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muralist.cli import _show
from muralist.cli._options import Debug, Device, Json

if TYPE_CHECKING:
    from muralist.eval.measure import Report, Row
    from muralist.eval.source import Source

ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}


def command(
    files: Annotated[list[str] | None, typer.Argument(help="Video files, or folders of them.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Names with commas between. [default: all that need no weights]")] = None,
    reference: Annotated[str | None, typer.Option(metavar="DIR", help="Videos of the same names to compare with.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Write eval.json and eval.csv there.")] = None,
    weights: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="Weights of a network: lpips, inception, i3d, clip, vae. Repeatable.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show what can be measured, and stop.")] = False,
    device: Device = "auto",
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Measure videos: detail, true resolution, likeness to a reference, flicker, and more."""
    if show:
        return _list(json)
    from muralist.base import pick_device
    from muralist.eval.measure import chosen, measure
    from muralist.eval.registry import Setup
    from muralist.eval.source import find_sources
    from muralist.store.paths import typed_path

    setup = Setup(weights=given_weights(weights or []), device=pick_device(device))
    wanted = chosen(None if metrics is None else [name.strip() for name in metrics.split(",")], reference=reference is not None)
    folder = None if output is None else _folder(output)
    sources = find_sources(typed_path(file, "files") for file in files or [])
    references = find_sources([typed_path(reference, "reference")]) if reference is not None else []
    _show.notes()
    report = measure(sources, wanted, references=references, setup=setup, progress=_Progress(len(sources)))
    _print(report, json=json)
    for path in report.write(folder) if folder else []:
        print(f"muralist: {_show.plain(path)}", file=sys.stderr)
    return 0


def _list(json: bool) -> int:
    from muralist.eval.registry import available

    metrics = available().values()
    if json:
        for m in metrics:
            _show.emit({"event": "metric", "name": m.name, "kind": m.kind, "summary": m.summary, "better": m.better, "origin": m.origin, "needs": m.needs})
        return 0
    rows = [(m.name, ARROWS[m.better], m.unit, m.summary, "--reference" if m.kind != "video" and not m.needs else m.needs) for m in metrics]
    _show.table("", ["metric", "", "unit", "what", "needs"], rows)
    return 0


def given_weights(options: list[str]) -> dict[str, Path]:
    """NAME=PATH options; UserError for anything else."""
    from muralist.errors import UserError
    from muralist.store.paths import typed_path

    found = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or not name or not path:
            raise UserError(f"{option[:60]!r} is not NAME=PATH", where="weights", fix="write --weights lpips=FILE")
        found[name] = typed_path(path, "weights")
        if not found[name].exists():
            raise UserError("no such file", where=f"weights {name}={path[:80]}", fix="check the path")
    return found


def _folder(text: str) -> Path:
    """The output folder; a file of that name is refused before anything is measured."""
    from muralist.errors import UserError
    from muralist.store.paths import typed_path

    folder = typed_path(text, "output")
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", where=str(folder), fix="name a folder for --output")
    return folder


class _Progress:
    """A line on a terminal's standard error, a few times a second."""

    def __init__(self, count: int):
        self._count, self._shown, self._terminal = count, 0.0, sys.stderr.isatty()

    def __call__(self, source: Source, frame: int) -> None:
        last = frame + 1 == source.info.num_frames
        if self._terminal and (last or time.monotonic() - self._shown > 0.2):
            self._shown = time.monotonic()
            line = f"{_show.plain(source.path.name)[:60]}: frame {frame + 1} of {source.info.num_frames}"
            print(f"\r\x1b[K{'' if last else line}", end="", file=sys.stderr, flush=True)


def _print(report: Report, *, json: bool) -> None:
    if json:
        for row in report.rows:
            _show.emit({"event": "result", **row.record()})
        return
    about = {metric.name: metric for metric in report.metrics}
    for source in report.sources:
        rows = [row for row in report.rows if row.file == source.path and not row.skipped]
        title = f"{source.path.name} ({source.info.width}x{source.info.height}, {source.info.num_frames} frames)"
        _show.table(_show.plain(title), ["metric", "", "value", "unit"], [_cells(row, about) for row in rows], numbers=["value"])
    if together := [row for row in report.rows if row.file is None and not row.skipped]:
        _show.table("all files", ["metric", "", "value", "unit"], [_cells(row, about) for row in together], numbers=["value"])
    skipped = dict.fromkeys((row.metric, row.skipped) for row in report.rows if row.skipped)
    if skipped:
        _show.table("skipped", ["metric", "why"], list(skipped))


def _cells(row: Row, about: dict) -> tuple[str, str, str, str]:
    metric = about[row.metric]
    return row.metric, ARROWS[metric.better], "-" if math.isnan(row.value) else f"{row.value:.5g}", metric.unit
