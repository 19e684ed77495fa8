"""What `muralist psd` writes: all numbers as JSON, the curves as CSV, and both as one picture."""

from __future__ import annotations

import csv
import importlib.util
import io
import statistics
from pathlib import Path
from typing import Any

import torch

from muralist.config import jsonable
from muralist.errors import UserError
from muralist.eval.trajectory import BANDS, Curves, Result
from muralist.nn.experts import SWITCH
from muralist.store import atomic

COLOURS = {"low": "tab:blue", "high": "tab:orange"}


def require_matplotlib() -> None:
    """UserError at once instead of after the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws the curves, is not installed", where="psd", fix="pip install 'muralist[train]'")


def write(result: Result, picture: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The picture, and the numbers beside it as `.json` and `.csv`; returns the content of the JSON. `about`: what to say of the base."""
    found = record(result, about)
    atomic.write_json(picture.with_suffix(".json"), found)
    atomic.write_file(picture.with_suffix(".csv"), table(result).encode())
    atomic.write_file(picture, draw(result, str(about.get("name", ""))))
    return found


# --- numbers ----------------------------------------------------------------------------------------------------------------------


def record(result: Result, about: dict[str, Any]) -> dict[str, Any]:
    """JSON form: what was followed, what was found, the mean curves, and what each video gave."""
    curves = result.mean
    each = [
        {"prompt": v.prompt, "seed": v.seed, "crossing": v.crossing, "half_settled": dict(zip(BANDS, v.half_settled)), "settled": _by_band(v.settled)}
        for v in result.videos
    ]
    return {
        "base": about,
        "study": jsonable(result.study),
        "summary": summary(result),
        "sigma": curves.sigma.tolist(),
        "settled": _by_band(curves.settled),
        "rate": _by_band(curves.rate),
        "power": _by_band(curves.power),
        "gain": _by_band(curves.gain),
        "high_to_low": curves.high_to_low.tolist(),
        "psd": {"frequency": result.frequency.tolist(), "power": curves.psd.tolist()},
        "videos": each,
        "versions": atomic.versions(),
    }


def summary(result: Result) -> dict[str, Any]:
    """The crossing with its spread over videos, when each band is half settled, and both at the published switch and at the crossing."""
    curves, crossings = result.mean, [v.crossing for v in result.videos if v.crossing is not None]
    error = statistics.stdev(crossings) / len(crossings) ** 0.5 if len(crossings) > 1 else None
    spread = {"found": len(crossings), "of": len(result.videos), "lowest": min(crossings, default=None), "highest": max(crossings, default=None)}
    return {
        "crossing": curves.crossing,
        "crossing_of_videos": spread | {"standard_error": error},
        "half_settled": dict(zip(BANDS, curves.half_settled)),
        "final_power": dict(zip(BANDS, curves.power[-1].tolist())),
        "switch": {"sigma": SWITCH, **_settled_at(curves, SWITCH)},
        "at_crossing": None if curves.crossing is None else _settled_at(curves, curves.crossing),
    }


def table(result: Result) -> str:
    """CSV: a line a prediction; the rates are those to the next one, the power of ring F stands under `psd.F` (share of Nyquist)."""
    curves, text = result.mean, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("settled", "rate", "power", "gain")
    writer.writerow(
        ["step", "sigma", *(f"{name}_{band}" for name in names for band in BANDS), "high_to_low", *(f"psd.{f:.4f}" for f in result.frequency.tolist())]
    )
    rates = [*curves.rate.tolist(), ["", ""]]
    for step, sigma in enumerate(curves.sigma.tolist()):
        bands = [*curves.settled[step].tolist(), *rates[step], *curves.power[step].tolist(), *curves.gain[step].tolist()]
        writer.writerow([step, sigma, *bands, curves.high_to_low[step].item(), *curves.psd[step].tolist()])
    return text.getvalue()


def _by_band(values: torch.Tensor) -> dict[str, list[float]]:
    return dict(zip(BANDS, values.T.tolist()))


def _settled_at(curves: Curves, sigma: float) -> dict[str, float]:
    return {band: curves.at(values, sigma) for band, values in zip(BANDS, curves.settled.T)}


# --- picture ----------------------------------------------------------------------------------------------------------------------


def draw(result: Result, name: str) -> bytes:
    """PNG: the spectra on the left, coloured by noise level; the settled shares on the right, noise to the left and data to the right."""
    from matplotlib.figure import Figure  # without pyplot: nothing global is changed, and the canvas is Agg

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_spectra(figure, left, result)
    _draw_settled(right, result)
    count, grid = len(result.videos), result.study.grid
    title = f"{name}: {grid.width}x{grid.height}, {grid.num_frames} frames, {count} video{'s' * (count > 1)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _draw_spectra(figure: Any, axes: Any, result: Result) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0, 1), "viridis")
    frequency = result.frequency[1:].tolist()  # the mean has no place on a logarithmic axis
    for sigma, power in zip(result.mean.sigma.tolist(), result.mean.psd):
        axes.loglog(frequency, power[1:].tolist(), color=colours.to_rgba(sigma), linewidth=1, nonpositive="mask")
    axes.axvline(result.study.cutoff, color="grey", linestyle="--", linewidth=1)
    axes.text(result.study.cutoff, 1.01, "low | high", transform=axes.get_xaxis_transform(), ha="center", fontsize=8, color="grey")
    axes.set(xlabel="frequency, share of the latent's Nyquist", ylabel="power spectral density of the predicted clean latent")
    figure.colorbar(colours, ax=axes, label="sigma")


def _draw_settled(axes: Any, result: Result) -> None:
    curves, sigma = result.mean, result.mean.sigma.tolist()
    for index, band in enumerate(BANDS):
        for video in result.videos if len(result.videos) > 1 else ():
            axes.plot(sigma, video.settled[:, index].tolist(), color=COLOURS[band], linewidth=0.5, alpha=0.3)
        axes.plot(sigma, curves.settled[:, index].tolist(), color=COLOURS[band], marker=".", label=f"{band} band")
    _mark(axes, SWITCH, "grey", f"{SWITCH:g}, the published switch")
    if curves.crossing is not None:
        _mark(axes, curves.crossing, "black", f"{curves.crossing:.3f}, the high band overtakes")
    axes.set(xlabel="sigma (noise on the left, data on the right)", ylabel="settled share of the final content", xlim=(1.02, -0.02), ylim=(-0.02, 1.02))
    axes.legend(fontsize=8, loc="lower right")


def _mark(axes: Any, sigma: float, colour: str, label: str) -> None:
    axes.axvline(sigma, color=colour, linestyle="--", linewidth=1, label=label)
