"""`miniature-uhr`: the adapter that lets the base work far above its own size, trained on crops of large renders.

A crop of a 4K render has the token grid of a whole frame at the base's size, keeps its true place in the scene and shows what a
32-pixel token means there: bare ground, a stretch of edge. Only noise levels at which refinement works are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig

from muralist.data import latents
from muralist.train.loop import Schedule, begin, draw_curve, fit
from muralist.train.miniature import GRID, TextToVideo, load_vae
from muralist.train.objectives.flow import Batch, FlowConfig, FlowMatching
from muralist.types import Grid

ADAPTER = "uhr"
RANK = 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
HEIGHTS = (1088, 2176)
FRAMES = 9
CROP = (256, 448)


@dataclass(frozen=True, slots=True)
class Crops:
    """Batches from pools of several sizes, one size a batch."""

    pools: tuple[latents.LatentPool, ...]
    batch: int = 16

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch:
        pool = self.pools[rng.integers(len(self.pools))]
        return Batch(*pool.take(rng.integers(len(pool.captions), size=self.batch)))


def train_uhr(
    folder: Path, *, minutes: float, device: torch.device, resume: bool, model: Path, crops: int = 400, report: Callable[[str], None] = print
) -> Path:
    """LoRA on every projection of the base in `model`; writes `folder/adapters/uhr`. A copy of it in `model/adapters` puts it to use."""
    begin(folder, resume=resume)
    base = TextToVideo.of(model).to(device).requires_grad_(False)
    vae = load_vae(model / "vae").to(device).eval()
    pools = tuple(latents.build_pool(vae, _pool(height, crops), folder / "latents", device, report) for height in HEIGHTS)
    torch.manual_seed(0)
    base.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name=ADAPTER)
    objective = FlowMatching(base, base.transformer, base.embed, Crops(pools), FlowConfig(max_sigma=0.9), device)
    fit(objective, Schedule(minutes=minutes, learning_rate=1e-3, weight_decay=0.0), folder, resume=resume, report=report)
    for parameter in base.transformer.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    base.transformer.save_lora_adapter(folder / "adapters" / ADAPTER, adapter_name=ADAPTER)
    draw_curve(folder)
    return folder / "adapters" / ADAPTER


def _pool(height: int, crops: int) -> latents.PoolConfig:
    grid = Grid(num_frames=GRID.num_frames, height=height, width=height * 7 // 4, fps=GRID.fps)
    return latents.PoolConfig(name=f"crops-{height}", count=crops, grid=grid, frames=FRAMES, crop=CROP, seed=height)
