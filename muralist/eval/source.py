"""Videos to be measured: any file, read in a process of its own, frame by frame."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from muralist.errors import UserError
from muralist.store import video_read
from muralist.store.video_read import VideoInfo

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ivf")
_SIDECAR_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """A checked video file."""

    path: Path
    info: VideoInfo

    def frames(self) -> Iterator[torch.Tensor]:
        """Frames [H, W, 3] float32 in [0, 1], in order, one at a time; UserError if fewer come than the file holds."""
        return video_read.read_frames(self.path, self.info)

    @property
    def prompt(self) -> str | None:
        """The prompt in the file's metadata, where muralist wrote it."""
        request = self.info.metadata.get("request")
        prompt = request.get("prompt") if isinstance(request, dict) else self.info.metadata.get("prompt")
        return prompt if isinstance(prompt, str) else None


def open_source(path: Path) -> Source:
    """Check one file; UserError with one line that names it.

    Decoders of H.265 and VP9 do not notice every changed byte. A file with a sidecar of ours beside it is therefore held against the
    checksum there. A transport stream says nowhere how long it is, so that a cut one looks whole: it is not read.
    """
    path = Path(path)
    source = Source(path, video_read.inspect(path))
    if _is_transport_stream(path):
        raise UserError("a transport stream does not say how long it is", where=str(path), fix="put it into an mp4: `ffmpeg -i FILE -c copy out.mp4`")
    video_read.check_readable(path, source.info)
    _check_sum(path)
    return source


def find_sources(paths: Iterable[Path]) -> list[Source]:
    """The files among `paths` and the videos directly in the folders among them, each checked, in order of names, no file twice.

    Raises:
        UserError: a path that is not there, a folder without videos, a file that is no readable video.
    """
    files = dict.fromkeys(file for path in paths for file in _files(Path(path)))
    if not files:
        raise UserError("no files", where="files", fix="name video files or folders")
    return [open_source(file) for file in files]


def _files(path: Path) -> list[Path]:
    if "\0" in str(path) or not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError("no videos in this folder", where=str(path), fix=f"name a folder with {', '.join(SUFFIXES)} files")
    return files


def _is_transport_stream(path: Path) -> bool:
    """Packets of 188 or (with times) 192 bytes, each with the byte 0x47 in front; ISO/IEC 13818-1, 2.4.3.2."""
    with open(path, "rb") as file:
        start = file.read(4 * 192)
    return any(len(start) > 3 * size + skip and {start[skip + k * size] for k in range(4)} == {0x47} for size, skip in ((188, 0), (192, 4)))


def _check_sum(path: Path) -> None:
    sidecar = path.with_name(path.name + ".json")
    try:
        expected = json.loads(sidecar.read_bytes()[:_SIDECAR_LIMIT])["video"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # none, or somebody else's
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"its bytes are not those that {sidecar.name} describes", where=str(path), fix="restore the file, or remove the sidecar")
