"""FLOPs and live memory of the streaming encoder, from the VAE's configuration alone: `nn/encoder.py` walked on the meta device, tile by tile.

Memory is counted as the decoder's is (`nn/decoder_memory.py`): the pool of work tensors and whatever else is alive at the worst moment of each operator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from muralist.cost import vae
from muralist.nn import encoder_blocks as blocks
from muralist.nn.decoder_blocks import Attention, ConvIn, Operator, ResidualBlock
from muralist.nn.decoder_conv import HISTORY, STRIP_BYTES, uses_time_mix
from muralist.nn.decoder_memory import SLACK, Walk, convolutions, copies, pool
from muralist.nn.empty import empty_vae
from muralist.nn.encoder import StreamingEncoder
from muralist.tiling import Box, Span, kinds, latent_boxes

Size = tuple[int, int]
FLOAT = 4  # bytes of a number of the pixels that are read and of the latents


@dataclass(frozen=True, slots=True)
class EncodeNeed:
    """`read`: the box of pixels that one tile of each kind reads, and how many such tiles there are; FLOPs of all tiles and of the middle.

    `live_bytes`: alive at once, weights of the whole VAE and features of the whole video included; `weight_bytes`: diffusers' weights of the encoder.
    """

    read: tuple[tuple[Box, int], ...]
    cost: vae.Cost
    live_bytes: int
    weight_bytes: int

    @property
    def tiles(self) -> int:
        return sum(count for _, count in self.read)

    def in_numbers_of(self, itemsize: int) -> EncodeNeed:
        """The same with numbers of so many bytes, where it was counted in bfloat16: in float32 on a GPU at most twice as much."""
        times = itemsize // torch.bfloat16.itemsize
        return replace(self, live_bytes=self.live_bytes * times, weight_bytes=self.weight_bytes * times)


def encode(config: Mapping[str, Any], num_frames: int, size: Size, tile: int, *, quick: bool) -> EncodeNeed:
    """A video of `num_frames` of `size` [H, W] pixels in tiles of `tile` pixels; `quick`: float32 on a CPU (`decoder_conv`)."""
    return _encode(json.dumps(dict(config), sort_keys=True), num_frames, size, tile, quick)


@lru_cache(maxsize=32)  # a plan asks for the same one several times
def _encode(config_json: str, num_frames: int, size: Size, tile: int, quick: bool) -> EncodeNeed:
    model = empty_vae(json.loads(config_json), torch.float32 if quick else torch.bfloat16)
    encoder = _encoder(model)
    frames = (num_frames - 1) // encoder.temporal_factor + 1
    height, width = (side // encoder.spatial_factor for side in size)
    found = kinds(latent_boxes(height, width, tile, encoder.spatial_factor), (height, width), _reach(encoder))
    walks = [(encoder.boxes(box, size), count) for box, count in found.items()]
    total = vae.Cost()
    for step, times in vae.steps(frames):
        total = total + _middle(encoder, (height, width), step) * times
        for boxes, count in walks:
            total = total + _tile(encoder, boxes, size, step) * (times * count)
    read = tuple((boxes[0].times(encoder.patch), count) for boxes, count in walks)
    live = _live_bytes(encoder, [boxes for boxes, _ in walks], size, frames)
    weights = _bytes(p for part in (model.encoder, model.quant_conv) for p in part.parameters())
    return EncodeNeed(read, total, live + _bytes(model.parameters()) + _copies(encoder), weights)


@lru_cache(maxsize=8)
def _encoder(model: AutoencoderKLWan) -> StreamingEncoder:
    return StreamingEncoder(model)


def _reach(encoder: StreamingEncoder) -> int:
    """Latents that the halo of a tile reaches at most, in whole ones."""
    middle, unit = 1 << 11, encoder.spatial_factor // encoder.patch
    one = Span(middle, middle + 1)
    rows = encoder.boxes(Box(one, one), (2 * middle * encoder.spatial_factor,) * 2)[0].y.over(unit)
    return max(middle - rows.start, rows.stop - middle - 1)


# -- FLOPs --


def _tile(encoder: StreamingEncoder, boxes: list[Box], size: Size, step: vae.Step) -> vae.Cost:
    """One latent frame of a tile through the layers that see pixels."""
    total, frames, size = vae.Cost(), 1 if step.first else encoder.temporal_factor, (size[0] // encoder.patch, size[1] // encoder.patch)
    for operator, out in zip(encoder.tiled, boxes[1:]):
        total = total + _COSTS[type(operator)](operator, out, size, frames, step)
        size, frames = (size[0] // operator.scale, size[1] // operator.scale), _frames_after(operator, frames, step)
    return total


def _middle(encoder: StreamingEncoder, size: Size, step: vae.Step) -> vae.Cost:
    return sum((_COSTS[type(operator)](operator, Box.whole(*size), size, 1, step) for operator in encoder.whole), vae.Cost())


def _frames_after(operator: Any, frames: int, step: vae.Step) -> int:
    return frames if step.first else frames // getattr(operator, "frame_scale", 1)


def _resample(operator: blocks.Resample, out: Box, size: Size, frames: int, step: vae.Step) -> vae.Cost:
    space = 2 * operator.space.weight.numel() * out.area * frames
    time = 2 * sum(tap.numel() for tap in operator.time.taps) * out.area * (frames // 2) if operator.time and not step.first else 0
    return vae.Cost(space + time)


def _down(operator: blocks.DownBlock, out: Box, size: Size, frames: int, step: vae.Step) -> vae.Cost:
    inner, total = operator.inner(out, size), vae.Cost()
    for left, resnet in zip(reversed(range(len(operator.resnets))), operator.resnets):
        total = total + vae.residual(resnet, inner.grow(2 * left).clip(*size), size, frames, step)
    return total + _resample(operator.resample, out, size, frames, step) if operator.resample else total


def _tail(operator: blocks.Tail, out: Box, size: Size, frames: int, step: vae.Step) -> vae.Cost:
    return vae.Cost(vae.conv(operator.conv, out, size, frames, step) + 2 * operator.mean[0].numel() * out.area * frames)


_COSTS: dict[type, Callable[[Any, Box, Size, int, vae.Step], vae.Cost]] = {
    ConvIn: vae.conv_in,
    ResidualBlock: vae.residual,
    Attention: vae.attention,
    blocks.Resample: _resample,
    blocks.DownBlock: _down,
    blocks.Tail: _tail,
}


# -- Memory --


class _Down(Walk):
    """The same count for the layers of an encoder: what goes through gets smaller."""

    def through(self, operator: Operator, box: Box, out: Box) -> None:
        """One operator from input `box` to output `out`."""
        match operator:
            case ConvIn():
                self._conv_in(operator, box, out)
            case blocks.DownBlock():
                self._down(operator, box, out)
            case blocks.Resample():
                self._resample(operator, box, out)
            case blocks.Tail():
                buffer, result = self._conv(operator.conv, out)
                self.pooled(conv1=buffer)
                self.alive(box.area * self.channels * self.frames, result, result)
            case Attention() if uses_time_mix(operator.qkv[0]):  # on a CPU, whose kernel holds no scores
                area = out.area * self.channels
                self.alive(area * self.frames, area, area, 3 * area)
            case _:
                super().through(operator, box, out)
        self.size = (self.size[0] // operator.scale, self.size[1] // operator.scale)

    def _conv_in(self, operator: ConvIn, box: Box, out: Box) -> None:
        """All rows of the result at once, and as many of what is mixed over time to make it."""
        buffer, result = self._conv(operator.conv, out)
        mixed = result // self.frames * (self.frames + HISTORY) if self.frames in operator.conv.mixed else 0
        self.pooled(conv1=buffer, results=mixed)
        self.alive(box.area * self.channels * self.frames, result)
        self.channels = operator.conv.out_channels

    def _down(self, block: blocks.DownBlock, box: Box, out: Box) -> None:
        inner, given = block.inner(out, self.size), box.area * self.channels * self.frames
        around = out.area * block.resnets[-1].conv2.out_channels * (self.frames // block.frame_scale)
        self.alive(given, around, around)
        held = given + around
        for left, resnet in zip(reversed(range(len(block.resnets))), block.resnets):
            target = inner.grow(2 * left).clip(*self.size)
            self._residual(resnet, box, target, held)
            box = target
        if block.resample:
            self._resample(block.resample, box, out, held)
        self.alive(held, around, around)

    def _resample(self, operator: blocks.Resample, box: Box, out: Box, held: int = 0) -> None:
        """`held`: elements that an enclosing block keeps meanwhile."""
        padded, area = out.times(2).grow(1).area * self.channels * self.frames, out.area * self.channels
        self.alive(held, padded if box.shape < out.times(2).grow(1).shape else 0, area * self.frames)
        if operator.time:
            self.caches += area
            self.alive(held, area * self.frames, area * (self.frames + 1), area, 3 * area * self.frames // 2)
            self.frames //= 2


def _live_bytes(encoder: StreamingEncoder, walks: list[list[Box]], size: Size, frames: int) -> int:
    """Without weights: the widest of the tiles `walks`, or the middle, beside the pixels of a tile, the features and latents of the whole video."""
    tiles = [_tile_walk(encoder, boxes, size) for boxes in walks]
    (height, width), channels = (side // encoder.spatial_factor for side in size), tiles[0].channels
    middle = _Down(1, (height, width), channels)
    for operator in encoder.whole:
        middle.through(operator, Box.whole(height, width), Box.whole(height, width))
    everything = [*tiles, middle]
    work = pool(everything) + max(walk.worst + walk.caches for walk in everything)
    itemsize = encoder.whole[-1].conv.weight.element_size()
    pixels = max(boxes[0].area for boxes in walks) * encoder.patch**2 * 3 * encoder.temporal_factor
    held = frames * height * width * (channels * itemsize + encoder.mean.numel() * FLOAT)
    return round(SLACK * (work * itemsize + pixels * FLOAT)) + held + 8 * STRIP_BYTES


def _tile_walk(encoder: StreamingEncoder, boxes: list[Box], size: Size) -> _Down:
    walk = _Down(encoder.temporal_factor, (size[0] // encoder.patch, size[1] // encoder.patch), 3 * encoder.patch**2)
    for operator, box, out in zip(encoder.tiled, boxes, boxes[1:]):
        walk.through(operator, box, out)
    return walk


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copies(encoder: StreamingEncoder) -> int:
    flat = [part for operator in encoder.tiled + encoder.whole for part in getattr(operator, "resnets", [operator])]
    return copies([*convolutions(flat), encoder.whole[-1].conv])
