"""What every benchmark writes: a JSON with machine, versions and date, and the same as a Markdown table."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from muralist.base import pick_device, pick_dtype

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor()
    )
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "dtype": str(pick_dtype(pick_device("auto"))).removeprefix("torch."),  # that models compute in unless a row says otherwise
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def write(name: str, rows: list[dict[str, Any]], note: str = "", cases: list[dict[str, Any]] | None = None) -> None:
    """`results/NAME.json` and `results/NAME.md`; every row has the same keys. `cases`: what the rows are means of, for the JSON alone."""
    RESULTS.mkdir(exist_ok=True)
    where = machine()
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": where, "note": note, "rows": rows} | ({"cases": cases} if cases else {}), indent=2) + "\n")
    columns = list(rows[0])
    lines = [f"# {name}", "", ", ".join(f"{k} {v}" for k, v in where.items()), "", note, "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
