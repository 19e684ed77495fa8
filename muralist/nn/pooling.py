"""Tokens summed into cells, in the same order every time."""

from __future__ import annotations

import torch


def added(total: torch.Tensor, cells: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`total` [B, cells, D] with each of `tokens` [B, n, D] added to its cell of `cells` [n]; in place where nothing is differentiated.

    `index_add` on a GPU adds in whatever order its threads come, and a resumed run would end in other bits; `index_put` sorts first.
    """
    if total.device.type == "cuda":
        return _sorted(total, cells, tokens)
    return (total.index_add if torch.is_grad_enabled() else total.index_add_)(1, cells, tokens)


def _sorted(total: torch.Tensor, cells: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    turned, values = total.transpose(0, 1), tokens.transpose(0, 1)
    put = turned.index_put if torch.is_grad_enabled() else turned.index_put_
    return put((cells,), values, accumulate=True).transpose(0, 1)
