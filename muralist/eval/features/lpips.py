"""LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018), version 0.1.

    d(x, y) = sum over five layers l of mean over positions of sum over channels c of w_lc (f_lc(x) - f_lc(y))^2

with f the layer's ReLU output scaled to unit length over its channels and w >= 0 learned on human judgement. The backbone is AlexNet or VGG16
up to the fifth layer; parameters carry torchvision's names (`features.0.weight`) and the lpips package's (`lin0.model.1.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from muralist.errors import UserError
from muralist.eval.features.weights import load_into, read
from muralist.tiling import Box, Span, tile_boxes

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of values in [-1, 1]: ImageNet's mean and deviation
TILE = 512  # VGG16 holds about 600 MB for one such tile with its halo, whatever the frame's size
MIN_SIDE = 32


class Network(Protocol):
    """Layers of a convolutional network for a perceptual distance.

    `strides`: pixels a position of each layer's map; `halo`: pixels beyond a position that it may depend on, a multiple of the last stride.
    """

    strides: tuple[int, ...]
    halo: int

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Maps [B, C, h, w] of every layer for x [B, 3, H, W] in [0, 1]."""

    def weigh(self, layer: int, squares: torch.Tensor) -> torch.Tensor:
        """Squared differences [B, C, h, w] summed over channels with the layer's weights, [B, h, w]."""


class LPIPS(nn.Module):
    """Backbone and weights of one flavour; random until loaded."""

    def __init__(self, layers: list[nn.Module], *, taps: tuple[int, ...], widths: tuple[int, ...], strides: tuple[int, ...], halo: int):
        super().__init__()
        self.features, self.taps, self.strides, self.halo = nn.Sequential(*layers), taps, strides, halo
        for k, width in enumerate(widths):
            # named as the lpips package names it: a dropout, then the weights
            setattr(self, f"lin{k}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))}))

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        h = (2 * x - 1 - x.new_tensor(SHIFT).view(3, 1, 1)) / x.new_tensor(SCALE).view(3, 1, 1)
        maps = []
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in self.taps:
                maps.append(h)
        return maps

    def weigh(self, layer: int, squares: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"lin{layer}")["model"](squares)[:, 0]


def alexnet() -> LPIPS:
    """AlexNet in torchvision's "one weird trick" form."""
    pool = nn.MaxPool2d(3, stride=2)
    layers = [
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), pool, nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool,
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip
    return LPIPS(layers, taps=(1, 4, 7, 9, 11), widths=(64, 192, 384, 256, 256), strides=(4, 8, 16, 16, 16), halo=96)


def vgg16() -> LPIPS:
    """VGG16, five blocks of 3x3 convolutions."""
    layers: list[nn.Module] = []
    width, taps = 3, []
    for block, (count, out) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
        layers += [nn.MaxPool2d(2)] if block else []
        for _ in range(count):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        taps.append(len(layers) - 1)
    return LPIPS(layers, taps=tuple(taps), widths=(64, 128, 256, 512, 512), strides=(1, 2, 4, 8, 16), halo=112)


@lru_cache(maxsize=2)
def load_lpips(path: Path, device: torch.device) -> LPIPS:
    """The flavour that the file holds. Raises UserError for anything else."""
    tensors = _usual_names(read(path))
    first = tensors.get("features.0.weight")
    if first is None or first.ndim != 4:
        raise UserError("no features.0.weight in it: not LPIPS weights", where=str(path), fix="see docs/eval-weights.md for the right file")
    return load_into(alexnet() if first.shape[-1] == 11 else vgg16(), tensors, path).to(device)


def _usual_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The lpips package's own names (`net.slice2.3.weight`, `lins.0.model.1.weight`) become torchvision's; classifiers and constants are left out."""
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^net\.slice\d\.(\d+)\.", r"features.\1.", name)
        name = re.sub(r"^lins\.(\d)\.", r"lin\1.", name)
        if not name.startswith(("classifier.", "scaling_layer.")):
            renamed[name] = tensor
    return renamed


@torch.inference_mode()
def distances(network: Network, image: torch.Tensor, others: Sequence[torch.Tensor], tile: int = TILE) -> list[float]:
    """LPIPS of `image` [3, H, W] in [0, 1] to each of the others, tile by tile.

    Every tile is computed with a halo that holds the receptive field, and its sums are added up in double precision: the result is that
    of the whole frame, in the memory of one tile.
    """
    height, width = image.shape[1:]
    sums = torch.zeros(len(others), len(network.strides), dtype=torch.float64)
    counts = torch.zeros(len(network.strides), dtype=torch.float64)
    for box in tile_boxes(height, width, tile, network.strides[-1]):
        mine = _unit_stages(network, image, box)
        counts += torch.tensor([f.shape[-2] * f.shape[-1] for f in mine])
        for number, other in enumerate(others):
            theirs = _unit_stages(network, other, box)
            sums[number] += torch.stack([network.weigh(k, (f - g).square()).double().sum().cpu() for k, (f, g) in enumerate(zip(mine, theirs))])
    return (sums / counts).sum(dim=1).tolist()


def _unit_stages(network: Network, image: torch.Tensor, box: Box) -> list[torch.Tensor]:
    """Every layer's map of a box of the image, scaled to unit length over channels."""
    height, width = image.shape[1:]
    outer = box.grow(network.halo).clip(height, width)
    maps = network.stages(image[None, :, outer.y.start : outer.y.stop, outer.x.start : outer.x.stop])
    kept = [m[..., _kept(box.y, outer.y, height, step), _kept(box.x, outer.x, width, step)] for m, step in zip(maps, network.strides)]
    return [m / (m.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for m in kept]


def _kept(inner: Span, outer: Span, size: int, step: int) -> slice:
    """Positions of a map of `outer` that belong to `inner`; the last tile keeps all that is left, however its size was rounded."""
    return slice((inner.start - outer.start) // step, None if inner.stop == size else (inner.stop - outer.start) // step)
