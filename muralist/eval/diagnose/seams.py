"""Seams: brightness steps along whole columns or rows, where tiles or windows met.

A seam is weak (a step of one code value) but long, and always at the same place. So luma is averaged over short segments along the line and
over a few frames, which keeps the step and averages texture away. The second difference of these averages, against what is usual within some
tens of pixels, says how unusual each line is in each segment and at each time. An edge of the scene is unusual in a few of them, a seam in
most: the largest 40 % have no say. Borders that are not known are sought as combs: equally spaced lines that all stand out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

SEGMENT = 32  # pixels along the line
GROUPS = 16  # moments at most that are kept apart
KEPT = 0.6  # of all segments at all moments, those that stand out least
AROUND = 32  # pixels across the line; what is usual is measured in three neighbouring blocks of this width
FLOOR = 0.1 / 255  # luma; a smaller step shows nowhere, and saturated areas have no texture to compare with
STRONGEST = 30.0  # more does not count: one strong line is no comb
SHORTEST = 48  # pixels; codecs work in blocks of up to 32 pixels and may leave a grid of them
EDGE = 8  # lines so close to the picture's border are left out


@dataclass(frozen=True, slots=True)
class Comb:
    """Lines that stand out together; a seam at x lies between pixels x - 1 and x. `period` is 0 where the lines were given."""

    period: int
    lines: tuple[int, ...]
    score: float


class LineMeter:
    """One direction: how far the border before each column of what is added stands out. For rows, add transposed frames."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []  # of segment means [K, W], a moment each
        self._counts: list[int] = []
        self._length = 1  # frames a moment, a power of two

    def add(self, luma: torch.Tensor) -> None:
        """The next frame [H, W] in [0, 1]."""
        means = F.avg_pool2d(luma[None, None], (min(SEGMENT, luma.shape[0]), 1))[0, 0]
        if self._counts and self._counts[-1] < self._length:
            self._sums[-1] += means
            self._counts[-1] += 1
            return
        if len(self._sums) == GROUPS:  # merge neighbours: memory stays bounded and the moments equally long
            self._sums = [a + b for a, b in zip(self._sums[::2], self._sums[1::2])]
            self._counts, self._length = [2 * self._length] * (GROUPS // 2), 2 * self._length
        self._sums.append(means)
        self._counts.append(1)

    def profile(self) -> tuple[np.ndarray, np.ndarray]:
        """Per column x [W]: how far the border between x - 1 and x stands out (0 +- 1 without seams, -1 beside a stronger one), and the step in luma."""
        pairs = [_unusual((total / count).numpy()) for total, count in zip(self._sums, self._counts)]
        z, step = (np.concatenate(parts) for parts in zip(*pairs))
        kept = max(1, round(KEPT * len(z)))
        unusual = np.partition(z, kept - 1, axis=0)[:kept].mean(0)
        middle = np.median(unusual)
        standing = (unusual - middle) / (1.48 * np.median(abs(unusual - middle)) + 1e-9)
        standing[:EDGE] = standing[-EDGE:] = 0
        beside = ndimage.maximum_filter1d(standing, 7)
        return np.where(standing < beside, np.minimum(standing, -1), standing), np.median(step, axis=0)


def _unusual(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From segment means [K, W]: |z| and the size of the step before each column, both [K, W]."""
    step = np.zeros_like(means)
    d = np.diff(means, axis=1)
    # a step at x is in d at x - 1 alone; slopes and soft edges are in its neighbours as well
    step[:, 2:-1] = abs(d[:, 1:-1] - (d[:, :-2] + d[:, 2:]) / 2)
    return step / np.maximum(1.48 * _usual(step), FLOOR), step


def _usual(step: np.ndarray) -> np.ndarray:
    """Median of `step` [K, W] near each column: of blocks first, then of each block and its two neighbours."""
    rows, size = step.shape
    count = -(-size // AROUND)
    blocks = np.pad(step, ((0, 0), (0, count * AROUND - size)), mode="reflect").reshape(rows, count, AROUND)
    blocks = ndimage.median_filter(np.median(blocks, axis=2), (1, 3), mode="nearest")
    return np.repeat(blocks, AROUND, axis=1)[:, :size]


def find_comb(standing: np.ndarray) -> Comb:
    """The equally spaced lines (two or more, or the middle one) of which the weakest stand out most, in a profile [W]."""
    size = len(standing)
    best = Comb(0, (), 0.0)
    for period in range(SHORTEST, size // 2 + 1):
        padded = np.full(-(-size // period) * period, np.inf)
        padded[EDGE : size - EDGE] = np.minimum(standing[EDGE : size - EDGE], STRONGEST)
        table = np.sort(padded.reshape(-1, period), axis=0)
        count = np.isfinite(table).sum(0)
        score = _together(table[(np.maximum(count, 1) - 1) // 4, np.arange(period)], count)
        score[(count < 2) & ~((np.arange(period) == 0) & (2 * period == size))] = 0
        phase = int(score.argmax())
        if score[phase] > best.score:
            best = Comb(period, tuple(x for x in range(phase, size, period) if EDGE <= x < size - EDGE), float(score[phase]))
    return best


def known_comb(standing: np.ndarray, lines: Sequence[int]) -> Comb:
    """The same score for given lines."""
    lines = tuple(sorted({int(x) for x in lines if EDGE <= x < len(standing) - EDGE}))
    if not lines:
        return Comb(0, (), 0.0)
    weakest = np.sort(np.minimum(standing[list(lines)], STRONGEST))[(len(lines) - 1) // 4]
    return Comb(0, lines, float(_together(weakest, np.array(len(lines)))))


def _together(weak: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Score of `count` lines of which three quarters stand out by `weak` at least."""
    return weak * np.sqrt(count)
