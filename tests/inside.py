"""Run the cells of a comparison inside the test process, without the seconds that each new process would need to start."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from muralist.compare.child import Events, reason
from tests.shell import muralist


def run(arguments: Sequence[str], folder: Path, on_event: Events) -> str | None:
    """As `muralist.compare.child.run`."""
    with chdir(folder):
        answer = muralist(*arguments)
    for line in answer.out.splitlines():
        on_event(json.loads(line))
    assert os.getcwd() != str(folder)
    return None if answer.code == 0 else reason(answer.code, answer.err)
