"""`branched`: what a base learns to paint a large video from noise at once (Hu et al., arXiv 2510.18775).

Trained together on whole videos, as many frames of each size as fit a number of tokens, and on single frames of them: the compressed branches of
every block, and a low-rank adapter on every projection. Where one object is and where none is, windows have to learn from their branches: that
is seen in single frames, many times as many of which fit a step, and so these come first while the branches are new. The paper trains the whole
model; its change fits an adapter here, so that one base serves all recipes. It does not start as `uhr`, which knows noise with a guide in it alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from muralist.data.latents import LatentPool, PoolConfig
from muralist.errors import UserError
from muralist.nn.attention import BranchedWindows
from muralist.nn.branches import attach_branches, trainable
from muralist.nn.kinds import BRANCHES, BranchesConfig, hierarchical
from muralist.nn.transformer import Graft
from muralist.nn.windows import TRAVEL
from muralist.store import weights
from muralist.store.parts import save_part
from muralist.train import state
from muralist.train.loop import CHECKPOINTS, Length, Report, begin
from muralist.train.objectives.flow import Batch, FlowConfig, FlowMatching
from muralist.train.trainee import Trainee, VideoData, fit_adapter, give_adapter
from muralist.types import Grid

BRANCHED = "branched"  # the adapter
NEW = "new"  # what branches stand on that the base does not have
HEIGHTS = (512, 1088)  # of the world's renders
TIMES = 7  # about the tokens of a batch and the most of a video, in clips of the base's own size
LEAST = 17_000  # tokens, up to which videos of small bases go all the same: the embedded one's 29 frames at 1088, in which an object has a way to go
SHIFT = 5.0  # of the noise levels, as in sampling
CLIPS = 200  # of each height
SINGLES = 4  # single frames of each height for each of its clips
SINGLE_SHARE = (0.75, 0.35)  # of the batches in each half of the training of new branches
SINGLE_SHARE_ON = (0.15, 0.15)  # where the base's own go on: they know of one object, and its way is seen in clips alone


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchedConfig:
    """What an ablation may change: the branches (None: the paper's two, in windows that travel), what odd blocks do, and which of them are at work (all)."""

    branches: BranchesConfig | None = None
    odd: str = "more"
    names: tuple[str, ...] | None = None

    def of(self, trainee: Trainee) -> tuple[BranchesConfig, BranchedWindows]:
        """For one base: its branches, and the attention in which they are trained."""
        layers = len(trainee.transformer.blocks)
        branches = self.branches or hierarchical(trainee.info.width, layers)
        plain = tuple(sorted(set(range(layers)) - set(branches.blocks)))
        names = tuple(branches.branches) if self.names is None else self.names
        return branches, BranchedWindows(branches.windows, self.odd, names, plain, branches.travel)


def train_branched(
    folder: Path,
    *,
    length: Length,
    device: torch.device,
    resume: bool,
    model: Path,
    data: VideoData | None = None,
    config: BranchedConfig | None = None,
    report: Report = print,
) -> Path:
    """Writes `folder/adapters/branched` and `folder/parts/branches`; copies in the model's folder put them to use."""
    begin(folder, resume=resume)
    trainee, data = Trainee(model, device), (data or VideoData()).settled(HEIGHTS, CLIPS)
    branches, attention = (config or BranchedConfig()).of(trainee)
    whole = [_pool(trainee, height, data.clips, attention) for height in data.heights]
    origin = trainee.origin(data) | {"frames": str([pool.frames for pool in whole]), "windows": repr(attention)}
    state.require_origin(folder / CHECKPOINTS, origin)
    pools = trainee.encoded([_singles(pool) for pool in whole] + whole, data, folder, report)
    give_adapter(trainee, BRANCHED)
    attached, stands_on = _attached(trainee, branches, report)
    attached = trainable(attached.to(device))
    flow = FlowConfig(prediction=trainee.info.prediction, shift=SHIFT, graft=Graft(attention=attention))
    share = SINGLE_SHARE if stands_on == NEW else SINGLE_SHARE_ON
    source = Whole(pools[: len(whole)], pools[len(whole) :], TIMES * math.prod(trainee.info.geometry.latent_shape(trainee.own_grid)[1:]), share)
    objective = InBranchedWindows(trainee, trainee.transformer, trainee.embed, source, flow, device)
    origin |= {"singles": f"{SINGLES}, {share}", BRANCHES: stands_on}
    adapter = fit_adapter(trainee, BRANCHED, objective, folder, length, resume, origin, report)
    save_part(folder / "parts" / BRANCHES, BRANCHES, asdict(branches), {name: p.detach().half().cpu() for name, p in attached.named_parameters()})
    return adapter


@dataclass(frozen=True, slots=True)
class Whole:
    """Batches of whole pictures, of one size each: single frames of `frames` or videos of `clips`, as many as have about `latents` latents, or one;
    and one of the steps at which windows stand elsewhere.

    `single_share`: of single frames among the batches, in each half of the training.
    """

    frames: tuple[LatentPool, ...]
    clips: tuple[LatentPool, ...]
    latents: int
    single_share: tuple[float, float]

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch:
        pools = self.frames if rng.random() < self.single_share[progress >= 0.5] else self.clips
        pool = pools[rng.integers(len(pools))]
        count = max(1, round(self.latents / pool.z[0, 0].numel()))
        return Batch(*pool.take(rng.integers(len(pool.captions), size=count)), step=int(rng.integers(len(TRAVEL))))


class InBranchedWindows(FlowMatching):
    """Flow matching in windows that stand where they do at the batch's step of sampling."""

    def _graft(self, batch: Batch) -> Graft:
        graft = super()._graft(batch)
        return replace(graft, attention=graft.attention.at(batch.step))


def _attached(trainee: Trainee, branches: BranchesConfig, report: Report) -> tuple[torch.nn.ModuleDict, str]:
    """The base's own branches if they are these, else new ones in their place; and what they are, of which a checkpoint holds what is trained alone."""
    blocks = trainee.transformer.blocks
    if trainee.info.branches and replace(trainee.info.branches, travel=branches.travel) == branches:
        own = torch.nn.ModuleDict({str(number): blocks[number].branches for number in branches.blocks})
        return own, weights.fingerprint(trainee.info.folder / "parts" / BRANCHES)
    if trainee.info.branches is not None:
        report("the base's own branches are of another configuration: new ones take their place")
    for block in blocks:
        if hasattr(block, "branches"):
            del block.branches
    torch.manual_seed(0)
    return attach_branches(blocks, branches), NEW


def _pool(trainee: Trainee, height: int, clips: int, attention: BranchedWindows) -> PoolConfig:
    """Whole videos of one height in the base's own proportions, as many frames as fit the tokens. Raises UserError for a height that cannot be trained at."""
    own, geometry = trainee.own_grid, trainee.info.geometry
    large = geometry.legal(Grid(num_frames=own.num_frames, height=height, width=round(height * own.width / own.height), fps=own.fps))
    shape, budget = geometry.token_shape(large), max(TIMES * math.prod(geometry.token_shape(own)), LEAST)
    try:
        attention.require_fit(shape)
    except UserError as error:
        raise UserError(f"videos {height} pixels high: {error.what}", where="height", fix="use larger ones") from None
    latent_frames = min(budget // (shape[1] * shape[2]), shape[0])
    if latent_frames < min(2, shape[0]):
        raise UserError(f"of a video {height} pixels high only single frames fit {budget:,} tokens", where="height", fix="use smaller ones, such as 1088")
    return PoolConfig(name=f"whole-{height}", count=clips, grid=large, frames=(latent_frames - 1) * geometry.temporal_factor + 1, seed=height + 1)


def _singles(clips: PoolConfig) -> PoolConfig:
    """Single frames of the same size, SINGLES for each clip."""
    return replace(clips, name=clips.name.replace("whole", "frame"), count=SINGLES * clips.count, frames=1, seed=clips.seed + 1)
