"""VRT without warping and without reconstruction: the encoder and the decoder of the latent upsampler (LUVE, appendix C.2).

Seven stages go down to an eighth of the size and up again with skips, then groups of plain window attention refine at full size. The result
is `features + conv_first(x)`; VRT's last convolution is left out. Parameter names follow the published VRT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops.layers.torch import Rearrange
from torch import nn

from muralist.nn.latent_upsampler.tmsa import Shape, TmsaGroup

SCALES = ("none", "down", "down", "down", "up", "up", "up")


@dataclass(frozen=True, slots=True, kw_only=True)
class VrtConfig:
    """`depth` blocks in each of the seven stages at width `dim`, of which `mutual_share` attend mutually; then `groups` groups of
    `refine_depth` blocks at width `refine_dim`, the last `still_groups` of which see single frames only."""

    in_channels: int
    dim: int
    depth: int
    refine_dim: int
    refine_depth: int
    groups: int
    heads: int = 6
    window: Shape = (6, 8, 8)
    mutual_share: float = 0.75
    mlp_ratio: float = 2.0
    still_groups: int = 2


class Vrt(nn.Module):
    """[B, T, H, W, C] -> [B, T, H, W, dim]; H and W must be multiples of 8."""

    def __init__(self, config: VrtConfig):
        super().__init__()
        c = config
        self.conv_first = nn.Conv3d(c.in_channels, c.dim, (1, 3, 3), padding=(0, 1, 1))
        for number, scale in enumerate(SCALES, start=1):
            self.add_module(f"stage{number}", Stage(c, scale))
        refine = [Refinement(c, single_frames=i >= c.groups - c.still_groups) for i in range(c.groups)]
        widen = nn.Sequential(nn.Identity(), nn.LayerNorm(c.dim), nn.Linear(c.dim, c.refine_dim), nn.Identity())
        self.stage8 = nn.ModuleList([widen, *refine])
        self.norm = nn.LayerNorm(c.refine_dim)
        self.conv_after_body = nn.Linear(c.refine_dim, c.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_first(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return x + self.conv_after_body(self.norm(self._features(x)))

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x1 = self.stage1(x)
        x2 = self.stage2(x1)
        x3 = self.stage3(x2)
        x = self.stage5(self.stage4(x3))
        x = self.stage6(x + x3)
        x = self.stage7(x + x2) + x1
        for layer in self.stage8:
            x = layer(x)
        return x


class Stage(nn.Module):
    """Resampling by two (or none), mutual attention over two frames, then attention over whole windows; [B, T, H, W, dim]."""

    def __init__(self, c: VrtConfig, scale: str):
        super().__init__()
        mutual = int(c.depth * c.mutual_share)
        self.reshape = _resampling(c.dim, scale)
        self.residual_group1 = TmsaGroup(c.dim, mutual, (2, *c.window[1:]), c.heads, c.mlp_ratio, mutual=True)
        self.linear1 = nn.Linear(c.dim, c.dim)
        self.residual_group2 = TmsaGroup(c.dim, c.depth - mutual, c.window, c.heads, c.mlp_ratio, mutual=False)
        self.linear2 = nn.Linear(c.dim, c.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reshape(x)
        x = self.linear1(self.residual_group1(x)) + x
        return self.linear2(self.residual_group2(x)) + x


class Refinement(nn.Module):
    """A group of window attention with a linear layer and a residual around it."""

    def __init__(self, c: VrtConfig, *, single_frames: bool):
        super().__init__()
        window = (1, *c.window[1:]) if single_frames else c.window
        self.residual_group = TmsaGroup(c.refine_dim, c.refine_depth, window, c.heads, c.mlp_ratio, mutual=False)
        self.linear = nn.Linear(c.refine_dim, c.refine_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.residual_group(x))


def _resampling(dim: int, scale: str) -> nn.Sequential:
    """Space to channels or channels to space, a norm, and a linear layer where the width changes."""
    if scale == "none":
        return nn.Sequential(nn.Identity(), nn.LayerNorm(dim), nn.Identity())
    if scale == "down":
        gather, wide = Rearrange("n t (h b) (w a) c -> n t h w (a b c)", a=2, b=2), 4 * dim
    else:
        gather, wide = Rearrange("n t h w (a b c) -> n t (h b) (w a) c", a=2, b=2), dim // 4
    return nn.Sequential(gather, nn.LayerNorm(wide), nn.Linear(wide, dim), nn.Identity())
