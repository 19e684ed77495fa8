"""What every estimate of a plan reads, and what it says of a stage."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from muralist.base_info import BaseInfo
from muralist.config import Request
from muralist.cost import transformer
from muralist.cost.machine import Machine
from muralist.nn import fp8
from muralist.types import Grid

FLOAT = 4  # bytes of a stored latent's number
# The interpreter with PyTorch, diffusers and transformers imported: 469 MB resident (CPU build, measured). On a GPU the driver's context takes its place.
PROCESS_BYTES = 500 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage: its work in words, its size, its cost, and what will be done about it.

    `tokens`: of one forward, 0 where there are none; `keys_per_query`: mean over queries and layers; `flops`: of
    the whole stage, of which `attention_flops` in self-attention; `attention_saving`: how many times fewer those are than with attention
    over all tokens; `memory_bytes`: peak where the models compute, `host_bytes`: of weights that wait in main memory beside it; `disk_bytes`: peak
    of its own files.
    """

    stage: str
    work: str
    tokens: int = 0
    keys_per_query: float = 0.0
    flops: int = 0
    attention_flops: int = 0
    attention_saving: float = 1.0
    memory_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0
    action: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every estimate reads: the request, its base, the machine, and the legal grid that is computed on.

    `streamed`: blocks come to the device one after another from main memory (`nn/streaming.py`).
    """

    request: Request
    info: BaseInfo
    machine: Machine
    streamed: bool = False

    @property
    def grid(self) -> Grid:
        return self.info.geometry.legal(self.request.grid)

    @property
    def linears(self) -> Literal["plain", "fp8"]:
        """How linear layers in the transformer's blocks will multiply: as asked, where the machine and the base's width allow it."""
        asked = self.request.config.kernels.linears
        return asked if self.machine.fp8 and fp8.fits(self.dimensions.width) else "plain"

    @property
    def dimensions(self) -> transformer.Dimensions:
        return transformer.Dimensions.of(self.info.transformer_config)

    def latent_bytes(self, grid: Grid) -> int:
        """A latent video of the legal grid in float32."""
        return FLOAT * math.prod(self.info.geometry.latent_shape(grid))

    @property
    def proxy_grid(self) -> Grid:
        """The legal grid of the proxy, where the request has one."""
        return self.request.config.proxy.grid(self.request.grid, self.info.geometry)


def size_text(grid: Grid) -> str:
    """A grid for people."""
    return f"{grid.width}x{grid.height} x{grid.num_frames}"
