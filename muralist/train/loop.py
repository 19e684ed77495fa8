"""The training loop: one visible loop over steps, for any objective.

An objective owns the modules and says what a step's loss is; the loop owns time, learning rate, averages, checkpoints and
the curve. Its length is minutes or steps; the learning rate is constant and falls over the last part of it, so
that a run that is resumed with a larger length goes on as if it had been planned so.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from muralist.errors import UserError
from muralist.store import atomic
from muralist.train import state

Report = Callable[[str], object]


class Objective(Protocol):
    """What is trained: `module` holds every trained parameter; `loss` must draw its randomness from (seed, step) alone."""

    module: nn.Module

    def loss(self, step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]: ...


WARMUP = 0.1  # of the length, at most: a short one would be over before `warmup` steps are
SOONEST = 10  # steps, where the first ones take long, as compiling does


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Of a training: exactly one of `minutes`, of this machine, and `steps`, the same everywhere."""

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self):
        if (self.minutes is None) == (self.steps is None):
            raise UserError("give exactly one of minutes and steps", where="train", fix="use minutes=30, or steps=1000")
        if not (self.minutes or self.steps or 0) > 0:
            raise UserError(f"{self}", where="train", fix="use a number above 0")

    def __str__(self) -> str:
        return f"{self.minutes:g} minutes" if self.steps is None else f"{self.steps} steps"

    def progress(self, step: int, seconds: float) -> float:
        """The share of it that is done, at most 1."""
        return min(step / self.steps if self.steps is not None else seconds / 60 / self.minutes, 1.0)

    def part(self, count: int) -> Length:
        """One of so many equal parts of it."""
        return Length(minutes=self.minutes / count) if self.steps is None else Length(steps=max(round(self.steps / count), 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast. `decay` is the share of the length in which the rate falls.

    The rate rises over `warmup` steps, or over WARMUP of the length where that is sooner, but over SOONEST steps at least.
    """

    length: Length
    learning_rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.25
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    muon: bool = False
    save_every_minutes: float = 5.0

    def rate(self, step: int, progress: float) -> float:
        falling = max((progress - (1 - self.decay)) / self.decay, 0.0)
        rising = min(max((step + 1) / self.warmup, min(progress / WARMUP, (step + 1) / SOONEST)), 1.0)
        return self.learning_rate * rising * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling)))


CHECKPOINTS = "checkpoints"


def begin(folder: Path, *, resume: bool) -> None:
    """Say at once what would otherwise be found after hours: a folder that is in use, a library that is missing. Raises UserError."""
    if not resume:
        state.require_unused(folder / CHECKPOINTS)
    atomic.clean(folder / CHECKPOINTS)  # what a killed process was writing
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws the curve, is not installed", where="train", fix="pip install 'muralist[train]'")


def fit(objective: Objective, schedule: Schedule, folder: Path, *, resume: bool, origin: Mapping[str, str] | None = None, report: Report = print) -> nn.Module:
    """Train to the schedule's end; returns the module with its averaged (EMA) weights.

    `origin`: what the training stands on (a base's fingerprint, its data), by name; a resume on another one is refused.

    Raises FloatingPointError on a loss or a gradient that is not finite, before the weights are touched; KeyboardInterrupt after Ctrl-C, with
    everything up to the last step saved; UserError, before anything is written, if `folder` holds a training and `resume` is not asked for,
    or holds another kind of training.
    """
    begin(folder, resume=resume)
    parameters = dict(objective.module.named_parameters())
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizers = _optimizers(objective.module, schedule)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    step, seconds = _restore(folder, parameters, average, optimizers, schedule, origin or {}) if resume else (0, 0.0)
    saved_at = seconds

    def save() -> None:
        facts = {"step": step, "seconds": seconds, "schedule": asdict(schedule), "origin": dict(origin or {})}
        tensors = {f"weights.{n}": p for n, p in parameters.items()} | {f"average.{n}": p for n, p in average.items()}
        state.save(folder / CHECKPOINTS, step, tensors | state.optimizer_tensors(optimizers), facts)

    curve = _Curve(folder, step)
    report(f"{sum(p.numel() for p in parameters.values()) / 1e6:.2f} M parameters, from step {step} ({seconds / 60:.1f} min)")
    with _held_interrupt() as interrupted:
        while (progress := schedule.length.progress(step, seconds)) < 1:
            started = time.monotonic()
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = schedule.rate(step, progress)
            try:
                values = _gradients(objective, step, progress, parameters.values(), schedule.clip)
            except Exception as error:
                if not interrupted():
                    raise
                if seconds > saved_at:
                    save()  # Ctrl-C also ended a compiler that the step had called; the weights are those of before it
                raise KeyboardInterrupt from error
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            _update_average(average, parameters, min(schedule.ema, (1 + step) / (10 + step)))
            step, seconds = step + 1, seconds + time.monotonic() - started
            if line := curve.add(step, seconds, values):
                report(line)
            if interrupted() or seconds - saved_at > schedule.save_every_minutes * 60 or schedule.length.progress(step, seconds) >= 1:
                save()
                saved_at = seconds
            if interrupted():
                raise KeyboardInterrupt
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(average[name])
    return objective.module


def _gradients(objective: Objective, step: int, progress: float, parameters: Iterable[nn.Parameter], clip: float) -> dict[str, float]:
    """Gradients of a step, clipped, in the parameters; what is told of it, by name."""
    loss, metrics = objective.loss(step, progress)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss is {loss.item()} at step {step}; the newest checkpoint is intact")
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"a gradient is {norm.item()} at step {step}; the newest checkpoint is intact")
    return {"loss": loss.item(), "grad_norm": norm.item(), **metrics}


@contextmanager
def _held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the step is through: an update that stops half-way cannot be saved. Outside the main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)


def _optimizers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon` the matrices inside the transformer blocks go to Muon (at AdamW's step size), which needs fewer samples."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if schedule.muon and p.ndim == 2 and ".blocks." in name]
    others = [p for name, p in named if not any(p is m for m in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=schedule.learning_rate, betas=schedule.betas, weight_decay=schedule.weight_decay)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _update_average(average, parameters, decay: float) -> None:
    names = list(average)
    torch._foreach_lerp_([average[n] for n in names], [parameters[n].detach() for n in names], 1 - decay)


def _restore(folder, parameters, average, optimizers, schedule: Schedule, origin: Mapping[str, str]) -> tuple[int, float]:
    newest = state.load_newest(folder / CHECKPOINTS)
    if newest is None:
        return 0, 0.0
    tensors, numbers = newest
    if {name: p.shape for name, p in parameters.items()} != {n.removeprefix("weights."): t.shape for n, t in tensors.items() if n.startswith("weights.")}:
        raise UserError("these checkpoints are of another training", where=str(folder / CHECKPOINTS), fix="name the --output of this one")
    state.require_whole_origin(folder / CHECKPOINTS, numbers, origin)
    if (rate := numbers["schedule"]["learning_rate"]) != schedule.learning_rate:
        what = f"these checkpoints were trained at a learning rate of {rate:g}, it is {schedule.learning_rate:g} now"
        raise UserError(what, where=str(folder / CHECKPOINTS), fix="name another --output, or resume with the version that began it")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"weights.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
    state.restore_optimizers(optimizers, tensors)
    return numbers["step"], numbers["seconds"]


class _Curve:
    """Means over `every` steps, appended to `curve.csv`, which is first cut back to `step`, where the training starts or goes on.

    A value that is NaN was not measured in its step; where none was, the cell is empty.
    """

    def __init__(self, folder: Path, step: int, every: int = 50):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.every, self.sums, self.count = folder / "curve.csv", every, {}, 0
        self._cut(step)

    def _cut(self, step: int) -> None:
        """Drop what a killed process wrote after its last checkpoint (those steps come again), and a line it did not finish."""
        header, *rows = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() and self.path.stat().st_size else [b""]
        kept = [row for row in rows if (match := re.fullmatch(rb"(\d+),.*\n", row)) and int(match[1]) <= step]
        if kept:
            atomic.write_file(self.path, header + b"".join(kept))
        else:
            self.path.unlink(missing_ok=True)

    def add(self, step: int, seconds: float, values: dict[str, float]) -> str | None:
        """Count a step in; every `every` steps write a row and return it as a line."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total, count) if math.isnan(value) else (total + value, count + 1)
        self.count += 1
        if self.count < self.every:
            return None
        means = {name: round(total / count, 6) for name, (total, count) in self.sums.items() if count}
        row = {"step": step, "minutes": round(seconds / 60, 3)} | means
        self._write(row, columns=["step", "minutes", *self.sums])
        self.sums, self.count = {}, 0
        return "  ".join(f"{name} {value:g}" for name, value in row.items())

    def _write(self, row: dict[str, float], columns: list[str]) -> None:
        """A row more. The file keeps its own columns; what is measured for the first time gets one at the end, empty in the rows before."""
        with open(self.path, "a+", newline="") as handle:
            handle.seek(0)
            known = handle.readline().strip().split(",") if self.path.stat().st_size else []
        if new := [name for name in columns if name not in known]:
            known = self._widen(known + new)
        with open(self.path, "a", newline="") as handle:
            csv.DictWriter(handle, known).writerow(row)

    def _widen(self, columns: list[str]) -> list[str]:
        """Write the file again with these columns."""
        with open(self.path, newline="") as handle:
            rows = list(csv.DictReader(handle))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        atomic.write_file(self.path, text.getvalue().encode())
        return columns


def draw_curve(folder: Path) -> None:
    """`curve.png` beside `curve.csv`: the loss over minutes. A training too short for one row has no curve."""
    if not (folder / "curve.csv").is_file():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(folder / "curve.csv") as handle:
        rows = list(csv.DictReader(handle))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([float(r["minutes"]) for r in rows], [float(r["loss"]) for r in rows])
    axes.set(xlabel="minutes", ylabel="loss", yscale="log")
    figure.savefig(folder / "curve.png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
