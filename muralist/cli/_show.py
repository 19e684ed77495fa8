"""What the commands show: progress, tables, JSON lines, and errors as one line.

Bars, notes and errors go to standard error, results to standard output, so that a pipe receives results only. With `--json` standard
output is one JSON object a line, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from muralist.cli import _options
from muralist.errors import Note, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from muralist.progress import StageReport

UNITS = ("B", "kB", "MB", "GB", "TB")


class Interrupted(Exception):
    """Ctrl-C during a run; the text continues the line `muralist: interrupted`."""


# --- errors -----------------------------------------------------------------------------------------------------------------------


def error_line(error: Exception) -> str | None:
    """WHERE: WHAT; FIX of an error that the user can mend, None for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, typer.TyperException):
        return str(_usage(error))
    from muralist.nn.out_of_memory import ran_out  # torch takes seconds to import, and is there where anything else goes wrong

    if ran_out(error):
        return str(UserError("the memory does not suffice", where="memory", fix="use a smaller --size, fewer --num-frames, or --memory low"))
    return None


def _usage(error: typer.TyperException) -> UserError:
    """A usage error in our form; the command's own usage text would be several lines."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    where = getattr(error, "option_name", None) or (parameter.opts[0] if parameter else "command line")
    what = error.message or error.format_message()
    return UserError(what.rstrip("."), where=where, fix=f"see `{context.command_path if context else 'muralist'} --help`")


# --- text -------------------------------------------------------------------------------------------------------------------------


def amount(size: float) -> str:
    """Bytes for people, decimal units."""
    power = 0
    while size >= 999.5 and power < len(UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.3g} {UNITS[power]}"


def span(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"


def plain(text: Any) -> str:
    """Printable characters only: what a file or a prompt says must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def notes() -> None:
    """Say what was adjusted, once."""
    for text in _options.notes:
        print(f"muralist: note: {plain(text)}", file=sys.stderr)
    _options.notes.clear()


def emit(record: dict[str, Any]) -> None:
    """One JSON line on standard output, at once. A reader who has seen enough (`| head -1`) does not stop the work."""
    try:
        print(json.dumps(record, sort_keys=True, default=str), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[str] = ()) -> None:
    """A table on standard output; the columns named in `numbers` are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in columns:
        grid.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(plain(cell)) for cell in row))
    console().print(grid)


def report(reports: Sequence[StageReport]) -> None:
    """The closing table: seconds and peaks of each stage."""
    device = any(r.peak_device for r in reports)
    columns = ["stage", "time", "peak memory", *(["peak GPU memory"] if device else [])]

    def row(name: str, seconds: float, rss: int, gpu: int) -> list[str]:
        return [name, span(seconds), amount(rss), *([amount(gpu)] if device else [])]

    rows = [row(r.stage, r.seconds, r.peak_rss, r.peak_device) for r in reports]
    highest = [max((getattr(r, name) for r in reports), default=0) for name in ("peak_rss", "peak_device")]
    table("", columns, [*rows, row("total", sum(r.seconds for r in reports), *highest)], numbers=columns[1:])


def quiet() -> None:
    """Silence the libraries' own bars and warnings: ours say what matters."""
    import warnings

    import diffusers.utils.logging
    import transformers.utils.logging

    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=Note)
    warnings.showwarning = lambda message, *_, **__: print(f"muralist: note: {plain(message)}", file=sys.stderr)
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
