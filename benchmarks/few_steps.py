"""What few steps cost and lose (PixelWizard, Table 5): the same base, anchor and size in 2 to 8 shortcut steps without guidance and in 50 plain ones with it.

    python benchmarks/few_steps.py [--size 896x512] [--count 4]     # about 2 minutes a prompt and variant of 50 steps

Held-out prompts; the variants of one prompt are painted one after the other in one process. Writes results/few_steps.{json,md} and a sheet of middle frames,
one row a prompt, in the order of the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adherence import ATTRIBUTES, scenes, small
from common import write
from judged import paint_and_judge
from PIL import Image

import muralist
from muralist.data import world
from muralist.eval.metrics.temporal import DynamicDegree
from muralist.progress import Silent
from muralist.types import Grid

MANY = "50 steps, guidance"
VARIANTS = {MANY: ('refine.steps={"kind": "PlainSteps"}', "refine.num_inference_steps=50", "refine.guidance_scale=4")}
VARIANTS |= {f"{count} steps": (f"refine.num_inference_steps={count}",) for count in (8, 5, 4, 3, 2)}
DYNAMIC = "dynamic_degree[blocks]"


def painted(pipe: muralist.api.Pipeline, scene: world.Scene, grid: Grid, settings: tuple[str, ...]) -> tuple[dict[str, float], torch.Tensor]:
    """What is measured of a video, and its middle frame."""
    observer = Silent()
    found = paint_and_judge(pipe, scene, grid, settings, fps=grid.fps, observer=observer)
    dynamic = DynamicDegree(grid.fps)
    for frame in found.frames:
        dynamic.add(frame)
    moved = dynamic.result()
    right = {name: float(bool(getattr(found.score, name))) for name in ATTRIBUTES if name != "camera"}  # the prompts say nothing of one
    right["one object"] = float(found.score.num_objects == 1)
    seconds = sum(report.seconds for report in observer.reports if report.stage == "refine")
    values = {"refine_s": seconds} | right | found.distance | {"dynamic": moved[DYNAMIC], "speed": moved[f"{DYNAMIC}.speed"]}
    return values, small(found.frames)[:, 448:896]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--size", default="896x512")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, default=Path("few_steps.png"))
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    grid, pipe = Grid(num_frames=29, height=height, width=width), muralist.load(options.model, recipe="pixelwizard")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    sheet = []
    for scene in scenes(options.count, options.seed):
        made = {name: painted(pipe, scene, grid, settings) for name, settings in VARIANTS.items()}
        sheet.append(torch.cat([picture for _, picture in made.values()], dim=1))
        for name, (values, _) in made.items():
            found[name].append(values)
            print(world.caption(scene), name, values, flush=True)
        write("few_steps", rows(found), note=f"{len(sheet)} held-out prompts, pixelwizard, {options.size} x 29, seed {options.seed}")
    Image.fromarray(torch.cat(sheet).numpy()).save(options.sheet)


def rows(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Means over prompts; `faster`: the many steps' time in refinement against this one's."""
    means = {name: {key: float(np.mean([values[key] for values in each])) for key in each[0]} for name, each in found.items()}
    return [{"variant": name, "faster": means[MANY]["refine_s"] / values["refine_s"]} | values for name, values in means.items()]


if __name__ == "__main__":
    main()
