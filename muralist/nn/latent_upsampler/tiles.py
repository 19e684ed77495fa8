"""Large latents through the upsampler's networks piece by piece, in bounded memory.

Its linear part is computed of the whole. Windows look a few positions around themselves, but the halvings see much further, so pieces cannot be made
exact. They overlap instead, and where they do their results are blended with weights that sum to one. Pieces begin and end where a source position's
border is a target position's too, if such places are near enough, so that the factor in each is that of the whole. A video that fits in one piece comes
out as it would untiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch

from muralist.nn.latent_upsampler.model import LatentUpsampler
from muralist.tiling import Span, blend_weights, overlapping

Tile = tuple[int, int, int]


def pieces(shape: Sequence[int], target: Sequence[int], tile: Tile, overlap: Tile) -> list[tuple[Span, ...]]:
    """For each axis of (F, h, w) the spans that cover it, on the way to `target` (F, H, W)."""
    return [_cover(*axis) for axis in zip(shape, target, tile, overlap)]


def _cover(length: int, full: int, tile: int, overlap: int) -> tuple[Span, ...]:
    unit = length // math.gcd(length, full)  # source positions from one common border to the next
    unit = unit if 2 * unit <= tile else 1
    side = tile // unit
    spans = overlapping(length // unit, side, min(math.ceil(overlap / unit), side - 1))
    return tuple(Span(span.start * unit, span.stop * unit) for span in spans)


@torch.no_grad()
def upsample_in_tiles(
    network: LatentUpsampler,
    z: torch.Tensor,
    size: tuple[int, int],
    tile: Tile,
    overlap: Tile,
    on_piece: Callable[[int, int], object] = lambda done, total: None,
) -> torch.Tensor:
    """z [1, C, F, h, w] -> [1, C, F, H, W] of `size` (H, W); `tile` and `overlap` are in source positions (frames, rows, columns).

    A piece's result stands where its source stands, to the nearest target position. `on_piece` is told (pieces done, all pieces).
    """
    shape = tuple(z.shape[2:])
    target = (shape[0], *size)
    covers, linear = pieces(shape, target, tile, overlap), network.linear(z, size)
    scaled = [[_scaled(span, length, full) for span in spans] for spans, length, full in zip(covers, shape, target)]
    weights = [blend_weights(spans, full) for spans, full in zip(scaled, target)]
    result = z.new_zeros(1, z.shape[1], *target)
    every = list(product(*(range(len(spans)) for spans in covers)))
    for done, index in enumerate(every, start=1):
        source = tuple(slice(spans[i].start, spans[i].stop) for spans, i in zip(covers, index))
        place = [spans[i] for spans, i in zip(scaled, index)]
        there = tuple(slice(span.start, span.stop) for span in place)
        made = network.detailed(z[:, :, *source], linear[:, :, *there])
        t, y, x = (w[i].to(made) for w, i in zip(weights, index))
        result[:, :, *there] += made * t[:, None, None] * y[:, None] * x
        on_piece(done, len(every))
    return result


@torch.no_grad()
def upsample_part(network: LatentUpsampler, z: torch.Tensor, spans: tuple[Span, Span], size: tuple[int, int]) -> tuple[torch.Tensor, tuple[Span, Span]]:
    """z [1, C, F, h, w] -> what the rows and columns of `spans` become on the way to `size` (H, W), as a piece of their own, and where it stands."""
    (y, x), linear = spans, network.linear(z, size)
    rows, columns = (_scaled(span, length, full) for span, length, full in zip(spans, z.shape[-2:], size))
    part = linear[..., rows.start : rows.stop, columns.start : columns.stop]
    return network.detailed(z[..., y.start : y.stop, x.start : x.stop], part), (rows, columns)


def _scaled(span: Span, length: int, full: int) -> Span:
    return Span(round(span.start * full / length), round(span.stop * full / length))
