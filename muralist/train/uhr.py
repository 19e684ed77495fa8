"""`uhr`: the adapter that lets a base work far above its own size, trained on crops of large videos.

A crop of a 4K render has the token grid of a whole frame at the base's size and shows what a token means there: bare ground, a stretch of
edge. Only noise levels at which refinement works are trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig

from muralist.base import select_adapter
from muralist.train.loop import Report, Schedule, begin, draw_curve, fit
from muralist.train.objectives.flow import FlowConfig, FlowMatching
from muralist.train.trainee import Crops, Trainee, VideoData

ADAPTER = "uhr"
RANK = 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
MAX_SIGMA = 0.9


def train_uhr(folder: Path, *, minutes: float, device: torch.device, resume: bool, model: Path, data: VideoData | None = None, report: Report = print) -> Path:
    """LoRA on every projection of the base in `model`; writes `folder/adapters/uhr`. A copy of it in `model/adapters` puts it to use.

    A base that has the adapter already goes on from it.
    """
    begin(folder, resume=resume)
    trainee = Trainee(model, device)
    pools = trainee.pools(data or VideoData(), folder / "latents", report)
    _give_adapter(trainee)
    config = FlowConfig(prediction=trainee.info.prediction, shift=trainee.info.defaults.flow_shift, max_sigma=MAX_SIGMA)
    objective = FlowMatching(trainee, trainee.transformer, trainee.embed, Crops(pools), config, device)
    fit(objective, Schedule(minutes=minutes, learning_rate=1e-3, weight_decay=0.0), folder, resume=resume, report=report)
    trainee.transformer.to(torch.bfloat16).save_lora_adapter(folder / "adapters" / ADAPTER, adapter_name=ADAPTER)
    draw_curve(folder)
    return folder / "adapters" / ADAPTER


def _give_adapter(trainee: Trainee) -> None:
    """A new adapter, or the base's own one, ready to be trained."""
    torch.manual_seed(0)
    if ADAPTER not in trainee.info.adapters:
        trainee.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name=ADAPTER)
    select_adapter(trainee.transformer, ADAPTER)
    for name, parameter in trainee.transformer.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name)
