"""From videos to the report: pictures, measures, results.json, results.csv and report.html in one directory."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muralist.compare import grid, page, quality, table
from muralist.compare.media import folder_name, make_media
from muralist.compare.seams import decode_borders
from muralist.compare.table import Entry, Scene
from muralist.errors import UserError
from muralist.eval.registry import Metric, Setup
from muralist.eval.source import Source, open_source
from muralist.store import atomic

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Ruler:
    """What is measured, with what: metrics, their setup, and the videos that some of them compare with."""

    metrics: tuple[Metric, ...]
    setup: Setup
    references: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sides (columns), scenes, one entry for each pair that there is, and the source of every entry that has a video."""

    sides: tuple[str, ...]
    scenes: tuple[Scene, ...]
    entries: tuple[Entry, ...]
    sources: dict[int, Source]  # by the entry's number


def of_runs(outcomes: Sequence[grid.Outcome], root: Path, model: str) -> Comparison:
    """The cells of a grid: a recipe or a variant of one is a side, a prompt with a seed is a scene. A video that cannot be read counts as a failure."""
    scenes = list(dict.fromkeys(Scene(o.cell.request.prompt, o.cell.request.seed) for o in outcomes))
    entries, sources = [], {}
    for number, outcome in enumerate(outcomes):
        request, record = outcome.cell.request, outcome.cell.record()
        entry = Entry(side=outcome.cell.side, scene=scenes.index(Scene(request.prompt, request.seed)), command=record["command"])
        entry.path, entry.failure, entry.costs = outcome.folder.relative_to(root).as_posix(), outcome.failure, outcome.costs
        if not entry.failure:
            try:
                sources[number] = open_source(outcome.video)
            except UserError as error:
                entry.failure = str(error)
        entries.append(entry)
        _describe(entry, sources.get(number), model)
    return Comparison(tuple(dict.fromkeys(e.side for e in entries)), tuple(scenes), tuple(entries), sources)


def of_files(files: Sequence[Source]) -> Comparison:
    """Files: each is a side, and all of them are one scene."""
    stems = Counter(source.path.stem for source in files)
    short = [source.path.stem if stems[source.path.stem] == 1 else str(source.path) for source in files]
    entries = tuple(Entry(side=side, scene=0, path=str(source.path)) for side, source in zip(short, files))
    for entry, source in zip(entries, files):
        _describe(entry, source, None)
    return Comparison(tuple(short), (Scene(),), entries, dict(enumerate(files)))


def _describe(entry: Entry, source: Source | None, model: str | None) -> None:
    if source:
        entry.info = source.info
        entry.borders = decode_borders(source.info.metadata, model)
        entry.add_costs()


def write(comparison: Comparison, root: Path, ruler: Ruler, tell: Tell) -> dict[str, Any]:
    """Measure, make the pictures, write the three files; returns the content of results.json.

    A file that turns out damaged while it is read becomes a failure of its own entry.
    """
    skipped: dict[str, str] = {}
    for number, source in comparison.sources.items():
        entry = comparison.entries[number]
        tell(f"{entry.side}: {entry.path}")
        name = folder_name(entry.path or entry.side)
        try:
            entry.media = make_media(source, root, name)
        except UserError as error:
            entry.failure, entry.values = str(error), {}
            continue
        kept = root / "media" / name / "values.json"
        entry.values = quality.of_video(source, ruler.metrics, ruler.setup, ruler.references, kept, skipped) | entry.values
    results = _results(comparison, ruler, skipped)
    atomic.write_json(root / "results.json", results)
    rows = table.csv_text(comparison.entries, comparison.scenes)
    atomic.write_file(root / "results.csv", rows.encode("utf-8", "backslashreplace"))
    atomic.write_file(root / "report.html", page.render(results, [entry.media for entry in comparison.entries]).encode())
    return results


def _results(comparison: Comparison, ruler: Ruler, skipped: dict[str, str]) -> dict[str, Any]:
    sides, scenes, entries = comparison.sides, comparison.scenes, comparison.entries
    rows = table.measures(ruler.metrics)
    summary = table.summarise(entries, sides, rows)
    for side in sides:
        sources = [source for number, source in comparison.sources.items() if entries[number].side == side and not entries[number].failure]
        for name, value in quality.of_side(sources, ruler.metrics, ruler.setup, ruler.references, skipped).items():
            summary[side][name] = {"mean": value, "error": None, "n": len(sources)}
    return {
        "format": 1,
        "subtitle": _subtitle(comparison),
        "versions": atomic.versions(),
        "machine": f"{platform.machine()} {platform.system()}",
        "sides": list(sides),
        "scenes": [{"prompt": scene.prompt, "seed": scene.seed} for scene in scenes],
        "measures": {name: {key: getattr(row, key) for key in table.Measure.__dataclass_fields__} for name, row in rows.items()},
        "summary": summary,
        "best": table.best(entries, summary, rows),
        "stages": table.mean_stages(entries, sides),
        "skipped": skipped,
        "cells": [entry.record() for entry in entries],
    }


def _subtitle(comparison: Comparison) -> str:
    prompts, seeds = (len({getattr(scene, name) for scene in comparison.scenes}) for name in ("prompt", "seed"))
    if comparison.scenes == (Scene(),):
        return f"{len(comparison.sides)} files"
    failed = sum(entry.failure is not None for entry in comparison.entries)
    counted = [f"{n} {word}{'s' * (n != 1)}" for n, word in ((len(comparison.sides), "column"), (prompts, "prompt"), (seeds, "seed"))]
    return " × ".join(counted) + (f", {failed} of {len(comparison.entries)} runs failed" if failed else "")
