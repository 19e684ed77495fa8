"""Recipes side by side on the same held-out prompts: adherence, spectral distance and FID-patch[mural] against true renders.

    python benchmarks/adherence.py --count 12 --size 3840x2160 --recipe luve --keep kept/luve      # and so for each recipe
    python benchmarks/side_by_side.py cascade=kept/cascade luve=kept/luve

Pictures: the middle frame of each clip, which `adherence.py` keeps; patches of 256 pixels, 32 of a frame. The last row is the floor of their distance:
other patches of the same true renders. Writes results/side_by_side-SIZE.{json,md}.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from adherence import averages
from common import write
from kept import Kept, of_eight_bits, read, true_middle

from muralist.eval.features.mural import load_mural
from muralist.eval.features.patches import cut, patch_boxes
from muralist.eval.metrics.frechet import FID_SIDE, MAX_PATCHES, frechet_distance
from muralist.eval.metrics.spectrum import SpectralDistance
from muralist.eval.registry import Unavailable


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", nargs="+", metavar="NAME=FOLDER")
    options = parser.parse_args()
    network = load_mural(torch.device("cpu"))
    recipes = {name: read(Path(folder)) for name, _, folder in (given.partition("=") for given in options.kept)}
    sizes = {clip.about["size"] for clips in recipes.values() for clip in clips}
    prompts = {tuple(clip.row["prompt"] for clip in clips) for clips in recipes.values()}
    if len(sizes) != 1 or len(prompts) != 1:
        raise SystemExit(f"the folders hold other sizes or prompts: {sorted(sizes)}, {[len(p) for p in prompts]} prompts")
    true = [of_eight_bits(true_middle(clip.scene, clip.about["num_frames"], *clip.frame.shape[:2])) for clip in next(iter(recipes.values()))]
    truth = [features(network, frame, turn) for turn, frame in enumerate(true)]
    rows = [
        {"recipe": name} | averages([clip.row for clip in clips], clips[0].about["num_frames"]) | spectral(clips, true) | patches(network, clips, truth)
        for name, clips in recipes.items()
    ]
    others = torch.cat([features(network, frame, turn + 2) for turn, frame in enumerate(true)])
    rows.append(dict.fromkeys(rows[0]) | {"recipe": "true renders, other patches", "fid_patch[mural]": distance(others, torch.cat(truth))})
    print(rows)
    (size,) = sizes
    write(f"side_by_side-{size}", rows, note=f"{len(true)} held-out prompts at {size}; the same prompts and seeds for every recipe; percent, dB, none")


def adherence(clips: list[Kept]) -> dict[str, float]:
    return averages([clip.row for clip in clips], clips[0].about["num_frames"])


def spectral(clips: list[Kept], true: list[torch.Tensor]) -> dict[str, float]:
    """Means over the clips of their middle frames' distances."""
    found = []
    for clip, frame in zip(clips, true):
        distance = SpectralDistance(1)
        distance.add(clip.frame, frame)
        found.append(distance.result())
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def patches(network: torch.nn.Module, clips: list[Kept], truth: list[torch.Tensor]) -> dict[str, float]:
    return {"fid_patch[mural]": distance(torch.cat([features(network, clip.frame, turn) for turn, clip in enumerate(clips)]), torch.cat(truth))}


def features(network: torch.nn.Module, frame: torch.Tensor, turn: int) -> torch.Tensor:
    """[patches, 64] of a frame; of a large one other patches at every turn."""
    boxes = patch_boxes(*frame.shape[:2], FID_SIDE, MAX_PATCHES, turn=turn)
    return torch.cat([network(part) for part in cut(frame, boxes).split(8)])


def distance(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """None where there are too few patches."""
    try:
        return frechet_distance(x, y)
    except Unavailable:
        return None


if __name__ == "__main__":
    main()
