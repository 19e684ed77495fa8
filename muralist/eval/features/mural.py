"""Our own small feature network, "mural": trained on the world, shipped in the package, sensitive to detail at native size.

It learned to tell colour, shape, ground and scale of world crops, and which damage a crop has suffered and how much of it (blur, noise,
enlargement, compression). Five stages of convolutions see the picture and its finest detail apart; the mean of every channel and the
logarithm of its spread (how much energy there is in what it sees) become one vector of `WIDTH` numbers. Nothing is normalised over
positions, so that tiles of a frame give the maps that the whole frame gives.

It stands in where the papers' weights are not there, always under a name of its own: what it says of filmed pictures is unproven.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from muralist.eval.features.weights import load_into, read

WIDTH = 64
HIDDEN = 256
FLOOR = 1e-6  # variance below which nothing is seen
CHANNELS = (32, 64, 96, 128, 128)
DETAIL_GAIN = 8.0  # fine detail of the world is some hundredths of the range
FILE = "assets/features/mural.safetensors"


class Mural(nn.Module):
    """[B, 3, H, W] in [0, 1], any size from 16 on, to [B, WIDTH]."""

    strides = (2, 4, 8, 16, 16)
    halo = 64  # at least the reach of the receptive field, a multiple of the last stride

    def __init__(self):
        super().__init__()
        c1, c2, c3, c4, c5 = CHANNELS
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(6, c1, 4, stride=2, padding=1),
                nn.Conv2d(c1, c2, 3, stride=2, padding=1),
                nn.Conv2d(c2, c3, 3, stride=2, padding=1),
                nn.Conv2d(c3, c4, 3, stride=2, padding=1),
                nn.Conv2d(c4, c5, 3, padding=1),
            ]
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.embed = nn.Sequential(nn.Linear(2 * sum(CHANNELS), HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Maps of every stage, [B, C, ~H / s, ~W / s] with s of `strides`."""
        local = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        h = torch.cat([2 * x - 1, DETAIL_GAIN * (x - local)], dim=1)
        maps = []
        for conv in self.convs:
            h = F.silu(conv(h))
            maps.append(h)
        return maps

    def weigh(self, layer: int, squares: torch.Tensor) -> torch.Tensor:
        """All channels count alike: there is no human judgement to learn weights from."""
        return squares.sum(dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(torch.cat([part for m in self.stages(x) for part in _statistics(m)], dim=1))


def _statistics(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log deviation of every channel, both [B, C], from a map [B, C, h, w]."""
    mean = m.mean(dim=(2, 3))
    variance = (m - mean[..., None, None]).square().mean(dim=(2, 3))
    return mean, 0.5 * torch.log(variance + FLOOR)


def asset() -> Path:
    """Where the package keeps the trained weights."""
    return Path(str(resources.files("muralist") / FILE))


@lru_cache(maxsize=2)
def load_mural(device: torch.device) -> Mural:
    """The trained network, ready to measure."""
    path = asset()
    return load_into(Mural(), read(path), path).to(device)
