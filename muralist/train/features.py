"""`features`: the small network whose features the Fréchet and perceptual metrics use where the papers' weights are not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from muralist.eval.features.mural import WIDTH, Mural
from muralist.store.tensors import save_tensors
from muralist.train.loop import Length, Schedule, draw_curve, fit
from muralist.train.objectives.factors import FactorsConfig, Reader, TellApart, judge


def train_features(folder: Path, *, length: Length, device: torch.device, resume: bool, report: Callable[[str], None] = print) -> Path:
    """Tell the world's words and the damages of its crops apart; writes `folder/mural.safetensors` and says how well it does on held-out scenes."""
    torch.manual_seed(0)
    reader = Reader(Mural(), WIDTH).to(device, memory_format=torch.channels_last)
    fit(TellApart(reader, FactorsConfig(), device), Schedule(length=length, learning_rate=2e-3, decay=0.5), folder, resume=resume, report=report)
    report("  ".join(f"{name} {value:.3f}" for name, value in judge(reader, FactorsConfig(held_out=True, seed=1), device).items()))
    path = folder / "mural.safetensors"
    save_tensors(path, reader.network.state_dict())
    draw_curve(folder)
    return path
