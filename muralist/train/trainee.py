"""A base of any kind, frozen, to which something is added and taught: an adapter, experts."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from torch import nn

from muralist.base import Base, pick_dtype
from muralist.base_info import UPSAMPLER, BaseInfo, inspect_base
from muralist.data import latents
from muralist.data.degrade import AnchorDamage
from muralist.data.latents import LatentPool, PoolConfig
from muralist.data.sharpen import Unsharp
from muralist.data.sources import Source, World
from muralist.errors import UserError
from muralist.nn.adapters import select_adapter, several_adapters
from muralist.nn.enlarge import sampled
from muralist.stages.prompt import embed
from muralist.store import weights
from muralist.train import state
from muralist.train.loop import CHECKPOINTS, Length, Report, Schedule, draw_curve, fit
from muralist.train.miniature import load_vae
from muralist.train.objectives.flow import Batch, FlowMatching
from muralist.types import Grid

FRAMES = 17  # of a crop, if the base makes as many: five latent frames, of which the last two no longer see where the clip begins
AIMED = 0.5  # the share of crops that lie on the object where something tells of it: at 4K most of the picture is bare ground
WORLD_HEIGHTS = (1088, 2176)
CLIPS = 400  # encoded of each height
RANK = 32  # of adapters
LEARNING_RATE = 1e-3  # of adapters and of what is new beside them
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoData:
    """Which videos, and how many clips of each size. `heights`: of the world's renders, or of the one size that footage is shrunk to.

    None: the training's own number, once it is `settled`.
    """

    source: Source = field(default_factory=World)
    heights: tuple[int, ...] | None = None
    clips: int | None = None
    sharpen: Unsharp | None = None

    @property
    def origin(self) -> dict[str, str]:
        """What a training on these videos stands on."""
        return {"data": json.dumps([self.source.identity, self.heights], sort_keys=True), "--clips": str(self.clips)}

    def settled(self, heights: tuple[int, ...] = WORLD_HEIGHTS, clips: int = CLIPS) -> VideoData:
        """The same with a training's own numbers where none are given."""
        return replace(self, heights=self.heights or heights, clips=self.clips or clips)


class Trainee(nn.Module):
    """`transformer` in float32, nothing in it trained yet; `embed` knows the captions that it was told of.

    Args:
        model: a diffusers folder. One with two transformers is refused.
    """

    def __init__(self, model: Path, device: torch.device):
        super().__init__()
        self.info: BaseInfo = inspect_base(str(model))
        if self.info.boundary is not None:
            raise UserError("two transformers cannot be trained at once", where="from", fix="give a base with one, such as Wan2.1 or Wan2.2-TI2V-5B")
        self.base = Base(self.info, device, torch.float32)
        self.transformer = self.base.transformer().requires_grad_(False).train()
        if device.type == "cuda":
            self.transformer.enable_gradient_checkpointing()
        self._known: dict[str, torch.Tensor] = {}

    def origin(self, data: VideoData) -> dict[str, str]:
        """What a training of this base on these videos stands on: another one is not gone on with."""
        return {"base": weights.fingerprint(self.info.folder / "transformer"), **data.origin}

    @property
    def path_origin(self) -> dict[str, str]:
        """Where the path of a training from guides begins."""
        return {"path": json.dumps([self.info.defaults.skip_share, self.info.defaults.flow_shift])}

    def standing_on(self, *names: str) -> dict[str, str]:
        """The fingerprints of what the base has beside its components, such as `adapter proxy` and `part injector`; `none` where it lacks one."""
        return {name: self.info.fingerprints.get(name, "none") for name in names}

    @property
    def own_grid(self) -> Grid:
        """The grid that the base was made for."""
        return self.info.geometry.legal(self.info.defaults.grid)

    def embed(self, captions: Sequence[str]) -> torch.Tensor:
        """[B, L, D_text]; padding is zeros."""
        known = [self._known[text] for text in captions]
        length = self.info.defaults.max_sequence_length
        return torch.stack([nn.functional.pad(x.float(), (0, 0, 0, length - len(x))) for x in known]).to(self.base.device)

    def learn_captions(self, captions: Sequence[str]) -> None:
        """Embed the captions and the empty one, once each, in the type in which videos are painted; the text encoder goes again."""
        encoder = Base(self.info, self.base.device, pick_dtype(self.base.device))  # UMT5-xxl in float32 takes 23 GB
        for text in sorted({*captions, ""} - self._known.keys()):
            embedded = embed(encoder, text)[0]
            self._known[text] = embedded[: int(embedded.any(dim=-1).sum())].half().cpu()
        encoder.release("text_encoder", "tokenizer")

    def encoded(self, configs: Sequence[PoolConfig], data: VideoData, folder: Path, report: Report) -> tuple[LatentPool, ...]:
        """These pools, encoded into `folder/latents` where they are missing, and their captions learned.

        Raises UserError before that if checkpoints in `folder` stand on another base or other videos.
        """
        state.require_origin(folder / CHECKPOINTS, self.origin(data))
        vae = load_vae(self.info.folder / "vae").to(self.base.device).eval()

        def built(config: PoolConfig) -> LatentPool:
            upsampler = self.base.latent_upsampler() if config.guide_rest == "learned" else None
            return latents.build_pool(vae, config, folder / "latents", report, data.source, upsampler)

        pools = tuple(built(config) for config in configs)
        self.base.release(UPSAMPLER)
        self.learn_captions([text for pool in pools for text in pool.captions])
        return pools

    def crop_pool(self, height: int, data: VideoData) -> PoolConfig:
        """Crops of the base's own size from videos of one height."""
        own = self.own_grid
        large = self.info.geometry.legal(Grid(num_frames=own.num_frames, height=height, width=round(height * own.width / own.height), fps=own.fps))
        kind = "sharp" if data.sharpen else "crops"
        return PoolConfig(
            name=f"{kind}-{height}",
            count=data.clips,
            grid=large,
            frames=min(FRAMES, own.num_frames),
            crop=(own.height, own.width),
            sharpen=data.sharpen,
            seed=height,
        )

    def guided_pool(self, name: str, height: int, data: VideoData, damage: AnchorDamage) -> PoolConfig:
        """The same crops, each with its whole video at the base's own size, damaged so that it can stand for what the base generates."""
        crops = self.crop_pool(height, data)
        proxy = replace(self.own_grid, num_frames=crops.length)
        return replace(crops, name=f"{name}-{height}", proxy=proxy, damage=damage, aimed=AIMED)


