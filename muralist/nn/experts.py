"""Frequency experts: low-rank branches beside a block's attention and beside its FFN that see one band of its tokens (LUVE, section 3.3).

    y = Attention(x) + up(LowPass(down(x)))         y = FFN(x) + up(HighPass(down(x)))

The paper writes LoRA(LowPass(x)). The filter works along the grid and `down` along the channels, so the two commute, and filtering `rank`
channels instead of the model's width costs a tenth or less. x is what the branch beside it sees: the normed and modulated tokens.

An expert works on its own interval of noise levels. All of a base's experts are one part (`store/parts.py`) of kind `experts`: their
configurations, and for block i and expert n the tensors `blocks.i.n.down.weight` and `blocks.i.n.up.weight`.
"""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from muralist.errors import UserError
from muralist.nn.filters import RadialFilter
from muralist.nn.windows import Partition, reorder

EXPERTS = "experts"  # the kind of part
SWITCH = 0.875  # sigma at which the published experts change places: the released runtime's timestep 875
Place = Literal["attention", "ffn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """An expert of every block: where it stands, the band that it sees (None: all of them, a plain low-rank branch), its rank and scale.

    `sigmas`: it works where sigmas[0] <= sigma < sigmas[1], and at sigma = 1 too where that is its upper end.
    """

    place: Place
    band: RadialFilter | None
    sigmas: tuple[float, float]
    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.place not in typing.get_args(Place):
            raise UserError(f"place {self.place!r}", where="expert", fix=f"use {' or '.join(typing.get_args(Place))}")
        if not 0 <= self.sigmas[0] < self.sigmas[1] <= 1:
            raise UserError(f"noise levels {self.sigmas}", where="expert", fix="give two numbers from 0 to 1, the lower one first")
        if self.rank < 1:
            raise UserError(f"rank {self.rank}", where="expert", fix="use at least 1, such as 16")

    def works_at(self, sigma: float) -> bool:
        low, high = self.sigmas
        return low <= sigma < high or sigma == high == 1


class FrequencyExpert(nn.Module):
    """`up` (zero at the start, so that a new expert changes nothing) after `down`, scaled by alpha / rank."""

    def __init__(self, dim: int, config: ExpertConfig):
        super().__init__()
        self.down = nn.Linear(dim, config.rank, bias=False)
        self.up = nn.Linear(config.rank, dim, bias=False)
        self.place, self.band, self.scale = config.place, config.band, config.alpha / config.rank
        nn.init.zeros_(self.up.weight)


def attach(blocks: Sequence[nn.Module], dim: int, experts: Mapping[str, ExpertConfig]) -> nn.ModuleList:
    """Give every block its experts, `block.experts[name]`; returns them alone, a list of one ModuleDict a block, to be trained and stored."""
    for block in blocks:
        block.experts = nn.ModuleDict({name: FrequencyExpert(dim, config) for name, config in experts.items()})
    return nn.ModuleList(block.experts for block in blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """What a part of kind `experts` says of itself: the base that it fits, by width and number of blocks, and its experts by name."""

    dim: int
    layers: int
    experts: Mapping[str, ExpertConfig]

    def __post_init__(self) -> None:
        for (name, a), (other, b) in itertools.combinations(self.experts.items(), 2):
            if a.place == b.place and a.sigmas[0] < b.sigmas[1] and b.sigmas[0] < a.sigmas[1]:
                raise UserError(f"the experts {name} and {other} work at one place and noise level", where="expert", fix="part their intervals")
        if bad := [name for name in self.experts if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
            raise UserError(f"an expert named {bad[0]!r:.40}", where="expert", fix="use letters, digits, - and _")

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ExpertsConfig:
        """The inverse of `record`. Raises UserError."""
        try:
            experts = {name: _expert(value) for name, value in record["experts"].items()}
            return cls(dim=int(record["dim"]), layers=int(record["layers"]), experts=experts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the experts' configuration lacks or misnames {error}", where="part", fix="restore its config.json") from None

    def require_fit(self, dim: int, layers: int) -> None:
        """Raises UserError if these are experts for another base."""
        if (self.dim, self.layers) != (dim, layers):
            mine, other = f"{self.layers} blocks of width {self.dim}", f"{layers} of width {dim}"
            raise UserError(f"the experts are for {mine}, this base has {other}", where="part", fix="use experts that were trained for this base")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the part."""
        shapes = {}
        for layer in range(self.layers):
            for name, expert in self.experts.items():
                shapes[f"blocks.{layer}.{name}.down.weight"] = (expert.rank, self.dim)
                shapes[f"blocks.{layer}.{name}.up.weight"] = (self.dim, expert.rank)
        return shapes


def _expert(value: Mapping[str, Any]) -> ExpertConfig:
    low, high = (float(sigma) for sigma in value["sigmas"])
    band = None if value["band"] is None else RadialFilter(**value["band"])
    return ExpertConfig(**{**value, "sigmas": (low, high), "band": band})


@dataclass(slots=True)
class Branch:
    """An expert at work in one forward of one block: chunks go in while the layer beside it runs, the update comes out after it.

    `partition` says in which order the tokens come; the filter sees them in raster order.
    """

    expert: FrequencyExpert
    partition: Partition
    raster: Partition
    parts: list[torch.Tensor] = field(default_factory=list)

    def see(self, normed: torch.Tensor) -> None:
        """The next chunk [B, n, D] of the tokens, in order."""
        self.parts.append(self.expert.down(normed))

    def filtered(self) -> torch.Tensor:
        """[B, N, rank] in the partition's order, once all chunks have been seen."""
        x = torch.cat(self.parts, dim=1)
        if self.expert.band is None:
            return x
        x = reorder(x, self.partition, self.raster)
        return reorder(self.expert.band(x, self.partition.token_shape), self.raster, self.partition)

    def update(self, filtered: torch.Tensor) -> torch.Tensor:
        """[B, n, rank] -> [B, n, D]"""
        return self.expert.up(filtered) * self.expert.scale
