"""`muralist compare`: recipes on the same prompts and seeds, or any files, side by side in one report."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muralist.cli import _options, _show
from muralist.cli._options import Debug, Json, VideoOptions, takes_video_options
from muralist.errors import UserError

if TYPE_CHECKING:
    from muralist.compare.grid import Cell, Outcome, Side
    from muralist.compare.report import Comparison, Ruler
    from muralist.eval.source import Source

NOT_COMMON = {"seed", "recipe"}  # of the video options: they differ from cell to cell


@partial(takes_video_options, without=NOT_COMMON)
def command(
    video: VideoOptions,
    files: Annotated[list[str] | None, typer.Argument(help="Videos, or folders of them, to compare as they are.")] = None,
    recipes: Annotated[str | None, typer.Option("--recipes", metavar="A,B", help="Recipes to run; see `muralist recipes`.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="'NAME: RECIPE SETTING=VALUE ...'", help="A recipe with settings as of --set, under a name of its own. Repeatable."),
    ] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="FILE", help="Text file, one prompt a line.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Such as 0,1 or 0-3; the same for every recipe.")] = "0",
    output: Annotated[str, typer.Option("--output", "-o", help="Directory of the runs, results.json, results.csv and report.html.")] = "compare",
    metrics: Annotated[str | None, typer.Option("--metrics", help="Names, separated by commas. [default: all that need nothing but the video]")] = None,
    reference: Annotated[str | None, typer.Option("--reference", metavar="DIR", help="Videos for metrics that compare with references.")] = None,
    weights: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="Weights of a network, as for `muralist eval`. Repeatable.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Compare recipes or files. Stopped at any time, the same command goes on where it was."""
    from muralist.base import pick_device
    from muralist.cli.eval import given_weights
    from muralist.compare import quality
    from muralist.compare.grid import read_sides
    from muralist.compare.report import Ruler
    from muralist.eval.registry import Setup
    from muralist.store.paths import typed_path

    named = recipes is not None or bool(variant)
    if files and (named or prompts is not None):
        raise UserError("files and recipes are given", where="files", fix="compare either files or recipes")
    if not files and (not named or prompts is None):
        raise UserError("nothing to compare", where="files", fix="name files, or give --recipes or --variant, and --prompts")
    root, chosen = typed_path(output, "output"), quality.pick(metrics, reference=reference is not None)
    subject = _sources(files) if files else cells(read_sides(recipes, variant or ()), prompts, seeds, video)
    ruler = Ruler(
        tuple(chosen), Setup(weights=given_weights(weights or []), device=pick_device(video.device)), tuple(_sources([reference]) if reference else ())
    )
    return _execute(subject, root, ruler, video.model, json=json)


def cells(sides: Sequence[Side], prompts: str, seeds: str, video: VideoOptions) -> list[Cell]:
    """The grid in the order in which it runs: all sides of a scene one after another, so that an early stop leaves whole scenes."""
    from muralist.cli.generate import prepare
    from muralist.compare.grid import Cell, read_prompts, read_seeds
    from muralist.request import weights_of
    from muralist.store.paths import typed_path

    texts, numbers = read_prompts(typed_path(prompts, "prompts")), read_seeds(seeds)
    found = []
    for prompt in texts:
        for seed in numbers:
            for side in sides:
                options = replace(video, recipe=side.recipe, seed=seed, settings=[*(video.settings or ()), *side.settings])
                job = prepare(prompt, options, None)
                found.append(Cell(side.name, job.request, weights_of(job.request.config, job.info), tuple(words(options))))
    _options.notes[:] = dict.fromkeys(_options.notes)  # the same for every cell
    return found


def words(video: VideoOptions) -> Iterator[str]:
    """The options as they are typed; those that were left out stay out. A model's folder is named absolutely: each run has a directory of its own."""
    from muralist.store.weights import folder_of

    for field in fields(VideoOptions):
        value = getattr(video, field.name)
        if field.name == "settings":
            yield from itertools.chain.from_iterable(("--set", setting) for setting in value or ())
            continue
        if field.name == "model":
            value = folder_of(value) or value
        if value is not None and (value != field.default or field.name in NOT_COMMON):
            name = "--" + field.name.replace("_", "-")
            yield from (f"{name}={value}",) if str(value).startswith("-") else (name, str(value))


