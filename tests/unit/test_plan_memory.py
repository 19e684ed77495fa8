"""The plan's memory of a forward against what a process really grows by: a few cases of `benchmarks/plan_memory.py`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2, 5, 7])
def test_planned_memory_of_a_forward_is_that_of_a_process(number, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from plan_memory import Case

    row = Case("forward", number).apart()
    assert 0.85 <= row["plan / measured"] <= 1.15, row
