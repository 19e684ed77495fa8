"""The checks: each gathers what it needs while frames pass, then makes its findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from muralist.eval.diagnose import light, motion, repeats, seams, subjects
from muralist.eval.diagnose.finding import Finding, Plot, Result, untold
from muralist.eval.diagnose.track import Track
from muralist.eval.diagnose.view import Album, Check, Clip, View
from muralist.eval.metrics.resolution import EffectiveResolution
from muralist.eval.registry import Unavailable

Borders = Mapping[str, Sequence[int]]  # "x": columns, "y": rows; a border at x lies between pixels x - 1 and x

UNKNOWN_SEAMS = 12.0  # score: thousands of combs are tried
KNOWN_SEAMS = 6.0  # one is
SMALLEST = 128  # pixels of a side; smaller pictures are not tiled
SHARPNESS = 0.85  # of the file's own height


def all_checks(clip: Clip, proxy: Album | None = None, borders: Borders | None = None) -> list[Check]:
    """Every check for one clip."""
    return [Seams(borders), Light(clip.fps), Content(clip, proxy), Resolution(clip.num_frames)]


class Seams:
    """`seams`, along columns and rows; where `borders` are known, these are judged as well, with a lower threshold."""

    def __init__(self, borders: Borders | None = None):
        self._borders = {axis: lines for axis, lines in (borders or {}).items() if len(lines)}
        self._meters, self._size = {"x": seams.LineMeter(), "y": seams.LineMeter()}, 0

    def add(self, view: View) -> None:
        self._size = min(view.luma.shape)
        if self._size >= SMALLEST:
            self._meters["x"].add(view.luma)
            self._meters["y"].add(view.luma.T.contiguous())

    def results(self) -> list[Result]:
        if self._size < SMALLEST:
            return [untold("seams", "times the usual", UNKNOWN_SEAMS, f"pictures of fewer than {SMALLEST} pixels have no tiles")]
        profiles = {axis: meter.profile() for axis, meter in self._meters.items()}
        found = {axis: seams.find_comb(standing) for axis, (standing, _) in profiles.items()}
        results = [_seams("seams", profiles, found, UNKNOWN_SEAMS)]
        if self._borders:
            known = {axis: seams.known_comb(profiles[axis][0], lines) for axis, lines in self._borders.items()}
            results.append(_seams("seams at known borders", profiles, known, KNOWN_SEAMS))
        return results


def _seams(name: str, profiles: dict[str, tuple[np.ndarray, np.ndarray]], combs: dict[str, seams.Comb], threshold: float) -> Result:
    """One finding from the combs of both directions."""
    over = {axis: comb for axis, comb in combs.items() if comb.score >= threshold}
    value = max(comb.score for comb in combs.values())
    plots = [
        Plot(
            title=f"How far each {word} stands out", x_label=f"{axis}, pixels", y_label="times the usual", x=range(len(profiles[axis][0])),
            y=np.clip(profiles[axis][0], 0, None), marks=over[axis].lines if axis in over else (),
        )
        for axis, word in (("x", "column"), ("y", "row"))
    ]  # fmt: skip
    finding = Finding(
        name=name, value=value, unit="times the usual", threshold=threshold, found=bool(over), sentence=_seams_sentence(profiles, over),
        where={axis: list(comb.lines) for axis, comb in over.items()},
    )  # fmt: skip
    return Result(finding, tuple(plots))


def _seams_sentence(profiles: dict[str, tuple[np.ndarray, np.ndarray]], over: dict[str, seams.Comb]) -> str:
    """What is seen, with the step in code values of 8 bits."""
    if not over:
        return "No lines at which tiles or windows would have met."
    parts = []
    for axis, comb in over.items():
        _, step = profiles[axis]
        size = 255 * float(np.median(step[list(comb.lines)]))
        every = f", one every {comb.period} pixels" if comb.period and len(comb.lines) > 1 else ""
        parts.append(f"at {axis} = {', '.join(map(str, comb.lines[:12]))}{', ...' if len(comb.lines) > 12 else ''}{every} (steps of about {size:.2g} of 255)")
    return f"Brightness steps {' and '.join(parts)}."


class Light:
    """`luma pulse` and `colour drift`."""

    def __init__(self, fps: float):
        self._fps, self._track = fps, Track()

    def add(self, view: View) -> None:
        self._track.add(view.small)

    def results(self) -> list[Result]:
        return [light.pulse(self._track, self._fps), light.drift(self._track, self._fps)]


class Content:
    """`loops and repeats`, `duplicated subjects` and `slow motion`."""

    def __init__(self, clip: Clip, proxy: Album | None = None):
        self._own, self._proxy = Album(clip.num_frames, clip.fps), proxy

    def add(self, view: View) -> None:
        self._own.add(view)

    def results(self) -> list[Result]:
        thumbs, proxy = torch.stack(self._own.thumbs), self._proxy
        return [
            repeats.repeats(thumbs, self._own.fps),
            subjects.subjects(self._own.looks, proxy and proxy.looks),
            motion.slow_motion(thumbs, self._own.fps, proxy and torch.stack(proxy.thumbs), proxy.fps if proxy else 0.0),
        ]


class Resolution:
    """`fake resolution`, by the edges of the picture (`metrics.resolution`)."""

    def __init__(self, num_frames: int):
        self._meter, self._unavailable, self._height = EffectiveResolution(num_frames), "", 0

    def add(self, view: View) -> None:
        self._height = view.frame.shape[0]
        try:
            self._meter.add(view.frame)
        except Unavailable as reason:
            self._unavailable = str(reason)

    def results(self) -> list[Result]:
        name, unit = "fake resolution", "of the file's height"
        try:
            if self._unavailable:
                raise Unavailable(self._unavailable)
            share = self._meter.result()["effective_resolution"] / self._height
        except Unavailable as reason:
            return [untold(name, unit, SHARPNESS, str(reason))]
        found = share < SHARPNESS
        rows = round(share * self._height)
        sentence = f"The picture has the detail of about {rows} rows, not of {self._height}." if found else f"The detail is that of {self._height} rows."
        return [Result(Finding(name=name, value=share, unit=unit, threshold=SHARPNESS, found=found, sentence=sentence))]
