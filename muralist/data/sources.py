"""Where training videos come from: the world, or a folder of footage with captions. Both draw clips of any crop and length at random.

A folder of footage holds `videos.csv` with the columns `file` (a path inside the folder), `caption`, and, to choose by, `score`.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from muralist.data import world
from muralist.data.world import Crop, Scene, caption, near_object, render_clip, sample_scene
from muralist.errors import UserError
from muralist.store.paths import safe_join
from muralist.store.video_read import VideoInfo, inspect, read_frames
from muralist.types import Grid

if TYPE_CHECKING:
    from muralist.data.latents import PairConfig, PoolConfig

MANIFEST = "videos.csv"
SLOWEST = 0.9  # of the grid's rate: a slower file would repeat frames
SMALLEST = 0.9  # of the grid's sides: a base's grid is rounded up to its tokens, and footage of the same name is then a little smaller
ALIGNMENT = 32  # pixels: crops stand on the token grid of both VAE flavours


class Drawn(Protocol):
    """One clip that was drawn; nothing is rendered or read before it is asked for."""

    @property
    def caption(self) -> str: ...

    @property
    def place(self) -> tuple[float, float, float, float]:
        """Top, left, height and width of the crop as shares of the whole frame."""

    def pixels(self) -> torch.Tensor:
        """[T, H, W, 3] float32 in [0, 1]."""

    def near_object(self, cell: int, group: int) -> torch.Tensor | None:
        """Which latents see the object of the caption: [F, h, w], bool, for cells of `cell` pixels and `group` frames; None where nobody knows."""

    def on(self, grid: Grid) -> Drawn:
        """The same scene from the same moment on another grid, all of its picture and frames; where a clip ends, its last frame stays."""


class Source(Protocol):
    """`identity` (JSON values) changes when the same draw would give another clip."""

    @property
    def identity(self) -> dict[str, Any]: ...

    def draw(self, rng: np.random.Generator, config: PoolConfig) -> Drawn: ...

    def pair(self, rng: np.random.Generator, config: PairConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """The same part of the same clip at the sizes 1 and `config.scale`, both [T, H, W, 3]."""


# --- the world ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rendering:
    scene: Scene
    grid: Grid
    crop: Crop | None
    frames: range

    @property
    def caption(self) -> str:
        return caption(self.scene)

    @property
    def place(self) -> tuple[float, float, float, float]:
        return _share(self.crop, self.grid)

    def pixels(self) -> torch.Tensor:
        return render_clip(self.scene, self.grid, crop=self.crop, frames=self.frames)

    def near_object(self, cell: int, group: int) -> torch.Tensor:
        seen = near_object(self.scene, self.grid, cell=cell, crop=self.crop, frames=self.frames)
        # the first latent frame is one frame, the others are `group` of them
        return torch.cat([seen[:1], seen[1:].unflatten(0, (-1, group)).any(dim=1)])

    def on(self, grid: Grid) -> _Rendering:
        first = self.frames.start / self.grid.fps * grid.fps
        if not first.is_integer():
            raise ValueError(f"frame {self.frames.start} at {self.grid.fps:g} fps has no counterpart at {grid.fps:g}")
        return _Rendering(self.scene, grid, None, range(int(first), int(first) + grid.num_frames))


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Scenes of the training set, or of the held-out one, with a camera move in `camera_share` of them."""

    camera_share: float = 0.3
    held_out: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        return {"world": world.VERSION, "camera_share": self.camera_share, "held_out": self.held_out}

    def draw(self, rng: np.random.Generator, config: PoolConfig) -> Drawn:
        scene = self._scene(rng, config.grid)
        first = int(rng.integers(config.grid.num_frames - config.length + 1))
        frames = range(first, first + config.length)
        crop = None if config.crop is None else random_crop(rng, config.grid, config.crop)
        if crop is not None and config.aimed and rng.random() < config.aimed:
            crop = _aimed(rng, crop, scene, config.grid, int(rng.choice(frames)))
        return _Rendering(scene, config.grid, crop, frames)

    def pair(self, rng: np.random.Generator, config: PairConfig) -> tuple[torch.Tensor, torch.Tensor]:
        scene, grid, side = self._scene(rng, config.low), config.low, config.side
        if side > min(grid.height, grid.width) or config.frames > grid.num_frames:
            what = f"crops of {side} pixels and {config.frames} frames do not fit into {grid.width}x{grid.height} x {grid.num_frames}"
            raise UserError(what, where="data", fix="use a base of larger videos")
        first = int(rng.integers(grid.num_frames - config.frames + 1))
        top, left = (int(rng.integers(whole - side + 1)) for whole in (grid.height, grid.width))

        def at(scale: float) -> torch.Tensor:
            crop = Crop(*(round(value * scale) for value in (top, left, side, side)))
            large = grid.resized(height=round(grid.height * scale), width=round(grid.width * scale))
            return render_clip(scene, large, crop=crop, frames=range(first, first + config.frames))

        return at(1), at(config.scale)

    def _scene(self, rng: np.random.Generator, grid: Grid) -> Scene:
        return sample_scene(rng, held_out=self.held_out, camera_share=self.camera_share, duration=grid.duration)


