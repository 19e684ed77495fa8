"""Change over time: flicker, and whether anything moves.

`temporal_flickering` is VBench's formula (arXiv 2311.17982, appendix; values there 0 to 255):

    1 - mean over t of mean |v_(t+1) - v_t|,  over all pixels and RGB values in [0, 1], at full size

in [0, 1], higher is steadier. VBench asks it of prompts for still scenes only: of a video that moves it measures the motion as well.

`dynamic_degree[blocks]` is VBench's rule with another measure of motion, hence the other name. VBench calls a video dynamic if at least
round(n / 4) of its n frames at 8 frames a second (it writes round(4 n / 16)) have a speed above 6 pixels at a short side of 256, the
speed being the mean of the fastest 5 % of the optical flow by RAFT. Here the flow is that of blocks of 16x16 pixels of frames reduced
to a short side of 256 by area: each goes to the place within `REACH` pixels in the next frame where the mean absolute difference of the
luma, plus `REST` a pixel of way, is smallest. 1 is dynamic, 0 is not; `.share` is the share of pairs that are fast enough, `.speed`
their mean speed in those pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from muralist.eval.metrics._shared import absolute_error, luma, mean
from muralist.eval.registry import Metric, Unavailable, register

SIDE, BLOCK, REACH = 256, 16, 16  # REACH: a multiple of BLOCK
REST = 0.2 / 255  # luma: a flat block, which fits everywhere, stays where it is
RATE, FAST, FASTEST = 8.0, 6.0, 0.05


class Flickering:
    """See the module."""

    def __init__(self):
        self._last: torch.Tensor | None = None
        self._changes: list[float] = []

    def add(self, frame: torch.Tensor) -> None:
        if self._last is not None:
            self._changes.append(absolute_error(frame, self._last))
        self._last = frame

    def result(self) -> dict[str, float]:
        if not self._changes:
            raise Unavailable("a single frame does not flicker")
        return {"temporal_flickering": 1 - mean(self._changes)}


class DynamicDegree:
    """See the module; `fps` is the video's, 0 where unknown (every frame is then looked at)."""

    def __init__(self, fps: float):
        self._step, self._seen = max(round(fps / RATE), 1), 0
        self._last: torch.Tensor | None = None
        self._speeds: list[float] = []

    def add(self, frame: torch.Tensor) -> None:
        if self._seen % self._step == 0:
            small = reduced(luma(frame))
            if self._last is not None:
                self._speeds.append(top_speed(self._last, small))
            self._last = small
        self._seen += 1

    def result(self) -> dict[str, float]:
        if not self._speeds:
            raise Unavailable(f"fewer than two frames at {RATE:g} frames a second")
        name = "dynamic_degree[blocks]"
        fast = sum(speed > FAST for speed in self._speeds)
        dynamic = fast >= max(round((len(self._speeds) + 1) / 4), 1)
        return {name: float(dynamic), f"{name}.share": fast / len(self._speeds), f"{name}.speed": mean(self._speeds)}


def reduced(picture: torch.Tensor) -> torch.Tensor:
    """[H, W] with its short side made 256 by area mean (or linearly, if it is smaller)."""
    scale = SIDE / min(picture.shape)
    size = [max(round(side * scale), SIDE) for side in picture.shape]
    return F.interpolate(picture[None, None], size, mode="area" if scale <= 1 else "bilinear")[0, 0]


def top_speed(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean way in pixels of the fastest 5 % of the blocks from one picture [h, w] to the next; blocks at the border, which may leave, are left out."""
    height, width = (side // BLOCK * BLOCK - 2 * REACH for side in before.shape)
    blocks = before[REACH : REACH + height, REACH : REACH + width]
    best = torch.full((height // BLOCK, width // BLOCK), math.inf, device=before.device)
    way = torch.zeros_like(best)
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            other = after[REACH + dy : REACH + dy + height, REACH + dx : REACH + dx + width]
            cost = F.avg_pool2d((blocks - other).abs()[None], BLOCK)[0] + REST * math.hypot(dy, dx)
            better = cost < best
            best, way = torch.where(better, cost, best), way.masked_fill(better, math.hypot(dy, dx))
    fastest = way.flatten().sort(descending=True).values
    return fastest[: max(round(len(fastest) * FASTEST), 1)].mean().item()


register(
    Metric(
        name="temporal_flickering",
        kind="video",
        summary="one minus the mean change from frame to frame",
        unit="",
        better="higher",
        origin="VBench (arXiv 2311.17982), temporal flickering, without its choice of still scenes",
        start=lambda setup, source: Flickering(),
    )
)
register(
    Metric(
        name="dynamic_degree[blocks]",
        kind="video",
        summary="whether anything moves fast enough, by block matching",
        unit="",
        better="neither",
        origin="VBench (arXiv 2311.17982), dynamic degree, with block matching in place of RAFT",
        start=lambda setup, source: DynamicDegree(source.info.fps),
    )
)
