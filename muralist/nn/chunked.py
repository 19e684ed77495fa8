"""Work on a sequence chunk by chunk, so that what is alive is the sequence and one chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from muralist.nn.windows import Chunk

Work = Callable[[torch.Tensor, Chunk], torch.Tensor]


def map_chunks(work: Work, x: torch.Tensor, parts: Sequence[Chunk], in_place: bool) -> torch.Tensor:
    """x with every chunk replaced by work(chunk), which has its shape."""
    if len(parts) == 1 or not in_place:
        return join_chunks(work, x, parts, in_place)
    for chunk in parts:
        x[:, chunk.span] = work(x[:, chunk.span], chunk)
    return x


def join_chunks(work: Work, x: torch.Tensor, parts: Sequence[Chunk], in_place: bool) -> torch.Tensor:
    """work(chunk) [B, n, ...] of all chunks, side by side: [B, N, ...]. Without gradients nothing exists twice."""
    if len(parts) == 1:
        return work(x, parts[0])
    results = (work(x[:, chunk.span], chunk) for chunk in parts)
    return _write(results, parts) if in_place else torch.cat(list(results), dim=1)


def _write(results: Iterator[torch.Tensor], parts: Sequence[Chunk]) -> torch.Tensor:
    joined = None
    for chunk, result in zip(parts, results):
        if joined is None:
            joined = result.new_empty(len(result), parts[-1].stop, *result.shape[2:])
        joined[:, chunk.span] = result
    return joined
