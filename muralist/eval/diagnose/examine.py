"""diagnose(): one pass over a file, all checks at once. Memory: a few frames, and small pictures of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from muralist.errors import UserError
from muralist.eval.diagnose.checks import Borders, all_checks
from muralist.eval.diagnose.finding import Finding, Result
from muralist.eval.diagnose.view import Album, Check, Clip, View, album, open_clip
from muralist.eval.source import Source

Progress = Callable[[int, int], object]  # frames done, frames in all
ASPECTS = 0.03  # relative difference of shape at which a proxy is not taken for one


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found in one video; `still` is its middle frame [H, W, 3] in [0, 1]."""

    results: list[Result]
    still: torch.Tensor

    @property
    def findings(self) -> list[Finding]:
        return [result.finding for result in self.results]

    def record(self) -> list[dict[str, Any]]:
        """JSON form."""
        return [finding.record() for finding in self.findings]


def diagnose(source: Source, *, proxy: Source | None = None, borders: Borders | None = None, progress: Progress | None = None) -> Diagnosis:
    """Examine a video file.

    Args:
        source: the file.
        proxy: the small video that it was made from, for what only a comparison tells.
        borders: where tiles or windows are known to meet, in pixels: {"x": columns, "y": rows}.
        progress: told after every frame.
    Raises:
        UserError: a file that cannot be read to its end, or a proxy of another shape.
    """
    clip = open_clip(source)
    return examine(clip, all_checks(clip, _proxy(source, proxy) if proxy else None, borders), progress)


def examine(clip: Clip, checks: list[Check], progress: Progress | None = None) -> Diagnosis:
    """Show every frame of `clip` to every check."""
    still = None
    for index, frame in enumerate(clip.frames):
        view = View(frame, index)
        for check in checks:
            check.add(view)
        if index == clip.num_frames // 2:
            still = frame
        if progress:
            progress(index + 1, clip.num_frames)
    assert still is not None, "a checked file has all its frames"
    return Diagnosis([result for check in checks for result in check.results()], still)


def _proxy(source: Source, proxy: Source) -> Album:
    own, other = source.info.width / source.info.height, proxy.info.width / proxy.info.height
    if abs(own / other - 1) > ASPECTS:
        sizes = f"{proxy.info.width}x{proxy.info.height} against {source.info.width}x{source.info.height}"
        raise UserError(f"another shape than the file, {sizes}", where=str(proxy.path), fix="give the proxy that this very video was made from")
    return album(open_clip(proxy))
