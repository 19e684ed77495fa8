"""What upsampling by networks costs: their own modules run on the meta device under a counter, so the numbers follow the code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from muralist.base_info import UPSAMPLER
from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, VrtConfig
from muralist.nn.latent_upsampler.tiles import Tile, pieces
from muralist.stages.upsample import LearnedUpsampling
from muralist.store import parts

FLOAT = 4
# Tensors of a block's width alive at once, over frames padded to whole windows: the skips, the block's input, its norm, queries, keys and values, the gated
# hidden layer (measured: 11)
LIVE = 12


@dataclass(frozen=True, slots=True)
class UpsamplingCost:
    """Pieces, FLOPs of all of them, and bytes alive in one of them."""

    pieces: int
    flops: int
    live_bytes: int


def measure(folder: Path, part: LearnedUpsampling, source: Tile, target: Tile) -> UpsamplingCost:
    """For latents of `source` (F, h, w) enlarged to `target` (F, H, W) by the part in `folder`."""
    config = LatentUpsamplerConfig.of(parts.read_part(folder, UPSAMPLER))
    spans = pieces(source, target, part.tile, part.overlap)
    frames, height, width = (len(axis[0]) for axis in spans)
    size = (round(height * target[1] / source[1]), round(width * target[2] / source[2]))
    count = math.prod(len(axis) for axis in spans)
    padded = math.ceil(frames / config.encoder.window[0]) * config.encoder.window[0] if frames > config.encoder.window[0] else frames
    inner, outer = padded * height * width, padded * math.prod(size)
    live = max(inner * _width(config.encoder), outer * max(_width(config.decoder), config.channels)) * LIVE * FLOAT
    return UpsamplingCost(count, _flops(config, (frames, height, width), size) * count, live)


@lru_cache(maxsize=64)
def _flops(config: LatentUpsamplerConfig, piece: Tile, size: tuple[int, int]) -> int:
    """Of one piece; a plan asks several times, for each level of memory."""
    with torch.device("meta"), torch.no_grad():
        network, z = LatentUpsampler(config), torch.empty(1, config.channels, *piece)
        with FlopCounterMode(display=False) as counter:
            network(z, size)
    return counter.get_total_flops()


def _width(network: VrtConfig | None) -> int:
    return max(network.dim, network.refine_dim) if network else 0
