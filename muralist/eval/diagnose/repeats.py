"""Loops and repeats: a video that has gone away from a picture and comes back to it, frame after frame.

Small pictures of all frames are compared with one another. On a lag where a run of frames repeats, the distance falls to a fraction of how far
the video had gone in between; a video that stands still never went away, and one that moves on never comes back.
"""

from __future__ import annotations

import numpy as np
import torch

from muralist.eval.diagnose.finding import Finding, Plot, Result, untold

RUN = 5  # frames in a row that repeat
BACK = 0.6  # share of the way that is undone
AWAY = 0.3 / 255  # luma, root mean square; less is no motion
MOST = 2048  # frames compared; longer videos are thinned
SAME = 0.01  # shares that differ by less are alike; the earliest and shortest is named
LOOP = 0.9  # of all frames that could repeat do: a loop, not a repeat


def repeats(thumbs: torch.Tensor, fps: float) -> Result:
    """Find repeats in small luma pictures `thumbs` [T, h, w], values in [0, 1]."""
    stride = -(-len(thumbs) // MOST)
    pictures = thumbs[::stride].flatten(1)
    name, unit = "loops and repeats", "share of the way undone"
    if len(pictures) < 2 * RUN + 2:
        return untold(name, unit, BACK, f"a repeat takes {2 * RUN + 2} frames to show")
    runs = _runs(_distances(pictures))
    if float(runs.max()) < AWAY:
        return untold(name, unit, BACK, "nothing moves, so nothing can come back")
    (value, start, lag), per_lag, share = _best(runs)
    found = bool(value >= BACK)
    again = (start + lag) * stride
    if found and share[lag] >= LOOP:
        sentence = f"The video loops every {lag * stride} frames ({lag * stride / fps:.2g} s)."
    elif found:
        sentence = f"Frames from {start * stride} on come again from {again} on ({again / fps:.2g} s)."
    else:
        sentence = "No frames come back once the video has moved on."
    where = {"frames": [start * stride, again], "lag": [lag * stride]} if found else {}
    plot = Plot(
        title="How far the way is undone at each lag", x_label="lag, frames", y_label="share", x=[i * stride for i in range(len(per_lag))], y=per_lag,
        level=BACK, marks=(lag * stride,) if found else (),
    )  # fmt: skip
    return Result(Finding(name=name, value=value, unit=unit, threshold=BACK, found=found, sentence=sentence, where=where), (plot,))


def _distances(pictures: torch.Tensor) -> np.ndarray:
    """Root mean square differences [T, T] of pictures [T, n], each less its mean (light may change and the picture still repeat)."""
    centred = pictures - pictures.mean(1, keepdim=True)
    return (torch.cdist(centred.double(), centred.double()) / pictures.shape[1] ** 0.5).numpy()


def _runs(distances: np.ndarray) -> np.ndarray:
    """Largest distance along each diagonal run of RUN frames, [T - RUN + 1, T - RUN + 1]."""
    size = len(distances) - RUN + 1
    return np.max([distances[i : i + size, i : i + size] for i in range(RUN)], axis=0)


def _best(runs: np.ndarray) -> tuple[tuple[float, int, int], np.ndarray, np.ndarray]:
    """(share undone, start, lag) of the best repeat; and per lag the best share, and how many of the starts repeat."""
    size = len(runs)
    per_lag, share = np.zeros(size), np.zeros(size)
    best, farthest = (0.0, 0, 0), np.zeros(size)
    for lag in range(1, size):
        now = np.diagonal(runs, lag)
        before = farthest[: size - lag]
        undone = np.where(before >= AWAY, 1 - now / np.maximum(before, 1e-9), 0)
        if lag >= RUN:
            most = max(float(undone.max()), 0.0)
            per_lag[lag], share[lag] = most, (undone >= BACK).mean()
            if most > best[0] + SAME:
                best = (most, int((undone >= most - SAME).argmax()), lag)
        farthest = np.maximum(before, now)
    return best, per_lag, share