def _sources(files: list[str]) -> list[Source]:
    from muralist.eval.source import find_sources
    from muralist.store.paths import typed_path

    return find_sources([typed_path(file, "files") for file in files])


def _execute(subject: Sequence[Cell] | Sequence[Source], root: Path, ruler: Ruler, model: str, *, json: bool) -> int:
    """Make what is to be made, then the report."""
    from muralist.compare import grid, report
    from muralist.store.run import RunDirectory

    try:
        directory = RunDirectory.create(root, {"comparison": True})
    except (FileExistsError, NotADirectoryError, FileNotFoundError):
        raise UserError(f"{root} cannot be made a directory", where="output", fix="name a directory") from None
    with directory as run, _interruptible(root):
        _show.notes()
        if isinstance(subject[0], grid.Cell):
            outcomes = grid.run_grid(subject, run.root, tell=partial(_tell_cell, len(subject), json))
            comparison = report.of_runs(outcomes, run.root, model)
        else:
            comparison = report.of_files(subject)
        results = report.write(comparison, run.root, ruler, partial(_tell_measured, json))
    return _finish(comparison, results, root, json=json)


@contextmanager
def _interruptible(root: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise _show.Interrupted(f"; finished runs and measures are in {root}, the same command goes on") from None


def _tell_cell(total: int, json: bool, number: int, outcome: Outcome) -> None:
    """One line a cell, the moment it is finished or found finished."""
    request = outcome.cell.request
    if json:
        facts = {"side": outcome.cell.side, "recipe": request.recipe, "prompt": request.prompt, "seed": request.seed, "failure": outcome.failure}
        _show.emit({"event": "cell", "number": number + 1, "total": total, "seconds": round(outcome.costs.seconds, 3), **facts})
        return
    what = f"failed: {outcome.failure}" if outcome.failure else _show.span(outcome.costs.seconds)
    print(_show.plain(f"[{number + 1}/{total}] {outcome.cell.side} | {request.prompt[:60]} | seed {request.seed}: {what}"), file=sys.stderr, flush=True)


def _tell_measured(json: bool, what: str) -> None:
    if not json:
        print(_show.plain(f"measuring {what}"), file=sys.stderr, flush=True)


def _finish(comparison: Comparison, results: dict[str, Any], root: Path, *, json: bool) -> int:
    """The summary on standard output; when nothing at all could be made, the first reason as the one line."""
    failures = [entry.failure for entry in comparison.entries if entry.failure]
    if json:
        kept = {name: results[name] for name in ("sides", "summary", "best", "skipped")}
        _show.emit({"event": "result", "report": str(root / "report.html"), "failed": len(failures), **kept})
    else:
        _print_summary(results)
        for name, why in results["skipped"].items():
            print(f"muralist: note: {_show.plain(f'{name} is skipped: {why}')}", file=sys.stderr)
        print(root / "report.html")
    if len(failures) == len(comparison.entries):
        raise UserError(f"no run succeeded ({failures[0]})", where="compare", fix="mend that and give the same command again")
    return 0


def _print_summary(results: dict[str, Any]) -> None:
    def cell(side: str, name: str, unit: str) -> str:
        if name not in results["summary"][side]:
            return ""
        mean = results["summary"][side][name]["mean"]
        text = {"B": _show.amount, "s": _show.span}.get(unit, "{:.4g}".format)(mean)
        return text + (" *" if side in results["best"].get(name, {}).get("sides", ()) else "")

    sides = results["sides"]
    found = {name for values in results["summary"].values() for name in values}
    rows = [[row["label"], *(cell(side, name, row["unit"]) for side in sides)] for name, row in results["measures"].items() if name in found]
    print(f"{results['subtitle']} (* best)")
    _show.table("", ["", *sides], rows, numbers=sides)
