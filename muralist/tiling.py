"""Tiles of a line and of a frame: exact tiles with halos, and overlapping tiles whose weights sum to one.

Two ways to cut a frame serve two needs. *Exact* tiles partition the frame; each is computed from a larger box (its halo holds the receptive
field), so the pieces equal the untiled result and no blending is needed: this is how the decoder tiles. *Overlapping* tiles are for operators
that see everything inside a tile (attention, training crops): their results differ, so they are mixed with weights that sum to one at every
position. Everything here is integers and small weight vectors; positions are whatever unit the caller counts in (pixels, latents, tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The half-open interval [start, stop) of a line."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def grow(self, before: int, after: int | None = None) -> Span:
        """Wider by `before` at the front and `after` (the same by default) at the back; may leave the line."""
        return Span(self.start - before, self.stop + (before if after is None else after))

    def clip(self, size: int) -> Span:
        """The part inside [0, size); empty spans keep length zero."""
        start = min(max(self.start, 0), size)
        return Span(start, max(min(self.stop, size), start))

    def meet(self, other: Span) -> Span:
        """The common part; of length zero when the two are apart."""
        start = max(self.start, other.start)
        return Span(start, max(min(self.stop, other.stop), start))

    def shift(self, by: int) -> Span:
        return Span(self.start + by, self.stop + by)

    def times(self, factor: int) -> Span:
        """The same interval counted on a `factor` times finer line."""
        return Span(self.start * factor, self.stop * factor)

    def over(self, factor: int) -> Span:
        """The smallest interval of a `factor` times coarser line that covers this one."""
        return Span(self.start // factor, -(-self.stop // factor))

    def inside(self, outer: Span) -> slice:
        """The slice that cuts this span out of an array that holds `outer`.

        Raises:
            ValueError: `outer` does not hold this span.
        """
        if self.start < outer.start or self.stop > outer.stop:
            raise ValueError(f"{self} is not inside {outer}")
        return slice(self.start - outer.start, self.stop - outer.start)


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A rectangle of a frame: rows `y`, columns `x`."""

    y: Span
    x: Span

    @classmethod
    def whole(cls, height: int, width: int) -> Box:
        return cls(Span(0, height), Span(0, width))

    @property
    def area(self) -> int:
        return len(self.y) * len(self.x)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.y), len(self.x)

    def grow(self, by: int) -> Box:
        return Box(self.y.grow(by), self.x.grow(by))

    def clip(self, height: int, width: int) -> Box:
        return Box(self.y.clip(height), self.x.clip(width))

    def meet(self, other: Box) -> Box:
        return Box(self.y.meet(other.y), self.x.meet(other.x))

    def times(self, factor: int) -> Box:
        return Box(self.y.times(factor), self.x.times(factor))

    def over(self, factor: int) -> Box:
        return Box(self.y.over(factor), self.x.over(factor))

    def inside(self, outer: Box) -> tuple[slice, slice]:
        return self.y.inside(outer.y), self.x.inside(outer.x)


def split(size: int, tile: int, multiple: int = 1) -> tuple[Span, ...]:
    """Cut [0, size) into the fewest spans of at most `tile`, nearly equal, with inner borders on multiples of `multiple`.

    Equal spans beat full spans plus a remainder: a thin last tile would be almost all halo.

    Raises:
        ValueError: `tile` is smaller than `multiple`, or an argument is not positive.
    """
    if min(size, tile, multiple) < 1 or tile < multiple:
        raise ValueError(f"cannot split {size} into tiles of {tile} on multiples of {multiple}")
    units, per_tile = math.ceil(size / multiple), tile // multiple
    count = math.ceil(units / per_tile)
    borders = [min(units * i // count * multiple, size) for i in range(count + 1)]
    borders[-1] = size
    return tuple(Span(a, b) for a, b in pairwise(borders))


def tile_boxes(height: int, width: int, tile: int, multiple: int = 1) -> tuple[Box, ...]:
    """Disjoint boxes that cover a frame, row by row; see `split`."""
    columns = split(width, tile, multiple)
    return tuple(Box(y, x) for y in split(height, tile, multiple) for x in columns)


def latent_boxes(height: int, width: int, tile: int, factor: int) -> tuple[Box, ...]:
    """Disjoint boxes of latents, `factor` pixels wide, that cover a frame of [height, width] of them in tiles of at most `tile` pixels."""
    return tile_boxes(height, width, max(tile // factor, 1))


def kinds(tiles: Iterable[Box], size: tuple[int, int], reach: int, unit: int = 1) -> dict[Box, int]:
    """One of each kind of the boxes `tiles` of a frame of `size` [H, W], and how many there are: a 16K frame has thousands, of nine kinds.

    Alike are boxes of equal sides, equally far from each border as far as their halo reaches: `reach`, in positions of which `unit` make one of those
    that halos are counted in, so that borders inside such a unit matter too.
    """
    (height, width), found = size, {}
    for tile in tiles:
        gaps = (tile.y.start, height - tile.y.stop, tile.x.start, width - tile.x.stop)
        found.setdefault((*tile.shape, *(min(gap, reach + gap % unit) for gap in gaps)), []).append(tile)
    return {same[0]: len(same) for same in found.values()}


def overlapping(size: int, tile: int, overlap: int) -> tuple[Span, ...]:
    """The fewest spans of length min(tile, size) that cover [0, size), neighbours sharing at least `overlap` positions.

    Raises:
        ValueError: not 0 <= overlap < tile, or `size` is not positive.
    """
    if size < 1 or not 0 <= overlap < tile:
        raise ValueError(f"cannot cover {size} with tiles of {tile} that overlap by {overlap}")
    if size <= tile:
        return (Span(0, size),)
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [(size - tile) * i // (count - 1) for i in range(count)]
    return tuple(Span(start, start + tile) for start in starts)


def blend_weights(spans: Sequence[Span], size: int) -> tuple[torch.Tensor, ...]:
    """One weight vector a span, positive, that sum to one at every position of [0, size).

    Each is a trapezoid whose ramps are as long as the overlap with the neighbour, divided by the sum of all: the division makes the sum one
    by construction for any cover, ragged or not. In two dimensions the outer products of row and column weights sum to one as well.

    Raises:
        ValueError: the spans leave a position uncovered or reach outside.
    """
    total = torch.zeros(size, dtype=torch.float64)
    ramps = [_trapezoid(spans, i) for i in range(len(spans))]
    for span, ramp in zip(spans, ramps):
        if span.start < 0 or span.stop > size:
            raise ValueError(f"{span} reaches outside [0, {size})")
        total[span.start : span.stop] += ramp
    if not bool((total > 0).all()):
        raise ValueError(f"the spans leave a gap at position {int((total == 0).nonzero()[0])}")
    return tuple((ramp / total[span.start : span.stop]).float() for span, ramp in zip(spans, ramps))


def _trapezoid(spans: Sequence[Span], index: int) -> torch.Tensor:
    """Rises over the overlap with the span before, falls over the overlap with the one after, is one between; never zero."""
    span = spans[index]
    before = len(span.meet(spans[index - 1])) if index else 0
    after = len(span.meet(spans[index + 1])) if index + 1 < len(spans) else 0
    position = torch.arange(len(span), dtype=torch.float64)
    rise = (position + 1) / (before + 1)
    fall = (len(span) - position) / (after + 1)
    return torch.minimum(rise, fall).clamp(max=1.0)
