"""Large latents through the upsampler piece by piece, in bounded memory.

Windows look a few positions around themselves, but the halvings see much further, so pieces cannot be made exact. They overlap instead,
and where they do their results are blended with weights that sum to one. A video that fits in one piece comes out as it would untiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch

from muralist.nn.latent_upsampler.model import LatentUpsampler
from muralist.tiling import Span, blend_weights, overlapping

Tile = tuple[int, int, int]


def pieces(shape: Sequence[int], tile: Tile, overlap: Tile) -> list[tuple[Span, ...]]:
    """For each axis of (F, h, w) the spans that cover it."""
    return [overlapping(size, side, min(shared, side - 1)) for size, side, shared in zip(shape, tile, overlap)]


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
    covers = pieces(shape, tile, overlap)
    scaled = [[_scaled(span, length, full) for span in spans] for spans, length, full in zip(covers, shape, target)]
    weights = [blend_weights(spans, full) for spans, full in zip(scaled, target)]
    result = z.new_zeros(1, z.shape[1], *target)
    every = list(product(*(range(len(spans)) for spans in covers)))
    for done, index in enumerate(every, start=1):
        source = tuple(slice(spans[i].start, spans[i].stop) for spans, i in zip(covers, index))
        place = [spans[i] for spans, i in zip(scaled, index)]
        made = network(z[:, :, *source], (len(place[1]), len(place[2])))
        t, y, x = (w[i].to(made) for w, i in zip(weights, index))
        result[:, :, *(slice(span.start, span.stop) for span in place)] += made * t[:, None, None] * y[:, None] * x
        on_piece(done, len(every))
    return result


def _scaled(span: Span, length: int, full: int) -> Span:
    return Span(round(span.start * full / length), round(span.stop * full / length))
