"""FLOPs, parameters and live memory of the Wan decoder, whole or in tiles, from the VAE's configuration alone.

The decoder's layers are built without storage (PyTorch's meta device) and walked backwards from each tile as `nn/decoder.py` walks them, so
the halo counted here is the halo computed there. Each operator's cost is looked up by its class in `_COSTS`. In float32 on a CPU the
decoder multiplies less than diffusers does (`decoder_conv`); `quick` says which arithmetic is meant. With `quick=False` and one tile the
count is that of diffusers' `AutoencoderKLWan.decode`, but for the zeros before the first frame, which diffusers multiplies too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from muralist.nn import decoder_blocks as blocks
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.decoder_conv import HISTORY, CausalConv
from muralist.nn.empty import empty_vae
from muralist.tiling import Box

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs (2 a multiply-add) of convolutions and products, and those of the middle attention."""

    linear: int = 0
    attention: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.linear * times, self.attention * times)

    @property
    def flops(self) -> int:
        return self.linear + self.attention


@dataclass(frozen=True, slots=True)
class Step:
    """A latent frame's turn. `first`: it is frame 0; `taps`: how many of a kernel's three in time are multiplied."""

    first: bool
    taps: int = 3


def steps(frames: int) -> tuple[tuple[Step, int], ...]:
    """The turns of so many latent frames, and how often each comes: of frame 0 only the last tap meets more than zeros (`ConvPass.fresh`)."""
    return (Step(True, taps=1), 1), (Step(False), frames - 1)


def decoder(config: Mapping[str, Any], *, quick: bool, whole_blocks: int = 0) -> StreamingDecoder:
    """The streaming decoder of this configuration without weights, for its shapes; `quick`: float32 on a CPU."""
    return _decoder(empty_vae(config, torch.float32 if quick else torch.bfloat16), whole_blocks)


@lru_cache(maxsize=8)
def _decoder(model: AutoencoderKLWan, whole_blocks: int) -> StreamingDecoder:
    return StreamingDecoder(model, whole_blocks)


def parameters(config: Mapping[str, Any]) -> int:
    """Weights of encoder and decoder: both are loaded."""
    return sum(p.numel() for p in empty_vae(config, torch.bfloat16).parameters())


def decode(d: StreamingDecoder, latent_shape: tuple[int, int, int], tiles: Iterable[Box]) -> Cost:
    """FLOPs of decoding latents (F, h, w) once through the whole-frame part and once through each pixel box of `tiles`."""
    return _decode(d, latent_shape, tiles, steps(latent_shape[0]))


def _decode(d: StreamingDecoder, latent_shape: tuple[int, int, int], tiles: Iterable[Box], turns: tuple[tuple[Step, int], ...]) -> Cost:
    _, height, width = latent_shape
    inner, kinds, total = d.first_part_size(height, width), d.kinds(tiles, (height, width)), Cost()
    for step, times in turns:
        cost = Cost(linear=2 * len(d.post_quant[1]) ** 2 * height * width) + _whole(d, (height, width), step)
        count = math.prod(_magnifies(operator, step) for operator in d.whole)
        for tile, number in kinds.items():
            cost = cost + _tile(d, tile, inner, step, count) * number
        total = total + cost * times
    return total


