"""Runs the rows one after the other; what is finished is on disk before the next one starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from muralist.bench.lab import Lab
from muralist.bench.rows import ROWS, Figure
from muralist.errors import UserError
from muralist.nn.out_of_memory import ran_out
from muralist.store import atomic

QUICK = ("H7", "H1", "H8", "H9")


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one row, or why there are none."""

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    reason: str = ""


def run(lab: Lab, names: Sequence[str], folder: Path, *, minutes: float, tell: Callable[[Row], object]) -> list[Row]:
    """Measure the rows, writing `folder/bench.json` and `folder/bench.md` after each. A row that is begun is not cut short."""
    started, rows = time.monotonic(), []
    for name in names:
        spent = (time.monotonic() - started) / 60
        rows.append(_row(name, lab) if spent < minutes else Row(name, _title(name), reason=f"not begun: {spent:.1f} of {minutes:g} minutes were spent"))
        write(folder, rows, lab)
        tell(rows[-1])
    return rows


def _row(name: str, lab: Lab) -> Row:
    """What came before a figure that cannot be had stays."""
    figures: list[Figure] = []
    reason = ""
    try:
        for figure in ROWS[name](lab):
            figures.append(figure)
    except UserError as error:
        reason = str(error)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        reason = f"does not fit: {str(error).splitlines()[0]:.160}"
    return Row(name, _title(name), tuple(figures), reason)


def _title(name: str) -> str:
    return (ROWS[name].__doc__ or "").strip()


def write(folder: Path, rows: Sequence[Row], lab: Lab) -> None:
    """Everything so far."""
    atomic.write_json(folder / "bench.json", {"machine": about(lab), "rows": [_record(row) for row in rows], "measured": _plain(lab.known)})
    atomic.write_file(folder / "bench.md", markdown(rows, lab).encode())


def _record(row: Row) -> dict[str, Any]:
    return asdict(row) | {"figures": [asdict(figure) | {"met": figure.met} for figure in row.figures]}


def _plain(known: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, dict) else value if isinstance(value, float) else asdict(value) for name, value in known.items()}


def about(lab: Lab) -> dict[str, Any]:
    """Machine, driver, versions, and what was measured on it."""
    versions = atomic.versions() | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None}
    ceilings = lab.ceilings()
    return {
        "date": time.strftime("%Y-%m-%d"), "device": ceilings.name, "dtype": str(lab.dtype).removeprefix("torch."), "width": lab.width, "versions": versions,
        "matmul_tflops": ceilings.matmul_flops / 1e12, "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
    }  # fmt: skip


def markdown(rows: Sequence[Row], lab: Lab) -> str:
    """The table, with the goals where they mean something: at real sizes."""
    machine = about(lab)
    lines = ["# Real sizes, random weights" if lab.width == "real" else "# Small sizes: whether every row runs, no more", ""]
    lines += [", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in machine.items() if name != "versions"), ""]
    lines += ["| row | what | measured | goal | paper |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| **{row.name}** | {row.title} | {row.reason} | | |")
        lines += [f"| | {f.what} | {shown(f)} | {_goal(f, lab)} | {'' if f.paper is None else f'{f.paper:g}'} |" for f in row.figures]
    return "\n".join(lines) + "\n"


def shown(figure: Figure) -> str:
    """The value, and the two times that a ratio is made of."""
    times = [seconds for seconds in (figure.baseline_seconds, figure.seconds) if seconds is not None]
    return f"{figure.value:.3g} {figure.unit}" + (f" ({' / '.join(f'{seconds:.3g} s' for seconds in times)})" if times else "")


def _goal(figure: Figure, lab: Lab) -> str:
    if figure.goal is None or lab.width != "real":
        return ""
    return f"{'at most' if figure.less else 'at least'} {figure.goal:g}: {'met' if figure.met else 'missed'}"
