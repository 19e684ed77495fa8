"""Observers of a run: bars for people, JSON lines for programs, and Ctrl-C.

The first Ctrl-C leaves as soon as Python gets to run (what is finished is on disk already); the second one aborts at once, even while a
long matrix product holds the interpreter: a thread hears signals through a pipe that the C handler writes to.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from muralist.cli._show import Interrupted, amount, console, emit
from muralist.progress import Silent, StageReport


class Bars(Silent):
    """A bar for each stage, with steps, time left and peak memory, on standard error. Use as a context manager."""

    def __init__(self, stages: Sequence[str]):
        super().__init__()
        self._stages, self._tasks = list(stages), {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), PeakMemory(),
            console=console(stderr=True), refresh_per_second=4,
        )  # fmt: skip

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._progress.stop()

    def begin(self, stage: str, total: int) -> None:
        self._progress.start()  # not before: what is refused until here is one line, without an empty one for bars
        number = self._stages.index(stage) + 1 if stage in self._stages else 1
        self._tasks[stage] = self._progress.add_task(f"[{number}/{len(self._stages)}] {stage}", total=total)

    def advance(self, stage: str, done: int) -> None:
        task = self._task(stage)
        if done > task.completed + 1 and not task.completed:
            self._progress.reset(task.id, completed=done, total=task.total)  # taken over from an earlier process: no speed to learn from
        else:
            self._progress.update(task.id, completed=done)

    def end(self, stage: str, report: StageReport) -> None:
        super().end(stage, report)
        self._progress.update(self._task(stage).id, completed=self._task(stage).total)

    def _task(self, stage: str) -> Task:
        return next(task for task in self._progress.tasks if task.id == self._tasks[stage])


class PeakMemory(ProgressColumn):
    """The highest memory seen while the stage ran."""

    def __init__(self):
        super().__init__()
        self._process, self._peaks = psutil.Process(), {}

    def render(self, task: Task) -> Text:
        if not task.finished or task.id not in self._peaks:
            self._peaks[task.id] = max(self._peaks.get(task.id, 0), self._process.memory_info().rss)
        return Text(f"peak {amount(self._peaks[task.id])}")


class JsonLines(Silent):
    """Every event as one JSON object a line."""

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def begin(self, stage: str, total: int) -> None:
        emit({"event": "begin", "stage": stage, "total": total})

    def advance(self, stage: str, done: int) -> None:
        emit({"event": "advance", "stage": stage, "done": done})

    def end(self, stage: str, report: StageReport) -> None:
        super().end(stage, report)
        emit({"event": "end", "stage": stage, "seconds": round(report.seconds, 3), "peak_rss": report.peak_rss, "peak_device": report.peak_device})


@contextmanager
def resumable(run_dir: Path) -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted` with the command that goes on; a second Ctrl-C ends the process at once."""
    hint = f"; everything finished is saved, go on with: muralist resume {run_dir}"
    try:
        with _second_signal_aborts(f"muralist: aborted{hint}\n"):
            yield
    except KeyboardInterrupt:
        raise Interrupted(hint) from None


@contextmanager
def _second_signal_aborts(message: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    earlier = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_abort_at_second, args=(heard, message), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(wake)  # ends the thread


def _abort_at_second(heard: int, message: str) -> None:
    count = 0
    while byte := os.read(heard, 1):
        count += byte[0] == signal.SIGINT
        if count == 2:
            with suppress(OSError):
                os.write(sys.__stderr__.fileno(), message.encode(errors="replace"))
            os._exit(130)
    os.close(heard)
