"""Latents and pixels on a finer grid, by interpolation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange

from muralist.tiling import Box


def enlarged(z: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """[1, C, F, h, w] -> [1, C, F, H, W] of `size`, every frame by itself."""
    if z.shape[-2:] == size:
        return z
    images = F.interpolate(rearrange(z, "1 c f h w -> f c h w"), size=size, mode=mode, align_corners=False)
    return rearrange(images, "f c h w -> 1 c f h w")


class EnlargedPixels:
    """A video [T, h, w, 3] as one of `size` [H, W] pixels, of which boxes are read: each is interpolated from the few pixels that it lies on."""

    def __init__(self, video: torch.Tensor, size: tuple[int, int], mode: str, device: torch.device):
        self.video, self.device = video, device
        self.rows, self.columns = (_interpolation(a, b, mode).to(device) for a, b in zip(video.shape[1:3], size))

    def __call__(self, frames: range, box: Box) -> torch.Tensor:
        """Frames [t, rows, columns, 3] in [0, 1] of the box, in float32."""
        (rows, y), (columns, x) = _used(self.rows[box.y.start : box.y.stop]), _used(self.columns[box.x.start : box.x.stop])
        part = self.video[frames.start : frames.stop, y, x].to(self.device).float().permute(0, 3, 1, 2)
        return (rows @ (part @ columns.T)).clamp_(0, 1).permute(0, 2, 3, 1)


def _interpolation(source: int, target: int, mode: str) -> torch.Tensor:
    """Weights [target, source] of `F.interpolate` along one axis."""
    eye = torch.eye(source)[None, None]
    return F.interpolate(eye, size=(target, source), mode=mode, align_corners=False)[0, 0]


def _used(weights: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The columns of interpolation weights that are not all zero, and where they lie."""
    columns = weights.any(dim=0).nonzero()
    place = slice(int(columns[0]), int(columns[-1]) + 1)
    return weights[:, place], place
