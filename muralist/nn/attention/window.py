"""Every token attends to the tokens of its window: dense attention on a batch of windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange

from muralist.nn.attention.backends import attention
from muralist.nn.windows import Run

ExtraKeys = Callable[[Run], tuple[torch.Tensor, torch.Tensor]]
"""Keys and values that the windows of a run see besides their own tokens: two tensors [B, windows, m, H, d]."""


def attend_windows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Sequence[Run], extra: ExtraKeys | None = None) -> torch.Tensor:
    """q, k, v [B, n, H, d] in window-major order, n the tokens of `runs` -> [B, n, H, d] in the same order.

    Windows of one shape fold into the batch: [B * windows, H, tokens, d], four dimensions. Runs of different shapes are computed
    one after the other. `extra` appends further keys to each window; queries stay the window's own.
    """
    batch, start, outputs = len(q), 0, []
    for run in runs:
        part = slice(start, start + run.tokens)
        queries, keys, values = (rearrange(x[:, part], "b (w n) h d -> b w n h d", w=run.num_windows) for x in (q, k, v))
        if extra is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip((keys, values), extra(run)))
        folded = (rearrange(x, "b w n h d -> (b w) h n d") for x in (queries, keys, values))
        outputs.append(rearrange(attention(*folded), "(b w) h n d -> b (w n) h d", b=batch))
        start = part.stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
