"""How often `score` is right about true renders of held-out scenes, at the base's own size and at 4K.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py [--count 120] [--large 20]      # writes results/scoring.{json,md}

Right: every word of the caption is found, and exactly one object. Goal: 98 %.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import write

from muralist.data import world
from muralist.data.score import score
from muralist.types import Grid

WORDS = ("colour", "shape", "ground", "motion", "camera")
SIZES = {"448x256": Grid(num_frames=29, height=256, width=448), "3840x2160": Grid(num_frames=29, height=2160, width=3840)}


def judged(scene: world.Scene, grid: Grid) -> dict[str, bool]:
    found = score(torch.stack(list(world.render(scene, grid))), scene)
    return {word: bool(getattr(found, word)) for word in WORDS} | {"one object": found.num_objects == 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--large", type=int, default=20)
    options = parser.parse_args()
    rows = []
    for (size, grid), count in zip(SIZES.items(), (options.count, options.large)):
        rng, all_found = np.random.default_rng(17), []
        for _ in range(count):
            scene = world.sample_scene(rng, held_out=True)
            all_found.append(judged(scene, grid))
            if not all(all_found[-1].values()):
                print(size, world.caption(scene), scene.seed, all_found[-1], flush=True)
        shares = {word: float(np.mean([found[word] for found in all_found])) for word in all_found[0]}
        rows.append({"size": size, "renders": count, "all right": float(np.mean([all(found.values()) for found in all_found]))} | shares)
        print(rows[-1], flush=True)
    write("scoring", rows, "True renders of held-out scenes, 29 frames; share of them of which `score` is right.")


if __name__ == "__main__":
    main()
