"""What parts of a base say of themselves, apart from the networks: checking a folder must not import diffusers, which takes seconds."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muralist.errors import UserError

INJECTOR = "injector"  # kinds of part (`store/parts.py`)
STEP_SIZE = "step_size"
BRANCHES = "branches"
Gate = Literal["channel", "scalar", "none"]
Restoring = Literal["separable", "depthwise", "dense"]
Projecting = Literal["once", "each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectorConfig:
    """Latent channels, the base's width, the blocks before which the anchor is added, and how it is gated.

    `gate` none: alpha is 0. `refined` False: the anchor is only projected to the width (element-wise addition, an ablation).
    """

    channels: int
    dim: int
    blocks: tuple[int, ...] = (1,)
    gate: Gate = "channel"
    refined: bool = True

    def __post_init__(self) -> None:
        if self.gate not in typing.get_args(Gate):
            raise UserError(f"gate {self.gate!r}", where="injector", fix=f"use one of {', '.join(typing.get_args(Gate))}")
        if not self.blocks or min(self.blocks) < 0 or len(set(self.blocks)) != len(self.blocks):
            raise UserError(f"blocks {self.blocks}", where="injector", fix="name different blocks, from 0")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> InjectorConfig:
        """Back from `dataclasses.asdict`, also after a trip through JSON. Raises UserError."""
        try:
            return cls(**{**record, "blocks": tuple(record["blocks"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"the injector's configuration lacks or misnames {error}", where="part", fix="restore its config.json") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchConfig:
    """Attention among tokens that are pooled over `stride` x `stride` blocks of a frame, in `windows` x `windows` windows of all frames.

    `alternate`: odd blocks have one window more along each side. `key_of_query`: keys come from the query's projection (one release was
    trained so).
    """

    stride: int
    windows: int = 1
    alternate: bool = False
    key_of_query: bool = False

    def __post_init__(self) -> None:
        if self.stride < 2 or self.windows < 1:
            raise UserError(f"stride {self.stride}, {self.windows} windows", where="branch", fix="use a stride of at least 2 and at least one window")


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchesConfig:
    """The compressed branches of every block in `blocks`, in the order in which they are fused, for a base of width `dim`.

    `windows`: the number of local windows along a side, beside which they were trained. `rank`: of their low-rank changes to the projections
    of q, k and v. `restoring`: what follows the bilinear enlargement, a 3 x 3 x 3 convolution for each channel and one across channels
    (separable), the first alone, or a dense one. `projecting`: pooled tokens are projected (each), or projected tokens pooled (once).
    `of_branch`: the fusion weight is that of the branch, else of what stands beside it.
    """

    dim: int
    blocks: tuple[int, ...]
    branches: Mapping[str, BranchConfig]
    windows: int = 4
    rank: int = 64
    restoring: Restoring = "separable"
    projecting: Projecting = "each"
    of_branch: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("restoring", self.restoring, Restoring), ("projecting", self.projecting, Projecting)):
            if value not in typing.get_args(known):
                raise UserError(f"{name} {value!r:.40}", where="branches", fix=f"use one of {', '.join(typing.get_args(known))}")
        if not self.blocks or min(self.blocks) < 0 or len(set(self.blocks)) != len(self.blocks):
            raise UserError(f"blocks {self.blocks}", where="branches", fix="name different blocks, from 0")
        if self.projecting == "once" and any(branch.key_of_query for branch in self.branches.values()):
            raise UserError("keys of the query's projection", where="branches", fix="project pooled tokens (each): projected ones have keys of their own")
        if self.rank < 1 or not self.branches:
            raise UserError(f"{len(self.branches)} branches of rank {self.rank}", where="branches", fix="use at least one, of rank 1 and more")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> BranchesConfig:
        """Back from `dataclasses.asdict`, also after a trip through JSON. Raises UserError."""
        try:
            branches = {str(name): BranchConfig(**value) for name, value in record["branches"].items()}
            return cls(**{**record, "blocks": tuple(record["blocks"]), "branches": branches})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the branches' configuration lacks or misnames {error}", where="part", fix="restore its config.json") from None


def hierarchical(dim: int, blocks: int, windows: int = 4, **rest: Any) -> BranchesConfig:
    """The two branches beside K x K local windows (Hu et al., arXiv 2510.18775, sections 4.2 and 4.3), for a base with so many blocks.

    `coarse`: half as many windows on half the tokens along a side; `whole`: one window on a K-th of them.

    Raises UserError for a K that has no half.
    """
    if windows < 2 or windows % 2:
        raise UserError(f"K = {windows}", where="windows", fix="use an even number: half as many windows are needed too")
    branches = {"coarse": BranchConfig(stride=2, windows=windows // 2, alternate=True), "whole": BranchConfig(stride=windows)}
    return BranchesConfig(dim=dim, blocks=tuple(range(blocks)), branches=branches, windows=windows, **rest)
