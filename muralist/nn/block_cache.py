"""First-block cache: where the first block does nearly what it did lately, the others are not computed; what they added lately is added again.

The method is First Block Cache (ParaAttention by chengzeyi; diffusers has it as `FirstBlockCacheConfig`), its measure the relative L1 change of
TeaCache (arXiv 2411.19108, which takes it of the modulated input): with r = out - in of the first block and r' the same at the last step that was
computed in full, a step is skipped where mean |r - r'| < threshold * mean |r'|. diffusers' hooks compare a block's output with its input, which
ours overwrites; so the loop over the blocks asks itself.

- The conditional pass decides for its step and the unconditional pass follows, each with what it kept itself. A pass that has kept nothing, or
  kept it of another network or graft (the second of two transformers, other experts at work, other chunks), is computed in full.
- A full step of the conditional pass starts everything anew. So what stands after it depends on nothing before it, and a run that goes on from the
  latent with which such a step begins is bit for bit the one that was never stopped: `whole` is what whoever saves latents must ask.
- Memory: one [B, N, D] for each pass; for the comparison every 17th token (a prime: not the same columns of every row) of r' and of what enters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # imports this file
    from muralist.nn.transformer import Graft

STRIDE = 17


class FirstBlockCache:
    """The cache of one run of steps, with the two passes that a step may take. `whole`: the last step computed all blocks in every pass."""

    def __init__(self, threshold: float):
        self.threshold, self.whole = threshold, True
        self.conditional, self.unconditional = Pass(self._leads), Pass(self._follows)
        self._residual: torch.Tensor | None = None

    def _leads(self, residual: torch.Tensor, kept: bool) -> bool:
        self.whole = not (kept and relative_change(residual, self._residual) < self.threshold)
        if self.whole:
            self._residual = residual
            self.unconditional.forget()
        return not self.whole

    def _follows(self, residual: torch.Tensor, kept: bool) -> bool:
        return kept and not self.whole


class Pass:
    """The forwards of one prompt, a step each: `begin`, the first block, `skips`; if that is false, the other blocks and `keep`.

    Tokens [B, N, D] stand in the same order in all three, and carry no gradients: `skips` writes into them.
    `decide`: (every 17th token [B, n, D] of the first block's residual, whether something is kept to be added) -> whether to skip.
    """

    def __init__(self, decide: Callable[[torch.Tensor, bool], bool]):
        self._decide = decide
        self.forget()

    def forget(self) -> None:
        """Give the kept residual back: the next forward is a full one."""
        self._rest = self._first = self._entered = self._made_by = None

    def begin(self, tokens: torch.Tensor, network: torch.nn.Module, graft: Graft) -> None:
        """Tokens as they come to the first block, and to what is injected before it."""
        made_by = weakref.ref(network), graft  # weak: a network that was let go must not stay for a comparison
        if self._made_by != made_by:
            self.forget()
        self._made_by, self._entered = made_by, tokens[:, ::STRIDE].clone()

    def skips(self, tokens: torch.Tensor) -> bool:
        """Tokens after the first block; if True, what the others would have added is in them."""
        residual, self._entered = tokens[:, ::STRIDE] - self._entered, None
        if self._decide(residual, self._rest is not None):
            tokens.add_(self._rest)
            return True
        self._rest = None  # before its successor is made, and not there for whoever tries again where this forward fails
        self._first = tokens.clone()
        return False

    def keep(self, tokens: torch.Tensor) -> None:
        """Tokens after the last block."""
        self._rest, self._first = torch.sub(tokens, self._first, out=self._first), None


def relative_change(residual: torch.Tensor, before: torch.Tensor) -> float:
    """mean |r - r'| / mean |r'|, not a number where both are zero."""
    mean = [x.abs().mean(dtype=torch.float32) for x in (residual - before, before)]
    return (mean[0] / mean[1]).item()
