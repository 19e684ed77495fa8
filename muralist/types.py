"""The shape legend of the project and the typed hand-overs between stages.

Letters used everywhere:
    B batch   T pixel frames   H, W pixel rows and columns   F, h, w latent frames, rows, columns
    f, y, x token frames, rows, columns   N tokens = f * y * x   C latent channels   D model width   L text tokens

A *pixel video* is [T, H, W, 3] in [0, 1] (full range sRGB values, float).
A *latent video* is [1, C, F, h, w], normalised by the VAE's own `latents_mean` and `latents_std`
(about zero mean, unit variance), F = (T - 1) / temporal_factor + 1, h = H / spatial_factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from muralist.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Geometry of a pixel video: frames, rows, columns, frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float = 16.0

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.num_frames / self.fps

    @property
    def pixels(self) -> int:
        """Pixels of the whole video, T * H * W."""
        return self.num_frames * self.height * self.width

    def resized(self, *, height: int, width: int) -> Grid:
        return replace(self, height=height, width=width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a base maps pixels to latents and latents to tokens.

    Wan2.1: spatial_factor 8, channels 16; Wan2.2-5B: spatial_factor 16, channels 48. Both: temporal_factor 4, patch (1, 2, 2).
    """

    spatial_factor: int
    temporal_factor: int
    channels: int
    patch: tuple[int, int, int]

    @property
    def pixel_multiple(self) -> int:
        """Height and width must be multiples of this many pixels (16 for Wan2.1, 32 for Wan2.2)."""
        return self.spatial_factor * self.patch[1]

    def legal(self, grid: Grid) -> Grid:
        """The smallest computable grid that covers `grid`; the surplus rows and columns are cropped at the end."""
        if (grid.num_frames - 1) % self.temporal_factor:
            raise UserError(
                f"{grid.num_frames} frames",
                where="num_frames",
                fix=f"use {self.temporal_factor}n+1 frames, such as {nearest_frames(grid.num_frames, self.temporal_factor)}",
            )
        up = lambda size: math.ceil(size / self.pixel_multiple) * self.pixel_multiple  # noqa: E731
        return grid.resized(height=up(grid.height), width=up(grid.width))

    def latent_shape(self, grid: Grid) -> tuple[int, int, int, int]:
        """(C, F, h, w) of a legal grid."""
        return (self.channels, (grid.num_frames - 1) // self.temporal_factor + 1, grid.height // self.spatial_factor, grid.width // self.spatial_factor)

    def token_shape(self, grid: Grid) -> tuple[int, int, int]:
        """(f, y, x): the token grid of a legal grid."""
        _, F, h, w = self.latent_shape(grid)
        return (F // self.patch[0], h // self.patch[1], w // self.patch[2])


def nearest_frames(num_frames: int, temporal_factor: int = 4) -> int:
    """The nearest count of the form 4n + 1."""
    return max(round((num_frames - 1) / temporal_factor), 0) * temporal_factor + 1


@dataclass(frozen=True, slots=True)
class TextCond:
    """What the prompt became: `positive` and `negative`, each [1, L, D_text], padded with zeros as Wan expects."""

    positive: torch.Tensor
    negative: torch.Tensor


@dataclass(frozen=True, slots=True)
class LatentVideo:
    """A normalised latent video `z` [1, C, F, h, w] and the legal pixel grid it stands for."""

    z: torch.Tensor
    grid: Grid


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Consecutive pixel frames [t, H, W, 3], float in [0, 1], of which the first is frame number `start`."""

    frames: torch.Tensor
    start: int
