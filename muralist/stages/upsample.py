"""proxy -> guide: the proxy's latent on the target's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from einops import rearrange

from muralist.types import Geometry, Grid, LatentVideo


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentInterpolation:
    """Interpolate every latent frame by itself; time is not changed."""

    mode: Literal["bilinear", "bicubic"] = "bicubic"


def upsample(proxy: LatentVideo, to: Grid, geometry: Geometry, method: LatentInterpolation) -> LatentVideo:
    """[1, C, F, h, w] -> [1, C, F, H', W'] of the legal grid `to`; samples stand at pixel centres."""
    _, frames, height, width = geometry.latent_shape(to)
    images = rearrange(proxy.z, "1 c f h w -> f c h w")
    images = F.interpolate(images, size=(height, width), mode=method.mode, align_corners=False)
    assert len(images) == frames, f"{len(images)} latent frames for a grid of {frames}"
    return LatentVideo(rearrange(images, "f c h w -> 1 c f h w"), to)
