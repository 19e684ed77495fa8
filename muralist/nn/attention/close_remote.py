"""Two windows at once, without a parameter: tokens that lie together, and tokens that lie apart in a lattice (T3-Video, public code of 2026).

A grid is cut into n_t x n_y x n_x blocks. A token sees those of its block (close), and those whose index is the same as its own modulo n along
every axis (remote): as many tokens, spread over the whole video. The answer is the mean of both. The cut changes from block to block of the
transformer, so that after a few of them everything has met everything.

The released cuts are tables for two grids (`docs/import.md`); ours follow from the grid: single frames, then windows of about `tokens` tokens over all frames
(twice, square and wide), over a third and over a seventh of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from muralist.errors import UserError
from muralist.nn.kinds import require_whole
from muralist.nn.windows import Partition, Shape, choose_window, inverse_of, partition_evenly

WIDE = 5.0  # how much wider than high the windows of the third cut are, so that its borders are not the second's
MOST = 1 << 24  # tokens of a window
SHARES = (3, 7)  # parts of the frames


@dataclass(frozen=True, slots=True)
class CloseRemote:
    """Close and remote windows of about `tokens` tokens. `cuts`: numbers of blocks along time, height and width to cycle through; empty: those of the grid."""

    tokens: int = 2048
    cuts: tuple[Shape, ...] = ()

    def __post_init__(self) -> None:
        require_whole("attention.tokens", self.tokens, 8, MOST)
        if any(len(cut) != 3 for cut in self.cuts):
            raise UserError(f"cuts {self.cuts}", where="attention.cuts", fix="give three whole numbers for each")
        for number in itertools.chain(*self.cuts):
            require_whole("attention.cuts", number, 1, MOST)

    def require_fit(self, token_shape: Shape) -> None:
        """UserError for more blocks along an axis than there are tokens."""
        for cut in self.cuts:
            if any(count > side for count, side in zip(cut, token_shape)):
                what = f"{'x'.join(map(str, cut))} blocks of {'x'.join(map(str, token_shape))} tokens"
                raise UserError(what, where="attention.cuts", fix="use fewer blocks or a larger size")

    def counts(self, token_shape: Shape) -> tuple[Shape, ...]:
        """The cuts that blocks cycle through."""
        frames = token_shape[0]
        if self.cuts:
            return self.cuts
        wide = _counts(token_shape, self.tokens, frames, WIDE)
        parts = (_counts(token_shape, self.tokens, max(-(-frames // share), 1), 1.0) for share in SHARES)
        return ((frames, 1, 1), _counts(token_shape, self.tokens, frames, 1.0), wide, *parts)

    def partitions(self, token_shape: Shape) -> tuple[Partition, ...]:
        """Of the close windows; `remote` gives those of the others."""
        return tuple(partition_evenly(token_shape, cut) for cut in self.counts(token_shape))


def _counts(token_shape: Shape, tokens: int, frames: int, width: float) -> Shape:
    """How often each axis is cut for windows of `frames` frames, `width` times wider than high."""
    _, rows, columns = choose_window((1, *token_shape[1:]), max(tokens // frames, 1), aspect=(1.0, 1.0, width))
    return tuple(-(-length // side) for length, side in zip(token_shape, (frames, rows, columns)))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def remote(close: Partition) -> Partition:
    """The lattices that belong to a partition's windows: as many tokens each, those with equal remainders, on the CPU."""
    order = close.order
    _, rows, columns = close.token_shape
    apart = [_apart(length, len(pieces)) for length, pieces in zip(close.token_shape, close.axes)]
    order = (apart[0][order // (rows * columns)] * rows + apart[1][order // columns % rows]) * columns + apart[2][order % columns]
    return replace(close, order=order, inverse=inverse_of(order))


def _apart(length: int, count: int) -> torch.Tensor:
    """The indices of an axis, those of remainder 0 first: pieces of consecutive places become lattices."""
    return torch.cat([torch.arange(start, length, count, device="cpu") for start in range(count)])
