"""What a video VAE is trained on: crops of the world at every scale, rebuilt through a noisy, normalised latent.

Beside L1, squared and gradient losses there are three terms that the later stages need:
- noise on the latent, so that the decoder forgives the small errors of a denoiser;
- scale agreement (EQ-VAE, arXiv 2502.09509, eq. 5): a latent shrunk by interpolation decodes to the shrunk frames, so that a
  latent enlarged by interpolation is a sensible start for refinement;
- band energy: the finest two octaves carry as much power as the original, whatever their phase, so that frames are not smooth.

A VAE that goes on learning can be held to its earlier latents at the base's own size and wherever nothing moves: what was trained on those latents goes on
working, while what moves fast in large videos finds a place in them. One with other layers is `taught` first: its encoder learns those latents everywhere and
its decoder reads the earlier encoder's, each from the first step on and neither through the other.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from einops import rearrange

from muralist.base import mixed_precision
from muralist.data.shapes import REACH
from muralist.data.world import Crop, Scene, object_on, render_clip, sample_scene
from muralist.nn.single_frame import single_frame_convolutions
from muralist.types import Grid

HEIGHTS = (256, 256, 544, 1088, 2176, 2176)  # a third of the crops at the base's own scale, and as many where things cross a crop in two frames
FURTHER = (256, 1088, 2176, 2176)  # for weights that know their own scale
STILL = 0.01  # mean change of a picture in [-1, 1] from frame to frame, below which it stays as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionConfig:
    """Heights of the frames, one of which a crop is from; its side in pixels; frames of a clip, one of these numbers; batch of single frames and of clips of
    the first of these lengths (longer ones: as many as hold no more frames, at least one); share of the budget spent on single frames and, at its start,
    `taught` by an earlier VAE; how often errors count where the picture moves; loss weights; learning rate at its highest."""

    heights: tuple[int, ...] = HEIGHTS
    side: int = 96
    lengths: tuple[int, ...] = (9,)
    batch_single: int = 16
    batch_clip: int = 4
    single_share: float = 0.35
    latent_noise: float = 0.1
    kl: float = 1e-3
    gradient: float = 0.5
    squared: float = 2.0
    band: float = 0.02
    band_from: float = 0.3
    scale_every: int = 4
    held: float = 10.0
    taught: float = 0.0
    moving: float = 4.0
    learning_rate: float = 1e-3
    seed: int = 0

    def clips_of(self, frames: int) -> int:
        """How many clips of that length are a batch."""
        return max(1, self.batch_clip * self.lengths[0] // frames)


class Reconstruction:
    """Objective of `miniature-vae` and, where the encoder is frozen, of `miniature-decoder`; `module` is a diffusers AutoencoderKLWan.

    `earlier`: a VAE to whose latents those of `module` are held in crops at the base's own scale, and where a crop is `still`; everywhere while it is `taught`.
    """

    def __init__(self, vae: AutoencoderKLWan, config: ReconstructionConfig, device: torch.device, earlier: AutoencoderKLWan | None = None):
        self.module, self.config, self.device, self.earlier = vae, config, device, earlier

    def loss(self, step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        c = self.config
        single = progress < c.single_share
        rng = np.random.Generator(np.random.Philox(key=[c.seed, step]))
        frames = 1 if single else int(rng.choice(c.lengths))
        video, heights = _batch(rng, c.heights, c.batch_single if single else c.clips_of(frames), frames, c.side)
        video = video.to(self.device)
        generator = torch.Generator().manual_seed(c.seed * 1_000_003 + step)
        with single_frame_convolutions() if single else nullcontext():
            with torch.set_grad_enabled(any(p.requires_grad for p in self.module.encoder.parameters())), mixed_precision(self.device):
                mean = self.module.encode(video).latent_dist.mean.float()
            earlier = self._earlier(video)
            taught = earlier is not None and progress < c.taught
            z, target = earlier if taught else mean, video
            if step % c.scale_every == 0:
                z, target = _halved(z), _halved(video)
            z = z + c.latent_noise * torch.randn(z.shape, generator=generator).to(z.device)
            with mixed_precision(self.device):
                rebuilt = self.module.decode(z).sample.float()
        error, moves = rebuilt - target, ~still(video, tuple(mean.shape[2:]))
        counts = 1 + (c.moving - 1) * _over_pixels(moves, error.shape[2:])
        # the mean of the posterior is held near zero mean and unit variance, so that noise of a fixed size means the same everywhere
        spread = 0.5 * (mean**2).mean() - 0.5 * torch.log((mean**2).mean(dim=(0, 2, 3, 4)) + 1e-6).mean()
        terms = {
            "l1": (counts * error.abs()).mean(),
            "squared": c.squared * (counts * error**2).mean(),
            "gradient": c.gradient * _gradient_error(error, counts),
            "kl": c.kl * spread,
        }
        if progress >= c.band_from:
            terms["band"] = c.band * band_error(rebuilt, target)
        metrics = {"psnr": -10 * torch.log10((error.detach().clamp(-2, 2) ** 2).mean() / 4).item(), "rms_z": mean.detach().pow(2).mean().sqrt().item()}
        if earlier is not None:
            drift = (mean - earlier).square().mean(dim=1)  # [B, F, h, w]
            held = taught | (heights == min(HEIGHTS)).view(-1, 1, 1, 1).to(self.device) | ~moves
            terms["held"] = c.held * (drift * held).mean()
            metrics["drift"] = drift.detach().mean().sqrt().item()
        return sum(terms.values()), metrics

    def _earlier(self, video: torch.Tensor) -> torch.Tensor | None:
        """What the earlier VAE makes of it."""
        if self.earlier is None:
            return None
        with torch.no_grad(), mixed_precision(self.device):
            return self.earlier.encode(video).latent_dist.mean.float()


def _batch(rng: np.random.Generator, choice: tuple[int, ...], count: int, frames: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 3, T, side, side] in [-1, 1] and heights of their frames [B]: crops of random scenes at random scales, two thirds of them at the object."""
    clips, heights = [], []
    for _ in range(count):
        height = int(rng.choice(choice))
        grid = Grid(num_frames=29, height=height, width=height * 7 // 4)
        scene = sample_scene(rng)
        first = int(rng.integers(29 - frames + 1))
        crop = _crop_at(rng, scene, grid, int(rng.integers(first, first + frames)), side)  # of the first frame, what moves fast is gone in the third
        clips.append(render_clip(scene, grid, crop=crop, frames=range(first, first + frames)))
        heights.append(height)
    return rearrange(torch.stack(clips), "b t h w c -> b c t h w") * 2 - 1, torch.tensor(heights)


def _crop_at(rng: np.random.Generator, scene: Scene, grid: Grid, frame: int, side: int) -> Crop:
    """Two thirds have the object's outline in their middle on that frame, as far as the picture's borders allow."""
    if rng.random() < 0.67:
        x, y, reach = object_on(scene, grid, frame)
        angle = rng.uniform(0, 2 * np.pi)
        left, top = (at + reach / REACH * trig - side / 2 for at, trig in ((x, np.cos(angle)), (y, np.sin(angle))))
    else:
        left, top = rng.uniform(0, grid.width - side), rng.uniform(0, grid.height - side)
    return Crop(int(np.clip(top, 0, grid.height - side)), int(np.clip(left, 0, grid.width - side)), side, side)


def still(video: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Which latents stand for pictures that stay as they are: video [B, 3, T, H, W], in [-1, 1], and their shape (F, h, w) -> [B, F, h, w], bool.

    A latent and its neighbours must change by less than STILL from each frame to the next, on average over the latent's pixels.
    """
    frames, height, width = shape
    first = torch.ones(len(video), 1, height, width, dtype=torch.bool, device=video.device)  # a frame of its own
    if frames == 1:
        return first
    change = F.avg_pool3d(video.diff(dim=2).abs().mean(dim=1, keepdim=True), (1, video.shape[3] // height, video.shape[4] // width))
    every = change.shape[2] // (frames - 1)
    moved = F.max_pool3d(change, (every, 3, 3), stride=(every, 1, 1), padding=(0, 1, 1))[:, 0]
    return torch.cat([first, moved < STILL], dim=1)


def _halved(x: torch.Tensor) -> torch.Tensor:
    """Area average over 2x2, frame by frame."""
    return F.avg_pool3d(x, (1, 2, 2))


def _over_pixels(moves: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Of each latent [B, F, h, w] for the pixels of its frames, the first of which it has for itself: [B, 1, T, H, W], 0 or 1."""
    later = moves[:, 1:].repeat_interleave((shape[0] - 1) // max(moves.shape[1] - 1, 1), dim=1)
    return F.interpolate(torch.cat([moves[:, :1], later], dim=1)[:, None].float(), size=tuple(shape))


def _gradient_error(error: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (counts[..., 1:] * error.diff(dim=-1).abs()).mean() + (counts[..., 1:, :] * error.diff(dim=-2).abs()).mean()


def band_error(rebuilt: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of log power in two radial bands, [1/8, 1/4) and [1/4, 1/2) cycles a pixel, per frame."""
    return (_log_bands(rebuilt) - _log_bands(target)).abs().mean()


def _log_bands(x: torch.Tensor) -> torch.Tensor:
    height, width = x.shape[-2:]
    window = torch.hann_window(height, device=x.device)[:, None] * torch.hann_window(width, device=x.device)
    power = torch.fft.rfft2(x.mean(dim=1) * window).abs().square()
    radius = torch.hypot(torch.fft.fftfreq(height, device=x.device)[:, None], torch.fft.rfftfreq(width, device=x.device))
    bands = [(radius >= low) & (radius < 2 * low) for low in (0.125, 0.25)]
    return torch.stack([torch.log(power[..., band].mean(dim=-1) + 1e-4) for band in bands])
