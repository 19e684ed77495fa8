"""Pixel against pixel: PSNR, MSE and SSIM of a video and its reference.

`psnr`: mean over frames of 10 log10(1 / MSE_t), MSE_t over all pixels and RGB channels of values in [0, 1]; decibels, higher is closer;
identical frames count `CEILING` dB. `psnr.mse` is the mean of MSE_t. These are PSNR_RGB and MSE_RGB of LUVE (arXiv 2602.11564), Table 12.

`ssim`: mean over frames of the mean SSIM map of the luma, Wang et al., "Image quality assessment: from error visibility to structural
similarity", IEEE TIP 13(4), 2004, eq. 13, in [-1, 1], higher is closer:

    SSIM = (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2)),  C1 = (K1 L)^2, C2 = (K2 L)^2, K1 = 0.01, K2 = 0.03, L = 1

with weights of an 11x11 Gaussian of sigma 1.5 (sum 1), moments only where the whole window is inside the frame, and no downsampling
before (the paper's later code shrinks large frames first; at 4K that would hide just what is to be seen).
"""

from __future__ import annotations

import functools
import math

import torch

from muralist.eval.metrics._linear import BLOCK, Banded, convolution
from muralist.eval.metrics._shared import luma, mean, squared_error
from muralist.eval.registry import Metric, Unavailable, register

CEILING = 100.0
WINDOW, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2


class Psnr:
    """See the module."""

    def __init__(self):
        self._errors: list[float] = []

    def add(self, frame: torch.Tensor, reference: torch.Tensor) -> None:
        self._errors.append(squared_error(frame, reference))

    def result(self) -> dict[str, float]:
        return {"psnr": mean([psnr_of(error) for error in self._errors]), "psnr.mse": mean(self._errors)}


def psnr_of(error: float) -> float:
    """Decibels of a mean squared error of values in [0, 1]."""
    return min(-10 * math.log10(error), CEILING) if error > 0 else CEILING


class Ssim:
    """See the module."""

    def __init__(self):
        self._frames: list[float] = []

    def add(self, frame: torch.Tensor, reference: torch.Tensor) -> None:
        self._frames.append(ssim(luma(frame), luma(reference)))

    def result(self) -> dict[str, float]:
        return {"ssim": mean(self._frames)}


def ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean SSIM of two pictures [H, W] in [0, 1]; Unavailable below 11x11."""
    rows, columns = (side - WINDOW + 1 for side in x.shape)
    if min(rows, columns) < 1:
        raise Unavailable(f"a frame of {x.shape[1]}x{x.shape[0]} pixels is smaller than the window of {WINDOW}x{WINDOW}")
    blur = _blur(x.shape[1], str(x.device))
    bands = (slice(top, min(top + BLOCK, rows) + WINDOW - 1) for top in range(0, rows, BLOCK))
    return sum(_ssim_map(x[band], y[band], blur).sum().item() for band in bands) / (rows * columns)


def _ssim_map(x: torch.Tensor, y: torch.Tensor, across: Banded) -> torch.Tensor:
    """[rows - 10, columns - 10]; `across` blurs the columns."""
    # moments about the middle grey: variances are then small differences of small numbers, which float32 can hold
    x, y = x - 0.5, y - 0.5
    down = _blur(len(x), str(x.device))
    mx, my, xx, yy, xy = across.columns(down.all_rows(torch.stack((x, y, x * x, y * y, x * y))))
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    mx, my = mx + 0.5, my + 0.5
    return (2 * mx * my + C1) * (2 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))


@functools.lru_cache(8)
def _blur(size: int, device: str) -> Banded:
    """The Gaussian window as a map of `size` samples to size - 10."""
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * SIGMA**2))
    return Banded(convolution(size, window / window.sum()), device)


register(
    Metric(
        name="psnr",
        kind="pair",
        summary="peak signal-to-noise ratio of RGB, mean of frames",
        unit="dB",
        better="higher",
        origin="LUVE (arXiv 2602.11564), Table 12",
        start=lambda setup, source: Psnr(),
    )
)
register(
    Metric(
        name="ssim",
        kind="pair",
        summary="structural similarity of the luma at full size, 11x11 Gaussian window",
        unit="",
        better="higher",
        origin="Wang et al., IEEE TIP 13(4), 2004, eq. 13",
        start=lambda setup, source: Ssim(),
    )
)
