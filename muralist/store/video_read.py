"""Read video files: what they are (`inspect`), their frames (`read_frames`), and what a crash left of them (`repair`).

A file is first examined by a child process with limits (`video_probe`), so that a hostile or broken one costs a line of text and not
this process; a file that ends early without an error is common, so frames are counted, not believed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch

from muralist.errors import UserError
from muralist.store import atomic, video_probe
from muralist.store.colour import planes_to_rgb

# ITU-T H.273 code points, as far as video files in the wild use them
_PRIMARIES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020", 12: "display-p3"}
_TRANSFER = {1: "bt709", 6: "smpte170m", 13: "srgb", 14: "bt2020-10", 16: "pq", 18: "hlg"}
_MATRIX = {0: "rgb", 1: "bt709", 5: "bt601", 6: "bt601", 9: "bt2020", 10: "bt2020"}
_RANGE = {1: "limited", 2: "full"}
_PLANAR = {f"yuv{layout}p{depth}" for layout in (420, 422, 444) for depth in ("", "10le", "12le")}
_CONTAINERS = {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"mfra", b"udta", b"meta", b"uuid"}


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file holds. Colour names follow H.273; 'unspecified' where the file does not say."""

    width: int
    height: int
    num_frames: int
    fps: float
    codec: str
    tag: str
    pixel_format: str
    bit_depth: int
    primaries: str
    transfer: str
    matrix: str
    range: str
    metadata: dict[str, Any] = field(default_factory=dict)  # ours, from the comment tag
    tags: dict[str, str] = field(default_factory=dict)  # all tags of the container


def inspect(path: Path, *, decode: bool = False, timeout: float = 120) -> VideoInfo:
    """Examine a video of any origin in a child process with limits.

    Frames are counted by their packets (and the first one decoded), or with `decode` by decoding all of them.

    Raises:
        UserError: no such file, no video, frames missing or damaged, or the child ran out of its time (seconds) or memory.
    """
    path = _existing(path)
    facts = _run_probe(path, "decode" if decode else "packets", timeout)
    if "error" in facts:
        raise _unreadable(path, facts["error"])
    counted = facts["decoded"] if decode else facts["packets"]
    if not facts["decoded"] or facts["damaged"] or counted < max(facts["claimed"], facts["packets"]):
        raise _unreadable(path, f"{counted} of {max(facts['claimed'], facts['packets'])} frames are readable")
    return _info(facts, counted)


def read_frames(path: Path) -> Iterator[torch.Tensor]:
    """Frames [H, W, 3] of a video, float32 sRGB values in [0, 1], one at a time.

    The matrix and range of the file are honoured, with BT.709 limited where it does not say. Raises UserError as `inspect` does, or when
    fewer frames come out than are in the file.
    """
    info = inspect(path)
    count = 0
    try:
        with av.open("file:" + str(path), options=video_probe.OPEN) as container:
            container.streams.video[0].codec_context.thread_count = 4
            for frame in container.decode(video=0):
                yield _rgb(frame, info)
                count += 1
    # PyAV also lets IndexError and UnicodeDecodeError through on damaged files.
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if count != info.num_frames:
        raise _unreadable(path, f"{count} of {info.num_frames} frames could be decoded")


def repair(path: Path) -> int:
    """Cut a crashed fragmented mp4 behind its last complete fragment, in place. Returns the bytes cut; UserError if nothing can be saved."""
    path = _existing(path)
    end, seen = 0, set()
    with atomic.reported(path), open(path, "r+b") as handle:
        size = handle.seek(0, 2)
        for kind, stop in _boxes(handle, size):
            seen.add(kind)
            # A fragment's header without its data is of no use.
            end = end if kind == b"moof" else stop
        if b"moov" not in seen or b"mdat" not in seen:
            raise UserError("no complete fragment in this file", where=str(path), fix="resume the run it came from: `muralist resume RUN_DIR`")
        handle.truncate(end)
        atomic.sync(handle)
    return size - end


def _existing(path: Path) -> Path:
    path = Path(path)
    if "\0" in str(path) or not path.is_file():
        raise UserError("no such file", where=str(path), fix="check the path")
    return path


def _boxes(handle: Any, size: int) -> Iterator[tuple[bytes, int]]:
    """(type, end offset) of the complete top-level boxes (ISO/IEC 14496-12, 4.2), up to the first that is cut or no box."""
    start = 0
    while start + 8 <= size:
        handle.seek(start)
        header = handle.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8 or kind not in _CONTAINERS or start + length > size:
            return
        start += length
        yield kind, start


def _run_probe(path: Path, mode: str, timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-I", video_probe.__file__, str(path.absolute()), mode]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
        facts = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise _unreadable(path, f"not examined within {timeout:g} s") from error
    except ValueError as error:
        raise _unreadable(path, f"the reader stopped with code {done.returncode}") from error
    return facts


def _info(facts: dict[str, Any], num_frames: int) -> VideoInfo:
    name = lambda table, key: table.get(facts[key], "unspecified")  # noqa: E731
    return VideoInfo(
        width=facts["width"],
        height=facts["height"],
        num_frames=num_frames,
        fps=_rate(facts["rate"]),
        codec={"hevc": "h265"}.get(facts["codec"], facts["codec"]),
        tag=facts["tag"],
        pixel_format=facts["pix_fmt"],
        bit_depth=facts["bits"],
        primaries=name(_PRIMARIES, "color_primaries"),
        transfer=name(_TRANSFER, "color_trc"),
        matrix=name(_MATRIX, "colorspace"),
        range=name(_RANGE, "color_range"),
        metadata=_metadata(facts["tags"].get("comment", "")),
        tags=facts["tags"],
    )


def _rate(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        return 0.0


def _metadata(comment: str) -> dict[str, Any]:
    """Our JSON of the comment tag; empty if the comment is somebody else's."""
    try:
        data = json.loads(comment)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _rgb(frame: av.VideoFrame, info: VideoInfo) -> torch.Tensor:
    """A decoded frame as [H, W, 3] float32 in [0, 1]. Planar Y'CbCr is converted here, the rare rest by swscale through 16 bits."""
    if frame.format.name not in _PLANAR:
        return torch.from_numpy(frame.to_ndarray(format="rgb48le").astype("float32")) / 65535
    depth = frame.format.components[0].bits
    planes = [_plane(plane, depth) for plane in frame.planes]
    matrix = info.matrix if info.matrix in ("bt601", "bt2020") else "bt709"
    return planes_to_rgb(*planes, depth, matrix=matrix, full_range=info.range == "full")


def _plane(plane: Any, depth: int) -> torch.Tensor:
    """Code values [H, W] of one plane, row padding left out."""
    kind = torch.uint8 if depth == 8 else torch.int16
    return torch.frombuffer(plane, dtype=kind).view(plane.height, -1)[:, : plane.width]


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"not a readable video ({why})", where=str(path), fix="write it again; `repair` may save the frames of a crashed mp4")
