"""Latents and pixels on a finer grid, by interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange

from muralist.tiling import Box, Span

STRIP = 64  # enlarged rows or columns interpolated in one product
MODE = "bicubic"  # unless another one is asked for


def enlarged(z: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """[B, C, F, h, w] -> [B, C, F, H, W] of `size`, every frame by itself."""
    if z.shape[-2:] == size:
        return z
    images = F.interpolate(rearrange(z, "b c f h w -> (b f) c h w"), size=size, mode=mode, align_corners=False)
    return rearrange(images, "(b f) c h w -> b c f h w", b=len(z))


def sampled(z: torch.Tensor, places: torch.Tensor, size: Sequence[int], mode: str) -> torch.Tensor:
    """As `enlarged`, of a part of each video: [B, C, F, h, w] -> [B, C, F, *size].

    `places` [B, 4]: top, left, height and width of each part as shares of the frame. Samples stand at the middles of the result's rows and columns.
    """
    frames, (y, x) = z.shape[2], ((torch.arange(n) + 0.5) / n for n in size)
    top, left, height, width = (v[:, None] for v in places.unbind(1))
    rows, columns = (2 * (start + side * axis) - 1 for start, side, axis in ((top, height, y), (left, width, x)))
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1).to(z)  # [B, *size, 2]
    images = z.transpose(1, 2).flatten(0, 1)
    part = F.grid_sample(images, grid.repeat_interleave(frames, dim=0), mode=mode, padding_mode="border", align_corners=False)
    return part.unflatten(0, (-1, frames)).transpose(1, 2)


def between(small: int, large: int, scale: float) -> int:
    """Rows or columns of latents that are encoded on the way from `small` to `large`: `large` over `scale`, at least `small`."""
    return min(max(math.ceil(large / scale), small), large)


class EnlargedPixels:
    """A video [T, h, w, 3] as one of `size` [H, W] pixels, of which boxes are read: each is interpolated from the few pixels that it lies on.

    `rate`: its frames in one of the result's, whose frame t is linear between those around t * `rate`; after the last one it is held.
    """

    def __init__(self, video: torch.Tensor, size: tuple[int, int], mode: str, device: torch.device, rate: float = 1.0):
        self.video, self.device, self.rate = video, device, rate
        self.rows, self.columns = (_Axis(a, b, mode, device) for a, b in zip(video.shape[1:3], size))

    def __call__(self, frames: range, box: Box) -> torch.Tensor:
        """Frames [t, rows, columns, 3] in [0, 1] of the box, in float32."""
        y, x = self.rows.used(box.y), self.columns.used(box.x)
        part = self._in_time(frames, y, x).permute(0, 3, 1, 2)
        wide = torch.cat([part[..., used.start - x.start : used.stop - x.start] @ w.T for w, used in self.columns.strips(box.x)], dim=-1)
        high = [w @ wide[..., used.start - y.start : used.stop - y.start, :] for w, used in self.rows.strips(box.y)]
        return torch.cat(high, dim=-2).clamp_(0, 1).permute(0, 2, 3, 1)

    def _in_time(self, frames: range, y: slice, x: slice) -> torch.Tensor:
        if self.rate == 1:
            return self.video[frames.start : frames.stop, y, x].to(self.device).float()
        place = (torch.arange(frames.start, frames.stop) * self.rate).clamp(max=len(self.video) - 1)
        before, after = (self.video[at.long(), y, x].to(self.device).float() for at in (place.floor(), place.ceil()))
        return torch.lerp(before, after, place.frac().to(before)[:, None, None, None])

    def flops(self, box: Box) -> int:
        """Of one frame of the box, 2 a multiply-add."""
        used = self.rows.used(box.y)
        wide = sum(w.numel() for w, _ in self.columns.strips(box.x)) * (used.stop - used.start)
        return 2 * 3 * (wide + sum(w.numel() for w, _ in self.rows.strips(box.y)) * len(box.x))


class _Axis:
    """Weights [target, source] of `F.interpolate` along one axis, and which of them are not zero: known without asking the device."""

    def __init__(self, source: int, target: int, mode: str, device: torch.device):
        eye = torch.eye(source)[None, None]
        weights = F.interpolate(eye, size=(target, source), mode=mode, align_corners=False)[0, 0]
        there = weights.numpy() != 0
        self.first, self.stop = there.argmax(axis=1), source - there[:, ::-1].argmax(axis=1)
        self.weights = weights.to(device)

    def used(self, span: Span) -> slice:
        """The source positions that some results lie on."""
        return slice(int(self.first[span.start : span.stop].min()), int(self.stop[span.start : span.stop].max()))

    def strips(self, span: Span) -> list[tuple[torch.Tensor, slice]]:
        """(weights without their zeros, the positions that are left) of every `STRIP` results: products with the zeros of all would cost ten times as much."""
        parts = [Span(start, min(start + STRIP, span.stop)) for start in range(span.start, span.stop, STRIP)]
        return [(self.weights[part.start : part.stop, used], used) for part in parts for used in [self.used(part)]]
