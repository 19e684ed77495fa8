"""Slow motion: how fast the picture moves, against the proxy it was made from.

Speed is the ratio of what changes in time to what changes in space, both summed over small pictures: it is in frame heights a second, and
contrast drops out of it. Both videos are compared at the same step in time, so frame rates may differ.
"""

from __future__ import annotations

import torch

from muralist.eval.diagnose.finding import Finding, Result, untold

SLOW = 0.8  # of the proxy's speed
STILL = 0.01  # frame heights a second; slower than this, a ratio says nothing
NAME, UNIT = "slow motion", "of the proxy's speed"


def slow_motion(thumbs: torch.Tensor, fps: float, proxy: torch.Tensor | None, proxy_fps: float) -> Result:
    """Compare the speed of small luma pictures [T, h, w] with that of the proxy's [T', h, w']."""
    if proxy is None:
        return untold(NAME, UNIT, SLOW, "what is slow only a proxy says; give one with --proxy")
    if min(len(thumbs), len(proxy)) < 2 or min(fps, proxy_fps) <= 0:
        return untold(NAME, UNIT, SLOW, "there is no second frame, or no frame rate")
    step = 1 / min(fps, proxy_fps)
    own, reference = speed(thumbs, round(step * fps)) / step, speed(proxy, round(step * proxy_fps)) / step
    if reference < STILL:
        return untold(NAME, UNIT, SLOW, f"hardly anything moves in the proxy ({reference:.3f} frame heights a second)")
    value = own / reference
    found = value < SLOW
    moves = f"{own:.3f} frame heights a second against {reference:.3f} in the proxy"
    sentence = f"Motion is slower than in the proxy, {100 * value:.0f} % of its speed ({moves})." if found else f"Motion is as fast as in the proxy ({moves})."
    return Result(Finding(name=NAME, value=value, unit=UNIT, threshold=SLOW, found=found, sentence=sentence))


def speed(thumbs: torch.Tensor, lag: int) -> float:
    """Mean speed over `lag` frames, in frame heights, of pictures [T, h, w]."""
    lag = min(max(lag, 1), len(thumbs) - 1)
    centred = thumbs - thumbs.mean((1, 2), keepdim=True)
    in_time = (centred[lag:] - centred[:-lag]).abs().sum((1, 2)) / len(centred[lag:])
    down, right = torch.gradient(centred, dim=(1, 2))
    in_space = torch.hypot(down, right).sum((1, 2)).mean()
    return float(in_time.sum() / in_space.clamp(min=1e-6)) / thumbs.shape[1]
