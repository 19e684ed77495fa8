"""The plan's memory of a forward and of an enlargement against what a process really grows by: a few cases of `benchmarks/plan_memory.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [("forward", 0), ("forward", 2), ("forward", 5), ("forward", 7), ("upsample", 5), ("learned", 3)]


@pytest.mark.slow
def test_planned_memory_is_that_of_a_process():
    """Started anew: a process that has run other tests has freed memory to use again. Each case is a fork of it, so that libraries are imported once."""
    script = f"import json; from plan_memory import Case; print(json.dumps([Case(*case).apart() for case in {CASES}]))"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == len(CASES) and all(0.85 <= row["plan / measured"] <= 1.15 for row in rows), rows
