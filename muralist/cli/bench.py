"""`muralist bench`: the speed and memory of the field's figures, measured on this machine with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muralist.cli._options import Debug, Device
from muralist.errors import UserError

if TYPE_CHECKING:
    from muralist.bench.table import Row

WIDTHS = ("real", "small")
MAX_MINUTES = 600


def command(
    what: Annotated[str, typer.Argument(help="gpu: the table H1 to H11.")],
    only: Annotated[str | None, typer.Option(help="Rows to run, such as H1,H8. [default: all]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows alone.")] = False,
    width: Annotated[str, typer.Option(help="real: Wan2.1-1.3B and Wan2.2-5B; small: whether every row runs, on any machine.")] = "real",
    minutes: Annotated[float, typer.Option(help="No row is begun after this.")] = 9.0,
    device: Device = "auto",
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for bench.json and bench.md.")] = "bench",
    debug: Debug = False,
) -> int:
    """Measure both sides of every ratio in one process, on models with random weights of published shapes."""
    if what != "gpu":
        raise UserError(f"unknown benchmark {what!r:.40}", where="bench", fix="use gpu")
    if width not in WIDTHS:
        raise UserError(f"unknown width {width!r:.40}", where="width", fix=f"use one of {', '.join(WIDTHS)}")
    if not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"{minutes} minutes", where="minutes", fix="use a number above 0, such as 9")
    if only is not None and quick:
        raise UserError("rows and --quick at once", where="only", fix="give one of them")
    from muralist.base import pick_device
    from muralist.store.paths import typed_path

    target, folder = pick_device(device), typed_path(output, "output")
    if target.type == "cpu" and width == "real":
        raise UserError("real sizes take hours on a CPU", where="width", fix="use --width small here, or --device cuda on a machine that has one")
    return _execute(_names(only, quick), target, width, folder, minutes)


def _names(only: str | None, quick: bool) -> list[str]:
    from muralist.bench.rows import ROWS
    from muralist.bench.table import QUICK

    if only is None:
        return list(QUICK if quick else ROWS)
    asked = list(dict.fromkeys(name.strip().upper() for name in only.split(",")))
    if unknown := [name for name in asked if name not in ROWS]:
        raise UserError(f"no row {unknown[0]!r:.20}", where="only", fix=f"use some of {', '.join(sorted(ROWS, key=lambda name: int(name[1:])))}")
    return [name for name in ROWS if name in asked]


def _execute(names: list[str], device, width: str, folder: Path, minutes: float) -> int:
    from muralist.base import pick_dtype
    from muralist.bench import table
    from muralist.bench.lab import Lab
    from muralist.cli import _show
    from muralist.store import atomic

    _show.quiet()
    with atomic.reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = table.run(Lab(device, pick_dtype(device), width), names, folder, minutes=minutes, tell=_tell)
    print(f"{folder / 'bench.md'}: {sum(not row.reason for row in rows)} of {len(rows)} rows")
    return 0


def _tell(row: Row) -> None:
    from muralist.bench.table import shown

    print(f"{row.name}  {row.title}" + (f": {row.reason}" if row.reason else ""), flush=True)
    for figure in row.figures:
        print(f"    {figure.what}: {shown(figure)}", flush=True)
