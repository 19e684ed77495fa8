"""Which way a decode will go, and what that costs on a machine: joins `stages.decode` (order, memory, disk) with `cost.vae` (FLOPs).

The order and the tiles are chosen by the configuration alone, exactly as the pipeline chooses them (a resumed run must find the same
plan), so the machine decides only whether that fits and how long it takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from muralist.cost import vae
from muralist.cost.machine import Machine
from muralist.errors import UserError
from muralist.nn.empty import empty_vae
from muralist.stages.decode import GROUP, TILES, DecodeOptions, DecodePlan, TileMajor, TimeMajor, decode_bytes, plan_decode
from muralist.tiling import Box, tile_boxes
from muralist.types import Grid

DISK_BYTES_PER_S = 1e9  # of scratch files, written and read
NARROWEST = min(TILES)
ROOM_STEP = 1 << 28  # bytes; free memory is rounded down to it, so that its flicker does not change the plan
SMALL_TILE = 256  # pixels; below it the halo costs more than the tile, and what the whole frame needs stays
GOOD_TILE = 512  # pixels; at 4K its halo costs 6 % (Wan2.1) and 13 % (Wan2.2) over tiles of 1024, tiles of 128 cost 48 % and 117 %


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeNeed:
    """A decode plan and its cost; `memory_bytes` with weights. `streaming_bytes`: what the order without scratch files would take.

    `error`: no plan fits the configuration's own limit; the numbers are then those of the plan that comes closest.
    """

    plan: DecodePlan
    cost: vae.Cost
    memory_bytes: int
    disk_bytes: int
    seconds: float
    streaming_bytes: int
    tiles: int
    error: UserError | None

    @property
    def action(self) -> str:
        order = "frames stream out" if isinstance(self.plan, TimeMajor) else "tile after tile through the disk"
        tiles = f"{self.tiles} tiles of at most {self.plan.tile} pixels" if self.tiles > 1 else "whole frames"
        return f"{tiles}, {order}"


def settled(config: Mapping[str, Any], grid: Grid, dtype: str, options: DecodeOptions, room: int) -> DecodeOptions:
    """The options to run with: where the default limit holds only tiles that are almost all halo, tiles of `GOOD_TILE` and what they take.

    Options that someone has set stay as they are. The result depends on the machine only where `room` bytes do not hold that: the same request
    gives the same plan, hence the same frames, on every machine that is large enough. On a smaller one the decoder gets what room there is.
    """
    if options != DecodeOptions():
        return options
    model, good = empty_vae(config, getattr(torch, dtype)), TileMajor(tile=GOOD_TILE)
    peak = decode_bytes(model, _latent_shape(model, grid), good).peak
    if room < max(peak, options.memory_bytes):
        return replace(options, memory_bytes=max(room // ROOM_STEP * ROOM_STEP, ROOM_STEP))
    return options if peak <= options.memory_bytes else replace(options, order="tile", tile=GOOD_TILE, memory_bytes=peak)


def least_room(config: Mapping[str, Any], grid: Grid, dtype: str) -> int:
    """Bytes that hold the decode in small tiles, in steps of the options that are made of them."""
    model = empty_vae(config, getattr(torch, dtype))
    return -(-decode_bytes(model, _latent_shape(model, grid), TileMajor(tile=SMALL_TILE)).peak // ROOM_STEP) * ROOM_STEP


def decode_need(config: Mapping[str, Any], grid: Grid, crop: Grid, machine: Machine, options: DecodeOptions, *, group: int = GROUP) -> DecodeNeed:
    """The decode of the legal `grid`, cropped to `crop`; `group` as in `stages.decode.decode`: it decides how many states are kept."""
    return _need(json.dumps(dict(config), sort_keys=True), grid, crop, machine, options, group)


@lru_cache(maxsize=32)  # a plan asks for the same one several times
def _need(config_json: str, grid: Grid, crop: Grid, machine: Machine, options: DecodeOptions, group: int) -> DecodeNeed:
    config = json.loads(config_json)
    plan, error = _choose(config, grid, machine.dtype, options)
    model, quick = empty_vae(config, getattr(torch, machine.dtype)), machine.on_cpu and machine.dtype == "float32"
    decoder = vae.decoder(config, quick=quick, whole_blocks=getattr(plan, "whole_blocks", 0))
    shape = _latent_shape(model, grid)
    need, tiles = decode_bytes(model, shape, plan, group=group), _tiles(grid, crop, plan.tile, decoder.spatial_factor)
    cost = vae.decode(decoder, shape[1:], tiles)
    return DecodeNeed(
        plan=plan,
        cost=cost,
        memory_bytes=need.peak,
        disk_bytes=need.disk,
        seconds=machine.convolution_seconds(cost.flops, channels=_channels(config)) + need.traffic / DISK_BYTES_PER_S,
        streaming_bytes=need.peak if isinstance(plan, TimeMajor) else decode_bytes(model, shape, TimeMajor(tile=TILES[0])).peak,
        tiles=len(tiles),
        error=error,
    )


def _choose(config: dict[str, Any], grid: Grid, dtype: str, options: DecodeOptions) -> tuple[DecodePlan, UserError | None]:
    try:
        return plan_decode(config, grid, options, dtype=getattr(torch, dtype)), None
    except UserError as error:
        return TileMajor(tile=options.tile or NARROWEST), error


def _latent_shape(model: AutoencoderKLWan, grid: Grid) -> tuple[int, int, int, int]:
    """(C, F, h, w) of a legal grid."""
    space, time = model.config.scale_factor_spatial, model.config.scale_factor_temporal
    return model.config.z_dim, (grid.num_frames - 1) // time + 1, grid.height // space, grid.width // space


def _channels(config: Mapping[str, Any]) -> int:
    """Width of the decoder's last blocks."""
    return config.get("decoder_base_dim") or config.get("base_dim") or 96


def _tiles(grid: Grid, crop: Grid, tile: int, factor: int) -> list[Box]:
    """The boxes that `stages.decode` computes: those of the legal grid, less what is cropped."""
    boxes = (box.clip(crop.height, crop.width) for box in tile_boxes(grid.height, grid.width, max(tile, factor), factor))
    return [box for box in boxes if box.area]
