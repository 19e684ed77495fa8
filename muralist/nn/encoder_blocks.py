"""The blocks of the Wan encoder as operators on tiles, beside those of the decoder (`decoder_blocks`), whose protocol they follow.

What is its own here halves: rows and columns by a convolution of stride two, frames by a convolution over three of them. `scale` is the step of the
result on the input's grid. Formulas follow diffusers' `autoencoder_kl_wan.py` (0.42); the names they come from are in parentheses.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan as wan

from muralist.nn.decoder_blocks import Caches, NormSilu, Patch, ResidualBlock
from muralist.nn.decoder_conv import CausalConv, Pool, strips
from muralist.tiling import Box


class SpaceHalve:
    """A 3x3 convolution of stride two; one row and one column of zeros after the last (`WanResample.resample`)."""

    def __init__(self, conv: torch.nn.Conv2d):
        if conv.kernel_size != (3, 3) or conv.stride != (2, 2):
            raise ValueError(f"a downsampling convolution of kernel {conv.kernel_size} and stride {conv.stride}; the streaming encoder knows 3x3, 2")
        self.weight, self.bias = conv.weight.detach().contiguous(memory_format=torch.channels_last), conv.bias.detach()

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        fine = out.times(2)
        return Box(fine.y.grow(0, 1), fine.x.grow(0, 1)).clip(*size)

    def run(self, patch: Patch, out: Box) -> torch.Tensor:
        """[t, H, W, C] -> [t, H / 2, W / 2, C] of the coarse box `out`."""
        have = self.needs(out, patch.size)
        x = patch.crop(have).data
        missing = [2 * len(o) + 1 - len(h) for o, h in ((out.x, have.x), (out.y, have.y))]
        if any(missing):
            x = F.pad(x, (0, 0, 0, missing[0], 0, missing[1]))
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, stride=2).permute(0, 2, 3, 1)


class TimeHalve:
    """One frame from each two and the one before them, the very first frame excepted (`WanResample.time_conv`)."""

    def __init__(self, name: str, conv: wan.WanCausalConv3d):
        if conv.kernel_size != (3, 1, 1) or conv.stride != (2, 1, 1):
            raise ValueError(f"{name} has kernel {conv.kernel_size} and stride {conv.stride}; the streaming encoder knows 3x1x1, 2x1x1")
        self.name = name
        self.taps, self.bias = [tap.contiguous() for tap in conv.weight.detach()[..., 0, 0].unbind(-1)], conv.bias.detach()

    def run(self, x: torch.Tensor, *, first: bool, caches: Caches) -> torch.Tensor:
        """[t, H, W, C] -> [t / 2, H, W, C]; the first frame passes as it is."""
        joined = x if first else torch.cat([caches[self.name], x])
        caches[self.name] = x[-1:].clone()
        if first:
            return x
        before, middle, after = joined[:-2:2], joined[1:-1:2], joined[2::2]
        return F.linear(before, self.taps[0]) + F.linear(middle, self.taps[1]) + F.linear(after, self.taps[2], self.bias)


class Resample:
    """Half of the rows and columns, then half of the frames where `downsample3d` says so (`WanResample`)."""

    scale = 2

    def __init__(self, name: str, resample: wan.WanResample):
        if resample.mode not in ("downsample2d", "downsample3d"):
            raise ValueError(f"{name} is a {resample.mode}; the streaming encoder knows downsample2d and downsample3d")
        self.space = SpaceHalve(resample.resample[1])
        self.time = TimeHalve(f"{name}.time_conv", resample.time_conv) if resample.mode == "downsample3d" else None

    @property
    def frame_scale(self) -> int:
        return 2 if self.time else 1

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        return self.space.needs(out, size)

    def run(self, patch: Patch, out: Box, *, first: bool, caches: Caches) -> Patch:
        x = self.space.run(patch, out)
        if self.time:
            x = self.time.run(x, first=first, caches=caches)
        return Patch(x, out, (patch.size[0] // 2, patch.size[1] // 2))


class Average:
    """The residual flavour's shortcut around a block: frames, rows and columns become channels, and these are averaged in groups (`AvgDown3D`)."""

    def __init__(self, shortcut: wan.AvgDown3D):
        self.time, self.space, self.group = shortcut.factor_t, shortcut.factor_s, shortcut.group_size
        factor = shortcut.factor
        if max(factor, self.group) % min(factor, self.group):
            raise ValueError(f"a shortcut that averages {self.group} of {factor} parts; the streaming encoder knows multiples")

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """[t, H, W, C] -> [t / time, H / space, W / space, Co]; zeros stand before a first frame that has no partner."""
        if missing := -len(x) % self.time:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, missing, 0))
        sums: dict[int, torch.Tensor] = {}  # a channel's parts lie in one group, or in several consecutive ones
        for part, (i, a, b) in enumerate(itertools.product(range(self.time), range(self.space), range(self.space))):
            view, group = x[i :: self.time, a :: self.space, b :: self.space], part // self.group
            sums[group] = sums[group].add_(view) if group in sums else view.clone()
        total = torch.stack(list(sums.values()), dim=-1).flatten(-2)
        if self.group > (parts := self.time * self.space**2):  # several channels lie in one group
            total = total.unflatten(-1, (-1, self.group // parts)).sum(dim=-1)
        return total.div_(self.group)


class DownBlock:
    """Residual blocks, then downsampling, then the averaging shortcut (`WanResidualDownBlock`)."""

    def __init__(self, name: str, block: wan.WanResidualDownBlock, pool: Pool):
        self.resnets = [ResidualBlock(f"{name}.resnets.{i}", resnet, pool, f"result{i % 2}") for i, resnet in enumerate(block.resnets)]
        self.resample = Resample(f"{name}.downsampler", block.downsampler) if block.downsampler is not None else None
        self.scale = 2 if self.resample else 1
        self.shortcut = Average(block.avg_shortcut)

    @property
    def frame_scale(self) -> int:
        return self.resample.frame_scale if self.resample else 1

    def inner(self, out: Box, size: tuple[int, int]) -> Box:
        """What the residual blocks must give."""
        return self.resample.needs(out, size) if self.resample else out

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        return self.inner(out, size).grow(2 * len(self.resnets)).clip(*size)

    def run(self, patch: Patch, out: Box, *, first: bool, caches: Caches) -> Patch:
        around = self.shortcut.run(patch.crop(out.times(self.scale)).data)  # first: the residual blocks may write where the input lies
        inner, x = self.inner(out, patch.size), patch
        for left, resnet in zip(reversed(range(len(self.resnets))), self.resnets):
            x = resnet.run(x, inner.grow(2 * left).clip(*patch.size), first=first, caches=caches)
        if self.resample:
            x = self.resample.run(x, out, first=first, caches=caches)
        return Patch(x.crop(out).data + around, out, x.size)


class Tail:
    """Norm, SiLU and last convolution (`norm_out`, `conv_out`), then the mean's half of `quant_conv`."""

    scale = 1

    def __init__(self, name: str, norm: wan.WanRMS_norm, conv: wan.WanCausalConv3d, quant: wan.WanCausalConv3d, pool: Pool):
        self.norm, self.conv = NormSilu(norm), CausalConv(name, conv, pool, "conv1")
        channels = quant.out_channels // 2
        self.mean = (quant.weight.detach().flatten(1)[:channels].contiguous(), quant.bias.detach()[:channels])

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        return out.grow(1).clip(*size)

    def run(self, patch: Patch, out: Box, *, first: bool, caches: Caches) -> Patch:
        step = self.conv.start(len(patch.data), out, patch.size, caches)
        step.feed(step.real.y, patch.rows(step.real.y, step.real.x), self.norm.write)
        rows = [F.linear(step.take(part), *self.mean) for part in strips(out.y, step.strip_rows())]
        return Patch(torch.cat(rows, dim=1), out, patch.size)


def patchify(frames: torch.Tensor, patch: int, box: Box, size: tuple[int, int]) -> Patch:
    """Pixels [t, H, W, 3] in [0, 1] of the box `box`, in patches, -> activations in [-1, 1]; diffusers packs a patch as (colour, column, row)."""
    t, height, width, _ = frames.shape
    x = frames.view(t, height // patch, patch, width // patch, patch, 3).permute(0, 1, 3, 5, 4, 2)
    return Patch(x.reshape(t, height // patch, width // patch, -1) * 2 - 1, box, size)
