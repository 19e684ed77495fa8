"""Effective resolution: up to which frequency the picture carries energy of its own, so that enlarged video is told from true one.

An enlarged picture has nothing beyond the Nyquist limit of the picture it came from, but textures may be soft at any size and codecs add
noise, so a plain spectrum does not tell. Edges do: a sharp edge has energy at all frequencies. As in the edge method of ISO 12233:2017
(annex D, e-SFR), the response is measured on the strongest edges that the picture has, along rows and along columns:

    d = luma differences of neighbouring pixels,  P(f) = sum over windows of |DFT(hann * d)|^2,  windows of 64 pixels about local maxima of |d|
    R(f) = P(f) / mean P(1/32 ... 1/8 of Nyquist) / (2/3 + cos(pi f)/3),  f in units of Nyquist

The last factor is the response of an ideal pixel (the area average of a step, mean over its position), so that R is near one up to f = 1
for a true picture. The share is the first f at which R falls below `LEAST`, about the power that any interpolation leaves at the old
Nyquist limit; the effective height is share * rows. Of the two directions the better one counts: what has no edges along one of them is
not called enlarged for it (both are reported).

`effective_resolution` is in rows, from 0 to the height, higher is sharper; `.share` is the same as share of Nyquist. Skipped where nothing
in the picture has an edge. Nothing here knows content, codec or enlargement; benchmarks/results/effective_resolution.md says how far to trust it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from muralist.eval.metrics._shared import luma
from muralist.eval.registry import Metric, Unavailable, register

WINDOW = 64  # pixels: resolves 1/32 of Nyquist
EDGES, SHARE = 2048, 16  # windows a frame at most, and one in SHARE of those there are
LEAST = 10**-0.8  # -8 dB
REFERENCE = slice(1, 5)  # bins of the spectrum that every picture has
FAINT = 4 / 255  # root mean square of the edges' steepest difference, below which there is no edge
FRAMES = 16  # looked at in a video, evenly spread


class EffectiveResolution:
    """See the module. `height` and `num_frames` are the video's."""

    def __init__(self, num_frames: int):
        self._step, self._seen, self._height = max(num_frames // FRAMES, 1), 0, 0
        self._power = {"x": torch.zeros(WINDOW // 2 + 1, dtype=torch.float64), "y": torch.zeros(WINDOW // 2 + 1, dtype=torch.float64)}
        self._steepest = {"x": 0.0, "y": 0.0}

    def add(self, frame: torch.Tensor) -> None:
        self._height = frame.shape[0]
        if self._seen % self._step == 0:
            picture = luma(frame)
            for axis, lines in (("x", picture), ("y", picture.T.contiguous())):
                power, steepest = edge_power(lines)
                self._power[axis] += power.cpu()
                self._steepest[axis] = max(self._steepest[axis], steepest)
        self._seen += 1

    def result(self) -> dict[str, float]:
        shares = {axis: share(power) if self._steepest[axis] >= FAINT else 0.0 for axis, power in self._power.items()}
        best = max(shares.values())
        if not best:
            raise Unavailable("no edge stands out in this video")
        return {"effective_resolution": best * self._height, "effective_resolution.share": best} | {
            f"effective_resolution.share_{axis}": value for axis, value in shares.items()
        }


def edge_power(lines: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Power [33] of the differences about the strongest edges along the lines of a picture [n, length], and how steep those are."""
    difference = lines[:, 1:] - lines[:, :-1]
    half = WINDOW // 2
    inner = difference[:, half : difference.shape[1] - half].abs()
    if inner.shape[1] < WINDOW:
        raise Unavailable(f"a side of fewer than {2 * WINDOW + 1} pixels is too short to tell")
    steepness, column = F.max_pool1d(inner[:, None], WINDOW, return_indices=True)
    steepness, chosen = steepness.flatten().topk(min(max(steepness.numel() // SHARE, 1), EDGES))
    rows, starts = chosen // column.shape[2], column.flatten()[chosen]
    windows = difference[rows[:, None], starts[:, None] + torch.arange(WINDOW, device=lines.device)]
    power = torch.fft.rfft(windows * torch.hann_window(WINDOW, device=lines.device)).abs().square().sum(0, dtype=torch.float64)
    return power, steepness.square().mean().sqrt().item()


def share(power: torch.Tensor) -> float:
    """The first frequency, as a share of Nyquist, at which the response [33] falls below `LEAST`; 1 where it never does."""
    frequency = torch.linspace(0, 1, len(power), dtype=power.dtype)
    response = power / power[REFERENCE].mean() / (2 / 3 + torch.cos(math.pi * frequency) / 3)
    below = (response < LEAST).nonzero().flatten().tolist()
    after = [i for i in below if i >= REFERENCE.stop]
    if not after:
        return 1.0
    i = after[0]
    high, low = response[i - 1].log().item(), response[i].clamp(min=1e-30).log().item()
    part = (high - math.log(LEAST)) / (high - low)
    return (i - 1 + min(max(part, 0.0), 1.0)) / (len(power) - 1)


register(
    Metric(
        name="effective_resolution",
        kind="video",
        summary="height that the sharpest edges would need: tells true 4K from enlarged",
        unit="rows",
        better="higher",
        origin="ours, by the edge method of ISO 12233:2017, annex D",
        start=lambda setup, source: EffectiveResolution(source.info.num_frames),
    )
)
