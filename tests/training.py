"""What tests of trainings share."""

from __future__ import annotations

import csv
from contextlib import suppress

import torch

from muralist.train.loop import Length
from muralist.types import Grid

CPU = torch.device("cpu")
SIZE = Grid(num_frames=21, height=96, width=192, fps=16)


def quiet(line):
    pass


def write(folder, rows, columns=("file", "caption", "score")):
    with open(folder / "videos.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([columns, *rows])


def spied(monkeypatch, module, train, *arguments, **options):
    """What a training hands to the loop: its objective, its origin, and the names of what is trainable."""
    seen = {}

    def fit(objective, schedule, folder, *, resume, origin=None, report=print):
        names = [name for name, parameter in objective.module.named_parameters() if parameter.requires_grad]
        seen[str(folder)] = (objective, origin, names)
        if module == "trainee":  # what is saved after it is no longer in float32
            raise KeyboardInterrupt
        return objective.module

    monkeypatch.setattr(f"muralist.train.{module}.fit", fit)
    with suppress(KeyboardInterrupt):
        train(*arguments, length=Length(minutes=1), device=CPU, resume=False, report=quiet, **options)
    return list(seen.values())
