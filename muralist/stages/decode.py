"""Latent video -> pixel frames: exact, tile by tile, in bounded memory, resumable.

Two orders, because memory and disk trade places (`design.md`, decision 5):

* `TimeMajor`: latent frames outermost. Frames stream out at once; every tile keeps its causal caches for the whole run. With a `scratch`
  folder all caches are saved every few latent frames, so a restart repeats at most that many; kept are those that the reader of the frames
  may still ask for.
* `TileMajor`: tiles outermost. One tile's caches exist at a time; a finished tile lies on disk as whole numbers (`nn/packed.py`) and frames are
  assembled from the tile files. A restart repeats at most one tile, or, before the first one, whole-frame layers that take ten times as
  long to compute as to save.

Either way the first layers run frame by frame on the whole frame, since their attention sees all of it. Everything saved is published by
rename after fsync, under a folder named by a fingerprint of latents, weights and plan: stale work is never picked up.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open

from muralist.errors import UserError
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.decoder_blocks import Caches, Patch
from muralist.nn.decoder_memory import DecodeMemory, Saves, measure
from muralist.nn.empty import empty_vae
from muralist.nn.packed import packed, unpacked, value_bytes
from muralist.stages.decode_options import DecodeOptions
from muralist.store import atomic
from muralist.store.pace import Pace
from muralist.store.tensors import load_tensors, save_tensors
from muralist.tiling import Box, tile_boxes
from muralist.types import FrameChunk, Grid, LatentVideo

TILES = (1024, 768, 512, 384, 256, 128)  # sides tried, largest first: the halo of a small tile costs more than the tile
CPU = torch.device("cpu")
GROUP = 12  # frames: an encoder's closed group of pictures, which it must be given again from its start after a kill
Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeMajor:
    """Latent frames outermost: streams, keeps the caches of all tiles. `tile` is the largest tile side in pixels.

    `whole_blocks` upsampling blocks run on the whole frame; caches are saved every `save_every` latent frames if there is a scratch folder:
    three are the encoder's group of 12 frames, so that a restart decodes no more than it has to encode again.
    """

    tile: int
    whole_blocks: int = 0
    save_every: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TileMajor:
    """Tiles outermost: the caches of one tile, finished tiles on disk. `tile` is the largest tile side in pixels."""

    tile: int


DecodePlan = TimeMajor | TileMajor


def decode_bytes(vae: AutoencoderKLWan, latent_shape: tuple[int, int, int, int], plan: DecodePlan, *, group: int = GROUP) -> DecodeMemory:
    """Peak memory (`.peak`, bytes, the decoder's weights included) and disk (`.disk`, of a scratch folder) of a decode, before it starts.

    Args:
        vae: the model; one on the meta device will do.
        latent_shape: (C, F, h, w).
        group: as in `decode`.
    """
    return _bytes(StreamingDecoder(vae, _whole_blocks(plan)), latent_shape, plan, group)


def _bytes(decoder: StreamingDecoder, latent_shape: tuple[int, int, int, int], plan: DecodePlan, group: int) -> DecodeMemory:
    _, frames, height, width = latent_shape
    saves = _saves(decoder, frames, plan.save_every, group) if isinstance(plan, TimeMajor) else None
    return measure(decoder, frames, (height, width), _tiles(decoder, height, width, plan), saves=saves)


def _saves(decoder: StreamingDecoder, frames: int, save_every: int, group: int) -> Saves:
    """The files of caches of a whole decode, counted by going through it."""
    kept: list[int] = []
    most = 0
    points = range(save_every, frames, save_every)
    for k in points:
        kept = [*_wanted(kept, k, decoder, group), k]
        most = max(most, len(kept))
    return Saves(len(points), most)


def plan_decode(vae_config: Mapping[str, Any], grid: Grid, options: DecodeOptions | None = None, *, dtype: torch.dtype = torch.float32) -> DecodePlan:
    """The quickest plan that fits: time-major if its caches fit, else tile-major; the largest tile either way.

    Args:
        vae_config: the configuration of an `AutoencoderKLWan` (no weights are needed).
        grid: a legal grid.
        dtype: of the weights.

    Raises:
        UserError: no plan fits the memory.
    """
    options = options or DecodeOptions()
    vae = empty_vae(vae_config, dtype)
    space, time = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
    shape = (vae.config.z_dim, (grid.num_frames - 1) // time + 1, grid.height // space, grid.width // space)
    needs, decoder = [], StreamingDecoder(vae)  # every candidate has all blocks in tiles
    for plan in _candidates(options):
        need = _bytes(decoder, shape, plan, GROUP)
        if need.peak <= options.memory_bytes and need.largest_tensor < 2**31:
            return plan
        needs.append(need.peak)
    raise UserError(
        f"decoding {grid.width}x{grid.height} needs {min(needs) / 1e9:.1f} GB, allowed are {options.memory_bytes / 1e9:.1f} GB",
        where="decode.memory_bytes",
        fix="allow more, leave order and tile to the planner, or choose a smaller size",
    )


def _candidates(options: DecodeOptions) -> list[DecodePlan]:
    """In order of preference."""
    tiles = (options.tile,) if options.tile else TILES
    in_time = [TimeMajor(tile=tile) for tile in tiles if tile >= 512 or options.tile or options.order == "time"]
    in_tiles = [TileMajor(tile=tile) for tile in tiles]
    return {"auto": in_time + in_tiles, "time": in_time, "tile": in_tiles}[options.order]


def decode(
    latent: LatentVideo,
    vae: AutoencoderKLWan,
    plan: DecodePlan,
    *,
    scratch: Path | None = None,
    on_tile: Progress | None = None,
    crop: Grid | None = None,
    first_frame: int = 0,
    group: int = GROUP,
    lag: int = 0,
    where: torch.device = CPU,
) -> Iterator[FrameChunk]:
    """Frames of a latent video in order: 1, then 4, 4, ... of them, [t, H, W, 3] float32 in [0, 1].

    Args:
        latent: normalised latents [1, C, F, h, w].
        scratch: a folder for resumable work; what an earlier call with the same arguments finished there is not done again, and the frames
            come out bit-identical. Without one, nothing survives the call (tile-major then works in a temporary folder).
        on_tile: called with (done, total), counted in tiles; work found finished counts as done. Called with the same numbers after each latent
            frame of a tile, or of what comes before all tiles (tile-major): what it raises ends the decode there.
        crop: yield the top left part of this size, if the legal grid is larger; what is cut off is never converted.
        first_frame: pixel frame to start at: the first chunk is the one that holds it; nothing is yielded if it is the count of frames.
        group: a reader that was killed asks again from a multiple of this many frames, at or before the last it was given. One that asks for
            earlier ones gets them too, but later.
        lag: by how many frames that reader may be behind the last it was given, where they wait in a queue.
        where: the device of the frames, if they come straight from the decoder (time-major): converted there, a quarter of the bytes is copied.

    Raises:
        UserError: shapes that do not fit together.
        FloatingPointError: a decoded value is not finite; names the stage, the tile and the latent frame.
    """
    decoder = StreamingDecoder(vae, _whole_blocks(plan))
    job = _Job.of(latent, decoder, plan, crop, on_tile)
    if not 0 <= first_frame <= latent.grid.num_frames:
        raise UserError(f"{first_frame}", where="first_frame", fix=f"use 0 to {latent.grid.num_frames}")
    if first_frame == latent.grid.num_frames:
        return iter(())
    start = -(-first_frame // decoder.temporal_factor)
    folder = scratch and _folder(scratch, job, vae, plan)
    match plan:
        case TimeMajor():
            return _time_major(job, plan, folder, start, group, lag, where)
        case TileMajor():
            return _in_folder(job, folder, start)


def _whole_blocks(plan: DecodePlan) -> int:
    return plan.whole_blocks if isinstance(plan, TimeMajor) else 0


def _tiles(decoder: StreamingDecoder, height: int, width: int, plan: DecodePlan) -> tuple[Box, ...]:
    factor = decoder.spatial_factor
    return tile_boxes(height * factor, width * factor, max(plan.tile, factor), factor)


@dataclass(slots=True)
class _Job:
    """What both orders share: the latents, the tiles that survive the crop, and the progress count."""

    z: torch.Tensor
    decoder: StreamingDecoder
    tiles: tuple[Box, ...]
    height: int
    width: int
    on_tile: Progress
    total: int
    done: int = 0

    @classmethod
    def of(cls, latent: LatentVideo, decoder: StreamingDecoder, plan: DecodePlan, crop: Grid | None, on_tile: Progress | None) -> _Job:
        z, grid = latent.z, latent.grid
        _, _, frames, h, w = z.shape
        full = (h * decoder.spatial_factor, w * decoder.spatial_factor)
        if full != (grid.height, grid.width) or (frames - 1) * decoder.temporal_factor + 1 != grid.num_frames:
            what = f"latents {tuple(z.shape)} for a grid of {grid.num_frames}x{grid.height}x{grid.width}"
            raise UserError(what, where="decode", fix="pass the grid that the latents were made on")
        height, width = (crop.height, crop.width) if crop else full
        if height > full[0] or width > full[1]:
            raise UserError(f"{width}x{height} is larger than {full[1]}x{full[0]}", where="crop", fix="crop to a size inside the decoded one")
        boxes = [box.clip(height, width) for box in _tiles(decoder, h, w, plan)]
        tiles = tuple(box for box in boxes if box.area)
        total = len(tiles) * (frames if isinstance(plan, TimeMajor) else 1)
        return cls(z, decoder, tiles, height, width, on_tile or (lambda done, total: None), total)

    @property
    def frames(self) -> int:
        return self.z.shape[2]

    def advance(self, tiles: int = 1) -> None:
        """So many tiles are done. None: the caller may stop us here, since a tile of all frames takes long."""
        self.done += tiles
        self.on_tile(self.done, self.total)

    def first_part(self, k: int, caches: Caches) -> Patch:
        return self.decoder.first_part(self.z[:, :, k : k + 1], first=k == 0, caches=caches)

    def tile(self, patch: Patch, index: int, k: int, caches: Caches) -> torch.Tensor:
        """Checked pixels of one tile of one latent frame, float32 where they were decoded."""
        box = self.tiles[index]
        try:
            return self.decoder.second_part(patch, box, first=k == 0, caches=caches).float()
        except FloatingPointError as error:
            where = f"tile {index + 1} of {len(self.tiles)} (rows {box.y.start}-{box.y.stop}, columns {box.x.start}-{box.x.stop}), latent frame {k}"
            raise FloatingPointError(f"decode: {where}: {error}") from error


def _time_major(job: _Job, plan: TimeMajor, folder: Path | None, start: int, group: int, lag: int, where: torch.device) -> Iterator[FrameChunk]:
    k, whole, tiles = _load_state(folder, start, len(job.tiles), job.decoder.device)
    job.advance(k * len(job.tiles))
    while k < job.frames:
        patch = job.first_part(k, whole)
        span = job.decoder.frames_of(k)
        frames = torch.empty(len(span), job.height, job.width, 3, device=where)
        for index, box in enumerate(job.tiles):
            frames[:, box.y.start : box.y.stop, box.x.start : box.x.stop] = job.tile(patch, index, k, tiles[index])
            job.advance()
        k += 1
        if folder and k % plan.save_every == 0 and k < job.frames:
            _save_state(folder, k, whole, tiles, job.decoder, group, lag)
        if k > start:
            yield FrameChunk(frames, span.start)


def _save_state(folder: Path, k: int, whole: Caches, tiles: list[Caches], decoder: StreamingDecoder, group: int, lag: int) -> None:
    """All causal caches as they stand before latent frame `k`; first those go that no reader needs any more: each may be gigabytes."""
    saved = {_frame_of(path): path for path in _states(folder)}
    for old in set(saved).difference(_wanted(sorted(saved), k, decoder, group, lag)):
        atomic.remove(saved[old])
    named = {f"{i}/{name}": value for i, caches in enumerate([whole, *tiles]) for name, value in caches.items()}
    save_tensors(folder / f"caches-{k:06d}.safetensors", named, cached=False)


def _wanted(saved: list[int], k: int, decoder: StreamingDecoder, group: int, lag: int = 0) -> list[int]:
    """Which of the `saved` states (latent frames, ascending) the reader may still need when state `k` is saved: it has been given all frames
    before latent frame k - 1, but the last `lag`, and asks again from the start of its open group."""
    again = max(decoder.frames_of(k - 1).start - lag, 0) // group * group
    latest = max((frame for frame in saved if frame * decoder.temporal_factor < again + decoder.temporal_factor), default=0)
    return [frame for frame in saved if frame >= latest]


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("caches-*.safetensors"))


def _frame_of(state: Path) -> int:
    return int(state.stem.removeprefix("caches-"))


def _load_state(folder: Path | None, start: int, tiles: int, device: torch.device) -> tuple[int, Caches, list[Caches]]:
    """(latent frame, caches of the first part, caches a tile) of the last state saved at or before `start`; fresh ones if there is none."""
    saved = [path for path in _states(folder) if _frame_of(path) <= start] if folder else []
    everything: list[Caches] = [{} for _ in range(tiles + 1)]
    if not saved:
        return 0, everything[0], everything[1:]
    for name, value in load_tensors(saved[-1]).items():
        index, key = name.split("/", 1)
        everything[int(index)][key] = value.to(device)
    return _frame_of(saved[-1]), everything[0], everything[1:]


def _in_folder(job: _Job, folder: Path | None, start: int) -> Iterator[FrameChunk]:
    if folder:
        yield from _tile_major(job, folder, start)
    else:
        with tempfile.TemporaryDirectory(prefix="muralist-decode-") as temporary:
            yield from _tile_major(job, Path(temporary), start)


def _tile_major(job: _Job, folder: Path, start: int) -> Iterator[FrameChunk]:
    paths = [folder / f"tile-{i:04d}.pixels" for i in range(len(job.tiles))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    job.advance(len(paths) - len(missing))
    if missing:
        _first_parts(job, folder)
    for i in missing:
        _decode_tile(job, folder, i, paths[i])
        job.advance()
    yield from _assemble(job, paths, start)


def _first_parts(job: _Job, folder: Path) -> None:
    """The whole-frame layers of every latent frame, one file each; the caches beside them, now and then, let a restart go on."""
    state, pace = folder / "first-caches.safetensors", Pace()
    caches = {name: value.to(job.decoder.device) for name, value in load_tensors(state).items()} if state.exists() else {}
    start = int(caches.pop("next", torch.tensor(0)))
    for k in range(start, job.frames):
        patch = job.first_part(k, caches)
        save_tensors(folder / f"first-{k:06d}.safetensors", {"x": patch.data})
        if pace.due():  # on a GPU they take far longer to write than to compute
            with pace.saving():
                save_tensors(state, {**caches, "next": torch.tensor(k + 1)}, cached=False)
        job.advance(0)
    save_tensors(state, {"next": torch.tensor(job.frames)})


def _decode_tile(job: _Job, folder: Path, index: int, path: Path) -> None:
    """All frames of one tile into a file [T, rows, columns, 3] of whole numbers, complete or absent."""
    width = value_bytes(job.decoder.dtype)
    size = job.decoder.first_part_size(*job.z.shape[-2:])
    box = job.decoder.boxes(job.tiles[index], size)[0]

    def stream(sink: atomic.Sink) -> None:
        caches: Caches = {}
        for k in range(job.frames):
            with safe_open(folder / f"first-{k:06d}.safetensors", "pt") as saved:
                x = saved.get_slice("x")[:, box.y.start : box.y.stop, box.x.start : box.x.stop]
            pixels = job.tile(Patch(x.to(job.decoder.device), box, size), index, k, caches)
            for frame in pixels:
                sink.write(packed(frame, width))
            job.advance(0)

    values = (1 + (job.frames - 1) * job.decoder.temporal_factor) * job.tiles[index].area * 3
    atomic.write_file(path, stream, needed=values * width)


def _assemble(job: _Job, paths: list[Path], start: int) -> Iterator[FrameChunk]:
    """Frames from tile files; the maps are opened a chunk at a time, so that their pages do not add up in this process."""
    width = value_bytes(job.decoder.dtype)
    for k in range(start, job.frames):
        span = job.decoder.frames_of(k)
        frames = torch.empty(len(span), job.height, job.width, 3)
        for box, path in zip(job.tiles, paths):
            stored = np.memmap(path, np.uint8, "r", offset=span.start * box.area * 3 * width, shape=(len(span), *box.shape, 3, width))
            for frame, values in zip(frames, stored):
                frame[box.y.start : box.y.stop, box.x.start : box.x.stop] = unpacked(values)
        yield FrameChunk(frames, span.start)


def _folder(scratch: Path, job: _Job, vae: AutoencoderKLWan, plan: DecodePlan) -> Path:
    """The folder of exactly this work: named by latents, weights, plan, crop and library versions."""
    config = sorted((key, value) for key, value in vae.config.items() if not key.startswith("_"))
    facts = (plan, job.height, job.width, tuple(job.z.shape), job.z.dtype, vae.dtype, vae.device.type, config, atomic.versions())
    digest = hashlib.sha256(repr(facts).encode())
    digest.update(_raw(job.z))
    for name, weight in sorted(vae.state_dict().items()):
        # A thin sample: hashing gigabytes would take longer than many a decode.
        digest.update(name.encode() + _raw(weight.detach().flatten()[:: max(weight.numel() // 256, 1)]))
    folder = scratch / f"decode-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
