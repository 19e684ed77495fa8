"""What parts of a base say of themselves, apart from the networks: checking a folder must not import diffusers, which takes seconds."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muralist.errors import UserError

INJECTOR = "injector"  # kinds of part (`store/parts.py`)
STEP_SIZE = "step_size"
BRANCHES = "branches"
Gate = Literal["channel", "scalar", "none"]
FREQUENCIES = 256  # of the sinusoids of timesteps and step sizes
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
LARGEST = 1 << 14  # of the whole numbers in a part's configuration: what is larger is damage
Shape = tuple[int, ...]
Restoring = Literal["separable", "depthwise", "dense"]
Projecting = Literal["once", "each"]


def require_whole(where: str, value: object, least: int, most: int) -> None:
    """UserError unless the value is a whole number in this range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{str(value)!r:.40}", where=where, fix=f"a whole number from {least} to {most}")


def require_flags(where: str, **flags: object) -> None:
    """UserError unless the values are true or false."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{str(value)!r:.40}", where=f"{where}.{name}", fix="true or false")


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
        for name, value, least in (("channels", self.channels, 1), ("dim", self.dim, 4), *(("blocks", n, 0) for n in self.blocks)):
            require_whole(f"injector.{name}", value, least, LARGEST)
        require_flags("injector", refined=self.refined)
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise UserError(f"blocks {self.blocks}", where="injector", fix="name different blocks, from 0")

    @property
    def inner(self) -> int:
        """Channels between the two convolutions."""
        return self.dim // 4

    def tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the part."""
        c, d, inner = self.channels, self.dim, self.inner
        shapes: dict[str, Shape] = {"norm.weight": (d,), "norm.bias": (d,)}
        if self.refined:
            shapes |= {"features.0.weight": (inner, c, 1, 1, 1), "features.0.bias": (inner,), "features.1.weight": (inner,), "features.1.bias": (inner,)}
            shapes |= {"features.3.weight": (d, inner, 3, 3, 3), "features.3.bias": (d,)}
        else:
            shapes |= {"features.weight": (d, c, 1, 1, 1), "features.bias": (d,)}
        width = {"channel": d, "scalar": 1, "none": 0}[self.gate]
        for gate in ("gate_t", "gate_dt") if width else ():
            shapes |= {f"{gate}.0.weight": (d, FREQUENCIES), f"{gate}.0.bias": (d,), f"{gate}.2.weight": (width, d), f"{gate}.2.bias": (width,)}
        for block in self.blocks:
            shapes |= {f"out.{block}.weight": (d, d), f"out.{block}.bias": (d,)}
        return shapes

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
        require_whole("branch.stride", self.stride, 2, 64)
        require_whole("branch.windows", self.windows, 1, LARGEST)
        require_flags("branch", alternate=self.alternate, key_of_query=self.key_of_query)


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchesConfig:
    """The compressed branches of every block in `blocks`, in the order in which they are fused, for a base of width `dim`.

    `windows`: the number of local windows along a side, beside which they were trained. `rank`: of their low-rank changes to the projections
    of q, k and v, 0: none. `restoring`: what follows the bilinear enlargement, a 3 x 3 x 3 convolution for each channel and one across channels
    (separable), the first alone, or a dense one. `projecting`: pooled tokens are projected (each), or projected tokens pooled (once).
    `of_branch`: the fusion weight is that of the branch, else of what stands beside it. `travel`: windows stand elsewhere at every step of sampling,
    and did in training.
    """

    dim: int
    blocks: tuple[int, ...]
    branches: Mapping[str, BranchConfig]
    windows: int = 4
    rank: int = 64
    restoring: Restoring = "separable"
    projecting: Projecting = "each"
    of_branch: bool = True
    travel: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("restoring", self.restoring, Restoring), ("projecting", self.projecting, Projecting)):
            if value not in typing.get_args(known):
                raise UserError(f"{name} {value!r:.40}", where="branches", fix=f"use one of {', '.join(typing.get_args(known))}")
        for name, value, least in (("dim", self.dim, 1), ("rank", self.rank, 0), ("windows", self.windows, 1), *(("blocks", n, 0) for n in self.blocks)):
            require_whole(f"branches.{name}", value, least, LARGEST)
        require_flags("branches", of_branch=self.of_branch, travel=self.travel)
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise UserError(f"blocks {self.blocks}", where="branches", fix="name different blocks, from 0")
        if not self.branches or any(not re.fullmatch(r"[a-z_]+", name) for name in self.branches):
            raise UserError(f"branches {', '.join(map(repr, self.branches)) or 'none'}"[:80], where="branches", fix="name at least one, in small letters and _")
        if self.projecting == "once" and any(branch.key_of_query for branch in self.branches.values()):
            raise UserError("keys of the query's projection", where="branches", fix="project pooled tokens (each): projected ones have keys of their own")

    @property
    def pooled(self) -> int:
        """Tensors that a branch pools: the tokens, or the tokens and their q, k and v."""
        return {"each": 1, "once": 4}[self.projecting]

    def tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the part."""
        return {f"{block}.{name}.{tensor}": shape for block in self.blocks for name in self.branches for tensor, shape in self._of_branch(name).items()}

    def _of_branch(self, name: str) -> dict[str, Shape]:
        d, r = self.dim, self.rank
        shapes = {"pool_weight": (self.pooled, self.branches[name].stride ** 2, d), "pool_bias": (self.pooled, d)}
        for x in "qkv" if r else "":
            shapes |= {f"{x}.lora_A.weight": (r, d), f"{x}.lora_A.bias": (r,), f"{x}.lora_B.weight": (d, r), f"{x}.lora_B.bias": (d,)}
        shapes |= {"restoring.weight": (d, d if self.restoring == "dense" else 1, 3, 3, 3), "restoring.bias": (d,)}
        shapes |= {"across.weight": (d, d), "across.bias": (d,)} if self.restoring == "separable" else {}
        for layer, width in (("embedding.0", FREQUENCIES), ("embedding.2", d), ("projection", d)):
            shapes |= {f"fusion.{layer}.weight": (d, width), f"fusion.{layer}.bias": (d,)}
        return shapes

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> BranchesConfig:
        """Back from `dataclasses.asdict`, also after a trip through JSON. Raises UserError."""
        try:
            branches = {str(name): BranchConfig(**value) for name, value in record["branches"].items()}
            return cls(**{**record, "blocks": tuple(record["blocks"]), "branches": branches})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"the branches' configuration lacks or misnames {error}", where="part", fix="restore its config.json") from None


def hierarchical(dim: int, blocks: int, windows: int = 4, *, travel: bool = True, **rest: Any) -> BranchesConfig:
    """The two branches beside K x K local windows (Hu et al., arXiv 2510.18775, sections 4.2 and 4.3), for a base with so many blocks.

    `coarse`: half as many windows on half the tokens along a side; `whole`: one window on a K-th of them.

    Raises UserError for a K that has no half.
    """
    require_whole("windows", windows, 1, LARGEST)
    if windows % 2:
        raise UserError(f"K = {windows}", where="windows", fix="use an even number: half as many windows are needed too")
    branches = {"coarse": BranchConfig(stride=2, windows=windows // 2, alternate=True), "whole": BranchConfig(stride=windows)}
    return BranchesConfig(dim=dim, blocks=tuple(range(blocks)), branches=branches, windows=windows, travel=travel, **rest)
