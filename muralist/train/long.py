"""`proxy` and `detail`: what a base learns so that long, large videos can be painted in sight of a small one, at its own resolution alone.

`proxy`: whole clips of the base's size and number of frames at a quarter of its rate, their latent frames at every fourth temporal position
(AtlasVid's temporally scaled rotary positions, r_t = 4). `detail`: clips at the base's own size and rate in small windows, each in sight of a
still smaller and slower proxy of the clip. What a window does at 4K, with large windows and a proxy of the base's size, is the same task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from muralist.base import select_adapter
from muralist.data.latents import LatentPool, PoolConfig
from muralist.stages.proxy import LowFrameRateProxy
from muralist.stages.refine import ProxyWindows, Refine
from muralist.train.loop import Report, begin
from muralist.train.objectives.flow import Batch, FlowConfig, FlowMatching
from muralist.train.trainee import Trainee, VideoData, fit_adapter, give_adapter
from muralist.types import Grid

PROXY, DETAIL = "proxy", "detail"  # adapters
EVERY = 4  # latent frames
SHRINK = 2  # the proxy of a training clip has the clip's sides divided by this


@dataclass(frozen=True, slots=True)
class Clips:
    """Batches of whole clips, with their proxies if there are any; `stride` latent frames stand between two of theirs."""

    pool: LatentPool
    stride: int = 1
    batch: int = 4

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch:
        index = rng.integers(len(self.pool.captions), size=self.batch)
        proxy = None if self.pool.proxy is None else self.pool.proxy[torch.from_numpy(index)].float()
        return Batch(*self.pool.take(index), stride=self.stride, proxy=proxy)


def train_proxy(
    folder: Path, *, minutes: float, device: torch.device, resume: bool, model: Path, data: VideoData | None = None, report: Report = print
) -> Path:
    """LoRA on clips of a quarter of the base's rate; writes `folder/adapters/proxy`."""
    begin(folder, resume=resume)
    trainee, data = Trainee(model, device), (data or VideoData()).settled()
    own = trainee.own_grid
    slow = replace(own, fps=own.fps / EVERY)
    (pool,) = trainee.encoded([PoolConfig(name="slow", count=data.clips, grid=slow, seed=11)], data, folder, report)
    give_adapter(trainee, PROXY)
    objective = FlowMatching(trainee, trainee.transformer, trainee.embed, Clips(pool, stride=EVERY), _config(trainee), device)
    return fit_adapter(trainee, PROXY, objective, folder, minutes, resume, trainee.origin(data), report)


def train_detail(
    folder: Path, *, minutes: float, device: torch.device, resume: bool, model: Path, data: VideoData | None = None, report: Report = print
) -> Path:
    """LoRA on clips in small windows that see a proxy, which is looked at with the adapter `proxy` if there is one; writes `folder/adapters/detail`."""
    begin(folder, resume=resume)
    trainee, data = Trainee(model, device), (data or VideoData()).settled()
    own = trainee.own_grid
    coarse = _small_proxy(own).grid(own, trainee.info.geometry)
    (pool,) = trainee.encoded([PoolConfig(name="paired", count=data.clips, grid=own, proxy=coarse, seed=12)], data, folder, report)
    give_adapter(trainee, DETAIL)
    graft = training_windows(trainee).graft(trainee.info.geometry.token_shape(own))
    objective = InSightOfProxy(trainee, trainee.transformer, trainee.embed, Clips(pool), replace(_config(trainee), graft=graft), device)
    return fit_adapter(trainee, DETAIL, objective, folder, minutes, resume, trainee.origin(data), report)


class InSightOfProxy(FlowMatching):
    """Flow matching of clips in guided windows. The proxy is seen clean, as the base and its own adapter see it; no gradient goes there."""

    def _predict(self, batch: Batch, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, **extra: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            select_adapter(self.transformer, PROXY if PROXY in self.module.info.adapters else None)
            memory = self.transformer.remember(batch.proxy.to(self.device), torch.zeros_like(sigma), text, float(EVERY))
        select_adapter(self.transformer, DETAIL)
        for name, parameter in self.transformer.named_parameters():  # switching an adapter on makes it trainable and freezes the others
            parameter.requires_grad_(f".{DETAIL}." in name)
        self.transformer.configure(self.config.graft)
        return self.transformer(noisy, 1000 * sigma, text, return_dict=False, attention_kwargs={"proxy": memory, **extra})[0]


def training_windows(trainee: Trainee) -> Refine:
    """The windows of training."""
    windows = ProxyWindows.trained(trainee.info.geometry.token_shape(trainee.own_grid))
    return Refine(num_inference_steps=1, guidance_scale=1.0, flow_shift=1.0, attention=windows, token_chunk=None)


def _small_proxy(own: Grid) -> LowFrameRateProxy:
    return LowFrameRateProxy(height=own.height // SHRINK, width=own.width // SHRINK, num_inference_steps=1, guidance_scale=1.0, flow_shift=1.0, every=EVERY)


def _config(trainee: Trainee) -> FlowConfig:
    return FlowConfig(prediction=trainee.info.prediction, shift=trainee.info.defaults.flow_shift)
