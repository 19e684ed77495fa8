"""`experts`: the two frequency experts of a base, each trained on its own noise levels (LUVE, sections 3.4 and 4.1).

The low-frequency expert stands beside attention and learns above SWITCH, the high-frequency one beside the FFN and learns below it, on
sharpened videos. The base with its adapter for large sizes, if it has one, is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from muralist.data.sharpen import Unsharp
from muralist.nn.adapters import select_adapter
from muralist.nn.experts import EXPERTS, SWITCH, ExpertConfig, ExpertsConfig, attach
from muralist.nn.filters import RadialFilter
from muralist.nn.transformer import Graft
from muralist.store.parts import save_part
from muralist.train import state
from muralist.train.loop import CHECKPOINTS, Length, Report, Schedule, begin, draw_curve, fit
from muralist.train.objectives.flow import FlowConfig, FlowMatching
from muralist.train.trainee import LEARNING_RATE, Crops, Trainee, VideoData
from muralist.train.uhr import ADAPTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One expert and what it is trained on."""

    expert: ExpertConfig
    sharpen: Unsharp | None = None


LESSONS = {
    "low": Lesson(expert=ExpertConfig(place="attention", band=RadialFilter(band="low"), sigmas=(SWITCH, 1.0))),
    "high": Lesson(expert=ExpertConfig(place="ffn", band=RadialFilter(band="high"), sigmas=(0.0, SWITCH)), sharpen=Unsharp()),
}


def train_experts(
    folder: Path,
    *,
    length: Length,
    device: torch.device,
    resume: bool,
    model: Path,
    data: VideoData | None = None,
    lessons: dict[str, Lesson] | None = None,
    report: Report = print,
) -> Path:
    """One expert after the other, each in an equal part of `length`; writes `folder/parts/experts`. A copy of it in `model/parts` puts them to use.

    `lessons`: other experts than the two of the paper, for ablations.
    """
    lessons, data = lessons or LESSONS, (data or VideoData()).settled()
    begin(folder, resume=resume)
    for name in lessons:
        begin(folder / name, resume=resume)
    trainee = Trainee(model, device)
    select_adapter(trainee.transformer, ADAPTER if ADAPTER in trainee.info.adapters else None)
    trainee.transformer.requires_grad_(False)  # switching an adapter on makes it trainable
    width = trainee.info.width
    experts = ExpertsConfig(dim=width, layers=len(trainee.transformer.blocks), experts={name: lesson.expert for name, lesson in lessons.items()})
    torch.manual_seed(0)
    attached = attach(trainee.transformer.blocks, width, experts.experts).to(device)
    for name, lesson in lessons.items():
        _teach(name, lesson, trainee, attached, replace(data, sharpen=lesson.sharpen), folder, length.part(len(lessons)), resume, report)
    tensors = {f"blocks.{name}": parameter.detach().half() for name, parameter in attached.named_parameters()}
    return save_part(folder / "parts" / EXPERTS, EXPERTS, experts.record(), tensors)


def _teach(
    name: str,
    lesson: Lesson,
    trainee: Trainee,
    attached: torch.nn.ModuleList,
    data: VideoData,
    folder: Path,
    length: Length,
    resume: bool,
    report: Report,
) -> None:
    """Train one expert alone, in `folder/name`, where its checkpoints and its curve are."""
    origin = trainee.origin(data) | trainee.standing_on(f"adapter {ADAPTER}")
    state.require_origin(folder / name / CHECKPOINTS, origin)
    pools = trainee.encoded([trainee.crop_pool(height, data) for height in data.heights], data, folder, report)
    attached.requires_grad_(False)
    for experts in attached:
        experts[name].requires_grad_(True)
    low, high = lesson.expert.sigmas
    info = trainee.info
    config = FlowConfig(prediction=info.prediction, shift=info.defaults.flow_shift, min_sigma=low, max_sigma=high, graft=Graft(experts=(name,)))
    objective = FlowMatching(trainee, trainee.transformer, trainee.embed, Crops(pools), config, trainee.base.device)
    report(f"expert {name}: noise levels {low:g} to {high:g}")
    schedule = Schedule(length=length, learning_rate=LEARNING_RATE, weight_decay=0.0)
    fit(objective, schedule, folder / name, resume=resume, origin=origin, report=report)
    draw_curve(folder / name)
