"""Kill one comparison again and again, each time starting it anew: the parent of `test_kill_compare.py`, a process of its own.

usage: python chained_compare_kills.py MODEL FOLDER KILLS SEED

The modules are imported once; every attempt is a fork of this process, which also makes the runs itself instead of starting a process for
each. No tensor is computed before a fork (OpenMP does not survive one). Prints one JSON object.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import muralist.compare.report
import muralist.eval.measure
import muralist.pipeline  # noqa: F401  (what the forks need is imported here)
from muralist.compare import child
from tests import inside
from tests.shell import muralist as command_line


def attempt(model: str, folder: Path, seconds: float | None) -> int:
    """Fork, let the child compare, kill it after `seconds` (None: let it finish). Returns its exit status, -9 when killed."""
    process = os.fork()
    if process == 0:
        import torch

        torch.set_num_threads(1)
        child.run = inside.run
        options = ("--recipes", "cascade,direct", "--prompts", folder.parent / "prompts.txt", "--model", model, "--size", "96x64", "--num-frames", 5)
        answer = command_line("compare", *options, "--metrics", "spectrum", "--output", folder)
        (folder.parent / "error").write_text(answer.err)
        os._exit(answer.code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def results(folder: Path) -> dict:
    """What must not depend on kills: videos by cell, and values without times and memory."""
    videos = {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("cells/*/video.mp4")}
    report = json.loads((folder / "results.json").read_text())
    values = [cell["values"]["spectrum"] for cell in report["cells"]]
    return {"videos": videos, "values": values, "spectra": [cell["spectrum"] for cell in report["cells"]]}


def main() -> None:
    model, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    (folder / "prompts.txt").write_text("a red ball moves right\n")
    started = time.monotonic()
    assert attempt(model, folder / "whole", None) == 0, (folder / "error").read_text()
    length, draw, done = time.monotonic() - started, random.Random(seed), 0
    while done < kills:
        status = attempt(model, folder / "killed", draw.uniform(0, 0.3 * length))
        if status not in (0, -9):
            raise RuntimeError((folder / "error").read_text())
        if status == 0:
            break
        done += 1
    finished = (folder / "killed" / "report.html").exists()
    status = attempt(model, folder / "killed", None)
    assert status == 0, (folder / "error").read_text()
    attempts = sum(path.read_text().count('"attempt"') for path in (folder / "killed").glob("cells/*/journal.jsonl"))
    same = results(folder / "whole") == results(folder / "killed")
    print(json.dumps({"kills": done, "attempts": attempts, "same": same, "finished": finished, "seconds": length}))


if __name__ == "__main__":
    main()
