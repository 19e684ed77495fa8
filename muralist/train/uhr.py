"""`uhr`: the adapter that lets a base work far above its own size, trained on crops of large videos.

A crop of a 4K render has the token grid of a whole frame at the base's size and shows what a token means there: bare ground, a stretch of
edge. Only noise levels at which refinement works are trained.
"""

from __future__ import annotations

from pathlib import Path

import torch

from muralist.train.loop import Report, begin
from muralist.train.objectives.flow import FlowConfig, FlowMatching
from muralist.train.trainee import CLIPS, Crops, Trainee, VideoData, fit_adapter, give_adapter

ADAPTER = "uhr"
MAX_SIGMA = 0.9


def train_uhr(
    folder: Path, *, minutes: float, device: torch.device, resume: bool, model: Path, data: VideoData | None = None, clips: int = CLIPS, report: Report = print
) -> Path:
    """LoRA on every projection of the base in `model`; writes `folder/adapters/uhr`. A copy of it in `model/adapters` puts it to use.

    A base that has the adapter already goes on from it.
    """
    begin(folder, resume=resume)
    trainee = Trainee(model, device)
    data = data or VideoData()
    pools = trainee.pools(data, clips, folder / "latents", report)
    give_adapter(trainee, ADAPTER)
    config = FlowConfig(prediction=trainee.info.prediction, shift=trainee.info.defaults.flow_shift, max_sigma=MAX_SIGMA)
    objective = FlowMatching(trainee, trainee.transformer, trainee.embed, Crops(pools), config, device)
    return fit_adapter(trainee, ADAPTER, objective, folder, minutes, resume, trainee.origin(data, clips), report)
