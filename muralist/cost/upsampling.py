"""What upsampling by networks costs: their own modules run on the meta device under a counter, so the numbers follow the code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, VrtConfig, polynomial
from muralist.nn.latent_upsampler.model import MULTIPLE
from muralist.nn.latent_upsampler.tiles import Tile, pieces
from muralist.nn.latent_upsampler.tmsa import SCORES
from muralist.stages.upsample import LearnedUpsampling

FLOAT = 4
# Tensors of a block's width alive at once, over positions padded to whole windows: the skips, the block's input, its norm, queries, keys and values, the
# gated hidden layer (measured: 9 to 12); and of scores where windows have masks
LIVE, SCORED = 13, 2
BETWEEN = 4  # values of the target's size between the two: what was made and is put together, the linear part, their sum
LATENTS = 5  # of the target's size: the linear part, the result, what waits, and as much again for what is made of them


@dataclass(frozen=True, slots=True)
class UpsamplingCost:
    """Pieces, FLOPs of all of them, and bytes alive in one of them, whole latents among them."""

    pieces: int
    flops: int
    live_bytes: int


def measure(config: LatentUpsamplerConfig, part: LearnedUpsampling, source: Tile, target: Tile) -> UpsamplingCost:
    """For latents of `source` (F, h, w) enlarged to `target` (F, H, W)."""
    spans = pieces(source, target, part.tile, part.overlap)
    frames, height, width = (len(axis[0]) for axis in spans)
    size = (round(height * target[1] / source[1]), round(width * target[2] / source[2]))
    count = math.prod(len(axis) for axis in spans)
    between = BETWEEN * frames * math.prod(size) * config.channels
    live = max(_alive(config.encoder, (frames, height, width)), _alive(config.decoder, (frames, *size)), between)
    if config.polynomials:  # before the pieces, of the whole, some frames at a time
        frame = polynomial.values(config.channels, source[1:], target[1:])
        live = max(live, frame, min(source[0] * frame, polynomial.VALUES))
    return UpsamplingCost(count, _flops(config, (frames, height, width), size) * count, (live + LATENTS * config.channels * math.prod(target)) * FLOAT)


@lru_cache(maxsize=64)
def _flops(config: LatentUpsamplerConfig, piece: Tile, size: tuple[int, int]) -> int:
    """Of one piece; a plan asks several times, for each level of memory."""
    with torch.device("meta"), torch.no_grad():
        network, z = LatentUpsampler(config), torch.empty(1, config.channels, *piece)
        with FlopCounterMode(display=False) as counter:
            network(z, size)
    return counter.get_total_flops()


def _alive(network: VrtConfig | None, piece: Tile) -> int:
    """Numbers alive at once in an encoder or a decoder, if there is one."""
    if network is None:
        return 0
    frames = math.ceil(piece[0] / network.window[0]) * network.window[0] if piece[0] > network.window[0] else piece[0]
    positions = frames * math.prod(math.ceil(side / MULTIPLE) * MULTIPLE for side in piece[1:])
    masked = max(network.depth, network.refine_depth) > 1  # of the first block of a group no window is shifted
    scores = masked * positions * network.heads * math.prod(network.window)
    return round(LIVE * positions * max(network.dim, network.refine_dim) + SCORED * min(scores, SCORES))
