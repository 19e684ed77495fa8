"""What the commands print."""

from __future__ import annotations

import os
import subprocess
import sys

EMIT = "from muralist.cli._show import emit; [emit({'event': 'advance', 'done': i}) for i in range(20000)]; import sys; sys.stderr.write('finished')"


def test_a_reader_of_json_lines_who_leaves_does_not_stop_the_work():
    child = subprocess.Popen([sys.executable, "-c", EMIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert child.stdout.readline() == b'{"done": 0, "event": "advance"}\n'
    child.stdout.close()
    assert child.stderr.read() == b"finished" and child.wait() == 0
