"""Kill one generation again and again, each time resuming it: the parent of `test_kill_run.py`, a process of its own.

usage: python chained_kills.py MODEL FOLDER KILLS SEED

The modules are imported once; every attempt is a fork of this process, so that a kill costs milliseconds instead of an import.
No tensor is computed before a fork (OpenMP does not survive one). Prints one JSON object.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import av

import muralist.stages.encode
from muralist.base import Base, pick_device
from muralist.base_info import inspect_base
from muralist.config import Request
from muralist.pipeline import generate
from muralist.recipes import find
from muralist.store.run import RunDirectory
from muralist.types import Grid


class Log:
    """An observer that appends each unit of finished work to a file, so that repeated work can be counted."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, stage, total):
        self.note(stage, "begin")

    def advance(self, stage, done):
        self.note(stage, done)

    def end(self, stage, report):
        self.note(stage, "end")

    def note(self, stage, what):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()} {stage} {what}\n")


def request(model: str) -> tuple[Request, object]:
    info = inspect_base(model)
    return Request(
        prompt="a red ball moves right over grass", negative_prompt="", grid=Grid(num_frames=29, height=96, width=160), seed=3, model=model, revision=None,
        recipe="cascade", config=find("cascade")(info),
    ), info  # fmt: skip


def work(asked: Request, info, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    base = Base(info, pick_device("cpu"))
    with RunDirectory.create(folder / "run", asked.record()) as run:
        generate(asked, base, run, folder / "out.mp4", Log(folder / "log"))


def attempt(asked: Request, info, folder: Path, seconds: float | None, encoding: bool = False) -> int:
    """Fork, let the child work, kill it after `seconds` (None: let it finish), with `encoding` counted from when the file is being written.

    Returns its exit status, -9 when killed.
    """
    child = os.fork()
    if child == 0:
        try:
            work(asked, info, folder)
        except BaseException as error:  # the parent must see it whatever it is
            (folder / "error").write_text(repr(error))
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        live = muralist.stages.encode.live_path(folder / "out.mp4")
        while encoding and not live.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left(folder: Path) -> tuple[int, int]:
    """Frames in published groups, and those that the file being written (or finished) gives back; 0 where there is none yet."""
    groups = (folder / "run").glob("scratch/encode/segment-??????/MANIFEST.json")
    published = sum(json.loads(path.read_text())["info"]["frames"] for path in groups)
    places = [p for p in (muralist.stages.encode.live_path(folder / "out.mp4"), folder / "out.mp4") if p.exists()]
    if not places:
        return published, 0
    with av.open(str(places[0])) as container:
        return published, sum(1 for _ in container.decode(video=0))


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "out.mp4").read_bytes()).hexdigest()


def repeated(log: list[list[str]], stage: str) -> int:
    """Units of a stage that were announced as done more than once."""
    units = [what for _, name, what in log if name == stage and what.isdigit()]
    return len(units) - len(set(units))


def most_redone(log: list[list[str]], stage: str) -> int:
    """The most units that one attempt had to do again, for a stage that begins by announcing how many it found finished."""
    worst, reached, seen = 0, 0, set()
    for process, name, what in log:
        if name == stage and what.isdigit():
            if process not in seen:
                worst = max(worst, reached - int(what))
                seen.add(process)
            reached = max(reached, int(what))
    return worst


def main() -> None:
    model, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    asked, info = request(model)
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    started = time.monotonic()
    assert attempt(asked, info, folder / "whole", None) == 0, (folder / "whole" / "error").read_text()
    length, draw, done, seen = time.monotonic() - started, random.Random(seed), 0, []
    while done < kills:
        # kills come at all ages of an attempt, each third one while the file is written; one that finished is started anew in a fresh folder
        encoding = done % 3 == 2
        status = attempt(asked, info, folder / "killed", draw.uniform(0, (0.1 if encoding else 0.6) * length), encoding)
        if status == 1:
            raise RuntimeError((folder / "killed" / "error").read_text())
        if status == -9:
            done += 1
            seen.append(left(folder / "killed"))
        elif done < kills:
            assert digest(folder / "killed") == digest(folder / "whole")
            (folder / "killed").rename(folder / f"finished-{len(list(folder.glob('finished-*')))}")
            (folder / "killed").mkdir()
    if not (folder / "killed" / "out.mp4").exists():
        assert attempt(asked, info, folder / "killed", None) == 0, (folder / "killed" / "error").read_text()
    logs = [[line.split() for line in p.read_text().splitlines()] for p in folder.glob("*/log") if p.parent.name != "whole"]
    print(
        json.dumps(
            {
                "kills": done,
                "same": digest(folder / "killed") == digest(folder / "whole"),
                "repeated": sum(repeated(log, stage) for log in logs for stage in ("proxy", "refine")),
                "decoded_again": max(most_redone(log, "decode") for log in logs),
                "left": seen,
                "seconds": length,
            }
        )
    )


if __name__ == "__main__":
    main()
