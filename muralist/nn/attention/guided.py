"""Windows that also see the whole scene from afar: the keys of a coarse video of it, those that lie around the window.

A query of the fine video sees the tokens of its window and `Near.count` tokens of the coarse one; the coarse one's own queries see the
coarse tokens alone, so it is computed before and apart (`ProxyMemory`). Both stand on one set of axes, those of the fine tokens: coarse row j
of l rows over L fine ones at (j + 1/2) L / l - 1/2, columns alike, coarse latent frame f at `time_scale` f. A base has seen relative
positions up to its own size and no further, while at 8K two coarse neighbours stand 17 fine tokens apart: places beyond `Near.reach` from
the middle of the window are drawn in to it. Near tokens are where they are, far ones at the edge of what is known.

The paper (AtlasVid) says that guidance is aligned, and that attention is asymmetric; counts, reach and places are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from muralist.errors import UserError
from muralist.nn.attention.window import ExtraKeys
from muralist.nn.kinds import LARGEST
from muralist.nn.pooling import added
from muralist.nn.rope import axis_dims, frequencies, rotate
from muralist.nn.windows import Partition, Run, Shape, WindowAttention

Axes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Near:
    """How much of a coarse video a window sees: `count` tokens along time, height and width, those around its middle.

    `reach`: how far from the window's middle, in fine tokens, their places may be.
    """

    count: Shape = (4, 4, 4)
    reach: tuple[float, float, float] = (16.0, 16.0, 24.0)

    def __post_init__(self) -> None:
        if len(self.count) != 3 or not all(isinstance(side, int) and 1 <= side <= LARGEST for side in self.count):
            raise UserError(f"{self.count} coarse tokens", where="attention.near", fix=f"give three whole numbers from 1 to {LARGEST}")
        if len(self.reach) != 3 or not all(0 < far <= LARGEST for far in self.reach):
            raise UserError(f"reach {self.reach}", where="attention.near", fix=f"give three numbers above 0, at most {LARGEST}")

    def within(self, coarse: Shape) -> Near:
        """The same, with no more tokens along an axis than there are."""
        return replace(self, count=tuple(map(min, self.count, coarse)))


@dataclass(frozen=True, slots=True)
class Middle:
    """A level between window and proxy: means of the fine tokens themselves over blocks of `pool` tokens, seen as a proxy is."""

    pool: Shape = (1, 4, 4)
    near: Near = Near(count=(4, 4, 4))

    def __post_init__(self) -> None:
        if len(self.pool) != 3 or not all(isinstance(side, int) and 1 <= side <= LARGEST for side in self.pool):
            raise UserError(f"blocks of {self.pool} tokens", where="attention.middle", fix=f"give three whole numbers from 1 to {LARGEST}")


@dataclass(frozen=True, slots=True)
class GuidedWindows:
    """Shifted windows with the keys of a proxy (needs a `ProxyMemory` at every forward), and of a middle level if there is one."""

    windows: WindowAttention
    near: Near = Near()
    middle: Middle | None = None

    def partitions(self, token_shape: Shape) -> tuple[Partition, ...]:
        return self.windows.partitions(token_shape)


@dataclass(frozen=True, slots=True)
class Within:
    """Where a fine video lies in a larger one of `shape` tokens (f, y, x): its first token's place there; both whole numbers or not."""

    shape: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class ProxyMemory:
    """What the blocks made of a coarse video: for each block its keys, not yet rotated, and values, both [B, N, H, d], N in raster order.

    `time_scale`: fine latent frames from one coarse one to the next. `within`: the coarse video shows more than the fine one, which lies there in it.
    """

    token_shape: Shape
    time_scale: float
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    within: Within | None = None

    def of(self, item: int, within: Within) -> ProxyMemory:
        """That of one video of the batch, for a fine one that lies in it."""
        layers = tuple((key[item : item + 1], value[item : item + 1]) for key, value in self.layers)
        return replace(self, layers=layers, within=within)


def places(coarse: Shape, fine: Within, time_scale: float) -> Axes:
    """Where tokens of a coarse video of all of `fine.shape` stand along each axis of the fine ones: three increasing float64 vectors."""
    time = torch.arange(coarse[0], dtype=torch.float64) * time_scale
    rows, columns = ((torch.arange(few, dtype=torch.float64) + 0.5) * many / few - 0.5 for few, many in zip(coarse[1:], fine.shape[1:]))
    return tuple(axis - start for axis, start in zip((time, rows, columns), fine.origin))


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The coarse tokens of every window of a partition: raster indices [W, m], cosines and sines of their places [W, m, d / 2]."""

    index: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def of(self, run: Run, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [B, N, H, d] of all coarse tokens -> those of the run's windows, [B, windows, m, H, d], the keys rotated."""
        windows = slice(run.first, run.first + run.num_windows)
        index = self.index[windows]
        keys, values = (x[:, index.flatten()] for x in (key, value))
        keys = rotate(keys, self.cos[windows].flatten(0, 1), self.sin[windows].flatten(0, 1))
        return tuple(x.unflatten(1, index.shape) for x in (keys, values))


