"""`anchored`: what a base learns to paint a large video from noise in a few steps, led by an anchor (PixelWizard, sections 3.3 and 3.4).

Trained together on crops of large videos: an adapter on every projection, the injector, the step-size embedding. The anchor of a crop is the
damaged video at the base's own size, encoded whole and cut where the crop lies: it says what is there and nothing of its detail. Flow
matching alternates with self-consistency of large steps (`objectives/shortcut.py`); a tenth of the captions is left out, and with them the anchor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from muralist.data.degrade import AnchorDamage
from muralist.nn.injector import AnchorInjector
from muralist.nn.kinds import INJECTOR, STEP_SIZE, InjectorConfig
from muralist.nn.step_size import StepSizeEmbedding
from muralist.store.parts import save_part
from muralist.train.loop import Length, Report, begin
from muralist.train.objectives.flow import Batch, FlowConfig
from muralist.train.objectives.shortcut import ShortcutConfig, ShortcutMatching
from muralist.train.trainee import Crops, Trainee, VideoData, fit_adapter, give_adapter

ANCHORED = "anchored"  # the adapter
BATCH = 8
LEARNING_RATE = 3e-4  # at 1e-3, what large steps had learned was lost within 150 steps, their error ten times as large (seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchoredConfig:
    """What an ablation may change: the injector (None: no anchor at all), how large steps are learned, the damage that makes anchors, how fast all is."""

    injector: InjectorConfig | None
    shortcut: ShortcutConfig = field(default_factory=lambda: ShortcutConfig(guidance=3.0))
    damage: AnchorDamage = field(default_factory=AnchorDamage)
    learning_rate: float = LEARNING_RATE


def train_anchored(
    folder: Path,
    *,
    length: Length,
    device: torch.device,
    resume: bool,
    model: Path,
    data: VideoData | None = None,
    config: AnchoredConfig | None = None,
    report: Report = print,
) -> Path:
    """Writes `folder/adapters/anchored`, `folder/parts/injector` and `folder/parts/step_size`; copies in the model's folder put them to use.

    A base that has any of them already goes on from it.
    """
    begin(folder, resume=resume)
    trainee = Trainee(model, device)
    info = trainee.info
    config = config or AnchoredConfig(injector=info.injector or InjectorConfig(channels=info.geometry.channels, dim=info.width))
    data = (data or VideoData()).settled()
    wanted = [trainee.guided_pool(ANCHORED, height, data, config.damage) for height in data.heights]
    pools = trainee.encoded(wanted, data, folder, report)
    give_adapter(trainee, ANCHORED)
    added = _added(trainee, config, device, report)
    flow = FlowConfig(prediction=info.prediction, shift=info.defaults.flow_shift)
    objective = Anchored(trainee, trainee.transformer, trainee.embed, Crops(pools, batch=BATCH), flow, device, shortcut=config.shortcut)
    adapter = fit_adapter(trainee, ANCHORED, objective, folder, length, resume, trainee.origin(data), report, config.learning_rate)
    for kind, (record, network) in added.items():
        save_part(folder / "parts" / kind, kind, record, {name: p.detach().half().cpu() for name, p in network.named_parameters()})
    return adapter


def _added(trainee: Trainee, config: AnchoredConfig, device: torch.device, report: Report) -> dict[str, tuple[dict, torch.nn.Module]]:
    """The step-size embedding, and the injector if there is one, in the transformer and trained with it: the base's own, else new ones."""
    torch.manual_seed(0)
    transformer, info = trainee.transformer, trainee.info
    if STEP_SIZE not in info.parts:
        transformer.step_size = StepSizeEmbedding(info.width)
    if info.injector is not None and info.injector != config.injector:
        report(f"the base's own injector {'is left out' if config.injector is None else 'is of another configuration: a new one takes its place'}")
        del transformer.injector
    if config.injector is not None and not hasattr(transformer, "injector"):
        transformer.injector = AnchorInjector(config.injector)
    added = {STEP_SIZE: ({"dim": info.width}, transformer.step_size.to(device).requires_grad_(True))}
    if config.injector is not None:
        added[INJECTOR] = (asdict(config.injector), transformer.injector.to(device).requires_grad_(True))
    return added


class Anchored(ShortcutMatching):
    """Shortcut training of crops with anchors; where the caption is left out the anchor is too, and the injector is given zeros."""

    def _predict(self, batch: Batch, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, **extra: torch.Tensor) -> torch.Tensor:
        if hasattr(self.transformer, "injector"):
            anchor = batch.proxy.to(self.device) * text.ne(self.embed([""])).flatten(1).any(dim=1).view(-1, 1, 1, 1, 1)
            extra["anchor"] = self.transformer.injector.refine(anchor, self.transformer.token_shape(noisy))
        return super()._predict(batch, noisy, sigma, text, **extra)
