"""`proxy`, `detail`, `detail-uhr`: what a base learns so that long, large videos can be painted in sight of a small one.

`proxy`: whole clips of the base's size and number of frames at a quarter of its rate, their latent frames at every fourth temporal position
(AtlasVid's temporally scaled rotary positions, r_t = 4). `detail`: clips at the base's own size and rate in small windows, each in sight of a
still smaller and slower proxy of the clip. What a window does at 4K, with large windows and a proxy of the base's size, is the same task: nothing
above the base's own size is needed (the paper trains at 720p alone).

`detail-uhr` goes on from `detail` on crops of large videos, each in sight of the whole one as a proxy of the base's size (the paper's optional
fine-tuning at 4K). A small base needs it: what it calls an object is a few tokens wide, at 4K half a hundred. Crops, their sizes and the share of
them that lie on the object are ours. Its windows are as large as a crop, half of its frames each, unless that is more than windows ever have: there
the task need not be scaled down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from muralist.data.latents import LatentPool, PoolConfig
from muralist.nn.adapters import select_adapter
from muralist.nn.attention import ProxyMemory, Within
from muralist.stages.proxy import LowFrameRateProxy
from muralist.stages.refine import PROXY_SHRINK, ProxyWindows, Refine
from muralist.stages.upsample import LATENT_SCALE
from muralist.train import state
from muralist.train.loop import CHECKPOINTS, Length, Report, begin
from muralist.train.objectives.flow import Batch, FlowConfig, FlowMatching, Source
from muralist.train.trainee import AIMED, Trainee, VideoData, fit_adapter, give_adapter, train_alone
from muralist.train.uhr import DAMAGE, start_of_path
from muralist.types import Grid

PROXY, DETAIL, DETAIL_UHR = "proxy", "detail", "detail_uhr"  # adapters
EVERY = 4  # latent frames


@dataclass(frozen=True, slots=True)
class Clips:
    """Batches of whole clips, with their proxies if there are any; `stride` latent frames stand between two of theirs. `skip_share`: see `_from_proxy`."""

    pool: LatentPool
    stride: int = 1
    skip_share: float = 0.0
    batch: int = 4

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch:
        index = rng.integers(len(self.pool.captions), size=self.batch)
        batch = Batch(*self.pool.take(index), stride=self.stride)
        return batch if self.pool.proxy is None else _from_proxy(batch, self.pool, index, self.skip_share, rng)


@dataclass(frozen=True, slots=True)
class Sighted:
    """Batches of crops, one size a batch, with the whole videos as proxies. `crop`: a crop's token grid; `skip_share`: see `_from_proxy`."""

    pools: tuple[LatentPool, ...]
    crop: tuple[int, int, int]
    skip_share: float
    batch: int = 4

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch:
        pool, (frames, rows, columns) = self.pools[rng.integers(len(self.pools))], self.crop
        index = rng.integers(len(pool.captions), size=self.batch)
        places = ((top, left, rows / height, columns / width) for top, left, height, width in pool.places[torch.from_numpy(index)].tolist())
        within = [Within((frames, tall, wide), (0.0, top * tall, left * wide)) for top, left, tall, wide in places]
        return _from_proxy(Batch(*pool.take(index), within=within), pool, index, self.skip_share, rng)


def _from_proxy(batch: Batch, pool: LatentPool, index: np.ndarray, skip_share: float, rng: np.random.Generator) -> Batch:
    """The batch in sight of its slow proxies, on the path from the guides that they make: these replace `skip_share` of the steps, or fewer."""
    chosen = torch.from_numpy(index)
    return replace(batch, proxy=pool.proxy[chosen].float(), guide=pool.guide[chosen].float(), skip_share=start_of_path(rng, skip_share))


def train_proxy(
    folder: Path, *, length: Length, device: torch.device, resume: bool, model: Path, data: VideoData | None = None, report: Report = print
) -> Path:
    """LoRA on clips of a quarter of the base's rate; writes `folder/adapters/proxy`."""
    begin(folder, resume=resume)
    trainee, data = Trainee(model, device), (data or VideoData()).settled()
    own = trainee.own_grid
    slow = replace(own, fps=own.fps / EVERY)
    (pool,) = trainee.encoded([PoolConfig(name="slow", count=data.clips, grid=slow, seed=11)], data, folder, report)
    give_adapter(trainee, PROXY)
    objective = FlowMatching(trainee, trainee.transformer, trainee.embed, Clips(pool, stride=EVERY), _config(trainee), device)
    return fit_adapter(trainee, PROXY, objective, folder, length, resume, trainee.origin(data), report)


