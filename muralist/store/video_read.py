"""Read video files: what they are (`inspect`), their frames (`read_frames`), and what a crash left of them (`repair`).

A file is examined and decoded by a child process with limits (`video_probe`), so that a hostile or broken one costs a line of text and
not this process; a file that ends early without an error is common, so frames are counted, not believed.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import torch

from muralist.errors import UserError
from muralist.store import atomic, video_probe
from muralist.store.colour import planes_to_rgb

# ITU-T H.273 code points, as far as video files in the wild use them
_PRIMARIES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020", 12: "display-p3"}
_TRANSFER = {1: "bt709", 6: "smpte170m", 13: "srgb", 14: "bt2020-10", 16: "pq", 18: "hlg"}
_MATRIX = {0: "rgb", 1: "bt709", 5: "bt601", 6: "bt601", 9: "bt2020", 10: "bt2020"}
_RANGE = {1: "limited", 2: "full"}
_HDR = ("pq", "hlg")
_TURNS = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}  # display matrix to degrees clockwise
_CONTAINERS = {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"mfra", b"udta", b"meta", b"uuid"}


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file holds. Colour names follow H.273; 'unspecified' where the file does not say.

    Width and height are those a player shows; `rotation` is how far it turns the coded picture for that, in degrees clockwise, None for
    a turn that is not a multiple of 90 degrees or mirrors.
    """

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
    rotation: int | None = 0
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


def read_frames(path: Path, info: VideoInfo | None = None) -> Iterator[torch.Tensor]:
    """Frames [H, W, 3] of a video, float32 sRGB values in [0, 1], one at a time, upright.

    Matrix, range and rotation of the file are honoured, with BT.709 limited where it does not say; frames of a variable rate come as they
    are, none dropped or doubled. `info` is what `inspect` said, if that was asked before.

    Raises:
        UserError: as `inspect` does; HDR (its values are not sRGB's, and a tone mapping would be ours and not the file's); mirrored
            pictures; damage; or fewer frames come out than are in the file.
    """
    path, info = Path(path), info or inspect(path)
    check_readable(path, info)
    seconds = 60 + int(info.num_frames * (1 + info.width * info.height / 1e6))
    command = [sys.executable, "-I", video_probe.__file__, str(path.absolute()), "frames", str(seconds)]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        with suppress(OSError, AttributeError):  # only Linux sizes its pipes
            fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)  # a 4K frame in 24 pieces, not in 380
        yield from _received(path, info, child)
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


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


def check_readable(path: Path, info: VideoInfo) -> None:
    """UserError if the frames could not be given as upright sRGB."""
    if info.transfer in _HDR:
        raise UserError(f"HDR video ({info.transfer})", where=str(path), fix="convert it to SDR (BT.709) first")
    if info.rotation is None:
        raise UserError("its picture is mirrored or turned by an odd angle", where=str(path), fix="write it again upright")


def _received(path: Path, info: VideoInfo, child: subprocess.Popen) -> Iterator[torch.Tensor]:
    """Frames out of the child's pipe; every description is checked against `info` before its bytes are read."""
    count, buffer = 0, bytearray()
    while True:
        try:
            record = json.loads(child.stdout.readline(1 << 16))
        except ValueError as error:
            raise _unreadable(path, f"the reader stopped with code {child.wait(10)} after {count} frames") from error
        if "planes" not in record:
            break
        yield _upright(_rgb(_read_planes(path, info, record, child.stdout, buffer), record, info), info.rotation)
        count += 1
    if "error" in record or count != info.num_frames:
        raise _unreadable(path, record.get("error", f"{count} of {info.num_frames} frames could be decoded"))


def _read_planes(path: Path, info: VideoInfo, record: dict[str, Any], pipe: BinaryIO, buffer: bytearray) -> list[torch.Tensor]:
    """The planes [rows, bytes of a row with its padding] uint8 of one frame, views of `buffer`; refuses a change of size or of form."""
    shapes, size = record["planes"], (info.height, info.width) if info.rotation in (0, 180) else (info.width, info.height)
    total = sum(rows * line for rows, _, line in shapes)
    if tuple(shapes[0][:2]) != size or record["bits"] not in range(8, 17) or total > 16 * size[0] * (size[1] + 256):
        raise _unreadable(path, f"a frame of {shapes[0][1]}x{shapes[0][0]} pixels, {record['bits']} bits amid others")
    buffer.extend(bytes(total - len(buffer)))
    view = memoryview(buffer)[:total]
    if pipe.readinto(view) != total:
        raise _unreadable(path, "the reader stopped within a frame")
    data = torch.frombuffer(view, dtype=torch.uint8)
    parts = data.split([rows * line for rows, _, line in shapes])
    return [part.view(rows, line) for part, (rows, _, line) in zip(parts, shapes)]


def _upright(frame: torch.Tensor, degrees: int) -> torch.Tensor:
    """[H, W, 3] turned clockwise."""
    return frame.rot90(-degrees // 90, (0, 1)).contiguous() if degrees else frame


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
    rotation = _TURNS.get(tuple(facts["matrix"] or (1, 0, 0, 1)))
    width, height = (facts["height"], facts["width"]) if rotation in (90, 270) else (facts["width"], facts["height"])
    return VideoInfo(
        width=width,
        height=height,
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
        rotation=rotation,
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


def _rgb(planes: list[torch.Tensor], record: dict[str, Any], info: VideoInfo) -> torch.Tensor:
    """Planes [rows, bytes of a row] as [H, W, 3] float32 in [0, 1]."""
    form, bits = record["format"], record["bits"]
    width = info.width if info.rotation in (0, 180) else info.height
    if form == "rgb48le":
        return (planes[0].view(torch.uint16)[:, : 3 * width].float() / 65535).unflatten(1, (width, 3))
    planes = [(plane if bits == 8 else plane.view(torch.uint16))[:, :columns] for plane, (_, columns, _) in zip(planes, record["planes"])]
    full = info.range == "full" or form.startswith("yuvj") or (form.startswith("gray") and info.range != "limited")
    if len(planes) < 3:  # grey
        planes = [planes[0], *2 * [torch.full((1, 1), 1 << (bits - 1), dtype=torch.int32)]]
    matrix = info.matrix if info.matrix in ("bt601", "bt2020") else "bt709"
    return planes_to_rgb(*planes, bits, matrix=matrix, full_range=full)


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"not a readable video ({why})", where=str(path), fix="write it again; `repair` may save the frames of a crashed mp4")
