"""Compressed branches beside local attention: the same scene seen from further away, in fewer tokens (Hu et al., arXiv 2510.18775, section 4).

A branch pools the tokens of each frame over blocks (a weighted mean, one weight for each channel and place in the block; the plain mean at
the start), attends among the pooled tokens with the block's own projections and low-rank changes to them, and is brought back to all tokens:
bilinear enlargement, then a convolution in space and time that changes nothing at the start. Local attention and the branches share
the block's output projection; a fusion weight for each channel follows the noise level:

    z <- alpha(t) * branch + (1 - alpha(t)) * z      (equation 3), for one branch after the other

A grid that the blocks do not divide has smaller blocks at its far edges: their weights are scaled by how many tokens are missing, so that
nothing is resized. Positions are those of the pooled grid itself, as in the release: at K times the base's size its whole picture then
has about the positions that the base knows, and so it can lead from the start (`Fusion`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from muralist.nn.attention.window import attend_windows
from muralist.nn.kinds import FREQUENCIES, BranchConfig, BranchesConfig, Restoring
from muralist.nn.pooling import added
from muralist.nn.rope import RopeScale, RotaryTable, rotary_table, rotate
from muralist.nn.step_size import waves
from muralist.nn.windows import Chunk, Partition, Shape, partition_evenly

START, LEAD = 0.1, 0.8  # weights of a branch that training starts from; LEAD: of a view of the whole picture where noise hides all but the layout
LEADS = (500.0, 700.0)  # timesteps between which that weight rises
FIT = 1e-2  # of the mean square of what the weight is made from: what its start gives up in exactness to stay small


class LowRank(nn.Module):
    """A change of a projection, zero at the start."""

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(dim, rank), nn.Linear(rank, dim)
        nn.init.zeros_(self.lora_B.weight)
        nn.init.zeros_(self.lora_B.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_B(self.lora_A(x))


class NoChange(nn.Module):
    """In place of a change of rank 0: the projection stays the block's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(1)


class Fusion(nn.Module):
    """The fusion weight of every channel for timesteps [B], 0 to 1000: [B, 1, D].

    Before training it is START, alike in all channels; `leads`: it rises to LEAD at high noise. Windows alone, each of which takes itself for the picture
    there, paint an object each; led by a view of the whole at about the base's own size, they paint one or two between them before anything is trained.
    The start of a narrow base is coarser: off the ramp it is within 0.07 of these weights from a width of 256 on, within about 0.3 at 64.
    The embedding of one that leads is not to be trained (`trainable`): all channels start by one row of weights, and what they have in common would move it
    by several units of the logit a step, until one side of the fusion is gone for good (seen).
    """

    def __init__(self, dim: int, *, leads: bool, of_branch: bool = True):
        super().__init__()
        self.leads = leads
        self.embedding = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.projection = nn.Linear(dim, dim)
        sign = 1 if of_branch else -1
        nn.init.zeros_(self.projection.weight)
        nn.init.constant_(self.projection.bias, sign * _logit(START))
        if leads:
            self._rise(sign * (_logit(LEAD) - _logit(START)))

    @torch.no_grad()
    def _rise(self, height: float) -> None:
        """Let the projection start as a function of the timestep: the ridge regression of a ramp, from the embedding as it was drawn."""
        timesteps = torch.linspace(0, 1000, 201, device=self.projection.weight.device, dtype=torch.float32)
        features = self._features(timesteps).float()
        ramp = height * ((timesteps - LEADS[0]) / (LEADS[1] - LEADS[0])).clamp(0, 1)
        products = features @ features.T
        ridge = FIT * products.diagonal().mean() * torch.eye(len(products), device=products.device)
        self.projection.weight += (features.T @ torch.linalg.solve(products + ridge, ramp)).to(self.projection.weight.dtype)

    def _features(self, timestep: torch.Tensor) -> torch.Tensor:
        return F.silu(self.embedding(waves(timestep).to(self.projection.weight.dtype)))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.projection(self._features(timestep)).sigmoid()[:, None]


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


