"""Detail that a video loses when it is made small and large again: HD-MSE and mHD-MSE.

    HD-MSE(v)  = sum over k = 3, 4, 5 of MSE(v, R_k(v))            UltraGen (arXiv 2510.18775), appendix D, eq. 14
    mHD-MSE(v) = the mean over k = 3, 4, 5 of the same             PixelWizard (arXiv 2605.25801), eq. 9.9

R_k reduces by 2^k and enlarges to the old size; the mean squared error is over frames, pixels and RGB values in [0, 1]. Higher means
more detail (noise counts as detail too); 0 for a flat picture. Neither paper says which filters it uses. Here: the area mean down, to
round(side / 2^k) pixels, and linear interpolation up. Numbers of one paper and these compare in order, not in their third digit.
"""

from __future__ import annotations

import torch

from muralist.eval.metrics._linear import Banded, area, linear
from muralist.eval.metrics._shared import mean, once_a_frame
from muralist.eval.registry import Metric, register

SCALES = (3, 4, 5)


class Resize:
    """R_k of frames of one size."""

    def __init__(self, height: int, width: int, k: int, device: torch.device):
        rows, columns = (max(round(side / 2**k), 1) for side in (height, width))
        self._down = Banded(area(height, rows), device), Banded(area(width, columns), device)
        self._up = Banded(linear(rows, height), device), Banded(linear(columns, width), device)

    def error(self, frame: torch.Tensor) -> float:
        """Mean squared error of a frame [H, W, 3] and its R_k. Only small pictures are copied; the large one is made band by band."""
        height, width, _ = frame.shape
        flat = frame.view(height, 3 * width)
        short = self._down[0].all_rows(flat).view(-1, width, 3).permute(2, 0, 1)
        small = self._down[1].columns(short)
        wide = self._up[1].columns(small).permute(1, 2, 0).reshape(-1, 3 * width)
        total = sum((part - flat[start:end]).square_().sum().item() for start, end, part in self._up[0].rows(wide))
        return total / frame.numel()


class Detail:
    """Both measures: HD-MSE is the sum, mHD-MSE the mean of the same errors, so they share them."""

    def __init__(self, name: str, weight: float):
        self._name, self._weight, self._frames = name, weight, []

    def add(self, frame: torch.Tensor) -> None:
        self._frames.append(_errors(frame))

    def result(self) -> dict[str, float]:
        means = {k: mean([float(errors[i]) for errors in self._frames]) for i, k in enumerate(SCALES)}
        return {self._name: self._weight * sum(means.values())} | {f"{self._name}.k{k}": value for k, value in means.items()}


_resizes: dict[tuple, list[Resize]] = {}


@once_a_frame
def _errors(frame: torch.Tensor) -> torch.Tensor:
    """MSE at each of SCALES, [3] float64."""
    key = (*frame.shape[:2], frame.device)
    if key not in _resizes:
        _resizes.clear()  # one size at a time: the matrices of a 4K frame take some MB
        _resizes[key] = [Resize(*key[:2], k, frame.device) for k in SCALES]
    return torch.tensor([resize.error(frame) for resize in _resizes[key]], dtype=torch.float64)


def _register(name: str, summary: str, weight: float, origin: str) -> None:
    start = lambda setup, source: Detail(name, weight)  # noqa: E731
    register(Metric(name=name, kind="video", summary=summary, unit="", better="higher", origin=origin, start=start))


_register("hd_mse", "detail lost by reducing 8, 16 and 32 times, sum", 1.0, "UltraGen (arXiv 2510.18775), appendix D, eq. 14")
_register("mhd_mse", "detail lost by reducing 8, 16 and 32 times, mean", 1 / 3, "PixelWizard (arXiv 2605.25801), eq. 9.9")