def neighbours(cut: Partition, coarse: Shape, axes: Axes, near: Near, head_dim: int) -> Neighbours:
    """For each window of `cut`, on its device: the `near.count` consecutive coarse tokens along each axis whose mean place is nearest to its middle.

    Computed there too where it surely has float64: a GPU would wait longer for the CPU than a layer takes.
    """
    device = cut.order.device
    where = device if device.type == "cuda" else torch.device("cpu")
    axes = tuple(axis.to(where) for axis in axes)
    sides = torch.cat([torch.tensor(run.shape, dtype=torch.float64, device=where).expand(run.num_windows, 3) for run in cut.groups])
    middles = cut.origins.to(where) + (sides - 1) / 2  # [W, 3]
    found = [_nearest(middles[:, axis], axes[axis], near.count[axis], near.reach[axis]) for axis in range(3)]
    indices, angles = zip(*found)
    rows, columns = coarse[1:]
    index = _combined([indices[0] * rows * columns, indices[1] * columns, indices[2]])
    # each axis turns its own channels: laid out for every combination of the three, side by side
    turned = [_spread(place, axis, indices)[..., None] * frequencies(dim).to(where) for axis, (place, dim) in enumerate(zip(angles, axis_dims(head_dim)))]
    angle = torch.cat(turned, dim=-1).flatten(1, 3)
    return Neighbours(index.to(device), angle.cos().float().to(device), angle.sin().float().to(device))


def _nearest(middles: torch.Tensor, axis: torch.Tensor, count: int, reach: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and places, [W, c] each, of the `count` consecutive tokens (all, if there are no more) around each middle [W]."""
    count = min(count, len(axis))
    means = axis.unfold(0, count, 1).mean(dim=1)
    first = (means[None, :] - middles[:, None]).abs().argmin(dim=1)
    index = first[:, None] + torch.arange(count, device=first.device)
    return index, middles[:, None] + (axis[index] - middles[:, None]).clamp(-reach, reach)


def _combined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[W, a], [W, b], [W, c] -> all sums of one of each, [W, a * b * c]."""
    a, b, c = parts
    return (a[:, :, None, None] + b[:, None, :, None] + c[:, None, None, :]).flatten(1)


def _spread(values: torch.Tensor, axis: int, indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """[W, n] of one axis -> [W, a, b, c], the same along the two others."""
    shape = [len(values), 1, 1, 1]
    shape[axis + 1] = values.shape[1]
    return values.view(shape).expand(len(values), *(index.shape[1] for index in indices))


def joined(sources: Sequence[tuple[Neighbours, torch.Tensor, torch.Tensor]]) -> ExtraKeys:
    """Further keys and values for `attend_windows`: those of all sources (neighbours, key, value), side by side."""

    def extra(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = zip(*(near.of(run, key, value) for near, key, value in sources))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    return extra


@dataclass(frozen=True, slots=True, eq=False)
class Pooling:
    """Means over blocks of tokens: `cell` [N] is the block (raster order of the pooled grid `shape`) of each token in a partition's order."""

    shape: Shape
    cell: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, cut: Partition, pool: Shape) -> Pooling:
        shape = pooled_shape(cut.token_shape, pool)
        _, rows, columns = cut.token_shape
        f, y, x = cut.order // (rows * columns), cut.order // columns % rows, cut.order % columns
        cell = (f // pool[0] * shape[1] + y // pool[1]) * shape[2] + x // pool[2]
        return cls(shape, cell, torch.bincount(cell, minlength=shape[0] * shape[1] * shape[2]))

    def mean(self, parts: Iterator[tuple[slice, torch.Tensor]]) -> torch.Tensor:
        """Parts (span, [B, n, D]) of a sequence, in any order -> [B, cells, D]."""
        first, rest = next(parts), parts
        total = first[1].new_zeros(len(first[1]), len(self.count), first[1].shape[-1], dtype=torch.float32)
        for span, part in itertools.chain([first], rest):
            total = added(total, self.cell[span], part.float())
        return (total / self.count[:, None]).to(first[1].dtype)


def pooled_shape(token_shape: Shape, pool: Shape) -> Shape:
    """Blocks along each axis."""
    return tuple(-(-length // side) for length, side in zip(token_shape, pool))


def pooled_places(cut: Partition, pool: Shape) -> Axes:
    """The middles of the blocks along each axis; the last one of an axis may be smaller."""
    return tuple(_block_middles(length, side) for length, side in zip(cut.token_shape, pool))


def _block_middles(length: int, side: int) -> torch.Tensor:
    starts = torch.arange(0, length, side, dtype=torch.float64)
    return (starts + (starts + side).clamp(max=length) - 1) / 2
