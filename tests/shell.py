"""Run the command line inside the test process: the same entry point, without the seconds that a new process needs to import torch."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any

from muralist.cli.main import main


@dataclass(frozen=True, slots=True)
class Answer:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON lines on standard output."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> str:
        """The one line that every user's mistake gets, checked for its form."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("muralist: error: ") and "; " in lines[0] and len(lines[0]) <= 400, lines[0]
        assert lines[0].isprintable()
        return lines[0]


def muralist(*arguments: object) -> Answer:
    """One command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Answer(code, out.getvalue(), err.getvalue())