def random_crop(rng: np.random.Generator, grid: Grid, crop: tuple[int, int] | None) -> Crop:
    """A crop (height, width) at a place of the token grid, anywhere in the frame; all of it without one. Raises UserError where it does not fit."""
    height, width = crop or (grid.height, grid.width)
    if height > grid.height or width > grid.width:
        raise UserError(f"crops of {width}x{height} do not fit into {grid.width}x{grid.height}", where="data", fix="use a larger --height")
    top, left = (ALIGNMENT * int(rng.integers((full - side) // ALIGNMENT + 1)) for full, side in ((grid.height, height), (grid.width, width)))
    return Crop(top, left, height, width)


def _aimed(rng: np.random.Generator, crop: Crop, scene: Scene, grid: Grid, frame: int) -> Crop:
    """The crop moved so that its middle is somewhere on the object of that frame, as far as the picture's borders allow."""
    x, y, reach = world.object_on(scene, grid, frame)
    middle = (y + reach * rng.uniform(-1, 1), x + reach * rng.uniform(-1, 1))
    sides = zip(middle, (crop.height, crop.width), (grid.height, grid.width))
    top, left = (ALIGNMENT * int(np.clip(round((at - side / 2) / ALIGNMENT), 0, (full - side) // ALIGNMENT)) for at, side, full in sides)
    return replace(crop, top=top, left=left)


def _share(crop: Crop | None, grid: Grid) -> tuple[float, float, float, float]:
    c = crop or Crop(0, 0, grid.height, grid.width)
    return (c.top / grid.height, c.left / grid.width, c.height / grid.height, c.width / grid.width)


# --- footage ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Clip:
    """A file of a folder of footage, its name there, its caption, and its score and the score's metric where there are such."""

    path: Path
    name: str
    caption: str
    score: float | None = None
    scored_by: str = ""


@dataclass(frozen=True, slots=True)
class _Excerpt:
    """Frames of a file, as many a second as the grid has, shrunk to cover the grid's picture and cut to the crop."""

    clip: Clip
    info: VideoInfo
    grid: Grid
    crop: Crop
    first: int
    count: int

    @property
    def caption(self) -> str:
        return self.clip.caption

    @property
    def place(self) -> tuple[float, float, float, float]:
        return _share(self.crop, self.grid)

    def near_object(self, cell: int, group: int) -> None:
        return None

    def on(self, grid: Grid) -> _Excerpt:
        return replace(self, grid=grid, crop=Crop(0, 0, grid.height, grid.width), count=grid.num_frames)

    def pixels(self) -> torch.Tensor:
        last = self.info.num_frames - 1
        wanted = [min(self.first + round(i * self.info.fps / self.grid.fps), last) for i in range(self.count)]
        frames, needed = enumerate(itertools.islice(read_frames(self.clip.path, self.info), wanted[-1] + 1)), set(wanted)
        kept = {index: self._cut(frame) for index, frame in frames if index in needed}
        return torch.stack([kept[index] for index in wanted])

    def _cut(self, frame: torch.Tensor) -> torch.Tensor:
        """[H, W, 3] -> [h, w, 3]: shrink, take the middle of the grid's shape, then the crop."""
        shrink = max(self.grid.height / frame.shape[0], self.grid.width / frame.shape[1])
        size = [max(round(side * shrink), least) for side, least in zip(frame.shape[:2], (self.grid.height, self.grid.width))]
        image = F.interpolate(frame.permute(2, 0, 1)[None], size, mode="bilinear", antialias=True)[0]
        top, left = ((have - want) // 2 for have, want in zip(size, (self.grid.height, self.grid.width)))
        c = self.crop
        return image[:, top + c.top : top + c.top + c.height, left + c.left : left + c.left + c.width].permute(1, 2, 0)


@dataclass(frozen=True, slots=True)
class Footage:
    """The clips of a folder that are large and long enough for what is drawn."""

    clips: tuple[Clip, ...]

    @property
    def identity(self) -> dict[str, Any]:
        lines = (f"{clip.name}\t{clip.path.stat().st_size}\t{clip.path.stat().st_mtime_ns}\t{clip.caption}\n" for clip in self.clips)
        return {"footage": hashlib.sha256("".join(lines).encode()).hexdigest()}

    def draw(self, rng: np.random.Generator, config: PoolConfig) -> Drawn:
        return self._excerpt(rng, config.grid, config.crop, config.length)

    def pair(self, rng: np.random.Generator, config: PairConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """The lower one is the higher one shrunk with an antialiased bilinear filter (LUVE, appendix C.3)."""
        side = round(config.side * config.scale)
        grid = config.low.resized(height=round(config.low.height * config.scale), width=round(config.low.width * config.scale))
        high = self._excerpt(rng, grid, (side, side), config.frames).pixels()
        low = F.interpolate(high.permute(0, 3, 1, 2), [config.side] * 2, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
        return low, high

    def _excerpt(self, rng: np.random.Generator, grid: Grid, crop: tuple[int, int] | None, count: int) -> _Excerpt:
        """A crop (height, width), or all, of a random file that is large, fast and long enough; each one is looked at once it is drawn."""
        for _ in range(1000):
            clip = self.clips[int(rng.integers(len(self.clips)))]
            info = _inspected(clip.path)
            room = info.num_frames - 1 - math.ceil((count - 1) * info.fps / grid.fps)
            if room < 0 or info.fps < SLOWEST * grid.fps:
                continue
            if (fitted := _fitted(grid, info, crop)) is not None:
                return _Excerpt(clip, info, fitted, random_crop(rng, fitted, crop), int(rng.integers(room + 1)), count)
        need = f"{grid.width}x{grid.height} with {count} frames at {grid.fps:g} fps"
        raise UserError(f"hardly a clip has {need}", where="data", fix="give larger, faster or longer footage; enlarging it would teach blur")


def _fitted(grid: Grid, info: VideoInfo, crop: tuple[int, int] | None) -> Grid | None:
    """The grid if the file covers it; for crops one a little smaller will do. None where neither is so: nothing is enlarged."""
    share = min(info.height / grid.height, info.width / grid.width)
    if share >= 1:
        return grid
    smaller = grid.resized(height=int(grid.height * share), width=int(grid.width * share))
    fits = crop is not None and share >= SMALLEST and smaller.height >= crop[0] and smaller.width >= crop[1]
    return smaller if fits else None


_inspected = lru_cache(maxsize=None)(inspect)


def read_footage(folder: Path, *, min_score: float | None = None, report: Callable[[str], object] = print) -> Footage:
    """The clips that `videos.csv` names; with `min_score` those whose score is at least that. Raises UserError naming the line that is wrong."""
    manifest = folder / MANIFEST
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as handle:
            rows = csv.DictReader(handle)
            _require_columns(rows.fieldnames or [], manifest, ("file", "caption") + (() if min_score is None else ("score",)))
            clips = [_clip(folder, row, f"{manifest}, line {rows.line_num}") for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{manifest} cannot be read ({error})", where="data", fix="write a CSV with the columns file, caption and score") from None
    chosen = [clip for clip in clips if min_score is None or (clip.score is not None and clip.score >= min_score)]
    if not chosen:
        least = "no clip" if min_score is None else f"no clip of a score of at least {min_score:g}"
        raise UserError(f"{manifest} names {least}", where="data", fix="add lines" if min_score is None else "lower --min-score")
    if min_score is not None:
        report(f"{len(chosen)} of {len(clips)} clips have a score of at least {min_score:g}")
    return Footage(tuple(chosen))


def _require_columns(found: list[str], manifest: Path, needed: tuple[str, ...]) -> None:
    if missing := [name for name in needed if name not in found]:
        fix = "add it to every line" if missing[0] != "score" else "add it, or fill it with `muralist score`"
        raise UserError(f"{manifest} has no column {missing[0]!r}", where="data", fix=fix)


def _clip(folder: Path, row: dict[str, str | None], where: str) -> Clip:
    if None in row or None in row.values():
        raise UserError("more or fewer cells than columns", where=where, fix='put captions with commas between quotation marks: "a ball, rolling"')
    text, score = row["caption"].strip(), row.get("score", "").strip()
    path = safe_join(folder, row["file"])
    if not path.is_file():
        raise UserError(f"no file {row.get('file')!r:.80}", where=where, fix="correct the path, which is relative to the folder")
    if not text:
        raise UserError("the caption is empty", where=where, fix="say what the video shows")
    try:
        number = float(score) if score else None
    except ValueError:
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise UserError(f"the score {score!r:.40} is no number", where=where, fix="give a number, or leave it empty")
    return Clip(path, row["file"], text, number, row.get("scored_by", "").strip())