def diffusers_decode(config: Mapping[str, Any], latent_shape: tuple[int, int, int], *, tile: int | None = None, stride: int | None = None) -> Cost:
    """What diffusers' own `decode` costs: whole frames, or with `enable_tiling`: tiles of `tile` pixels every `stride` pixels (256, 192)."""
    d = decoder(config, quick=False)
    frames, height, width = latent_shape
    if tile is None or (height <= tile // d.spatial_factor and width <= tile // d.spatial_factor):
        return _untiled(d, frames, height, width)
    side, step = tile // d.spatial_factor, (stride or tile) // d.spatial_factor
    rows, columns = ([min(side, length - start) for start in range(0, length, step)] for length in (height, width))
    return sum((_untiled(d, frames, h, w) * (rows.count(h) * columns.count(w)) for h in set(rows) for w in set(columns)), Cost())


def _untiled(d: StreamingDecoder, frames: int, height: int, width: int) -> Cost:
    whole, turns = Box.whole(height * d.spatial_factor, width * d.spatial_factor), ((Step(True), 1), (Step(False), frames - 1))
    return _decode(d, (frames, height, width), [whole], turns)


def _whole(d: StreamingDecoder, size: Size, step: Step) -> Cost:
    """The operators that run on the whole frame, on one latent frame of `size`."""
    total, frames = Cost(), 1
    for operator in d.whole:
        box = Box.whole(size[0] * operator.scale, size[1] * operator.scale)
        total = total + _COSTS[type(operator)](operator, box, size, frames, step)
        size, frames = box.shape, frames * _magnifies(operator, step)
    return total


def _tile(d: StreamingDecoder, tile: Box, size: Size, step: Step, frames: int) -> Cost:
    """The tiled operators and the head for one pixel box; `size` is that of the whole-frame part's result."""
    total = Cost()
    for operator, out in zip(d.tiled, d.boxes(tile, size)[1:]):
        total = total + _COSTS[type(operator)](operator, out, size, frames, step)
        size, frames = (size[0] * operator.scale, size[1] * operator.scale), frames * _magnifies(operator, step)
    return total + _COSTS[type(d.head)](d.head, tile, size, frames, step)


def _magnifies(operator: Any, step: Step) -> int:
    """Frames out for each frame in: latent frame 0 stays one frame."""
    return 1 if step.first else getattr(operator, "frame_scale", 1)


# -- Costs: (operator, output box, size of the input image, frames in, whose turn it is) -> Cost --


def conv(layer: CausalConv, out: Box, size: Size, frames: int, step: Step) -> int:
    """A causal 3x3x3 convolution: direct, or as Winograd over time with the two mixes (`ConvPass`)."""
    reach = layer.in_channels * layer.out_channels * out.area
    if frames not in layer.mixed or step.taps == 1:
        return 2 * 9 * step.taps * reach * frames
    n, frame = frames + HISTORY, out.grow(1)
    before = n * n * len(frame.clip(*size).y) * len(frame.x) * layer.in_channels
    after = frames * n * out.area * layer.out_channels
    return 2 * (9 * n * reach + before + after)


def conv_in(operator: blocks.ConvIn, out: Box, size: Size, frames: int, step: Step) -> Cost:
    return Cost(conv(operator.conv, out, size, frames, step))


def residual(operator: blocks.ResidualBlock, out: Box, size: Size, frames: int, step: Step) -> Cost:
    inner = out.grow(1).clip(*size)
    shortcut = 0 if operator.shortcut is None else 2 * operator.shortcut[0].numel() * out.area * frames
    return Cost(conv(operator.conv1, inner, size, frames, step) + conv(operator.conv2, out, size, frames, step) + shortcut)


def attention(operator: blocks.Attention, out: Box, size: Size, frames: int, step: Step) -> Cost:
    tokens, width = math.prod(size), len(operator.proj[1])
    weights = operator.qkv[0].numel() + operator.proj[0].numel()
    return Cost(2 * weights * tokens * frames, 4 * tokens**2 * width * frames)


def _up(operator: blocks.UpBlock, out: Box, size: Size, frames: int, step: Step) -> Cost:
    even = out.over(2).times(2) if operator.space else out
    box = operator.space.needs(even, size) if operator.space else out
    total = Cost()
    for i, resnet in enumerate(operator.resnets):
        total = total + residual(resnet, box.grow(2 * (len(operator.resnets) - 1 - i)).clip(*size), size, frames, step)
    if operator.time and not step.first:
        total = total + Cost(2 * operator.time.weight.numel() * box.area * frames)
    return total + Cost(_space(operator.space, box, even, frames * _magnifies(operator, step))) if operator.space else total


def _space(space: blocks.SpaceDouble, box: Box, even: Box, frames: int) -> int:
    """A transposed convolution costs its taps at every input position, a convolution at every output position."""
    if space.merged is not None:
        return 2 * space.merged.numel() * box.area * frames
    return 2 * space.weight.numel() * even.area * frames


def _head(operator: blocks.Head, out: Box, size: Size, frames: int, step: Step) -> Cost:
    return Cost(conv(operator.conv, out.over(operator.scale), size, frames, step))


_COSTS: dict[type, Callable[[Any, Box, Size, int, Step], Cost]] = {
    blocks.ConvIn: conv_in,
    blocks.ResidualBlock: residual,
    blocks.Attention: attention,
    blocks.UpBlock: _up,
    blocks.Head: _head,
}
