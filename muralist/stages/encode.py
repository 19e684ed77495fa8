"""decode -> encode: frames stream into the file.

Each finished group of pictures (GOP) is published in the run directory the moment it is complete, and appended to OUT.part, which plays at
any time. After a kill only the unfinished group is encoded again; the finished file is a packet copy of the groups, hence bit-identical
to that of an uninterrupted run (same package versions). No frame is kept longer than its encoder needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from muralist.errors import UserError
from muralist.stages.ahead import Ahead
from muralist.store import atomic
from muralist.store.colour import Planes, rgb_to_planes
from muralist.store.paths import check_output
from muralist.store.run import RunDirectory
from muralist.store.video_write import EncodeOptions, LiveFile, Segment, SegmentEncoder, Settings, finish_file
from muralist.types import FrameChunk, Grid

__all__ = ["EncodeOptions", "encode", "live_path", "next_frame", "sidecar_path"]

_SEGMENT = "segment.mp4"


def encode(
    chunks: Iterator[FrameChunk],
    grid: Grid,
    output: Path,
    options: EncodeOptions | None = None,
    run: RunDirectory | None = None,
    metadata: Mapping[str, Any] | None = None,
    ahead: Ahead | None = None,
) -> Path:
    """Write the video, its metadata inside and in OUT.json beside it.

    Args:
        chunks: frames [t, H, W, 3] in [0, 1] in order, starting at `next_frame(run)` or earlier (what is done is skipped). Frames larger
            than the grid lose their surplus rows and columns at the bottom and right.
        grid: exact size, frame count and rate of the file.
        output: an .mp4 path; an older file there is replaced at the very end.
        run: where finished groups are kept; None keeps nothing to resume from.
        ahead: takes the frames from `chunks` and converts them in a thread of its own, while earlier ones are compressed.
        metadata: JSON values (prompt, seed, recipe, base, versions); go to the mp4's comment tag and to OUT.json.
    Returns:
        `output`.
    Raises:
        UserError: options that cannot be, a path that cannot be written, a full disk (everything finished so far stays), or groups in
            `run` that were made with other options.
        FloatingPointError: a frame holds NaN or infinity.
        ValueError: missing, surplus or misplaced frames (a bug in the caller).
    """
    settings = (options or EncodeOptions()).resolve(grid)
    output = check_output(Path(output))
    comment = json.dumps(dict(metadata or {}), sort_keys=True, allow_nan=False)
    journal = Journal(run)
    journal.require(settings)
    live = LiveFile(live_path(output), settings, comment, journal.segments())
    pictures = (ahead or Ahead(0))(_pictures(chunks, grid, settings, first=live.frames))
    with closing(pictures):
        for segment in _encoded(pictures, grid, settings, first=live.frames):
            journal.add(segment, settings)
            live.append(segment)
    live.close()
    _publish(output, settings, comment, metadata or {}, grid)
    return output


def next_frame(run: RunDirectory | None) -> int:
    """The first frame that `encode` still needs; earlier ones are in finished groups. The frame count of the grid if none is missing."""
    return Journal(run).next_frame


def live_path(output: Path) -> Path:
    """The file that plays while `output` is being made."""
    return output.with_name(output.name + ".part")


def sidecar_path(output: Path) -> Path:
    """The JSON beside `output`."""
    return output.with_name(output.name + ".json")


class Journal:
    """Finished groups in the run's scratch directory, one published directory each; without a run, none.

    Content is verified when they are listed. The list ends at the first gap, damaged group, or group of another encoder version:
    from there on everything is encoded again.
    """

    def __init__(self, run: RunDirectory | None):
        self._root = run.scratch("encode") if run else None
        self._infos: list[dict[str, Any]] = []
        self.next_frame = 0
        while self._root and (info := _intact(self._directory(self.next_frame))):
            self._infos.append(info)
            self.next_frame += info["frames"]

    def require(self, settings: Settings) -> None:
        """UserError if a finished group was made with other settings."""
        for info in self._infos:
            for name, value in settings.record.items():
                if info["settings"].get(name) != value:
                    was = f"finished frames were encoded with {name} = {info['settings'].get(name)}, now it is {value}"
                    raise UserError(was, where=str(self._root), fix="ask for the earlier value, or remove this directory to encode all frames again")

    def segments(self) -> Iterator[Segment]:
        """The finished groups in order."""
        start = 0
        for info in self._infos:
            yield Segment((self._directory(start) / _SEGMENT).read_bytes(), start, info["frames"])
            start += info["frames"]

    def add(self, segment: Segment, settings: Settings) -> None:
        """Publish a finished group."""
        if self._root:
            info = {"frames": segment.frames, "settings": settings.record}
            atomic.publish_dir(self._directory(segment.start), {_SEGMENT: segment.data}, info)

    def _directory(self, start: int) -> Path:
        return self._root / f"segment-{start:06d}"


def _intact(directory: Path) -> dict[str, Any] | None:
    """The info of a finished group if it can be used by these versions."""
    try:
        manifest = atomic.verify_dir(directory)
    except UserError:
        return None
    info = manifest["info"]
    usable = _SEGMENT in manifest["files"] and isinstance(info.get("frames"), int) and info["frames"] > 0 and isinstance(info.get("settings"), dict)
    return info if usable and manifest.get("versions", {}).get("av") == atomic.versions()["av"] else None


def _pictures(chunks: Iterator[FrameChunk], grid: Grid, settings: Settings, first: int) -> Iterator[tuple[int, Planes]]:
    """(number, code values on the CPU) of every frame from `first` on."""
    for number, frame in _frames(chunks, grid, first):
        yield number, rgb_to_planes(frame, settings.bit_depth)


def _encoded(pictures: Iterator[tuple[int, Planes]], grid: Grid, settings: Settings, first: int) -> Iterator[Segment]:
    """Every group from frame `first` on, each as soon as it is complete."""
    encoder, done = None, first
    for number, planes in pictures:
        encoder = encoder or SegmentEncoder(settings, start=number)
        encoder.add_planes(planes)
        if encoder.frames == settings.gop or number == grid.num_frames - 1:
            yield encoder.finish()
            encoder, done = None, number + 1
    if done != grid.num_frames:
        raise ValueError(f"encode: the frames end too early; {done} of {grid.num_frames} are in whole groups")


def _frames(chunks: Iterator[FrameChunk], grid: Grid, first: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(number, frame [H, W, 3]) from `first` on, cropped to the grid and checked. Takes no chunk when no frame is missing."""
    expected = first
    while expected < grid.num_frames and (chunk := next(chunks, None)) is not None:
        if chunk.start > expected:
            raise ValueError(f"encode: frame {expected} is missing, the next chunk starts at {chunk.start}")
        for frame in chunk.frames[expected - chunk.start :]:
            if frame.shape[0] < grid.height or frame.shape[1] < grid.width or expected == grid.num_frames:
                raise ValueError(f"encode: frame {expected} of shape {tuple(frame.shape)} does not fit {grid}")
            # One sum finds any NaN or infinity: neither can cancel out.
            if not torch.isfinite(frame.sum(dtype=torch.float32)):
                raise FloatingPointError(f"encode: frame {expected} holds NaN or infinity")
            yield expected, frame[: grid.height, : grid.width]
            expected += 1


def _publish(output: Path, settings: Settings, comment: str, metadata: Mapping[str, Any], grid: Grid) -> None:
    """Turn the closed live file into the finished one. The video appears last: when it is there, all is."""
    live, pending = live_path(output), atomic.pending_path(output)
    frames = finish_file(live, pending, settings, comment)
    if frames != grid.num_frames:
        raise ValueError(f"encode: {frames} of {grid.num_frames} frames reached the file")
    video = {"sha256": atomic.file_sha256(pending), **settings.record}
    atomic.write_json(sidecar_path(output), {"metadata": dict(metadata), "video": video, "versions": atomic.versions()})
    with atomic.reported(output):
        atomic.publish(pending, output)
        atomic.sync(output.parent)
        atomic.remove(live)
