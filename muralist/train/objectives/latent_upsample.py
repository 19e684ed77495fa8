"""What the latent upsampler is trained on: latents of the same video at two sizes (LUVE, section 3.2 and appendix C.3).

First the latent alone, L1. Then also what it decodes to: L1 of pixels and of their differences from frame to frame, on one random crop of the
first latent frames of one video, which keeps the decoder's activations small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch.utils.checkpoint import checkpoint

from muralist.data.latents import LatentPairs, latent_statistics
from muralist.nn.latent_upsampler import LatentUpsampler


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentUpsampleConfig:
    """`pixels_from`: share of the budget spent on latents alone; `patch`: side of the decoded crop in latent positions."""

    batch: int = 4
    pixels_from: float = 0.5
    pixel: float = 1.0
    difference: float = 1.0
    patch: int = 8
    seed: int = 0


class LatentUpsample:
    """Objective of the latent upsampler; `vae` is frozen. Each step takes one of the pools, hence one scale."""

    def __init__(self, module: LatentUpsampler, vae: AutoencoderKLWan, pools: Sequence[LatentPairs], config: LatentUpsampleConfig, device: torch.device):
        self.module, self.vae, self.pools, self.config, self.device = module, vae.requires_grad_(False), pools, config, device
        self.mean, self.std = latent_statistics(vae, device)

    def loss(self, step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        c = self.config
        rng = np.random.Generator(np.random.Philox(key=[c.seed, step]))
        pool = self.pools[rng.integers(len(self.pools))]
        index = torch.from_numpy(rng.integers(len(pool.low), size=c.batch))
        low, high = (z[index].to(self.device, torch.float32) for z in (pool.low, pool.high))
        predicted = self.module(low, tuple(high.shape[-2:]))
        terms = {"latent": (predicted - high).abs().mean()}
        if progress >= c.pixels_from:
            terms |= self._pixel_terms(predicted[:1], high[:1], rng)
        return sum(terms.values()), {name: term.item() for name, term in terms.items()}

    def _pixel_terms(self, predicted: torch.Tensor, high: torch.Tensor, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        c = self.config
        frames = high.shape[2] // 2 + 1
        rows, columns = (slice(start := int(rng.integers(max(side - c.patch, 0) + 1)), start + c.patch) for side in high.shape[-2:])
        crops = [z[:, :, :frames, rows, columns] * self.std + self.mean for z in (predicted, high)]
        made = checkpoint(self._decode, crops[0], use_reentrant=False)
        with torch.no_grad():
            true = self._decode(crops[1])
        terms = {"pixel": c.pixel * F.l1_loss(made, true)}
        if made.shape[2] > 1:
            terms["difference"] = c.difference * F.l1_loss(made.diff(dim=2), true.diff(dim=2))
        return terms

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z).sample
