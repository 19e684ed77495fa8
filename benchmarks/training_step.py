"""What compiled blocks bring to a training: steps of an adapter, plain and compiled, in turn in one process.

    python benchmarks/training_step.py [--model DIR] [--steps 5]

One batch as `uhr` has it (ten crops of the base's own size, 17 frames) in random numbers; medians of CPU time, which a busy neighbour disturbs less than
the clock. Writes results/training_step.{json,md}.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import write

from muralist.base import pick_dtype
from muralist.base_info import inspect_base
from muralist.nn.kernels import Kernels
from muralist.train.objectives.flow import Batch, FlowConfig, FlowMatching
from muralist.train.trainee import FRAMES, Trainee, give_adapter

CAPTION, CLIPS = "a red ball moves right over grass", 10
WAYS = {"plain": Kernels(), "compiled": Kernels(compile="blocks")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # nothing is compiled already
    objective = of_an_adapter(inspect_base(options.model).folder)
    seconds = {name: [] for name in WAYS}
    for number in range(options.steps + 1):
        for name, kernels in WAYS.items():
            seconds[name].append(step(objective, number, kernels))
    rows = []
    for name, (first, *others) in seconds.items():
        parts = dict(zip(("forward_s", "backward_s"), (statistics.median(part) for part in zip(*others))))
        rows.append({"blocks": name, "first_step_s": sum(first), **parts, "step_s": sum(parts.values())})
    plain = rows[0]["step_s"]
    rows = [row | {"faster": plain / row["step_s"]} for row in rows]
    print(rows)
    write(
        "training_step", rows, note=f"{CLIPS} crops of {FRAMES} frames, {pick_dtype(torch.device('cpu'))}, CPU time, medians of {options.steps} steps in turn"
    )


def of_an_adapter(model: Path) -> FlowMatching:
    trainee = Trainee(model, torch.device("cpu"))
    give_adapter(trainee, "uhr")
    trainee.learn_captions([CAPTION])
    shape = trainee.info.geometry.latent_shape(replace(trainee.own_grid, num_frames=FRAMES))
    batch = Batch(torch.randn(CLIPS, *shape), [CAPTION] * CLIPS)
    return FlowMatching(trainee, trainee.transformer, trainee.embed, lambda rng, progress: batch, FlowConfig(), torch.device("cpu"))


def step(objective: FlowMatching, number: int, kernels: Kernels) -> tuple[float, float]:
    """CPU seconds forwards and backwards."""
    with kernels.at_work():
        start = used()
        loss, _ = objective.loss(number, 0.5)
        middle = used()
        loss.backward()
        objective.module.zero_grad(set_to_none=True)
        return middle - start, used() - middle


def used() -> float:
    """CPU seconds of this process and of those that it has waited for, the compiler's."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


if __name__ == "__main__":
    main()
