"""FLOPs and live memory of the streaming encoder, from the VAE's configuration alone: `nn/encoder.py` walked on the meta device, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diffusers import AutoencoderKLWan

from muralist.cost import vae
from muralist.nn import encoder_blocks as blocks
from muralist.nn.decoder_blocks import Attention, ConvIn, ResidualBlock
from muralist.nn.decoder_conv import HISTORY, CausalConv
from muralist.nn.decoder_memory import SLACK
from muralist.nn.encoder import StreamingEncoder
from muralist.tiling import Box, latent_boxes

Size = tuple[int, int]
RESULTS = 4  # tensors beside the buffers of two convolutions: the two that residual blocks take turns in, one with its border, what is made of them


@dataclass(frozen=True, slots=True)
class EncodeNeed:
    """The boxes of pixels that are read, one a tile, FLOPs of all tiles and of the middle, and bytes alive at once, features of the whole video included."""

    read: tuple[Box, ...]
    cost: vae.Cost
    live_bytes: int


def encode(config: Mapping[str, Any], num_frames: int, size: Size, tile: int, *, quick: bool) -> EncodeNeed:
    """A video of `num_frames` of `size` [H, W] pixels in tiles of `tile` pixels; `quick`: float32 on a CPU (`decoder_conv`)."""
    encoder = _encoder(vae.empty(config, "float32" if quick else "bfloat16"))
    frames = (num_frames - 1) // encoder.temporal_factor + 1
    height, width = (side // encoder.spatial_factor for side in size)
    tiles = latent_boxes(height, width, tile, encoder.spatial_factor)
    walks = [encoder.boxes(box, size) for box in tiles]
    kinds: dict[tuple[Size, ...], list[list[Box]]] = {}
    for boxes in walks:
        kinds.setdefault(tuple(b.shape for b in boxes), []).append(boxes)
    total = _middle(encoder, (height, width)) * frames
    for same in kinds.values():
        for first, times in ((True, 1), (False, frames - 1)):
            total = total + _tile(encoder, same[0], size, first) * (times * len(same))
    itemsize = 4 if quick else 2
    features = frames * height * width * encoder.whole[-1].conv.in_channels
    live = features + max(_live(encoder, same[0]) for same in kinds.values())
    return EncodeNeed(tuple(boxes[0].times(encoder.patch) for boxes in walks), total, round(itemsize * live * SLACK))


@lru_cache(maxsize=8)
def _encoder(model: AutoencoderKLWan) -> StreamingEncoder:
    return StreamingEncoder(model)


def _tile(encoder: StreamingEncoder, boxes: list[Box], size: Size, first: bool) -> vae.Cost:
    """One latent frame of a tile through the layers that see pixels."""
    total, frames, size = vae.Cost(), 1 if first else encoder.temporal_factor, (size[0] // encoder.patch, size[1] // encoder.patch)
    for operator, out in zip(encoder.tiled, boxes[1:]):
        total = total + _COSTS[type(operator)](operator, out, size, frames, first)
        size, frames = (size[0] // operator.scale, size[1] // operator.scale), _frames_after(operator, frames, first)
    return total


def _middle(encoder: StreamingEncoder, size: Size) -> vae.Cost:
    return sum((_COSTS[type(operator)](operator, Box.whole(*size), size, 1, False) for operator in encoder.whole), vae.Cost())


def _frames_after(operator: Any, frames: int, first: bool) -> int:
    return frames if first else frames // getattr(operator, "frame_scale", 1)


def _resample(operator: blocks.Resample, out: Box, size: Size, frames: int, first: bool) -> vae.Cost:
    space = 2 * operator.space.weight.numel() * out.area * frames
    time = 2 * sum(tap.numel() for tap in operator.time.taps) * out.area * (frames // 2) if operator.time and not first else 0
    return vae.Cost(space + time)


def _down(operator: blocks.DownBlock, out: Box, size: Size, frames: int, first: bool) -> vae.Cost:
    inner, total = operator.inner(out, size), vae.Cost()
    for left, resnet in zip(reversed(range(len(operator.resnets))), operator.resnets):
        total = total + vae.residual(resnet, inner.grow(2 * left).clip(*size), size, frames, first)
    return total + _resample(operator.resample, out, size, frames, first) if operator.resample else total


def _tail(operator: blocks.Tail, out: Box, size: Size, frames: int, first: bool) -> vae.Cost:
    return vae.Cost(vae.conv(operator.conv, out, size, frames) + 2 * operator.mean[0].numel() * out.area * frames)


_COSTS: dict[type, Callable[[Any, Box, Size, int, bool], vae.Cost]] = {
    ConvIn: vae.conv_in,
    ResidualBlock: vae.residual,
    Attention: vae.attention,
    blocks.Resample: _resample,
    blocks.DownBlock: _down,
    blocks.Tail: _tail,
}


def _live(encoder: StreamingEncoder, boxes: list[Box]) -> int:
    """Elements alive in the widest layer of a tile: its pixels, two convolutions with their borders, results, and the history of every layer."""
    frames, history, widest = encoder.temporal_factor, 0, 0
    for operator, have in zip(encoder.tiled, boxes):
        convolutions = _convolutions(operator)
        history += sum(HISTORY * conv.in_channels * have.grow(1).area for conv in convolutions)
        channels = max((c for conv in convolutions for c in (conv.in_channels, conv.out_channels)), default=0)
        widest = max(widest, channels * have.grow(1).area * (2 * (frames + HISTORY) + RESULTS * frames))
        frames = _frames_after(operator, frames, False)
    return history + widest + 2 * 3 * encoder.temporal_factor * boxes[0].area * encoder.patch**2


def _convolutions(operator: Any) -> list[CausalConv]:
    match operator:
        case ConvIn():
            return [operator.conv]
        case ResidualBlock():
            return [operator.conv1, operator.conv2]
        case blocks.DownBlock():
            return [conv for resnet in operator.resnets for conv in _convolutions(resnet)]
    return []
