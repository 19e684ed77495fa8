"""What the tensors of LUVE's released upsampler mean, computed from their names position by position: slow, plain, and without our networks.

Sizes must be multiples of the windows at every scale. C: channels, T: frames; n: positions of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F

from tests.released import HEADS, WINDOW, Shape, places, relative_index, sines

Tensors = dict[str, torch.Tensor]


def below(sd: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in sd.items() if name.startswith(prefix)}


def upsample(sd: Tensors, z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """z [C, T, h, w] -> [C, T, H, W]"""
    centres = [torch.linspace(-1 + 1 / side, 1 - 1 / side, side, dtype=z.dtype) for side in size]
    grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flip(-1).expand(z.shape[1], *size, 2)
    smooth = F.grid_sample(z.transpose(0, 1), grid, mode="bilinear", padding_mode="border", align_corners=False).transpose(0, 1)
    coarse = implicit(sd, vrt(below(sd, "encoder."), z), size) + smooth
    refined = torch.einsum("oc,cthw->othw", sd["conv.weight"].flatten(1), vrt(below(sd, "decoder."), coarse))
    return refined + sd["conv.bias"][:, None, None, None] + coarse


def implicit(sd: Tensors, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The MLP at every target position: the nearest feature's 3x3x3 neighbourhood (time, channel, row, column), offset, cell."""
    shape, target = features.shape[1:], (features.shape[1], *size)
    padded = F.pad(features, (1, 1, 1, 1, 1, 1))
    rows = []
    for place in product(*(range(side) for side in target)):
        at = [(i + 0.5) * n / full for i, n, full in zip(place, shape, target)]
        t, y, x = (min(int(a), n - 1) for a, n in zip(at, shape))
        around = padded[:, t : t + 3, y : y + 3, x : x + 3].transpose(0, 1).flatten()
        offset = [2 * (a - i - 0.5) for a, i in zip(at, (t, y, x))]
        rows.append(torch.cat([around, torch.tensor(offset + [2 * n / full for n, full in zip(shape, target)], dtype=features.dtype)]))
    values = torch.stack(rows)
    layers = sorted({int(name.split(".")[2]) for name in sd if name.startswith("imnet.layers.")})
    for layer in layers:
        values = dense(sd, f"imnet.layers.{layer}", values if layer == 0 else values.relu())
    return values.T.unflatten(1, target)


def vrt(sd: Tensors, x: torch.Tensor) -> torch.Tensor:
    """[C, T, H, W] -> features of the first layer's width"""
    x = F.conv3d(x[None], sd["conv_first.weight"], sd["conv_first.bias"], padding=(0, 1, 1))[0]
    first = stage(below(sd, "stage1."), x, "none")
    second = stage(below(sd, "stage2."), first, "down")
    third = stage(below(sd, "stage3."), second, "down")
    y = stage(below(sd, "stage5."), stage(below(sd, "stage4."), third, "down"), "up")
    y = stage(below(sd, "stage6."), y + third, "up")
    y = (stage(below(sd, "stage7."), y + second, "up") + first).permute(1, 2, 3, 0)
    y = dense(sd, "stage8.0.2", layer_norm(sd, "stage8.0.1", y))
    number = 1
    while f"stage8.{number}.linear.weight" in sd:
        y = y + dense(sd, f"stage8.{number}.linear", group(below(sd, f"stage8.{number}.residual_group."), y))
        number += 1
    return x + dense(sd, "conv_after_body", layer_norm(sd, "norm", y)).permute(3, 0, 1, 2)


