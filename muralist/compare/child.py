"""Run one `muralist` command line in a process of its own.

A process a run makes peak memory the run's own, and lets nothing that happens to one run (memory, a crash in a codec) reach the others.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import muralist

_PR_SET_PDEATHSIG = 1
_LINE = 300  # characters of a reason

Events = Callable[[dict[str, Any]], object]
Runner = Callable[[Sequence[str], Path, Events], str | None]


def run(arguments: Sequence[str], folder: Path, on_event: Events) -> str | None:
    """Run `muralist ARGUMENTS` inside `folder`, hand over its JSON lines as they come.

    Returns None when it ended well, else the reason in one line. Whatever interrupts the wait (Ctrl-C) also kills the child: a run can
    always be killed, and goes on from what it has finished.
    """
    paths = [str(Path(muralist.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command, environment = [sys.executable, "-m", "muralist.cli.main", *arguments], os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, preexec_fn=_die_with_parent
        )
        try:
            for line in process.stdout:
                with suppress(ValueError):
                    on_event(json.loads(line))
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        errors.seek(0)
        return None if code == 0 else reason(code, errors.read().decode(errors="replace"))


def reason(code: int, errors: str) -> str:
    """The one line that says why a command failed, from its exit code and standard error."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("muralist: note:")]
    told = [line.partition("muralist: error: ")[2] for line in lines if line.startswith("muralist: error: ")]
    if code < 0:
        return f"killed by signal {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    cause = [line for line in lines if not line.startswith("muralist:")]
    line = (told or cause or [f"exit code {code}"])[-1]
    return "".join(c if c.isprintable() else " " for c in line)[:_LINE]


def _die_with_parent() -> None:
    """On Linux a killed comparison takes its run along; elsewhere the run's lock says for how long it has to be waited for."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
