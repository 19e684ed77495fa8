"""Video files while and after they are written: closed groups of pictures, a live file, a finished file.

Three facts shape this module (measured on libavformat 62):

- One encoder instance per group of pictures (GOP) makes each group closed and its bytes a function of its own frames, so that a group
  finished before a kill and one encoded after it join without a trace. The join copies packets and re-encodes nothing.
- An mp4 that is killed while being written is unreadable, fragmented or not, unless the muxer runs with `hybrid_fragmented` *and*
  `flush_packets=1`. A fragment only reaches the disk when the next one begins, so the live file cuts one per frame: it is always
  playable up to the last but one frame of the last finished group, and becomes an ordinary mp4 when it is closed.
- Encoder output must not depend on chance. x265 with one frame thread gives the same bytes for any pool size (tested 1 to 16). x264's
  bytes depend on its thread count, so that is a constant; and its macroblock tree reads past odd widths: 832x480 came out in 8 versions
  in 10 runs with it, in one without (10 of 10).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from muralist.errors import UserError
from muralist.store import atomic
from muralist.store.colour import Planes, rgb_to_planes
from muralist.types import Grid

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
_ENCODERS = {"h264": "libx264", "h265": "libx265"}
_TAGS = {"h264": "avc1", "h265": "hvc1"}  # Apple's players open H.265 as hvc1 only
MOST_POOLS = 256  # worker threads
_UHD = 3840  # from this side length on, H.265 with 10 bits: level limits and banding both speak against 8-bit H.264
_X264_THREADS = "4"
_REORDER = 2  # frames by which decoding runs ahead of display: both encoders stay within a two-level pyramid of B-frames
_BT709, _LIMITED = 1, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """How the file is compressed.

    Args:
        codec: 'h264', 'h265', or 'auto': H.265 for a side of 3840 pixels and more, else H.264.
        bit_depth: 8 or 10; None is 10 for H.265 and 8 for H.264.
        crf: quality, 0 (best) to 51; 16 is visually lossless.
        preset: effort, 'ultrafast' to 'veryslow'; None is 'superfast' for H.265 (4K on two cores) and 'medium' for H.264.
        gop: frames of a closed group of pictures: what a kill costs at most.
        pools: worker threads of x265; None for all cores. Does not change the bytes.
    """

    codec: str = "auto"
    bit_depth: int | None = None
    crf: float = 16
    preset: str | None = None
    gop: int = 12
    pools: int | None = None

    def resolve(self, grid: Grid) -> Settings:
        """All choices made for this grid; raises UserError naming the option that cannot be."""
        codec = self.codec
        if codec == "auto":
            codec = "h265" if max(grid.width, grid.height) >= _UHD else "h264"
        _require(codec in _ENCODERS, "codec", self.codec, "use auto, h264 or h265")
        depth = (10 if codec == "h265" else 8) if self.bit_depth is None else self.bit_depth
        preset = ("superfast" if codec == "h265" else "medium") if self.preset is None else self.preset
        _require(depth in (8, 10), "bit_depth", depth, "use 8 or 10")
        _require(preset in PRESETS, "preset", preset, f"use one of {', '.join(PRESETS)}")
        _require(0 <= self.crf <= 51, "crf", self.crf, "use 0 (best) to 51")
        _require(1 <= self.gop <= 250, "gop", self.gop, "use 1 to 250 frames")
        _require(self.pools is None or 1 <= self.pools <= MOST_POOLS, "pools", self.pools, f"use 1 to {MOST_POOLS} threads")
        _require(grid.width % 2 == grid.height % 2 == 0, "size", f"{grid.width}x{grid.height}", "use even numbers: chroma has half the resolution")
        _require(min(grid.width, grid.height) >= 16, "size", f"{grid.width}x{grid.height}", "use 16 pixels or more")
        _require(0.01 <= grid.fps <= 1000, "fps", grid.fps, "use 0.01 to 1000")
        rate = str(Fraction(grid.fps).limit_denominator(1001))
        size = {"num_frames": grid.num_frames, "height": grid.height, "width": grid.width}
        return Settings(codec=codec, bit_depth=depth, crf=float(self.crf), preset=preset, gop=self.gop, rate=rate, pools=self.pools, **size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides the bytes of a segment (`pools` does not)."""

    codec: str
    bit_depth: int
    crf: float
    preset: str
    gop: int
    rate: str
    num_frames: int
    height: int
    width: int
    pools: int | None = None

    @property
    def record(self) -> dict[str, Any]:
        """JSON form, without what does not matter to the bytes."""
        return {key: value for key, value in asdict(self).items() if key != "pools"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A closed group of `frames` pictures as a small mp4 of its own; the first one is frame number `start` of the video."""

    data: bytes
    start: int
    frames: int


class SegmentEncoder:
    """Encodes one closed group of pictures in memory: `add` frames, then `finish`."""

    def __init__(self, settings: Settings, start: int):
        self._buffer, self._depth, self._start, self.frames = io.BytesIO(), settings.bit_depth, start, 0
        self._packets = 0
        self._container = av.open(self._buffer, "w", format="mp4")
        rate = Fraction(settings.rate)
        stream = self._container.add_stream(_ENCODERS[settings.codec], rate=rate, options=_encoder_options(settings))
        stream.width, stream.height, stream.pix_fmt = settings.width, settings.height, "yuv420p10le" if settings.bit_depth == 10 else "yuv420p"
        context = stream.codec_context
        context.time_base = stream.time_base = 1 / rate
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        context.codec_tag = _TAGS[settings.codec]
        self._stream = stream

    def add(self, frame: torch.Tensor) -> None:
        """Encode the next frame [H, W, 3], float in [0, 1]."""
        self.add_planes(rgb_to_planes(frame, self._depth))

    def add_planes(self, planes: Planes) -> None:
        """Encode the next frame, given as code values on the CPU."""
        picture = _picture(planes, self._stream.pix_fmt)
        picture.pts, picture.time_base = self.frames, self._stream.codec_context.time_base
        self._mux(self._stream.encode(picture))
        self.frames += 1

    def finish(self) -> Segment:
        """The segment; its mp4 begins with an IDR frame at time 0."""
        self._mux(self._stream.encode(None))
        self._container.close()
        return Segment(self._buffer.getvalue(), self._start, self.frames)

    def _mux(self, packets: Iterable[av.Packet]) -> None:
        """Set decoding times anew, evenly. In groups shorter than their delay x265 leaves garbage there (one file in 60 then fails), and
        x264 a gap that players take for another frame rate."""
        for packet in packets:
            packet.dts = self._packets - _REORDER
            self._packets += 1
            self._container.mux(packet)


class LiveFile:
    """The file that grows while frames arrive, playable at any time; closed, it is an ordinary mp4 with its index at the end.

    It is built under `path`.tmp and takes its name once it holds the segments it starts with (or else its first one), so that a resumed
    run never shortens what is there.
    """

    def __init__(self, path: Path, settings: Settings, comment: str, segments: Iterable[Segment] = ()):
        self.path, self.frames = path, 0
        self._settings, self._comment, self._container, self._named = settings, comment, None, False
        for segment in segments:
            self._join(segment)
        self._take_name()

    def append(self, segment: Segment) -> None:
        """Append the next segment. Raises UserError when the disk is full."""
        self._join(segment)
        self._take_name()

    def close(self) -> None:
        """Write the index."""
        with atomic.reported(self.path):
            self._container.close()

    def _join(self, segment: Segment) -> None:
        with atomic.reported(self.path, needed=len(segment.data)), av.open(io.BytesIO(segment.data), format="mp4") as source:
            if self._container is None:
                pending = atomic.pending_path(self.path)
                atomic.remove(pending)
                self._container = _new_mp4(pending, source.streams.video[0], self._settings, self._comment, LIVE)
            self.frames += copy_packets(source, self._container, self._settings, start=self.frames)

    def _take_name(self) -> None:
        if self._container is not None and not self._named:
            with atomic.reported(self.path):
                atomic.publish(atomic.pending_path(self.path), self.path)
            self._named = True


LIVE = {"movflags": "hybrid_fragmented+frag_every_frame", "flush_packets": "1"}
FINAL = {"movflags": "faststart"}


def finish_file(live: Path, pending: Path, settings: Settings, comment: str) -> int:
    """Copy a closed live file to `pending` with its index in front, times starting at zero, and sync it. Returns its number of frames."""
    atomic.remove(pending)
    with atomic.reported(pending, needed=live.stat().st_size), av.open(str(live), format="mp4") as source:
        with _new_mp4(pending, source.streams.video[0], settings, comment, FINAL) as target:
            frames = copy_packets(source, target, settings, start=0)
        atomic.sync(pending)
    return frames


def copy_packets(source: Any, target: Any, settings: Settings, *, start: int) -> int:
    """Copy the packets of `source`'s video to `target`'s only stream, the first one shown as frame number `start`. Returns their number."""
    stream = source.streams.video[0]
    count, shift = 0, 0
    for packet in source.demux(stream):
        if not packet.size:
            continue
        if count == 0:
            shift = round(start / (Fraction(settings.rate) * stream.time_base)) - packet.pts
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
        packet.stream = target.streams.video[0]
        target.mux(packet)
        count += 1
    return count


def _new_mp4(path: Path, template: Any, settings: Settings, comment: str, options: dict[str, str]) -> Any:
    """An output container with one stream like `template`. No clock time is written, so equal content gives equal files."""
    container = av.open(str(path), "w", format="mp4", options=options)
    container.metadata["comment"] = comment
    stream = container.add_stream_from_template(template)
    stream.codec_context.codec_tag = _TAGS[settings.codec]
    return container


def _encoder_options(settings: Settings) -> dict[str, str]:
    common = {"crf": str(settings.crf), "preset": settings.preset, "chroma_sample_location": "center", "g": str(settings.gop)}
    if settings.codec == "h264":
        return {**common, "threads": _X264_THREADS, "mbtree": "0", "sc_threshold": "0", "keyint_min": str(settings.gop)}
    keys = f"keyint={settings.gop}:min-keyint={settings.gop}:scenecut=0:open-gop=0"
    threads = f"pools={settings.pools or os.cpu_count() or 1}:frame-threads=1"
    return {**common, "threads": "1", "x265-params": f"{threads}:{keys}:info=0:log-level=none"}


def _picture(planes: Planes, pixel_format: str) -> av.VideoFrame:
    """An encoder's frame from code values; its rows may be padded."""
    Y, Cb, Cr = planes
    picture = av.VideoFrame(Y.shape[1], Y.shape[0], pixel_format)
    for plane, values in zip(picture.planes, (Y, Cb, Cr)):
        values = values.numpy()
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size).view(values.dtype)
        rows[:, : values.shape[1]] = values
    picture.colorspace, picture.color_range = _BT709, _LIMITED
    return picture


def _require(met: bool, where: str, value: object, fix: str) -> None:
    if not met:
        raise UserError(f"{value} cannot be encoded", where=where, fix=fix)
