"""Which frames and which patches of a video are looked at: evenly spread, the same ones every time, boundedly many."""

from __future__ import annotations

import torch

from muralist.tiling import Box, Span


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the indices 0 ... total - 1, evenly spread, the first and the last among them; the middle one alone."""
    if count >= total:
        return list(range(total))
    return [total // 2] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


def patch_boxes(height: int, width: int, side: int, at_most: int, turn: int = 0) -> list[Box]:
    """Disjoint square patches of a centred grid; where there are more than `at_most`, evenly spread ones, others at every `turn`."""
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    total = rows * columns
    chosen = range(total) if total <= at_most else sorted((i * total // at_most + turn) % total for i in range(at_most))
    return [_square(top + i // columns * side, left + i % columns * side, side) for i in chosen]


def _square(top: int, left: int, side: int) -> Box:
    return Box(Span(top, top + side), Span(left, left + side))


def cut(frame: torch.Tensor, boxes: list[Box]) -> torch.Tensor:
    """[n, 3, side, side] of a frame [H, W, 3]."""
    return torch.stack([frame[b.y.start : b.y.stop, b.x.start : b.x.stop].permute(2, 0, 1) for b in boxes])