def stage(sd: Tensors, x: torch.Tensor, scale: str) -> torch.Tensor:
    """[C, T, H, W]: space to channels or back, and two groups of blocks with a residual each."""
    if scale == "down":
        x = torch.cat([x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)])
    if scale == "up":
        quarters, wide = x.chunk(4), x.new_zeros(len(x) // 4, x.shape[1], 2 * x.shape[2], 2 * x.shape[3])
        for quarter, (column, row) in zip(quarters, product((0, 1), (0, 1))):
            wide[:, :, row::2, column::2] = quarter
        x = wide
    x = layer_norm(sd, "reshape.1", x.permute(1, 2, 3, 0))
    x = x if scale == "none" else dense(sd, "reshape.2", x)
    for number in (1, 2):
        x = dense(sd, f"linear{number}", group(below(sd, f"residual_group{number}."), x)) + x
    return x.permute(3, 0, 1, 2)


def group(sd: Tensors, x: torch.Tensor) -> torch.Tensor:
    """[T, H, W, C]: every second block's windows are shifted by half; how many frames they have shows in the size of the table."""
    number = 0
    while block := below(sd, f"blocks.{number}."):
        offsets = block["attn.relative_position_bias_table"].shape[0] // math.prod(2 * side - 1 for side in WINDOW[1:])
        x = tmsa(block, x, ((offsets + 1) // 2, *WINDOW[1:]), bool(number % 2))
        number += 1
    return x


def tmsa(sd: Tensors, x: torch.Tensor, window: Shape, shifted: bool) -> torch.Tensor:
    size = x.shape[:3]
    shift = [side // 2 if shifted and length > side else 0 for length, side in zip(size, window)]
    normed, moved = layer_norm(sd, "norm1", x), torch.zeros_like(x)
    for corner in product(*(range(0, length, side) for length, side in zip(size, window))):
        cells = torch.tensor([[c + p + s for c, p, s in zip(corner, place, shift)] for place in places(window)])
        t, y, x_ = (cells % torch.tensor(size)).T  # what lies beyond the end is taken from the start, and kept apart
        beyond = cells >= torch.tensor(size)
        together = (beyond[:, None] == beyond[None]).all(dim=2)
        moved[t, y, x_] = attention(sd, normed[t, y, x_], window, together)
    x = x + moved
    y = layer_norm(sd, "norm2", x)
    return x + dense(sd, "mlp.fc2", F.gelu(dense(sd, "mlp.fc11", y)) * dense(sd, "mlp.fc12", y))


def attention(sd: Tensors, rows: torch.Tensor, window: Shape, together: torch.Tensor) -> torch.Tensor:
    """[n, C]: each row attends to those that it lies together with; mutual: the queries of one frame, asked of the other, stand in the other."""
    bias = sd["attn.relative_position_bias_table"][relative_index(window)]  # [n, n, heads]
    own = [attend(*parts, bias[..., head], together) for head, parts in heads(dense(sd, "attn.qkv_self", rows))]
    if "attn.qkv_mut.weight" not in sd:
        return dense(sd, "attn.proj", torch.cat(own, dim=1))
    half, mutual = len(rows) // 2, []
    placed = rows + sines(window, rows.shape[1] // 2).to(rows).repeat(2, 1)
    for _, (query, key, value) in heads(dense(sd, "attn.qkv_mut", placed)):
        first = attend(query[half:], key[:half], value[:half], 0.0, together[:half, :half])
        second = attend(query[:half], key[half:], value[half:], 0.0, together[:half, :half])
        mutual.append(torch.cat([first, second]))
    return dense(sd, "attn.proj", torch.cat([*mutual, *own], dim=1))


def heads(qkv: torch.Tensor) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(number, [query, key, value] [n, d]) of each head: the three lie behind each other, and in each the heads."""
    width = qkv.shape[1] // 3
    d = width // HEADS
    for head in range(HEADS):
        yield head, [qkv[:, part * width + head * d : part * width + (head + 1) * d] for part in range(3)]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | float, together: torch.Tensor) -> torch.Tensor:
    scores = query @ key.T / math.sqrt(query.shape[1]) + bias + torch.where(together, 0.0, -100.0)
    return scores.softmax(dim=1) @ value


def dense(sd: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ sd[f"{name}.weight"].T + sd[f"{name}.bias"]


def layer_norm(sd: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * sd[f"{name}.weight"] + sd[f"{name}.bias"]
