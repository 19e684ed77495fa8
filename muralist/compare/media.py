"""What a browser can show of a video: a copy that it plays, a still to look at closely, a spectrum; made in one reading of the file.

DIR/media/NAME/still.png       the middle frame, every pixel, 8 bits
               preview.mp4     H.264, 8 bits, same size, where the video itself is something that browsers may not play
               facts.json      written last: which file this was made from, and what was found
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from muralist.errors import UserError
from muralist.eval.metrics.spectrum import CENTRES, Spectrum
from muralist.eval.source import Source
from muralist.stages.encode import encode, sidecar_path
from muralist.store import atomic
from muralist.store.video_read import VideoInfo
from muralist.store.video_write import EncodeOptions
from muralist.types import FrameChunk, Grid

FORMAT = 2  # of facts.json: another number makes everything anew
PREVIEW = EncodeOptions(codec="h264", bit_depth=8, crf=14, preset="veryfast")
THUMB, CROP = 360, 224  # pixels: width of the small picture, side of the native crop that stands in the page itself


@dataclass(frozen=True, slots=True)
class Media:
    """Paths relative to the report's directory, pictures as data URIs, and the spectrum: (cycles per pixel, decibels) by band."""

    video: str
    still: str
    thumb: str
    crop: str
    spectrum: tuple[tuple[float, float], ...]


def make_media(source: Source, root: Path, name: str) -> Media:
    """Everything the page shows of one video, made now or found from an earlier start.

    Args:
        source: the video.
        root: the report's directory; the video itself is referenced if it lies below, else it is copied.
        name: of its folder in `root`/media.
    Raises:
        UserError: fewer frames than the file should hold, or a full disk.
    """
    folder, stamp = root / "media" / name, _stamp(source.path)
    facts = _finished(folder, stamp)
    if facts is None:
        with atomic.reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        facts = {"format": FORMAT, "source": stamp, **_read_once(source, folder)}
        atomic.write_json(folder / "facts.json", facts)
    video = folder / "preview.mp4" if facts["preview"] else _beside(source.path, root, folder)
    still = Image.open(folder / "still.png").convert("RGB")
    spectrum = tuple((x, y) for x, y in facts["spectrum"])
    return Media(_relative(video, root), _relative(folder / "still.png", root), data_uri(_thumb(still)), data_uri(_crop(still)), spectrum)


def plays_in_browsers(path: Path, info: VideoInfo) -> bool:
    """Whether every browser in use plays it; what only some of them play counts as no."""
    return path.suffix.lower() in (".mp4", ".m4v") and info.codec == "h264" and info.pixel_format in ("yuv420p", "yuvj420p")


def _read_once(source: Source, folder: Path) -> dict[str, Any]:
    info, spectrum = source.info, Spectrum(source.info.num_frames)

    def frames() -> Iterator[torch.Tensor]:
        for number, frame in enumerate(source.frames()):
            if number == info.num_frames // 2:
                _write_still(frame, folder / "still.png")
            spectrum.add(frame)
            yield frame

    preview = not plays_in_browsers(source.path, info) and min(info.width, info.height) >= 16
    if preview:
        _encode_preview(frames(), info, folder / "preview.mp4")
    else:
        for _ in frames():
            pass
    levels = zip(CENTRES, spectrum.levels().tolist())
    return {"preview": preview, "spectrum": [(centre, level) for centre, level in levels if math.isfinite(level)]}


def _encode_preview(frames: Iterator[torch.Tensor], info: VideoInfo, path: Path) -> None:
    """The same frames in H.264, 8 bits; an odd last row or column is left out, because its chroma has half the resolution."""
    grid = Grid(num_frames=info.num_frames, height=info.height // 2 * 2, width=info.width // 2 * 2, fps=info.fps or 16.0)
    encode((FrameChunk(frame[None], number) for number, frame in enumerate(frames)), grid, path, PREVIEW)
    atomic.remove(sidecar_path(path))


# --- files ------------------------------------------------------------------------------------------------------------------------


def _stamp(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"path": str(path.resolve()), "size": found.st_size, "time": found.st_mtime_ns}


def _finished(folder: Path, stamp: dict[str, Any]) -> dict[str, Any] | None:
    try:
        facts = atomic.read_json(folder / "facts.json")
        usable = facts["format"] == FORMAT and facts["source"] == stamp and (folder / "still.png").is_file()
        return facts if usable and (not facts["preview"] or (folder / "preview.mp4").is_file()) else None
    except (UserError, KeyError, TypeError):
        return None


def _beside(path: Path, root: Path, folder: Path) -> Path:
    """The video where a page in `root` may reference it: itself if it lies below, else a copy."""
    if path.resolve().is_relative_to(root.resolve()):
        return path
    copy = folder / f"original{path.suffix.lower()}"
    if not copy.exists() or copy.stat().st_size != path.stat().st_size:
        with atomic.reported(copy, needed=path.stat().st_size):
            shutil.copyfile(path, atomic.pending_path(copy))
            atomic.publish(atomic.pending_path(copy), copy)
    return copy


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()


def folder_name(label: str) -> str:
    """A plain name for a label or path that may hold anything, different for different ones."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in Path(label).name)[:60].strip("-")
    return f"{plain}-{hashlib.sha256(label.encode('utf-8', 'replace')).hexdigest()[:8]}"


# --- pictures ---------------------------------------------------------------------------------------------------------------------


def _write_still(frame: torch.Tensor, path: Path) -> None:
    """A frame [H, W, 3] in [0, 1] as PNG, 8 bits."""
    image = Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=4)
    atomic.write_file(path, buffer.getvalue())


def _thumb(still: Image.Image) -> Image.Image:
    width = min(THUMB, still.width)
    return still.resize((width, max(round(still.height * width / still.width), 1)), Image.Resampling.LANCZOS)


def _crop(still: Image.Image) -> Image.Image:
    """The native pixels at the centre."""
    width, height = min(CROP, still.width), min(CROP, still.height)
    left, top = (still.width - width) // 2, (still.height - height) // 2
    return still.crop((left, top, left + width, top + height))


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
