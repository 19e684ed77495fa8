"""What `adherence.py --keep FOLDER` leaves of each clip, read again by the benchmarks that look at its pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from muralist.data import world
from muralist.types import Grid

STRIDE = 4  # of a large clip every fourth frame of a chunk is looked at: a whole one at 4K is 2.9 GB of floats
LARGE = 1000  # rows


@dataclass(frozen=True, slots=True)
class Kept:
    """The options, the scores, the scene, and the middle one of the frames that were looked at [H, W, 3], in [0, 1]."""

    about: dict[str, Any]
    row: dict[str, Any]
    scene: world.Scene
    frame: torch.Tensor


def read(folder: Path) -> list[Kept]:
    """Ends the run if there are none."""
    every, found = {world.caption(scene): scene for scene in world.all_scenes(held_out=True)}, []
    for path in sorted(folder.glob("[0-9][0-9][0-9]")):
        record = json.loads((path / "score.json").read_text())
        frame = torch.from_numpy(np.array(Image.open(path / "middle.png"))) / 255
        found.append(Kept(record["about"], record["row"], every[record["row"]["prompt"]], frame))
    if not found:
        raise SystemExit(f"{folder} holds no clips of adherence.py --keep")
    return found


def middle(num_frames: int, height: int) -> int:
    """Which frame is the kept one: chunks are the first frame alone, then a latent frame's four."""
    looked_at = list(range(num_frames)) if height < LARGE else [0, *range(1, num_frames, STRIDE)]
    return looked_at[len(looked_at) // 2]


def true_middle(scene: world.Scene, num_frames: int, height: int, width: int) -> torch.Tensor:
    """The same frame as the world renders it, [H, W, 3]."""
    index = middle(num_frames, height)
    return next(iter(world.render(scene, Grid(num_frames=num_frames, height=height, width=width), frames=range(index, index + 1))))


def of_eight_bits(frame: torch.Tensor) -> torch.Tensor:
    """As a kept one is: rounding is noise that shows in the finest octave."""
    return (frame * 255).round() / 255
