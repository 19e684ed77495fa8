"""Windows: which tokens attend to each other, and the order that makes every window a contiguous row.

A window is a block of neighbouring tokens in time, height and width. Tokens are put into *window-major* order once a forward
(all tokens of window 0, then of window 1, ...), so that attention inside windows is dense attention on a batch of windows: no
mask, no padding, no wrap-around, and every attention kernel works. Windows at the edge of the grid are smaller ("ragged");
windows of one shape are neighbours in the order and form one *group*, so a grid has at most 8 groups (27 when shifted).

Odd layers may use the partition shifted by half a window, so that information crosses window borders; going from one order to
the other is a single index permutation. An axis that one window covers is never shifted: it has no border to cross.
Borders that lie elsewhere at every denoising step (`traveled`) leave no lines in the picture.

This file is geometry on integers; `nn/attention/window.py` computes with it and `plan` counts keys with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise, product

import torch

from muralist.errors import UserError

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class WindowAttention:
    """Attention inside windows of `size` (frames, rows, columns of tokens, each >= 1).

    With `shift` odd layers use the partition shifted by half a window; without it every layer uses the same one, and windows
    never exchange information through self-attention. A side larger than the grid means the whole axis. `start`: where the first border lies
    along each axis, in tokens (0 and multiples of the side: at the grid's edge).

    Raises:
        UserError: a side is no positive whole number.
    """

    size: Shape
    shift: bool = True
    start: Shape = (0, 0, 0)

    def __post_init__(self) -> None:
        if len(self.size) != 3 or any(not isinstance(side, int) or side < 1 for side in self.size):
            raise UserError(f"window size {self.size}", where="attention.size", fix="give three whole numbers of at least 1: frames, rows, columns of tokens")

    def partitions(self, token_shape: Shape) -> tuple[Partition, ...]:
        """The partitions that layers cycle through: (even, odd), or a single one where they would be the same."""
        even, odd = (partition(token_shape, self.size, shifted=shifted, start=self.start) for shifted in (False, True))
        return (even, odd) if self.shift and even.axes != odd.axes else (even,)


@dataclass(frozen=True, slots=True)
class Run:
    """`num_windows` consecutive windows of one `shape`; `first` is the number of the first one in window-major order."""

    first: int
    num_windows: int
    shape: Shape

    @property
    def tokens_per_window(self) -> int:
        return math.prod(self.shape)

    @property
    def tokens(self) -> int:
        return self.num_windows * self.tokens_per_window


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole windows that are computed together: tokens `start` to `stop` of the window-major order, made of `runs`."""

    start: int
    stop: int
    runs: tuple[Run, ...] = ()

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """A token grid cut into windows.

    `axes` holds the lengths of the pieces along each axis; `groups` one run for each distinct window shape, in order.
    `order` [N] int64: the raster index (f, y, x row-major) of the token at each place of the window-major order; `inverse` [N] undoes it.
    `origins` [W, 3] int64: the first token (f, y, x) of each window, in order (what extra keys are aligned with).
    """

    token_shape: Shape
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    groups: tuple[Run, ...]
    order: torch.Tensor
    inverse: torch.Tensor
    origins: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return math.prod(self.token_shape)

    def to(self, device: torch.device | str) -> Partition:
        """The same partition with its indices on `device`."""
        order, inverse, origins = (index.to(device) for index in (self.order, self.inverse, self.origins))
        return replace(self, order=order, inverse=inverse, origins=origins)


def split_axis(length: int, side: int, *, shifted: bool = False, start: int = 0) -> tuple[int, ...]:
    """Lengths of the pieces, `side` long except at the edges, that cover an axis; the first ends at `start`, shifted: half a side further.

    >>> split_axis(10, 4), split_axis(10, 4, shifted=True), split_axis(10, 4, start=1), split_axis(3, 4, shifted=True)
    ((4, 4, 2), (2, 4, 4), (1, 4, 4, 1), (3,))
    """
    if side >= length:
        return (length,)
    first = (start + (side // 2 if shifted else 0)) % side
    cuts = sorted({0, length, *range(first, length, side)})
    return tuple(stop - start for start, stop in pairwise(cuts))


@lru_cache(maxsize=16)  # those of a few grids: a sampler asks for the same ones again, even where windows move from step to step
@torch.inference_mode(False)  # and training may ask for what a sampler has cached: autograd takes no inference tensors
def partition(token_shape: Shape, size: Shape, *, shifted: bool = False, start: Shape = (0, 0, 0)) -> Partition:
    """Cut the token grid (f, y, x) into windows of `size`, interior windows first, ragged ones after them. Indices are on the CPU."""
    return _cut(token_shape, tuple(split_axis(length, side, shifted=shifted, start=first) for length, side, first in zip(token_shape, size, start)))


@lru_cache(maxsize=32)  # windows, coarser ones and the whole, of even and of odd blocks, at four places
@torch.inference_mode(False)
def partition_evenly(token_shape: Shape, counts: Shape, place: int = 0, shifted: bool = False) -> Partition:
    """Cut the token grid (f, y, x) into `counts` windows along each axis, as `split_evenly` does. Indices are on the CPU."""
    return _cut(token_shape, tuple(split_evenly(length, count, place, shifted) for length, count in zip(token_shape, counts)))


def _cut(token_shape: Shape, axes: tuple[tuple[int, ...], ...]) -> Partition:
    groups, places, origins, first = [], [], [], 0
    for shape in sorted(product(*map(set, axes)), reverse=True):
        starts = [_starts(pieces, side) for pieces, side in zip(axes, shape)]
        group = Run(first, math.prod(map(len, starts)), shape)
        places.append(_raster(token_shape, starts, shape))
        origins.append(torch.cartesian_prod(*starts).view(-1, 3))
        groups.append(group)
        first += group.num_windows
    order = torch.cat(places)
    return Partition(token_shape, axes, tuple(groups), order, inverse_of(order), torch.cat(origins))


def split_evenly(length: int, count: int, place: int = 0, shifted: bool = False) -> tuple[int, ...]:
    """Lengths of `count` pieces that cover an axis, the longer ones first; as many as there are tokens, where that is fewer.

    `place`: which of `TRAVEL`'s pieces stand at; at all but the first they are as long as the longest, however many that makes, with shorter ones at the
    edges, and `shifted` ones stand half a side further: those of odd blocks, which may be as long as those of even ones, must cross their borders.
    In sides of four and more no border stands at three of the four places; one may at two, since those of the first are not all a side apart.

    >>> split_evenly(10, 4), split_evenly(3, 4), split_evenly(16, 2, place=1), split_evenly(16, 2, place=1, shifted=True)
    ((3, 3, 2, 2), (1, 1, 1), (2, 8, 6), (5, 8, 3))
    """
    count = min(count, length)
    side, longer = divmod(length, count)
    if place:
        longest = side + (longer > 0)
        start = _places(longest)[place]
        return split_axis(length, longest, start=_half_further(start, longest) if shifted else start)
    return (side + 1,) * longer + (side,) * (count - longer)


def _half_further(start: int, side: int) -> int:
    """Half a side further, but not at the grid's edge: there they stand at the first place."""
    return (start + side // 2) % side if side in SHORT else 1 + (start - 1 + (side - 1) // 2) % (side - 1)


def _starts(pieces: Sequence[int], side: int) -> torch.Tensor:
    """Where the pieces of length `side` begin."""
    starts = accumulate(pieces, initial=0)
    return torch.tensor([start for start, piece in zip(starts, pieces) if piece == side], device="cpu")


def _raster(token_shape: Shape, starts: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
    """Raster indices of all tokens of the windows of one shape: windows in raster order, tokens in raster order inside."""
    index = torch.zeros((1,) * 6, dtype=torch.int64, device="cpu")  # window t y x, then token t y x inside it
    strides = (token_shape[1] * token_shape[2], token_shape[2], 1)
    for axis, (start, side, stride) in enumerate(zip(starts, shape, strides)):
        index = index + _along(start * stride, axis) + _along(torch.arange(side, device="cpu") * stride, axis + 3)
    return index.flatten()


def _along(values: torch.Tensor, axis: int) -> torch.Tensor:
    """A vector laid along one of six axes."""
    return values.view([-1 if i == axis else 1 for i in range(6)])


def inverse_of(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes one."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device="cpu")
    return inverse


def switch(source: Partition, target: Partition) -> torch.Tensor:
    """[N] int64: `x[:, switch(a, b)]` is in the order of b where x is in the order of a."""
    return source.inverse[target.order]


def reorder(x: torch.Tensor, source: Partition, target: Partition) -> torch.Tensor:
    """x [B, N, ...] from the order of one partition to that of another of the same grid, on the same device."""
    return x if source.axes == target.axes else x.index_select(1, switch(source, target))


def chunks(groups: Sequence[Run], token_chunk: int | None) -> tuple[Chunk, ...]:
    """Whole windows gathered into chunks of at most `token_chunk` tokens, or of one window where that is larger; None: one chunk."""
    budget = token_chunk or sum(group.tokens for group in groups)
    done: list[Chunk] = []
    runs: list[Run] = []
    room = budget
    for group in groups:
        first, left = group.first, group.num_windows
        while left:
            take = min(left, room // group.tokens_per_window)
            if take == 0 and runs:
                done.append(_chunk(done, runs))
                runs, room = [], budget
                continue
            take = max(take, 1)
            runs.append(Run(first, take, group.shape))
            first, left, room = first + take, left - take, max(room - runs[-1].tokens, 0)
    return (*done, _chunk(done, runs))


def _chunk(done: Sequence[Chunk], runs: Sequence[Run]) -> Chunk:
    start = done[-1].stop if done else 0
    return Chunk(start, start + sum(run.tokens for run in runs), tuple(runs))


def spans(num_tokens: int, token_chunk: int | None) -> tuple[Chunk, ...]:
    """Plain chunks of `token_chunk` consecutive tokens, for work that treats every token alone; None: one chunk."""
    step = token_chunk or num_tokens
    return tuple(Chunk(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step))


def windows_of(token_shape: Shape, size: Shape, shift: bool = False, start: Shape = (0, 0, 0)) -> list[tuple[int, int]]:
    """(number of windows, tokens per window) for every window shape; a query of such a window has that many keys.

    `shift` asks for the partition of odd layers, `start` is that of `WindowAttention`. The products sum up to N; the squares times counts to the
    query-key pairs of a layer. Computed from the axes alone: no index is built, however large the grid.
    """
    axes = [split_axis(length, side, shifted=shift, start=first) for length, side, first in zip(token_shape, size, start)]
    shapes = sorted(product(*map(set, axes)), reverse=True)
    return [(math.prod(pieces.count(side) for pieces, side in zip(axes, shape)), math.prod(shape)) for shape in shapes]


TRAVEL = (0.0, 1 / 4, 1 / 8, 3 / 8)  # sides, at four steps in turn; odd layers stand half a side further, so all eighths are visited
SHORT = {1: (0, 0, 0, 0), 2: (0, 1, 0, 1), 3: (0, 1, 2, 1)}  # tokens, in a side that has not four places


def traveled(windows: WindowAttention, step: int) -> WindowAttention:
    """The windows of a denoising step: their borders lie where those of the last steps did not.

    A border that stays is drawn into the picture, since no step looks across it in the same layer. Moving windows between steps is SpotDiffusion's
    (arXiv 2407.15507, there at random); these places are ours, evenly spread whatever the number of steps.

    Places are parts of a side by `TRAVEL`, rounded to tokens; in a side below eight, those of a side of eight. So no two of four steps share a border in
    the same layers. A side of two or three has no four places: there no step shares one with the next.
    """
    return replace(windows, start=tuple(_places(side)[step % len(TRAVEL)] for side in windows.size))


def _places(side: int) -> tuple[int, ...]:
    """Where the first border lies at four steps in turn."""
    return SHORT.get(side) or tuple(round(part * max(side, 8)) for part in TRAVEL)


RAGGED_PENALTY = 0.8  # in units of |log(side / ideal)|: an axis is cut into unequal pieces only where even ones are twice off the mark
FILL_WEIGHT = 2.0  # falling short of the wanted number of tokens costs context, so more than a longish shape does


def choose_window(token_shape: Shape, target_tokens: int, *, aspect: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Shape:
    """Window sides with a product of at most `target_tokens`, in the proportions of `aspect`, dividing the grid where possible.

    The cost of a choice is the sum over axes of |log(side / ideal side)|, plus `RAGGED_PENALTY` for each axis that it does not
    divide, plus `FILL_WEIGHT` * log(target / product). Candidates are the sides that cut an axis into as equal pieces as can
    be: ceil(length / count); all divisors are among them.

    >>> choose_window((21, 135, 240), 1024), choose_window((8, 34, 60), 10**6)
    ((7, 9, 16), (8, 34, 60))

    Raises:
        UserError: `target_tokens` below 1.
    """
    if target_tokens < 1:
        raise UserError(f"{target_tokens} tokens per window", where="target_tokens", fix="ask for at least 1")
    ideal = _ideal_sides(token_shape, target_tokens, aspect)
    costs = [_side_costs(length, want) for length, want in zip(token_shape, ideal)]

    def cost(size: Shape) -> float:
        return sum(axis[side] for axis, side in zip(costs, size)) - FILL_WEIGHT * math.log(math.prod(size))

    return min((size for size in product(*costs) if math.prod(size) <= target_tokens), key=cost)


def _side_costs(length: int, ideal: float) -> dict[int, float]:
    """The cost of every side that is a candidate for an axis."""
    sides = sorted({math.ceil(length / count) for count in range(1, length + 1)})
    return {side: abs(math.log(side / ideal)) + RAGGED_PENALTY * (length % side > 0) for side in sides}


def _ideal_sides(token_shape: Shape, target_tokens: int, aspect: tuple[float, float, float]) -> tuple[float, ...]:
    """Real sides in the proportions of `aspect` with product min(target, N), none longer than its axis (water filling)."""
    sides = [float(length) for length in token_shape]
    free = {0, 1, 2}
    while free:
        taken = math.prod(sides[axis] for axis in range(3) if axis not in free)
        unit = (target_tokens / taken / math.prod(aspect[axis] for axis in free)) ** (1 / len(free))
        full = {axis for axis in free if unit * aspect[axis] >= token_shape[axis]}
        if not full:
            for axis in free:
                sides[axis] = max(unit * aspect[axis], 1.0)
            break
        free -= full
    return tuple(sides)
