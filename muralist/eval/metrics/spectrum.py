"""Radial power spectra: how power falls with frequency, and how far a video's spectrum is from its reference's.

    P(r) = mean of |DFT2(w (Y - mean Y))|^2 / sum w^2 over the frequencies of a ring, Y the luma in [0, 1], w a Hann window on both sides

averaged over up to 16 frames evenly spread, and given in decibels, 10 log10 P, in quarter octaves of cycles a pixel from 1/256 to 1/2
(Nyquist); white noise of variance s^2 has P = s^2 everywhere. Rings without a frequency, and those below two cycles a side, which the
window blurs, are left out. Power below 1e-10, a hundredth of what rounding to 10 bits adds, counts as 1e-10.

`spectrum`: the least-squares slope in dB an octave from 1/64 to 1/2 (filmed scenes: about -6, Field, JOSA A 4(12), 1987), neither
better nor worse by itself; `spectrum.F` is the level at F cycles a pixel.
`spectral_distance`: root mean square over bands of the difference in dB to the reference; 0 is equal, lower is closer;
`.highest_octave` is the mean difference in the octave up to Nyquist, negative where detail is lacking.
"""

from __future__ import annotations

import functools
import math

import torch

from muralist.eval.metrics._shared import luma, once_a_frame
from muralist.eval.registry import Metric, Unavailable, register

FRAMES = 16
LOWEST, PER_OCTAVE, OCTAVES = 1 / 256, 4, 7
CENTRES = [LOWEST * 2 ** ((i + 0.5) / PER_OCTAVE) for i in range(PER_OCTAVE * OCTAVES)]  # cycles a pixel
FLOOR = 1e-10
_SLOPE_FROM = 1 / 64


class Spectrum:
    """The mean spectrum of a video of `num_frames`."""

    def __init__(self, num_frames: int):
        self._step, self._seen, self._sum, self._count = max(num_frames // FRAMES, 1), 0, torch.zeros(len(CENTRES), dtype=torch.float64), 0

    def add(self, frame: torch.Tensor) -> None:
        if self._seen % self._step == 0:
            self._sum += radial_power(frame)
            self._count += 1
        self._seen += 1

    def levels(self) -> torch.Tensor:
        """Decibels of each band, NaN where the frame has none."""
        power = self._sum / self._count
        return torch.where(power.isnan(), power, 10 * power.clamp(min=FLOOR).log10())

    def result(self) -> dict[str, float]:
        levels = self.levels()
        octave = torch.tensor(CENTRES, dtype=torch.float64).log2()
        used = ~levels.isnan() & (octave > math.log2(_SLOPE_FROM))
        if used.sum() < 2:
            raise Unavailable("the frame is too small for a spectrum")
        x, y = octave[used] - octave[used].mean(), levels[used] - levels[used].mean()
        bands = {f"spectrum.{centre:.4f}": level for centre, level in zip(CENTRES, levels.tolist()) if not math.isnan(level)}
        return {"spectrum": float((x * y).sum() / (x * x).sum())} | bands


class SpectralDistance:
    """Two spectra side by side."""

    def __init__(self, num_frames: int):
        self._ours, self._theirs = Spectrum(num_frames), Spectrum(num_frames)

    def add(self, frame: torch.Tensor, reference: torch.Tensor) -> None:
        self._ours.add(frame)
        self._theirs.add(reference)

    def result(self) -> dict[str, float]:
        difference = self._ours.levels() - self._theirs.levels()
        difference = difference[~difference.isnan()]
        if not len(difference):
            raise Unavailable("the frame is too small for a spectrum")
        highest = difference[-PER_OCTAVE:]
        return {"spectral_distance": difference.square().mean().sqrt().item(), "spectral_distance.highest_octave": highest.mean().item()}


@once_a_frame
def radial_power(frame: torch.Tensor) -> torch.Tensor:
    """Power of each band of CENTRES, float64, NaN for a band without frequencies."""
    picture = luma(frame)
    height, width = picture.shape
    ring, counts, window = _rings(height, width, str(frame.device))
    # in float64: a slope is a small difference of levels
    spectrum = torch.fft.rfft2((picture - picture.mean()).double() * window)
    power = torch.zeros(len(CENTRES) + 1, dtype=torch.float64, device=frame.device)
    for values, index in zip(spectrum.split(64), ring.split(64)):  # by bands of rows: the power of a 4K frame is 66 MB more
        power.index_add_(0, index.flatten(), (values.real.square() + values.imag.square()).flatten())
    return (power / counts / window.square().sum(dtype=torch.float64))[:-1].cpu()


@functools.lru_cache(2)
def _rings(height: int, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the half spectrum [H, W // 2 + 1]: the band of each frequency (the last index: none), how many a band has; and the window [H, W]."""
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    ring = ((radius.clamp(min=1e-9) / LOWEST).log2() * PER_OCTAVE).floor().long()
    ring[(radius > 0.5) | (radius < max(LOWEST, 2 / min(height, width))) | (ring < 0)] = len(CENTRES)
    ring = ring.clamp(max=len(CENTRES)).masked_fill(radius == 0.5, len(CENTRES) - 1)
    counts = torch.bincount(ring.flatten(), minlength=len(CENTRES) + 1).double()
    window = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(width, periodic=False)
    return ring.int().to(device), counts.masked_fill(counts == 0, math.nan).to(device), window.to(device)


register(
    Metric(
        name="spectrum",
        kind="video",
        summary="slope of the radial power spectrum, and its level in quarter octaves",
        unit="dB/octave",
        better="neither",
        origin="radially averaged periodogram of the luma",
        start=lambda setup, source: Spectrum(source.info.num_frames),
    )
)
register(
    Metric(
        name="spectral_distance",
        kind="pair",
        summary="difference of the radial power spectra, root mean square over quarter octaves",
        unit="dB",
        better="lower",
        origin="ours",
        start=lambda setup, source: SpectralDistance(source.info.num_frames),
    )
)
