"""What the checks see of a video: each frame once, and small pictures that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from muralist.errors import UserError
from muralist.eval.diagnose import subjects
from muralist.eval.diagnose.finding import Result
from muralist.eval.diagnose.track import luma, reduced
from muralist.eval.metrics import _shared
from muralist.eval.source import Source

THUMB = 32  # rows


@dataclass(frozen=True, slots=True)
class Clip:
    """A video to be examined: `frames` [H, W, 3] float32 in [0, 1], `num_frames` of them."""

    frames: Iterator[torch.Tensor]
    num_frames: int
    fps: float


def open_clip(source: Source) -> Clip:
    """A checked file as a clip; UserError where it does not say how fast it is."""
    if not source.info.fps > 0:
        raise UserError("its frame rate is unknown", where=str(source.path), fix="write it again with a frame rate")
    return Clip(source.frames(), source.info.num_frames, source.info.fps)


class View:
    """One frame and what several checks derive from it."""

    def __init__(self, frame: torch.Tensor, index: int):
        self.frame, self.index = frame, index

    @cached_property
    def luma(self) -> torch.Tensor:
        """[H, W]; shared with the metrics."""
        return _shared.luma(self.frame)

    @cached_property
    def small(self) -> torch.Tensor:
        """[3, 128, w], area-averaged."""
        return reduced(self.frame)

    @cached_property
    def thumb(self) -> torch.Tensor:
        """Luma [32, w], area-averaged."""
        return luma(reduced(self.small.permute(1, 2, 0), THUMB).permute(1, 2, 0))


class Check(Protocol):
    """Looks at every frame and says what it found."""

    def add(self, view: View) -> None: ...

    def results(self) -> list[Result]: ...


@dataclass(slots=True)
class Album:
    """Small pictures of a whole video: a luma picture of every frame, and colour pictures of the moments at which subjects are counted."""

    num_frames: int
    fps: float
    thumbs: list[torch.Tensor] = field(default_factory=list)
    looks: list[torch.Tensor] = field(default_factory=list)

    def add(self, view: View) -> None:
        self.thumbs.append(view.thumb)
        if view.index in subjects.looks(self.num_frames):
            self.looks.append(view.small)


def album(clip: Clip) -> Album:
    """All of a clip; meant for proxies."""
    kept = Album(clip.num_frames, clip.fps)
    for index, frame in enumerate(clip.frames):
        kept.add(View(frame, index))
    return kept
