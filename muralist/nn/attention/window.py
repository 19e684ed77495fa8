"""Every token attends to the tokens of its window: dense attention on a batch of windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange

from muralist.nn.attention.backends import attention
from muralist.nn.windows import Run

ExtraKeys = Callable[[Run], tuple[torch.Tensor, torch.Tensor]]
"""Keys and values that the windows of a run see besides their own tokens: two tensors [B, windows, m, H, d]."""
AT_A_TIME = {"cpu": 8192}  # tokens; 4,096 to 8,192 are 15 to 20 % faster there than 32,768


def attend_windows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Sequence[Run], extra: ExtraKeys | None = None) -> torch.Tensor:
    """q, k, v [B, n, H, d] in window-major order, n the tokens of `runs` -> [B, n, H, d] in the same order.

    Windows of one shape fold into the batch: [B * windows, H, tokens, d], four dimensions. Runs of different shapes are computed
    one after the other. `extra` appends further keys to each window; queries stay the window's own.
    """
    start, outputs = 0, []
    for run in runs:
        part = slice(start, start + run.tokens)
        queries, keys, values = (rearrange(x[:, part], "b (w n) h d -> b w n h d", w=run.num_windows) for x in (q, k, v))
        if extra is None:
            outputs.append(_attend(queries, keys, values))
        else:
            outputs += _with_extra(queries, keys, values, *extra(run))
        start = part.stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _with_extra(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more_keys: torch.Tensor, more_values: torch.Tensor) -> list[torch.Tensor]:
    """A few windows at a time where that is faster: their keys are copied beside the further ones, and read while they are in the cache."""
    windows, tokens = q.shape[1:3]
    if more_keys.shape[1] != windows:
        raise ValueError(f"further keys of {more_keys.shape[1]} windows for {windows}")
    size = max(AT_A_TIME.get(q.device.type, windows * tokens) // tokens, 1)
    parts = (slice(first, first + size) for first in range(0, windows, size))
    return [_attend(q[:, w], torch.cat((k[:, w], more_keys[:, w]), dim=2), torch.cat((v[:, w], more_values[:, w]), dim=2)) for w in parts]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Queries [B, w, n, H, d] against the keys of their window, [B, w, m, H, d] -> [B, w n, H, d]."""
    folded = (rearrange(x, "b w n h d -> (b w) h n d") for x in (q, k, v))
    return rearrange(attention(*folded), "(b w) h n d -> b (w n) h d", b=len(q))
