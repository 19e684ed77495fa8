"""What the commands print."""

from __future__ import annotations

import os
import subprocess
import sys

from muralist.cli._bars import Bars

EMIT = "from muralist.cli._show import emit; [emit({'event': 'advance', 'done': i}) for i in range(20000)]; import sys; sys.stderr.write('finished')"


def test_a_reader_of_json_lines_who_leaves_does_not_stop_the_work():
    child = subprocess.Popen([sys.executable, "-c", EMIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert child.stdout.readline() == b'{"done": 0, "event": "advance"}\n'
    child.stdout.close()
    assert child.stderr.read() == b"finished" and child.wait() == 0


def test_bars_of_no_stage_leave_no_empty_line(capfd):
    with Bars(["prompt"]):
        pass
    assert capfd.readouterr() == ("", "")
    with Bars(["prompt"]) as bars:
        bars.begin("prompt", 1)
    assert "prompt" in capfd.readouterr().err
