"""One scene painted and judged, as several benchmarks do it: what of its caption the video shows, and how far its spectrum is from that of a true render."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import muralist
from muralist.data import world
from muralist.data.score import Score, score
from muralist.eval.diagnose.checks import Seams
from muralist.eval.diagnose.view import View
from muralist.eval.metrics.spectrum import SpectralDistance
from muralist.types import Grid


@dataclass(frozen=True, slots=True)
class Judged:
    """Frames [t, H, W, 3] in [0, 1], their score, and the values of `SpectralDistance`."""

    frames: torch.Tensor
    score: Score
    distance: dict[str, float]


def paint_and_judge(pipe: muralist.Pipeline, scene: world.Scene, grid: Grid, settings: tuple[str, ...], **options: Any) -> Judged:
    """`options`: more of them for the pipeline."""
    sized = {"width": grid.width, "height": grid.height, "num_frames": grid.num_frames}
    with pipe(world.caption(scene), **sized, seed=scene.seed, settings=settings, **options) as video:
        frames = torch.cat([chunk.frames for chunk in video])
    distance = SpectralDistance(len(frames))
    for frame, true in zip(frames, world.render(scene, grid)):
        distance.add(frame, true)
    return Judged(frames, score(frames, scene), distance.result())


def seams(frames: torch.Tensor) -> float:
    """How far the strongest comb of lines stands out, by `diagnose`."""
    check = Seams()
    for index, frame in enumerate(frames):
        check.add(View(frame, index))
    return check.results()[0].finding.value
