"""Released files as their sources describe them, made here: names and shapes are spelled out from the public code of LUVE's upsampler and of
Wan, not from our networks. What the names mean: `released_reference`."""

from __future__ import annotations

import math
from itertools import pairwise, product

import torch

Shape = tuple[int, ...]


def linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def tmsa(name: str, width: int, window: Shape, heads: int, mutual: bool) -> dict[str, Shape]:
    """A block of VRT: parameters, and the two tables that it also stores."""
    positions, offsets = math.prod(window), math.prod(2 * side - 1 for side in window)
    found = {f"{name}.attn.relative_position_bias_table": (offsets, heads), f"{name}.attn.relative_position_index": (positions, positions)}
    found |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width) | linear(f"{name}.attn.qkv_self", width, 3 * width)
    found |= linear(f"{name}.attn.proj", 2 * width if mutual else width, width)
    if mutual:
        found |= linear(f"{name}.attn.qkv_mut", width, 3 * width) | {f"{name}.attn.position_bias": (1, math.prod(window[1:]), 2 * (width // 2))}
    return found | linear(f"{name}.mlp.fc11", width, 2 * width) | linear(f"{name}.mlp.fc12", width, 2 * width) | linear(f"{name}.mlp.fc2", 2 * width, width)


def vrt(name: str, inputs: int, depths: list[int], widths: list[int], window: Shape, heads: int, still: tuple[int, ...]) -> dict[str, Shape]:
    """VRT as LUVE builds it: without warping and reconstruction; `still` are the layers (from 0) that see single frames."""
    found = {f"{name}.conv_first.weight": (widths[0], inputs, 1, 3, 3), f"{name}.conv_first.bias": (widths[0],)}
    for i, scale in enumerate(("none", "down", "down", "down", "up", "up", "up")):
        stage, width = f"{name}.stage{i + 1}", widths[i]
        gathered = {"none": width, "down": 4 * width, "up": width // 4}[scale]
        found |= norm(f"{stage}.reshape.1", gathered) | ({} if scale == "none" else linear(f"{stage}.reshape.2", gathered, width))
        mutual = int(depths[i] * 0.75)
        for block in range(mutual):
            found |= tmsa(f"{stage}.residual_group1.blocks.{block}", width, (2, *window[1:]), heads, True)
        for block in range(depths[i] - mutual):
            found |= tmsa(f"{stage}.residual_group2.blocks.{block}", width, window, heads, False)
        found |= linear(f"{stage}.linear1", width, width) | linear(f"{stage}.linear2", width, width)
    found |= norm(f"{name}.stage8.0.1", widths[6]) | linear(f"{name}.stage8.0.2", widths[6], widths[7])
    for i in range(7, len(depths)):
        for block in range(depths[i]):
            layer_window = (1, *window[1:]) if i in still else window
            found |= tmsa(f"{name}.stage8.{i - 6}.residual_group.blocks.{block}", widths[i], layer_window, heads, False)
        found |= linear(f"{name}.stage8.{i - 6}.linear", widths[i], widths[i])
    return found | norm(f"{name}.norm", widths[-1]) | linear(f"{name}.conv_after_body", widths[-1], widths[0])


def upsampler(encoder: dict, decoder: dict, hidden: list[int], channels: int = 16) -> dict[str, Shape]:
    """The whole state dictionary: encoder, decoder, the implicit function, the last convolution."""
    widths = [27 * encoder["widths"][0] + 6, *hidden, channels]
    found = vrt("encoder", channels, **encoder) | vrt("decoder", channels, **decoder)
    for i, (a, b) in enumerate(pairwise(widths)):
        found |= linear(f"imnet.layers.{2 * i}", a, b)
    return found | {"conv.weight": (channels, decoder["widths"][0], 1, 1), "conv.bias": (channels,)}


# config.yaml of the release and VRT's defaults, in which layers 11 and 12 see single frames
FULL = upsampler(
    {"depths": [8] * 7 + [4] * 6, "widths": [120] * 7 + [180] * 6, "window": (6, 8, 8), "heads": 6, "still": (11, 12)},
    {"depths": [1] * 10, "widths": [24] * 7 + [48] * 3, "window": (6, 8, 8), "heads": 6, "still": (11, 12)},
    [512, 512, 256, 256],
)
WINDOW, HEADS = (4, 4, 4), 3
SMALL = upsampler(
    {"depths": [4] * 7 + [2] * 2, "widths": [12] * 7 + [24] * 2, "window": WINDOW, "heads": HEADS, "still": (8,)},
    {"depths": [1] * 8, "widths": [12] * 8, "window": WINDOW, "heads": HEADS, "still": ()},
    [16, 8],
)


def tensors(shapes: dict[str, Shape], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values, and the tables as VRT computes them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        block = name.rpartition(".")[0]
        if name.endswith("relative_position_index"):
            made[name] = relative_index(window_of(shapes, block))
        elif name.endswith("position_bias"):
            made[name] = sines(window_of(shapes, block), shape[2] // 2)[None]
        else:
            made[name] = torch.randn(shape, generator=generator) * 0.3 + (1.0 if ".norm" in name and name.endswith("weight") else 0.0)
    return made


def window_of(shapes: dict[str, Shape], attention: str) -> Shape:
    positions = shapes[f"{attention}.relative_position_index"][0]
    return (positions // math.prod(WINDOW[1:]), *WINDOW[1:])


def places(window: Shape) -> list[Shape]:
    return list(product(*(range(side) for side in window)))


def relative_index(window: Shape) -> torch.Tensor:
    """Row of the table for each pair of places, mixed radix of the three offsets."""
    t, y, x = window
    rows = [[((a[0] - b[0] + t - 1) * (2 * y - 1) + a[1] - b[1] + y - 1) * (2 * x - 1) + a[2] - b[2] + x - 1 for b in places(window)] for a in places(window)]
    return torch.tensor(rows)


def sines(window: Shape, half: int) -> torch.Tensor:
    """[y * x, 2 * half]: of the row, then of the column."""
    waves = []
    for _, y, x in places((1, *window[1:])):
        angles = [
            [(at + 1) / (side + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / half) for i in range(half)] for at, side in ((y, window[1]), (x, window[2]))
        ]
        waves.append([math.cos(angle) if i % 2 else math.sin(angle) for axis in angles for i, angle in enumerate(axis)])
    return torch.tensor(waves)


# --- Wan's own names -----------------------------------------------------------------------------------------------------------------

WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    "patch_embedding": "patch_embedding",
}
WAN_BLOCK = {"attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v", "norm_q": "norm_q", "norm_k": "norm_k"}
WAN_BLOCK |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3", "scale_shift_table": "modulation"}


def wan_name(name: str) -> str:
    """A diffusers name as Wan's own checkpoints have it, part by part."""
    module, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    if module.startswith("blocks."):
        _, number, inner = module.split(".", 2)
        if inner.startswith("attn"):
            attention, _, layer = inner.partition(".")
            inner = f"{WAN_BLOCK[attention]}.{WAN_BLOCK[layer]}"
        else:
            inner = WAN_BLOCK[inner]
        module = f"blocks.{number}.{inner}"
    else:
        module = WAN[module]
    return f"{module}.{kind}" if kind else module
