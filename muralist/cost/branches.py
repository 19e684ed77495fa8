"""What compressed branches (`nn/branches.py`) add to a forward of Wan's transformer: query-key pairs, multiply-adds, live memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

from muralist.nn.attention import BranchedWindows
from muralist.nn.kinds import FREQUENCIES, BranchConfig, BranchesConfig
from muralist.nn.windows import Shape, split_evenly

RESTORING = {"separable": lambda d: 27 * d + d * d, "depthwise": lambda d: 27 * d, "dense": lambda d: 27 * d * d}  # multiply-adds a token


def window_pairs(token_shape: Shape, counts: Shape, place: int = 0, shifted: bool = False) -> int:
    """Query-key pairs in even windows, so many along each axis, that stand as `split_evenly` says."""
    return math.prod(sum(piece**2 for piece in split_evenly(side, count, place, shifted)) for side, count in zip(token_shape, counts))


def pooled_shape(config: BranchConfig, token_shape: Shape) -> Shape:
    """The pooled grid of a branch."""
    frames, rows, columns = token_shape
    return (frames, -(-rows // config.stride), -(-columns // config.stride))


def _at_work(attention: BranchedWindows, config: BranchesConfig | None, layers: int) -> Iterator[tuple[BranchConfig, bool]]:
    """Every branch of every block, and if it has one window more along each side."""
    for layer in range(layers):
        for name in attention.branches if layer not in attention.plain else ():
            branch = config.branches[name]
            yield branch, branch.alternate and attention.odd != "same" and layer % 2 == 1


def pairs(attention: BranchedWindows, config: BranchesConfig | None, token_shape: Shape, layers: int) -> int:
    """Query-key pairs among the pooled tokens of all blocks."""
    return sum(
        window_pairs(pooled_shape(branch, token_shape), (1, branch.windows + more, branch.windows + more), attention.place, more)
        for branch, more in _at_work(attention, config, layers)
    )


def pieces(attention: BranchedWindows, config: BranchesConfig | None, token_shape: Shape) -> Iterator[tuple[int, int]]:
    """(pooled tokens, keys of each) of every branch, whose windows are all computed at once."""
    for name in attention.branches:
        branch = config.branches[name]
        frames, rows, columns = pooled_shape(branch, token_shape)
        yield frames * rows * columns, frames * -(-rows // branch.windows) * -(-columns // branch.windows)


def multiply_adds(attention: BranchedWindows, config: BranchesConfig | None, token_shape: Shape, layers: int) -> int:
    """Of projections, low-rank changes, convolutions and fusion weights, all blocks together."""
    tokens, total = math.prod(token_shape), 0
    for branch, _ in _at_work(attention, config, layers):
        d, pooled = config.dim, math.prod(pooled_shape(branch, token_shape))
        projections = 3 * pooled * d * d if config.projecting == "each" else 0
        total += projections + 3 * pooled * 2 * d * config.rank + tokens * RESTORING[config.restoring](d) + (FREQUENCIES + 2 * d) * d
    return total


def live_bytes(attention: BranchedWindows, config: BranchesConfig | None, token_shape: Shape, width: int, itemsize: int, chunk: int) -> int:
    """The most that a block holds, with `chunk` bytes of temporaries where it works in chunks.

    While the last branch is restored: the residual stream, the windows' answer, the other branches, its pooled tokens, its enlarged picture and
    what two convolutions make of it, in two orders; while all are fused: all of them.
    """
    whole, count = math.prod(token_shape) * width * itemsize, len(attention.branches)
    pooled = sum(math.prod(pooled_shape(config.branches[name], token_shape)) for name in attention.branches) * width * itemsize
    working = chunk * 5 // 4 if config and config.projecting == "once" else chunk
    return max(whole * (5 + count) + pooled, whole * (2 + count) + working) if count else 0
