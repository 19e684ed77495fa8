"""One scene painted and judged, as several benchmarks do it: what of its caption the video shows, and how far its spectrum is from that of a true render."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

import muralist
from muralist.data import world
from muralist.data.score import Score, score
from muralist.eval.diagnose.checks import Seams
from muralist.eval.diagnose.finding import Finding
from muralist.eval.diagnose.view import View
from muralist.eval.metrics.spectrum import SpectralDistance
from muralist.nn.windows import split_evenly
from muralist.types import Geometry, Grid


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
    return Judged(frames, score_of(frames, scene), distance.result())


def score_of(frames: torch.Tensor, scene: world.Scene) -> Score:
    """Of a single frame too, in which nothing moves."""
    return score(frames if len(frames) > 1 else frames.expand(5, -1, -1, -1), scene)  # which looks at what changes


def seams(frames: torch.Tensor, borders: dict[str, list[int]] | None = None) -> Finding:
    """The strongest comb of lines, or that of `borders` if there are any, by `diagnose`; its value: how many times the usual it stands out."""
    check = Seams(borders)
    for index, frame in enumerate(frames):
        check.add(View(frame, index))
    return check.results()[-1].finding


def window_borders(geometry: Geometry, grid: Grid, windows: int, *, place: int = 0, shifted: bool = False, pooled: int = 1) -> dict[str, list[int]]:
    """Where `windows` by `windows` of them meet, in pixels; `place`, `shifted`: as `split_evenly` takes them; `pooled`: tokens along a side that are one."""
    _, rows, columns = geometry.token_shape(geometry.legal(grid))
    starts = {axis: accumulate(split_evenly(-(-tokens // pooled), windows, place, shifted)[:-1]) for axis, tokens in (("x", columns), ("y", rows))}
    return {axis: [geometry.pixel_multiple * pooled * start for start in along] for axis, along in starts.items()}