class CompressedBranch(nn.Module):
    """One branch of one block; see the module's docstring."""

    def __init__(self, dim: int, config: BranchConfig, rank: int, restoring: Restoring, pooled: int, *, of_branch: bool = True):
        super().__init__()
        self.config = config
        self.pool_weight = nn.Parameter(torch.full((pooled, config.stride**2, dim), config.stride**-2.0))
        self.pool_bias = nn.Parameter(torch.zeros(pooled, dim))
        self.q, self.k, self.v = (LowRank(dim, rank) if rank else NoChange() for _ in range(3))
        self.restoring = _passing(nn.Conv3d(dim, dim, 3, padding=1, groups=1 if restoring == "dense" else dim))
        self.across = _passing(nn.Linear(dim, dim)) if restoring == "separable" else None
        self.fusion = Fusion(dim, leads=config.windows == 1 and not config.alternate, of_branch=of_branch)

    def shares(self, tensors: Sequence[torch.Tensor], blocks: Blocks, span: slice) -> list[torch.Tensor]:
        """What a chunk adds to the pooled tokens: the tensors [B, n, D] of its tokens, each times its weights."""
        place, gain = blocks.place[span], blocks.gain[span, None]
        return [x * (weight[place] * gain).to(x.dtype) for x, weight in zip(tensors, self.pool_weight)]

    def restore(self, pooled: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """[B, cells, D] -> [B, N, D], both in raster order."""
        frames, rows, columns = blocks.token_shape
        stride = self.config.stride
        images = rearrange(pooled, "b (f y x) d -> (b f) d y x", f=frames, y=blocks.shape[1], x=blocks.shape[2])
        images = F.interpolate(images, scale_factor=stride, mode="bilinear", align_corners=False)[:, :, :rows, :columns]
        # channels stay the fastest axis from the tokens to the tokens: nothing is laid out anew
        video = rearrange(images, "(b f) d y x -> b d f y x", f=frames)
        with nullcontext() if video.is_meta else torch.autocast(video.device.type, enabled=False):
            # in its weights' own type: oneDNN's bfloat16 gradient of depthwise weights reads memory nobody wrote where there are two frames (torch 2.13)
            video = self.restoring(video.to(self.restoring.weight.dtype))
        tokens = rearrange(video, "b d f y x -> b (f y x) d").to(pooled.dtype)
        return tokens if self.across is None else self.across(tokens)


def _passing(layer: nn.Conv3d | nn.Linear) -> nn.Module:
    """The layer, passing everything on as it is."""
    if isinstance(layer, nn.Conv3d):
        nn.init.dirac_(layer.weight, groups=layer.groups)
    else:
        nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Branches(nn.ModuleDict):
    """The branches of one block by name, in the order in which they are fused."""

    def __init__(self, config: BranchesConfig):
        of_all = {"rank": config.rank, "restoring": config.restoring, "pooled": config.pooled, "of_branch": config.of_branch}
        super().__init__({name: CompressedBranch(config.dim, branch, **of_all) for name, branch in config.branches.items()})
        self.config = config


def attach_branches(blocks: Sequence[nn.Module], config: BranchesConfig) -> nn.ModuleDict:
    """Give the blocks that are named in `config` their branches, `block.branches[name]`; returns them alone, by block, to be trained and stored."""
    for number in config.blocks:
        blocks[number].branches = Branches(config)
    return nn.ModuleDict({str(number): blocks[number].branches for number in config.blocks})


def trainable(branches: nn.ModuleDict) -> nn.ModuleDict:
    """The same, all of it trained but for what must not be: embeddings of fusion weights that lead."""
    branches.requires_grad_(True)
    for module in branches.modules():
        if isinstance(module, Fusion) and module.leads:
            module.embedding.requires_grad_(False)
    return branches


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """How a branch pools the tokens of a partition, and how it attends among them.

    `cell` [N]: the pooled token (raster order) of each token in the partition's order, `place` [N]: its place in the block, row by row,
    `gain` [N]: by how much a block at the edge lacks tokens. `windows`: of the pooled grid `shape`, with `rope` for its tokens.
    """

    token_shape: Shape
    shape: Shape
    cell: torch.Tensor
    place: torch.Tensor
    gain: torch.Tensor
    windows: Partition
    rope: RotaryTable

    @classmethod
    def of(cls, cut: Partition, config: BranchConfig, head_dim: int, *, odd: bool, place: int = 0) -> Blocks:
        """For the tokens of `cut`, on its device; `odd`: of a block with an odd number; `place`: where windows stand (`split_evenly`)."""
        frames, rows, columns = cut.token_shape
        side, device = config.stride, cut.order.device
        shape = (frames, -(-rows // side), -(-columns // side))
        f, y, x = cut.order // (rows * columns), cut.order // columns % rows, cut.order % columns
        cell = (f * shape[1] + y // side) * shape[2] + x // side
        gain = side**2 / (_length(y, side, rows) * _length(x, side, columns))
        more = odd and config.alternate
        windows = partition_evenly(shape, (1, config.windows + more, config.windows + more), place, more).to(device)
        return cls(cut.token_shape, shape, cell, y % side * side + x % side, gain, windows, rotary_table(RopeScale(), shape, head_dim, device))


def _length(place: torch.Tensor, side: int, tokens: int) -> torch.Tensor:
    """How many tokens the blocks at these places have along an axis of so many."""
    return (tokens - place // side * side).clamp(max=side)


class Pools:
    """The pooled tokens of a block's branches, gathered chunk by chunk in float32."""

    def __init__(self, branches: Branches, blocks: Mapping[str, Blocks]):
        self.branches, self.blocks = branches, blocks
        self._sums: dict[str, list[torch.Tensor]] = {}

    def add(self, chunk: Chunk, tensors: Sequence[torch.Tensor]) -> None:
        """The next chunk: as many tensors [B, n, D] of its tokens as a branch pools."""
        for name, blocks in self.blocks.items():
            cells = blocks.cell[chunk.span]
            sums = self._sums.setdefault(name, [x.new_zeros(len(x), math.prod(blocks.shape), x.shape[-1], dtype=torch.float32) for x in tensors])
            shares = self.branches[name].shares(tensors, blocks, chunk.span)
            self._sums[name] = [added(old, cells, new.float()) for old, new in zip(sums, shares)]

    def take(self, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """The pooled tensors of a branch, [B, cells, D]."""
        return [(x + bias).to(dtype) for x, bias in zip(self._sums.pop(name), self.branches[name].pool_bias)]


def attend_pooled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """q, k, v [B, cells, H, d] in raster order, not yet rotated -> [B, cells, H * d], each cell having seen its window."""
    cut = blocks.windows
    rope = blocks.rope.at(cut.order)
    q, k, v = (x.index_select(1, cut.order) for x in (q, k, v))
    seen = attend_windows(rotate(q, *rope), rotate(k, *rope), v, cut.groups)
    return rearrange(seen.index_select(1, cut.inverse), "b n H d -> b n (H d)")


def fused(z: torch.Tensor, alphas: Sequence[torch.Tensor], restored: Sequence[torch.Tensor], *, of_branch: bool) -> torch.Tensor:
    """Equation 3 for one branch after the other: z and each of `restored` [B, n, D], each of `alphas` [B, 1, D]."""
    for alpha, branch in zip(alphas, restored):
        z = torch.lerp(z, branch, alpha.to(z.dtype)) if of_branch else torch.lerp(branch, z, alpha.to(z.dtype))
    return z
