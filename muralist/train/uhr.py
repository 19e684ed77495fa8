"""`uhr`: the adapter that lets a base work far above its own size, trained on crops of large videos on the path that refinement takes.

A crop of a 4K render has the token grid of a whole frame at the base's size and shows what a token means there: bare ground, a stretch of
edge. Its guide is what refinement is given: the whole video at the base's own size, a little damaged, enlarged through pixels where the crop lies, and
the last part of the way by interpolation; for half of the crops by the base's latent upsampler, if it has one. The path starts in half of the batches
where the base's own recipe has it, else earlier, down to the earliest start of any recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from muralist.base_info import UPSAMPLER, inspect_base
from muralist.data.degrade import AnchorDamage
from muralist.data.latents import PoolConfig
from muralist.stages.upsample import LATENT_SCALE, LEARNED_SCALE
from muralist.structure import check_upsampler
from muralist.train import state
from muralist.train.loop import CHECKPOINTS, Length, Report, begin
from muralist.train.objectives.flow import Batch, FlowConfig, FlowMatching
from muralist.train.trainee import Crops, Trainee, VideoData, fit_adapter, give_adapter

ADAPTER = "uhr"
EARLIEST = 0.1  # share of the steps that a guide replaces: LUVE's
DAMAGE = AnchorDamage(factor=(1.0, 8.0), blur=(0.0, 2.0))  # milder than an anchor's: a guide is drawn over, an anchor is looked at


@dataclass(frozen=True, slots=True)
class Guided:
    """Batches of crops with their guides; `skip_share`: the largest, and half of all."""

    crops: Crops
    skip_share: float

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch:
        batch = self.crops(rng, progress)
        return replace(batch, skip_share=start_of_path(rng, self.skip_share))


def start_of_path(rng: np.random.Generator, skip_share: float) -> float:
    """The share of the steps that a batch's guide replaces: `skip_share` in half of all, else less, down to EARLIEST."""
    return skip_share if rng.random() < 0.5 else rng.uniform(min(EARLIEST, skip_share), skip_share)


def train_uhr(folder: Path, *, length: Length, device: torch.device, resume: bool, model: Path, data: VideoData | None = None, report: Report = print) -> Path:
    """LoRA on every projection of the base in `model`; writes `folder/adapters/uhr`. A copy of it in `model/adapters` puts it to use.

    A base that has the adapter already goes on from it.
    """
    begin(folder, resume=resume)
    info = inspect_base(str(model))
    if UPSAMPLER in info.parts:
        check_upsampler(info)
    trainee = Trainee(model, device)
    data, defaults = (data or VideoData()).settled(), trainee.info.defaults
    origin = trainee.origin(data) | trainee.path_origin | trainee.standing_on(f"part {UPSAMPLER}")
    state.require_origin(folder / CHECKPOINTS, origin)
    pools = trainee.encoded(_wanted(trainee, data), data, folder, report)
    give_adapter(trainee, ADAPTER)
    config = FlowConfig(prediction=trainee.info.prediction, shift=defaults.flow_shift)
    source = Guided(Crops(pools), defaults.skip_share)
    objective = FlowMatching(trainee, trainee.transformer, trainee.embed, source, config, device)
    return fit_adapter(trainee, ADAPTER, objective, folder, length, resume, origin, report)


def _wanted(trainee: Trainee, data: VideoData) -> list[PoolConfig]:
    """Crops of each height with guides by interpolation, and others with guides by the base's upsampler."""
    crops = [trainee.guided_pool("enlarged", height, data, DAMAGE) for height in data.heights]
    pools = [replace(pool, guide_scale=LATENT_SCALE) for pool in crops]
    if UPSAMPLER in trainee.info.parts:
        learned = {"guide_scale": LEARNED_SCALE, "guide_rest": "learned"}
        pools += [replace(pool, name=f"upsampled-{pool.grid.height}", seed=pool.seed + 1, **learned) for pool in crops]
    return pools