@dataclass(frozen=True, slots=True)
class Crops:
    """Batches from pools of several sizes, one size a batch, with their guides, or with proxies cut where the crops lie (`cut_to`), if there are any."""

    pools: tuple[LatentPool, ...]
    batch: int = 10

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch:
        pool = self.pools[rng.integers(len(self.pools))]
        index = rng.integers(len(pool.captions), size=self.batch)
        batch, chosen = Batch(*pool.take(index)), torch.from_numpy(index)
        if pool.guide is not None:
            return replace(batch, guide=pool.guide[chosen].float())
        if pool.proxy is not None:
            return replace(batch, proxy=cut_to(pool.proxy[chosen].float(), pool.places[chosen], batch.x.shape[2:]))
        return batch


def cut_to(whole: torch.Tensor, places: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Latents of whole videos [B, C, F', h', w'] -> those of crops, [B, C, F, h, w], the first F frames.

    `places` [B, 4]: top, left, height and width of each crop as shares of the frame. Samples stand at the middles of the crop's latents.
    """
    return sampled(whole[:, :, : shape[0]], places, shape[1:], "bilinear")


def give_adapter(trainee: Trainee, name: str, like: str | None = None) -> None:
    """A new adapter on every projection, or the base's own one of that name, ready to be trained; nothing else is.

    A new one starts as the base's adapter `like`, where there is one.
    """
    torch.manual_seed(0)
    transformer = trainee.transformer
    if name not in trainee.info.adapters:
        known = like in trainee.info.adapters
        with several_adapters():
            config = copy.deepcopy(transformer.peft_config[like]) if known else LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
            transformer.add_adapter(config, adapter_name=name)
        if known:
            _copy_adapter(transformer, like, name)
    train_alone(transformer, name)


def train_alone(transformer: nn.Module, adapter: str) -> None:
    """Switch an adapter on, and let nothing else be trained."""
    select_adapter(transformer, adapter)
    for name, parameter in transformer.named_parameters():  # switching one on makes it trainable and leaves what else was
        parameter.requires_grad_(f".{adapter}." in name)


def _copy_adapter(transformer: nn.Module, source: str, target: str) -> None:
    parameters = dict(transformer.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".{target}." in name:
                parameter.copy_(parameters[name.replace(f".{target}.", f".{source}.")])


def fit_adapter(
    trainee: Trainee,
    name: str,
    objective: FlowMatching,
    folder: Path,
    length: Length,
    resume: bool,
    origin: Mapping[str, str],
    report: Report,
    learning_rate: float = LEARNING_RATE,
) -> Path:
    """Train the adapter, and what else is trainable, and write the adapter to `folder/adapters/name`, in bfloat16."""
    fit(objective, Schedule(length=length, learning_rate=learning_rate, weight_decay=0.0), folder, resume=resume, origin=origin, report=report)
    for parameter_name, parameter in trainee.transformer.named_parameters():
        if f".{name}." in parameter_name:  # the adapter alone: parts beside it are stored by whoever made them
            parameter.data = parameter.data.to(torch.bfloat16)
    trainee.transformer.save_lora_adapter(folder / "adapters" / name, adapter_name=name)
    draw_curve(folder)
    return folder / "adapters" / name
