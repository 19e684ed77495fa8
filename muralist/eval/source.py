"""Videos to be measured: any file, read in a process of its own, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from muralist.store import video_read
from muralist.store.video_read import VideoInfo


@dataclass(frozen=True, slots=True)
class Source:
    """A checked video file."""

    path: Path
    info: VideoInfo

    def frames(self) -> Iterator[torch.Tensor]:
        """Frames [H, W, 3] float32 in [0, 1], in order, one at a time; UserError if fewer come than the file holds."""
        return video_read.read_frames(self.path)


def open_source(path: Path) -> Source:
    """Check one file; UserError with one line that names it."""
    return Source(Path(path), video_read.inspect(Path(path)))
