"""How the predicted clean latent comes to be while a base denoises: its power spectra, and when each band of frequencies settles.

At step k the base holds z_k at noise level sigma_k and predicts the clean latent x_k = z_k - sigma_k v, v the guided velocity. The last
prediction is the result, x_end: the last Euler step goes to sigma 0. Coarse structure is known early and detail late; methods that treat
the two differently switch at a noise level in between, and this measures where that level lies for a base.

**Spectrum.** P = |DFT2(w x)|^2 / sum w^2 over height and width, mean over channels and latent frames; white noise of variance s^2 has
P = s^2 everywhere, and the mean of a frame is kept. w is a periodic Hann window on both sides: frames do not wrap around, and without it
the jump from one border to the other would put power of the coarse structure into high frequencies, just where early predictions have
none. It moves power by about one cycle a side; borders count less for it. Frequencies are radial shares of the Nyquist limit of
the *latent* grid (half a cycle a latent cell), rings one cycle of the shorter side wide.

**Bands.** |P_b x|^2 = the sum of P over a band, low or high, split at `cutoff` by a sharp `RadialFilter`; what lies on the cutoff counts
half for each, so that both bands together are the power of the latent. The low band holds the mean. A cutoff here is twice as large in
the unit of the filters on tokens, for a patch of 2 x 2.

**Settled share.** s_b(sigma_k) = 1 - |P_b (x_k - x_end)|^2 / |P_b x_end|^2, at least 0: how much of the band's final content stands
already. It is 1 at the last prediction by construction, so the fewer steps, the coarser the end of the curve.

**Crossing.** The noise level at which the rate of s_high overtakes that of s_low. Both change over the same step, so the unit of the rates
does not move it; they are given per unit of sigma, since the step depends on the schedule and log-SNR has no value at sigma = 1. It is
where the low band is farthest ahead, the maximum of s_low - s_high, which is unique where curves are uneven; between two noise levels it
is where the rates, taken at the middles of steps and linear in between, are equal. This definition is ours: the method that switches at
0.875 publishes the level and not how it was found.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from muralist.base import Base
from muralist.errors import UserError
from muralist.nn.filters import RadialFilter
from muralist.progress import Observer, measured
from muralist.sampling import flow
from muralist.stages.proxy import check_guidance
from muralist.store import atomic
from muralist.types import Grid, TextCond
from muralist.velocity import velocity_field

BANDS = ("low", "high")
MIN_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is followed: every prompt with every seed, denoised on one legal grid by one schedule.

    `guidance_interval`: noise levels (low, high) between which guidance works, `guidance_mean_interval`: also on channels' means (`flow.guided`).
    `cutoff`: share of the latent's Nyquist.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    grid: Grid
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    guidance_interval: flow.Interval = flow.WHOLE
    guidance_mean_interval: flow.Interval = flow.WHOLE
    cutoff: float = 0.25

    def __post_init__(self):
        flow.sigmas(self.num_inference_steps, self.flow_shift)
        check_guidance(self.guidance_scale, self.guidance_interval, self.guidance_mean_interval)
        check_cutoff(self.cutoff)
        if self.num_inference_steps < MIN_STEPS:
            raise UserError(f"{self.num_inference_steps} steps make no curve", where="num_inference_steps", fix=f"use at least {MIN_STEPS}, better 20 or more")

    @property
    def levels(self) -> list[float]:
        """The N + 1 noise levels from 1 to 0."""
        return flow.sigmas(self.num_inference_steps, self.flow_shift)


def check_cutoff(cutoff: float) -> None:
    if not 0 < cutoff < 1:
        raise UserError(f"{cutoff}", where="cutoff", fix="use a share of the latent's Nyquist frequency between 0 and 1, such as 0.25")


# --- spectra ----------------------------------------------------------------------------------------------------------------------


class Spectra:
    """Power of latents [C, F, h, w] over height and width, in rings and in two bands.

    `frequency` [R]: centres of the rings, shares of the latent's Nyquist from 0 to 1; the corners above belong to the high band only.
    """

    def __init__(self, height: int, width: int, cutoff: float):
        self._window = torch.hann_window(height)[:, None] * torch.hann_window(width)
        columns = torch.arange(width // 2 + 1)
        # the half spectrum of a real signal: each of its columns stands for two, but the first and, of an even width, the last
        self._times = torch.where((columns == 0) | (2 * columns == width), 1.0, 2.0).double().expand(height, -1)
        low = RadialFilter(band="low", cutoff=cutoff, edge=0.0).transfer(height, width).double()
        self._bands = torch.stack([low, 1 - low]) * self._times / (height * width)
        shorter = min(height, width)
        radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
        self._count = shorter // 2 + 1
        self._ring = (radius * shorter).round().long().clamp(max=self._count).flatten()
        self.frequency = torch.arange(self._count, dtype=torch.float64) * 2 / shorter

    def power(self, latent: torch.Tensor) -> torch.Tensor:
        """[C, F, h, w] -> P [h, w // 2 + 1] float64, mean over channels and frames; frame by frame, so that a long latent takes no more memory."""
        total = torch.zeros(self._times.shape, dtype=torch.float64)
        for frame in latent.unbind(1):
            spectrum = torch.fft.rfft2(frame.float() * self._window)
            total += (spectrum.real.square() + spectrum.imag.square()).double().mean(0)
        return total / latent.shape[1] / self._window.double().square().sum()

    def rings(self, power: torch.Tensor) -> torch.Tensor:
        """Mean of P over each ring, [R]."""
        sums, counts = (torch.bincount(self._ring, values.flatten(), minlength=self._count + 1) for values in (power * self._times, self._times))
        return (sums / counts)[: self._count]

    def bands(self, power: torch.Tensor) -> torch.Tensor:
        """Power of the low and the high band, [2]; their sum is the mean square of the windowed latent over that of the window."""
        return (self._bands * power).sum((1, 2))


# --- curves -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """N predictions of one video, or the mean of several: `sigma` [N], falling; `psd` [N, R]; `power` |P_b x_k|^2 and `error`
    |P_b (x_k - x_end)|^2, [N, 2], low and high. All float64."""

    sigma: torch.Tensor
    psd: torch.Tensor
    power: torch.Tensor
    error: torch.Tensor

    @property
    def settled(self) -> torch.Tensor:
        """s_b, [N, 2] in [0, 1]. A band that ends without power has nothing to settle: 1 where the error is 0 too."""
        return (1 - self.error / self.power[-1].clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)

    @property
    def rate(self) -> torch.Tensor:
        """Settled share per unit of sigma from each prediction to the next, [N - 1, 2]; positive while the band settles."""
        return self.settled.diff(dim=0) / -self.sigma.diff()[:, None]

    @property
    def gain(self) -> torch.Tensor:
        """Power of each band as a multiple of its final power, [N, 2]: whether it is there at all, be it in the right place or not."""
        return self.power / self.power[-1].clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def high_to_low(self) -> torch.Tensor:
        """Power of the high band over that of the low one, [N]."""
        return self.power[:, 1] / self.power[:, 0].clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def crossing(self) -> float | None:
        """The noise level at which the high band's rate overtakes the low one's; None if the low band gains no lead after the first prediction."""
        ahead = self.settled[:, 0] - self.settled[:, 1]
        peak = int(ahead.argmax())
        if ahead[peak] <= 0 or peak in (0, len(ahead) - 1):
            return None
        lead, middles = ahead.diff() / -self.sigma.diff(), (self.sigma[1:] + self.sigma[:-1]) / 2  # the difference of the rates, and where it holds
        weight = lead[peak - 1] / (lead[peak - 1] - lead[peak])  # above 0 before the first maximum, 0 or less after it
        return float(torch.lerp(middles[peak - 1], middles[peak], weight))

    @property
    def half_settled(self) -> tuple[float, float]:
        """For each band the noise level below which one half and more of it stands for good; the first level if that is so from the start."""
        low, high = (self._reaches_half(curve) for curve in self.settled.T)
        return low, high

    def _reaches_half(self, curve: torch.Tensor) -> float:
        below = (curve < 0.5).nonzero()
        if not len(below):
            return float(self.sigma[0])
        last = int(below[-1])
        weight = (0.5 - curve[last]) / (curve[last + 1] - curve[last])
        return float(torch.lerp(self.sigma[last], self.sigma[last + 1], weight))

    def at(self, values: torch.Tensor, sigma: float) -> float:
        """One of the curves [N] at any noise level, linear between predictions."""
        return float(numpy.interp(sigma, self.sigma.flip(0), values.flip(0)))


class Mean:
    """The mean of the curves of many videos; its settled share is that of their powers, so a video weighs as much as it holds."""

    def __init__(self):
        self._sums, self._count = None, 0

    def add(self, curves: Curves) -> None:
        new = (curves.psd, curves.power, curves.error)
        self._sums = new if self._sums is None else tuple(a + b for a, b in zip(self._sums, new))
        self._count += 1
        self._sigma = curves.sigma

    def result(self) -> Curves:
        psd, power, error = (total / self._count for total in self._sums)
        return Curves(sigma=self._sigma, psd=psd, power=power, error=error)


# --- trajectories -----------------------------------------------------------------------------------------------------------------


class Spool:
    """Latents of one shape, float32, in a file without a name in `folder`: memory holds one of them, and nothing is left behind."""

    def __init__(self, folder: Path, shape: Sequence[int]):
        self._folder, self._shape, self._bytes, self._count = folder, tuple(shape), 4 * torch.Size(shape).numel(), 0
        with atomic.reported(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by our own `with`

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, z: torch.Tensor) -> None:
        with atomic.reported(self._folder, needed=self._bytes):
            self._file.write(z.float().cpu().contiguous().numpy())
        self._count += 1

    def __getitem__(self, index: int) -> torch.Tensor:
        self._file.seek(index % self._count * self._bytes)
        return torch.frombuffer(bytearray(self._file.read(self._bytes)), dtype=torch.float32).reshape(self._shape)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(self._count))


def follow(
    velocity: flow.Velocity, noise: torch.Tensor, levels: list[float], spectra: Spectra, scratch: Path, after_step: Callable[[int, torch.Tensor], None]
) -> Curves:
    """Denoise [1, C, F, h, w] over `levels` and measure every prediction of the clean latent. They wait in `scratch` for the last of them."""
    with Spool(scratch, noise.shape[1:]) as predictions:

        def watched(z: torch.Tensor, sigma: float) -> torch.Tensor:
            v = velocity(z, sigma)
            predictions.append(flow.clean_estimate(z, v, sigma))
            return v

        flow.denoise(watched, noise, levels, after_step=after_step)
        end = predictions[-1]
        powers, errors = zip(*((spectra.power(x), spectra.power(x - end)) for x in predictions))
    stacked = [torch.stack([part(p) for p in found]) for part, found in ((spectra.rings, powers), (spectra.bands, powers), (spectra.bands, errors))]
    return Curves(sigma=torch.tensor(levels[:-1], dtype=torch.float64), psd=stacked[0], power=stacked[1], error=stacked[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """What is kept of one video: its settled shares [N, 2], and what was found in its own curves."""

    prompt: str
    seed: int
    settled: torch.Tensor
    crossing: float | None
    half_settled: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The mean over all videos and what each gave. `frequency` [R]: of the rings, shares of the latent's Nyquist."""

    study: Study
    frequency: torch.Tensor
    mean: Curves
    videos: tuple[Video, ...]


def run(study: Study, base: Base, scratch: Path, observer: Observer) -> Result:
    """Follow all videos, one after another. The noise of a seed is that of a proxy on the same grid, so `generate` walks the same way.

    Raises:
        UserError: the disk of `scratch`, a folder, gets full (see `require_room`).
    """
    from muralist.nn.transformer import Graft

    shape = base.info.geometry.latent_shape(study.grid)
    spectra, mean, videos, levels = Spectra(*shape[2:], study.cutoff), Mean(), [], study.levels
    texts = _texts(study, base, observer)
    steps = study.num_inference_steps
    with measured(observer, "denoise", len(texts) * len(study.seeds) * steps):
        for (prompt, text), seed in itertools.product(zip(study.prompts, texts), study.seeds):
            noise, done = flow.keyed_noise((1, *shape), seed=seed, stage="proxy").to(base.device), len(videos) * steps
            velocity = velocity_field(base, text, **flow.guidance_of(study), graft=Graft(), adapter=None)
            curves = follow(velocity, noise, levels, spectra, scratch, lambda step, z, done=done: observer.advance("denoise", done + step))
            mean.add(curves)
            videos.append(Video(prompt=prompt, seed=seed, settled=curves.settled, crossing=curves.crossing, half_settled=curves.half_settled))
    return Result(study=study, frequency=spectra.frequency, mean=mean.result(), videos=tuple(videos))


def require_room(study: Study, shape: Sequence[int], scratch: Path) -> None:
    """UserError unless the predictions of one video [C, F, h, w] fit into the folder; asked before weights are loaded."""
    needed, free = 4 * torch.Size(shape).numel() * study.num_inference_steps, atomic.free_bytes(scratch)
    if free < needed:
        raise UserError(f"{needed:,} bytes needed while it works, {free:,} bytes free", where=str(scratch), fix="free some space or choose another disk")


def _texts(study: Study, base: Base, observer: Observer) -> list[TextCond]:
    from muralist.stages.prompt import encode_prompt

    texts = []
    with measured(observer, "prompt", len(study.prompts)):
        for prompt in study.prompts:
            texts.append(encode_prompt(base, prompt, study.negative_prompt))
            observer.advance("prompt", len(texts))
    base.release("text_encoder", "tokenizer")
    return texts