def train_detail(
    folder: Path, *, length: Length, device: torch.device, resume: bool, model: Path, data: VideoData | None = None, report: Report = print
) -> Path:
    """LoRA on clips in small windows that see a proxy, which is looked at with the adapter `proxy` if there is one; writes `folder/adapters/detail`."""
    begin(folder, resume=resume)
    trainee, data = Trainee(model, device), (data or VideoData()).settled()
    windows = training_windows(trainee)
    origin = _origin(trainee, data, folder, PROXY) | {"windows": repr(windows.attention)}
    own = trainee.own_grid
    coarse = _slow_proxy(own, PROXY_SHRINK).grid(own, trainee.info.geometry)
    (pool,) = trainee.encoded([PoolConfig(name="paired", count=data.clips, grid=own, proxy=coarse, guide_scale=LATENT_SCALE, seed=12)], data, folder, report)
    give_adapter(trainee, DETAIL)
    graft = windows.graft(trainee.info.geometry.token_shape(own))
    objective = InSightOfProxy(trainee, Clips(pool, skip_share=trainee.info.defaults.skip_share), replace(_config(trainee), graft=graft), DETAIL)
    return fit_adapter(trainee, DETAIL, objective, folder, length, resume, origin, report)


def train_detail_uhr(
    folder: Path, *, length: Length, device: torch.device, resume: bool, model: Path, data: VideoData | None = None, report: Report = print
) -> Path:
    """LoRA on crops of large videos, in sight of the whole; starts as `detail` if there is one. Writes `folder/adapters/detail_uhr`."""
    begin(folder, resume=resume)
    trainee, data = Trainee(model, device), (data or VideoData()).settled()
    origin = _origin(trainee, data, folder, PROXY, DETAIL)
    configs = [_sighted_pool(trainee, height, data) for height in data.heights]
    pools = trainee.encoded(configs, data, folder, report)
    give_adapter(trainee, DETAIL_UHR, like=DETAIL)
    own = trainee.info.geometry.token_shape(trainee.own_grid)
    config = replace(_config(trainee), graft=_refine(ProxyWindows.of_crops(own)).graft(own))
    objective = InSightOfProxy(trainee, Sighted(pools, own, trainee.info.defaults.skip_share), config, DETAIL_UHR)
    return fit_adapter(trainee, DETAIL_UHR, objective, folder, length, resume, origin, report)


class InSightOfProxy(FlowMatching):
    """Flow matching of clips in guided windows. The proxy is seen clean, as the base and its own adapter see it; no gradient goes there."""

    def __init__(self, trainee: Trainee, source: Source, config: FlowConfig, adapter: str):
        super().__init__(trainee, trainee.transformer, trainee.embed, source, config, trainee.base.device)
        self.adapter = adapter

    def _predict(self, batch: Batch, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, **extra: torch.Tensor) -> torch.Tensor:
        memory = self._remembered(batch, sigma, text)
        self.transformer.configure(self.config.graft)
        if batch.within is None:
            return self._seen(memory, noisy, sigma, text, **extra)
        # each crop lies elsewhere, so that its windows have other neighbours: one at a time
        each = (memory.of(i, within) for i, within in enumerate(batch.within))
        inputs = (x.split(1) for x in (noisy, sigma, text))
        return torch.cat([self._seen(one, *given, **extra) for one, *given in zip(each, *inputs)])

    def _remembered(self, batch: Batch, sigma: torch.Tensor, text: torch.Tensor) -> ProxyMemory:
        with torch.no_grad():
            select_adapter(self.transformer, PROXY if PROXY in self.module.info.adapters else None)
            memory = self.transformer.remember(batch.proxy.to(self.device), torch.zeros_like(sigma), text, float(EVERY))
        train_alone(self.transformer, self.adapter)
        return memory

    def _seen(self, memory: ProxyMemory, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, **extra: torch.Tensor) -> torch.Tensor:
        return self.transformer(noisy, 1000 * sigma, text, return_dict=False, attention_kwargs={"proxy": memory, **extra})[0]


def _origin(trainee: Trainee, data: VideoData, folder: Path, *adapters: str) -> dict[str, str]:
    """What such a training stands on, the base's adapters among it, where it has them. Raises UserError if checkpoints in `folder` stand on others."""
    origin = trainee.origin(data) | trainee.path_origin | trainee.standing_on(*(f"adapter {name}" for name in adapters))
    state.require_origin(folder / CHECKPOINTS, origin)
    return origin


def training_windows(trainee: Trainee) -> Refine:
    """The windows of training at the base's own resolution."""
    return _refine(ProxyWindows.trained(trainee.info.geometry.token_shape(trainee.own_grid)))


def _refine(windows: ProxyWindows) -> Refine:
    return Refine(num_inference_steps=1, guidance_scale=1.0, flow_shift=1.0, attention=windows, token_chunk=None)


def _sighted_pool(trainee: Trainee, height: int, data: VideoData) -> PoolConfig:
    """Crops of the base's own size and number of frames, with the whole videos at its own size and a quarter of the rate."""
    crops, own = trainee.crop_pool(height, data), trainee.own_grid
    coarse = _slow_proxy(own).grid(own, trainee.info.geometry)
    return replace(crops, name=f"sighted-{height}", frames=own.num_frames, proxy=coarse, guide_scale=LATENT_SCALE, damage=DAMAGE, aimed=AIMED)


def _slow_proxy(own: Grid, shrink: int = 1) -> LowFrameRateProxy:
    return LowFrameRateProxy(height=own.height // shrink, width=own.width // shrink, num_inference_steps=1, guidance_scale=1.0, flow_shift=1.0, every=EVERY)


def _config(trainee: Trainee) -> FlowConfig:
    return FlowConfig(prediction=trainee.info.prediction, shift=trainee.info.defaults.flow_shift)
