"""World videos encoded once and kept: normalised latents with their captions, in memory and on disk.

A clip of 29 frames costs about a second to render and encode and is then used many times. Shards are safetensors with the
captions in the header; a cache that was interrupted goes on where it stopped, and a shard is a pure function of its number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file

from muralist.data.world import Crop, Scene, caption, render_clip, sample_scene
from muralist.nn.single_frame import single_frame_convolutions
from muralist.types import Grid

SHARD = 100  # videos
BATCH_FRAMES = 24  # encoded at a time: two clips at least, since torch takes its slow convolution for a single small one


@dataclass(frozen=True, slots=True)
class LatentPool:
    """Latents [n, C, F, h, w] in half precision and one caption each."""

    z: torch.Tensor
    captions: list[str]

    def take(self, index: np.ndarray) -> tuple[torch.Tensor, list[str]]:
        return self.z[torch.from_numpy(index)].float(), [self.captions[i] for i in index]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Which videos: their grid, how many consecutive frames of it (all by default), and a crop (height, width) in pixels for large grids."""

    name: str
    count: int
    grid: Grid
    frames: int | None = None
    crop: tuple[int, int] | None = None
    camera_share: float = 0.3
    seed: int = 1


@dataclass(frozen=True, slots=True)
class LatentPairs:
    """The same videos twice: `low` [n, C, F, h, w] and `high` [n, C, F, H, W], in half precision."""

    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """Crops of `side` pixels of scenes at the size `low`, and the same part of the scene `scale` times larger; `side * scale` must be legal."""

    name: str
    count: int
    low: Grid
    scale: float
    side: int = 128
    frames: int = 9
    seed: int = 1


def build_pairs(vae: AutoencoderKLWan, config: PairConfig, folder: Path, device: torch.device, report: Callable[[str], None] = print) -> LatentPairs:
    """As `build_pool`: load the shards from `folder`, encoding those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    low, high = [], []
    for shard in range((config.count + SHARD - 1) // SHARD):
        path = folder / f"{config.name}-{shard:04d}.safetensors"
        if not path.is_file():
            rng = np.random.Generator(np.random.Philox(key=[config.seed, shard]))
            pairs = [_pair(vae, config, rng, device) for _ in range(SHARD)]
            _save(path, {name: torch.cat(tensors) for name, tensors in zip(("low", "high"), zip(*pairs))}, {})
            report(f"{config.name}: {min((shard + 1) * SHARD, config.count)} of {config.count} pairs encoded")
        with safe_open(path, "pt") as file:
            low.append(file.get_tensor("low"))
            high.append(file.get_tensor("high"))
    return LatentPairs(torch.cat(low)[: config.count], torch.cat(high)[: config.count])


def _pair(vae: AutoencoderKLWan, config: PairConfig, rng: np.random.Generator, device: torch.device) -> list[torch.Tensor]:
    scene, grid, side = sample_scene(rng, duration=config.low.duration), config.low, config.side
    first = int(rng.integers(grid.num_frames - config.frames + 1))
    top, left = (int(rng.integers(whole - side + 1)) for whole in (grid.height, grid.width))
    result = []
    for scale in (1, config.scale):
        at = [round(value * scale) for value in (top, left, side, side)]
        large = grid.resized(height=round(grid.height * scale), width=round(grid.width * scale))
        video = render_clip(scene, large, crop=Crop(*at), frames=range(first, first + config.frames))
        result.append(encode(vae, video[None].to(device)).half().cpu())
    return result


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.rename(path)


def build_pool(vae: AutoencoderKLWan, config: PoolConfig, folder: Path, device: torch.device, report: Callable[[str], None] = print) -> LatentPool:
    """Load the pool's shards from `folder`, encoding those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    latents, captions = [], []
    for shard in range((config.count + SHARD - 1) // SHARD):
        path = folder / f"{config.name}-{shard:04d}.safetensors"
        if not path.is_file():
            _encode_shard(vae, config, shard, path, device)
            report(f"{config.name}: {min((shard + 1) * SHARD, config.count)} of {config.count} videos encoded")
        with safe_open(path, "pt") as file:
            latents.append(file.get_tensor("z"))
            captions += json.loads(file.metadata()["captions"])
    return LatentPool(torch.cat(latents)[: config.count], captions[: config.count])


def _encode_shard(vae: AutoencoderKLWan, config: PoolConfig, shard: int, path: Path, device: torch.device) -> None:
    rng = np.random.Generator(np.random.Philox(key=[config.seed, shard]))
    length = config.frames or config.grid.num_frames
    latents, captions = [], []
    together = max(BATCH_FRAMES // length, 2)
    for done in range(0, SHARD, together):
        scenes, videos = zip(*(_draw(rng, config, length) for _ in range(min(together, SHARD - done))))
        latents += encode(vae, torch.stack(videos).to(device)).half().cpu()
        captions += map(caption, scenes)
    _save(path, {"z": torch.stack(latents)}, {"captions": json.dumps(captions)})


def _draw(rng: np.random.Generator, config: PoolConfig, length: int) -> tuple[Scene, torch.Tensor]:
    """A scene and `length` consecutive frames of it, [T, H, W, 3]."""
    scene = sample_scene(rng, camera_share=config.camera_share, duration=config.grid.duration)
    first = int(rng.integers(config.grid.num_frames - length + 1))
    return scene, render_clip(scene, config.grid, crop=random_crop(rng, scene, config), frames=range(first, first + length))


def random_crop(rng: np.random.Generator, scene: Scene, config: PoolConfig) -> Crop | None:
    """A crop at a place of the token grid (multiples of 32 pixels), anywhere in the frame."""
    if config.crop is None:
        return None
    height, width = config.crop
    top, left = (32 * int(rng.integers((full - side) // 32 + 1)) for full, side in ((config.grid.height, height), (config.grid.width, width)))
    return Crop(top, left, height, width)


@torch.inference_mode()
def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Pixel videos [B, T, H, W, 3] in [0, 1] -> normalised latents [B, C, F, h, w], the posterior's mean."""
    x = rearrange(video, "b t h w c -> b c t h w").to(vae.dtype) * 2 - 1
    mean, std = latent_statistics(vae, x.device)
    with single_frame_convolutions() if x.shape[2] == 1 else nullcontext():
        return (vae.encode(x).latent_dist.mean.float() - mean) / std


@torch.inference_mode()
def decode(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """The inverse for small videos, by diffusers' own decoder: [1, C, F, h, w] -> [T, H, W, 3] in [0, 1]."""
    mean, std = latent_statistics(vae, z.device)
    video = vae.decode((z * std + mean).to(vae.dtype)).sample
    return rearrange((video.float() / 2 + 0.5).clamp(0, 1), "1 c t h w -> t h w c")


def latent_statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, each [1, C, 1, 1, 1], from the VAE's configuration."""
    return tuple(torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
