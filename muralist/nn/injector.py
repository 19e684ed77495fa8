"""The anchor-guided injector (PixelWizard, section 3.3): a small video of the scene, refined and added to the tokens of a large one.

    tokens = tokens + out((1 + alpha) z'),   z' = norm(conv3(conv1(anchor at the token grid))),   alpha = tanh(MLP(Sin(t)) + MLP(Sin(dt)))

t is the noise level and dt the size of the step, both on the scale of timesteps. `out` is zero at the start, so that a fresh injector changes
nothing. z' does not depend on t: it is made once a video. As in the release the two MLPs are apart, the anchor's latent is resized to the
grid of tokens, and injection stands before block 1; per channel or scalar gates, all blocks, and plain addition are variants.

A part of kind `injector` (`store/parts.py`) holds the weights and `InjectorConfig`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from muralist.errors import UserError
from muralist.nn.kinds import FREQUENCIES, InjectorConfig
from muralist.nn.step_size import waves
from muralist.nn.windows import Shape

GROUPS = 16


class AnchorInjector(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: InjectorConfig):
        super().__init__()
        self.config, dim = config, config.dim
        self.features = _refinement(config.channels, config.inner, dim) if config.refined else nn.Conv3d(config.channels, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=1e-6)  # as released
        width = {"channel": dim, "scalar": 1, "none": 0}[config.gate]
        self.gate_t, self.gate_dt = (_gate(dim, width) if width else None for _ in range(2))
        self.out = nn.ModuleDict({str(block): nn.Linear(dim, dim) for block in config.blocks})
        for layer in self.out.values():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def refine(self, anchor: torch.Tensor, token_shape: Shape) -> torch.Tensor:
        """The anchor's latent [B, C, F, h, w] on a token grid of as many latent frames: z' [B, N, D], N in raster order."""
        frames, rows, columns = token_shape
        if anchor.shape[2] != frames:
            raise UserError(f"an anchor of {anchor.shape[2]} latent frames for {frames}", where="anchor", fix="use a proxy at the target's frame rate")
        images = F.interpolate(rearrange(anchor, "b c f h w -> (b f) c h w"), size=(rows, columns), mode="bilinear", align_corners=False)
        video = rearrange(images, "(b f) c y x -> b c f y x", f=frames)
        return self.norm(rearrange(self.features(video), "b d f y x -> b (f y x) d"))

    def gain(self, timestep: torch.Tensor, step_size: torch.Tensor) -> torch.Tensor:
        """1 + alpha for timesteps [B] and step sizes [B]: [B, 1, D], [B, 1, 1] for a scalar gate."""
        if self.gate_t is None:
            return torch.ones(len(timestep), 1, 1, device=timestep.device)
        of_t, of_dt = (gate(waves(v).to(gate[0].weight.dtype)) for gate, v in ((self.gate_t, timestep), (self.gate_dt, step_size)))
        return 1 + torch.tanh(of_t + of_dt)[:, None]

    def works_before(self, block: int) -> bool:
        return str(block) in self.out

    def update(self, block: int, features: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """What is added before a block, from any part of z' [B, n, D]."""
        return self.out[str(block)](features * gain.to(features.dtype))


def _refinement(channels: int, inner: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels, inner, 1), nn.GroupNorm(min(GROUPS, inner), inner), nn.SiLU(), nn.Conv3d(inner, dim, 3, padding=1), nn.SiLU()
    )  # fmt: skip


def _gate(dim: int, width: int) -> nn.Sequential:
    """Zero at the start: the gain is then 1."""
    gate = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, width))
    nn.init.zeros_(gate[2].weight)
    nn.init.zeros_(gate[2].bias)
    return gate
