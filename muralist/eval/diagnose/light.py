"""Pulse and drift: what the light does, once the camera's move and moving objects are accounted for (`track`)."""

from __future__ import annotations

import numpy as np

from muralist.eval.diagnose.finding import Finding, Plot, Result, untold
from muralist.eval.diagnose.track import LUMA, Track

USUAL_PERIODS = (4, 8, 12, 16, 24, 32)  # VAE groups, groups of pictures, windows: preferred among equals
PULSE = 0.25  # percent of the mean luma, peak to peak; codecs alone reach half of this
PERIODIC = 0.6  # autocorrelation at the period
DRIFT = 0.5  # percent of the mean luma a second
SIGMAS = 4.0
MIN_FRAMES = 9


def pulse(track: Track, fps: float) -> Result:
    """Luma that rises and falls with a fixed period: the autocorrelation of the light at every lag that fits three times."""
    if len(track.light) < MIN_FRAMES - 1:
        return untold("luma pulse", "%", PULSE, f"a pulse takes {MIN_FRAMES} frames to show")
    light = _luma(track)
    periods = range(2, len(light) // 3 + 1)
    told = [_fold(light, period) for period in periods]
    correlation, size = (np.array(values) for values in zip(*told))
    best = _choose(list(periods), correlation, size)
    period, r, value = periods[best], float(correlation[best]), float(size[best])
    found = bool(r >= PERIODIC and value >= PULSE)
    if found:
        sentence = f"Brightness pulses by {value:.2g} % every {period} frames ({period / fps:.2g} s)."
    else:
        sentence = f"No brightness pulse of {PULSE:g} % or more (periods of 2 to {periods[-1]} frames)."
    finding = Finding(name="luma pulse", value=value, unit="%", threshold=PULSE, found=found, sentence=sentence, where={"period": [period]} if found else {})
    curve = Plot(
        title="Light over time, compensated for motion", x_label="frame", y_label="% of mean luma", x=range(len(light)), y=light - light.mean(),
        marks=range(0, len(light), period) if found else (),
    )  # fmt: skip
    ticks = Plot(
        title="Autocorrelation of the light", x_label="period, frames", y_label="correlation", x=list(periods), y=correlation, level=PERIODIC,
        marks=(period,) if found else (),
    )  # fmt: skip
    return Result(finding, (curve, ticks))


def _luma(track: Track) -> np.ndarray:
    """Light of each frame [T], percent of the clip's mean luma, 0 in the first frame."""
    steps = np.array([float(light @ LUMA) for light in track.light])
    mean = np.mean([float(colour @ LUMA) for colour in track.colour])
    return 100 * np.concatenate([[0.0], np.cumsum(steps)]) / max(mean, 1e-3)


def _fold(light: np.ndarray, period: int) -> tuple[float, float]:
    """Autocorrelation at `period`, and the peak-to-peak size of the mean cycle, of `light` less its running mean over one period."""
    half = period // 2
    window = np.ones(period) if period % 2 else np.concatenate([[0.5], np.ones(period - 1), [0.5]])
    fast = light[half : len(light) - half] - np.convolve(light, window / period, "valid")
    first, second = fast[:-period], fast[period:]
    power = np.sqrt((first**2).sum() * (second**2).sum())
    correlation = float((first * second).sum() / power) if power > 1e-12 else 0.0
    cycle = [fast[k::period].mean() for k in range(period)]
    return correlation, float(np.ptp(cycle))


def _choose(periods: list[int], correlation: np.ndarray, size: np.ndarray) -> int:
    """Index of the period: every multiple of it correlates as well, so the shortest of the good ones; a usual one before its neighbours."""
    good = np.flatnonzero((correlation >= PERIODIC) & (size >= PULSE))
    if not len(good):
        return int(np.argmax(np.where(correlation >= PERIODIC, size, 0)))
    near = [i for i in good if correlation[i] >= 0.9 * correlation[good].max() and size[i] >= 0.7 * size[good].max()]
    usual = [i for i in near if periods[i] in USUAL_PERIODS]
    return int((usual or near)[0]) if usual and usual[0] <= near[0] + 1 else int(near[0])


def drift(track: Track, fps: float) -> Result:
    """Colour that slides in one direction: the mean change of light a second, per channel, with its standard error."""
    if len(track.light) < MIN_FRAMES - 1:
        return untold("colour drift", "%/s", DRIFT, f"a drift takes {MIN_FRAMES} frames to show")
    luma = max(float(np.mean([float(colour @ LUMA) for colour in track.colour])), 1e-3)
    steps = 100 * np.stack([light.numpy() for light in track.light]) / luma  # [T - 1, 3]
    slope, error = steps.mean(0) * fps, _error(steps) * fps
    channel = int(abs(slope).argmax())
    value, sigma = float(abs(slope[channel])), float(error[channel])
    found = bool(value >= DRIFT and value >= SIGMAS * sigma)
    each = ", ".join(f"{name} {s:+.2f} ± {e:.2f}" for name, s, e in zip(("red", "green", "blue"), slope, error))
    sentence = f"Colour drifts by {each} % of the mean luma a second." if found else f"No colour drift of {DRIFT:g} %/s or more ({each})."
    path = np.concatenate([[0.0], steps[:, channel].cumsum()])
    plot = Plot(
        title=f"Colour over time, compensated for motion ({('red', 'green', 'blue')[channel]})", x_label="frame", y_label="% of mean luma",
        x=range(len(path)), y=path,
    )  # fmt: skip
    return Result(Finding(name="colour drift", value=value, unit="%/s", threshold=DRIFT, found=found, sentence=sentence), (plot,))


def _error(steps: np.ndarray, blocks: int = 6) -> np.ndarray:
    """Standard error [3] of the mean of `steps` [n, 3]: from means of blocks, since neighbouring steps are not independent."""
    means = np.stack([part.mean(0) for part in np.array_split(steps, min(blocks, len(steps)))])
    return means.std(0, ddof=1) / np.sqrt(len(means))
