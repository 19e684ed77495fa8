"""The blocks of the Wan decoder as operators on tiles: what box each needs, and how it computes it.

An operator takes a `Patch` that holds at least the box it asked for (`needs`) and returns a patch that holds the output box. Boxes are walked
backwards through the operators, so each layer computes just the halo that the layers after it still need; the halo of a tile is thus
derived from the modules, never guessed. Formulas follow diffusers' `autoencoder_kl_wan.py` (0.42); the names they come from are in
parentheses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan as wan

from muralist.nn.decoder_conv import HISTORY, CausalConv, Pool, strips, uses_time_mix
from muralist.tiling import Box, Span

Caches = dict[str, torch.Tensor]
HEAD_BYTES = 1 << 28  # of the last convolution's input at a time, where it is widened to fp32
SCORES = 1 << 27  # attention scores computed at a time where a kernel holds them all


@dataclass(slots=True)
class Patch:
    """Activations [t, h, w, C] of the box `box` of an image of `size` [H, W]."""

    data: torch.Tensor
    box: Box
    size: tuple[int, int]

    def crop(self, box: Box) -> Patch:
        """A view of the part `box`."""
        y, x = box.inside(self.box)
        return Patch(self.data[:, y, x], box, self.size)

    def rows(self, rows: Span, columns: Span) -> torch.Tensor:
        """A view of rows and columns given in image positions."""
        return self.data[:, rows.inside(self.box.y), columns.inside(self.box.x)]


class Operator(Protocol):
    """A layer of the decoder. `scale` is its spatial magnification."""

    scale: int

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        """The input box for the output box `out`, in an input image of `size`."""

    def run(self, patch: Patch, out: Box, *, first: bool, caches: Caches) -> Patch:
        """The output box `out`; `first` says that this is latent frame 0, which yields one frame."""


class NormSilu:
    """RMS norm over channels, then SiLU (`WanRMS_norm`, `nonlinearity`)."""

    def __init__(self, norm: wan.WanRMS_norm):
        if not isinstance(norm.bias, float):
            raise ValueError("the Wan decoder's norms have no bias")
        self.gamma, self.scale = norm.gamma.detach().flatten(), norm.scale

    def write(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """silu(x / |x| * sqrt(C) * gamma) of x [..., C] into `out`, in its type; low precision normalises in fp32 as diffusers does."""
        x = x.to(out.dtype)
        if x.dtype in (torch.float16, torch.bfloat16):
            out.copy_(F.normalize(x.float(), dim=-1).to(x.dtype) * self.scale * self.gamma)
        else:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            torch.mul(x, self.scale / length.clamp_(min=1e-12), out=out)
            out.mul_(self.gamma)
        F.silu(out, inplace=True)


class ConvIn:
    """The first convolution: no norm before it (`conv_in`)."""

    scale = 1

    def __init__(self, name: str, conv: wan.WanCausalConv3d, pool: Pool):
        self.conv = CausalConv(name, conv, pool, "conv1")

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        return out.grow(1).clip(*size)

    def run(self, patch: Patch, out: Box, *, first: bool, caches: Caches) -> Patch:
        step = self.conv.start(len(patch.data), out, patch.size, caches)
        step.feed(step.real.y, patch.rows(step.real.y, step.real.x), torch.Tensor.copy_)
        return Patch(step.take(out.y), out, patch.size)


class ResidualBlock:
    """conv2(silu(norm2(conv1(silu(norm1(x)))))) + shortcut(x) (`WanResidualBlock`).

    Rows flow through both convolutions strip by strip, so the tensor between them never exists. The result lies in the pool's slot `slot`
    until the next block with that slot runs; without a slot it is a new tensor.
    """

    scale = 1

    def __init__(self, name: str, block: wan.WanResidualBlock, pool: Pool, slot: str | None = None):
        if not isinstance(block.nonlinearity, torch.nn.SiLU):
            raise ValueError(f"{name} uses {block.nonlinearity}; the streaming decoder knows SiLU")
        self.norm1, self.norm2 = NormSilu(block.norm1), NormSilu(block.norm2)
        self.conv1 = CausalConv(f"{name}.conv1", block.conv1, pool, "conv1")
        self.conv2 = CausalConv(f"{name}.conv2", block.conv2, pool, "conv2")
        self.pool, self.slot = pool, slot
        plain = isinstance(block.conv_shortcut, torch.nn.Identity)
        self.shortcut = None if plain else (block.conv_shortcut.weight.detach().flatten(1), block.conv_shortcut.bias.detach())

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        return out.grow(2).clip(*size)

    def run(self, patch: Patch, out: Box, *, first: bool, caches: Caches) -> Patch:
        frames = len(patch.data)
        step2 = self.conv2.start(frames, out, patch.size, caches)
        step1 = self.conv1.start(frames, step2.real, patch.size, caches)
        step1.feed(step1.real.y, patch.rows(step1.real.y, step1.real.x), self.norm1.write)
        for rows in strips(step2.real.y, step2.strip_rows()):
            step2.feed(rows, step1.take(rows), self.norm2.write)
        shape = (frames, *out.shape, self.conv2.out_channels)
        result = self.pool.take(self.slot, shape, patch.data) if self.slot else patch.data.new_empty(shape)
        for rows in strips(out.y, step2.strip_rows()):
            torch.add(step2.take(rows), self._skip(patch.rows(rows, out.x)), out=result[:, rows.inside(out.y)])
        return Patch(result, out, patch.size)

    def _skip(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.shortcut is None else F.linear(x, *self.shortcut)


class Attention:
    """Self-attention of one head over all positions of a frame (`WanAttentionBlock`): needs the whole frame.

    The head is as wide as the layer (384, 1024), wider than flash kernels take, so queries go in chunks that bound the score matrix, if there is one.
    """

    scale = 1

    def __init__(self, block: wan.WanAttentionBlock):
        self.gamma, self.norm_scale = block.norm.gamma.detach().flatten(), block.norm.scale
        self.qkv = (block.to_qkv.weight.detach().flatten(1), block.to_qkv.bias.detach())
        self.proj = (block.proj.weight.detach().flatten(1), block.proj.bias.detach())

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        return Box.whole(*size)

    def run(self, patch: Patch, out: Box, *, first: bool, caches: Caches) -> Patch:
        y, x = out.inside(patch.box)
        frames = [frame + self._attend(frame) for frame in patch.data]
        return Patch(torch.stack(frames)[:, y, x], out, patch.size)

    def _attend(self, frame: torch.Tensor) -> torch.Tensor:
        """[H, W, C] -> [H, W, C]"""
        tokens = frame.flatten(0, 1)
        wide = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
        normed = F.normalize(wide, dim=-1).to(tokens.dtype) * self.norm_scale * self.gamma
        q, k, v = (part[None, None] for part in F.linear(normed, *self.qkv).chunk(3, dim=-1))
        chunks = q.split(len(tokens) if _holds_no_scores(q, k, v) else max(SCORES // len(tokens), 1), dim=2)
        mixed = torch.cat([F.scaled_dot_product_attention(chunk, k, v) for chunk in chunks], dim=2)
        return F.linear(mixed[0, 0], *self.proj).view_as(frame)


def _holds_no_scores(*qkv: torch.Tensor) -> bool:
    """Whether a GPU has a kernel for heads so wide that never holds the scores: all queries at once then, since few of them leave most of it idle."""
    if qkv[0].device.type != "cuda":
        return False
    return torch.backends.cuda.can_use_efficient_attention(torch.backends.cuda.SDPAParams(*qkv, None, 0.0, False, False))


class TimeDouble:
    """Two frames from each, the very first frame excepted (`WanResample.time_conv` and the interleave after it)."""

    def __init__(self, name: str, conv: wan.WanCausalConv3d):
        if conv.kernel_size != (3, 1, 1):
            raise ValueError(f"{name} has kernel {conv.kernel_size}; the streaming decoder knows 3x1x1")
        self.name, self.channels = name, conv.in_channels
        self.weight, self.bias = conv.weight.detach().contiguous(memory_format=torch.channels_last_3d), conv.bias.detach()

    def run(self, x: torch.Tensor, *, first: bool, caches: Caches) -> torch.Tensor:
        """[t, H, W, C] -> [2t, H, W, C]; the first frame passes as it is and leaves no history, as in diffusers ("Rep")."""
        if first:
            return x
        past = caches.get(self.name)
        if past is None:
            past = x.new_zeros((HISTORY, *x.shape[1:]))
        joined = torch.cat([past, x])
        caches[self.name] = joined[-HISTORY:].clone()
        pairs = F.conv3d(joined[None].permute(0, 4, 1, 2, 3), self.weight, self.bias)[0].permute(1, 2, 3, 0)
        t, h, w, _ = pairs.shape
        return pairs.reshape(t, h, w, 2, self.channels).permute(0, 3, 1, 2, 4).reshape(2 * t, h, w, self.channels)


class SpaceDouble:
    """Nearest upsampling by two, then a 3x3 convolution (`WanResample.resample`).

    Both together are one transposed convolution of kernel 4 and stride 2 (each of its taps is a sum of kernel taps): 2.25 times fewer
    multiplications and no upsampled tensor. Only where fp32 makes the summed taps exact enough; otherwise the two steps of diffusers.
    """

    def __init__(self, conv: torch.nn.Conv2d):
        weight, self.bias = conv.weight.detach(), conv.bias.detach()
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.out_channels = len(weight)
        self.merged = self._merge(weight) if uses_time_mix(weight) else None

    @staticmethod
    def _merge(weight: torch.Tensor) -> torch.Tensor:
        """[Co, C, 3, 3] -> [C, Co, 4, 4]: correlate with ones [2, 2], flipped because a transposed convolution scatters."""
        spread = weight.new_zeros(*weight.shape[:2], 4, 4, dtype=torch.float64)
        for dy in (0, 1):
            for dx in (0, 1):
                spread[:, :, dy : dy + 3, dx : dx + 3] += weight.flip(2, 3)
        return spread.float().transpose(0, 1).contiguous(memory_format=torch.channels_last)

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        """`out` on the fine grid, the result on the coarse one: the convolution reaches one fine position out."""
        return out.grow(1).over(2).clip(*size)

    def run(self, patch: Patch, out: Box) -> Patch:
        size = (patch.size[0] * 2, patch.size[1] * 2)
        x = patch.data.permute(0, 3, 1, 2)
        if self.merged is not None:
            full = F.conv_transpose2d(x, self.merged, self.bias, stride=2)  # covers one fine position more on every side
            return Patch(full.permute(0, 2, 3, 1), patch.box.times(2).grow(1), size).crop(out)
        fine = F.interpolate(x.float(), scale_factor=2, mode="nearest-exact").to(x.dtype)
        have, want = patch.box.times(2), out.grow(1)
        inner = want.meet(have)
        y, x = inner.inside(have)
        pads = (inner.x.start - want.x.start, want.x.stop - inner.x.stop, inner.y.start - want.y.start, want.y.stop - inner.y.stop)
        full = F.conv2d(F.pad(fine[:, :, y, x], pads), self.weight, self.bias)
        return Patch(full.permute(0, 2, 3, 1), out, size)


class Duplicate:
    """The residual flavour's shortcut around a block: channels become frames, rows and columns (`DupUp3D`)."""

    def __init__(self, shortcut: wan.DupUp3D):
        self.time, self.space, self.out_channels = shortcut.factor_t, shortcut.factor_s, shortcut.out_channels
        if self.space != 2:
            raise ValueError(f"a shortcut that magnifies {self.space} times; the streaming decoder knows 2")
        parts = range(self.time * 4)  # (frame, row, column)
        self.channels = [tuple((channel * shortcut.factor + part) // shortcut.repeats for channel in range(self.out_channels)) for part in parts]
        self._placed: dict[tuple[torch.device, tuple[int, ...]], torch.Tensor] = {}

    def _on(self, device: torch.device, channels: tuple[int, ...]) -> torch.Tensor:
        """Indices on a device, moved there once: to wait for them would hold the device up for every tile."""
        if (device, channels) not in self._placed:
            self._placed[device, channels] = torch.tensor(channels, device=device)
        return self._placed[device, channels]

    def add_to(self, result: torch.Tensor, x: torch.Tensor, *, first: bool) -> None:
        """result [t * time, 2h, 2w, Co] += duplicate(x [t, h, w, C]); the first chunk keeps only the last frame of each group."""
        _, h, w, _ = x.shape
        gathered: dict[tuple[int, ...], torch.Tensor] = {}
        for i in range(self.time - 1 if first else 0, self.time):
            frames = result if first else result[i :: self.time]
            for a in (0, 1):
                for b in (0, 1):
                    key = self.channels[(i * 2 + a) * 2 + b]
                    if key not in gathered:
                        gathered[key] = x if key == tuple(range(x.shape[-1])) else x[..., self._on(x.device, key)]
                    frames[:, a : 2 * h : 2, b : 2 * w : 2] += gathered[key]


class UpBlock:
    """Residual blocks, then upsampling, then the duplicating shortcut (`WanUpBlock`, `WanResidualUpBlock`)."""

    def __init__(self, name: str, block: wan.WanUpBlock | wan.WanResidualUpBlock, pool: Pool):
        # Two slots take turns: one residual block reads what the one before it wrote.
        self.resnets = [ResidualBlock(f"{name}.resnets.{i}", resnet, pool, f"result{i % 2}") for i, resnet in enumerate(block.resnets)]
        resample, where = _resample(block)
        self.scale = 2 if resample else 1
        self.space = SpaceDouble(resample.resample[1]) if resample else None
        self.time = TimeDouble(f"{name}.{where}.time_conv", resample.time_conv) if resample and resample.mode == "upsample3d" else None
        shortcut = getattr(block, "avg_shortcut", None)
        self.duplicate = Duplicate(shortcut) if shortcut is not None else None

    @property
    def frame_scale(self) -> int:
        return 2 if self.time else 1

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        if self.space:
            # Even borders: a shortcut position covers a pair of rows and a pair of columns.
            out = self.space.needs(out.over(2).times(2), size)
        return out.grow(2 * len(self.resnets)).clip(*size)

    def run(self, patch: Patch, out: Box, *, first: bool, caches: Caches) -> Patch:
        even = out.over(2).times(2) if self.space else out
        box = self.space.needs(even, patch.size) if self.space else out
        x = patch
        for i, resnet in enumerate(self.resnets):
            x = resnet.run(x, box.grow(2 * (len(self.resnets) - 1 - i)).clip(*patch.size), first=first, caches=caches)
        if not self.space:
            return x
        if self.time:
            x = Patch(self.time.run(x.data, first=first, caches=caches), x.box, x.size)
        result = self.space.run(x, even)
        if self.duplicate:
            self.duplicate.add_to(result.data, patch.crop(even.over(2)).data, first=first)
        return result.crop(out)


def _resample(block: torch.nn.Module) -> tuple[wan.WanResample | None, str]:
    """The upsampler of either kind of block and its attribute path."""
    if isinstance(block, wan.WanResidualUpBlock):
        return block.upsampler, "upsampler"
    return (block.upsamplers[0] if block.upsamplers is not None else None), "upsamplers.0"


class Head:
    """Norm, SiLU, last convolution, unpatchify, clamp and the move from [-1, 1] to [0, 1] (`norm_out`, `conv_out`, `unpatchify`).

    At least in fp32 whatever the type of the model: bf16 knows 128 values between 0.5 and 1, fewer than 8 bits, and a file gets 10. Where
    that widens the model's type (`widen` times), a tile is taken in bands of rows, so that the wide tensors stay small. `scale` is the patch.
    """

    def __init__(self, name: str, norm: wan.WanRMS_norm, conv: wan.WanCausalConv3d, patch: int, pool: Pool):
        self.norm, self.scale = NormSilu(norm), patch
        # diffusers packs a patch as (colour, column, row); (row, column, colour) makes pixel rows contiguous.
        order = torch.arange(conv.out_channels).view(-1, patch, patch).permute(2, 1, 0).flatten().tolist()
        dtype = torch.promote_types(conv.weight.dtype, torch.float32)
        self.conv = CausalConv(name, conv, pool, "conv1", order, dtype)
        self.widen = dtype.itemsize // conv.weight.element_size()

    def needs(self, out: Box, size: tuple[int, int]) -> Box:
        """`out` in pixels, the result in positions of the last convolution's input."""
        return out.over(self.scale).grow(1).clip(*size)

    def run(self, patch: Patch, out: Box, *, caches: Caches) -> torch.Tensor:
        """Pixels [t, rows, columns, 3] of the pixel box `out`, in [0, 1]; FloatingPointError if a value is NaN or infinite."""
        box, p, t = out.over(self.scale), self.scale, len(patch.data)
        pixels = self.conv.weight.new_empty((t, len(box.y), p, len(box.x) * p, 3))
        for band in self.bands(box):
            step = self.conv.start(t, band, patch.size, caches, f".{band.y.start - box.y.start}" if self.widen > 1 else "")
            step.feed(step.real.y, patch.rows(step.real.y, step.real.x), self.norm.write)
            for rows in strips(band.y, step.strip_rows()):
                x = step.take(rows)
                # Before the clamp hides an infinity. One sum finds any, without a mask as large as the frame.
                if not torch.isfinite(x.sum(dtype=torch.float32)):
                    raise FloatingPointError("the decoder's output holds NaN or infinity")
                x = x.clamp_(-1, 1).mul_(0.5).add_(0.5)
                pixels[:, rows.inside(box.y)].view(t, len(rows), p, len(box.x), -1).copy_(x.unflatten(-1, (p, -1)).movedim(3, 2))
        y, x = out.inside(box.times(p))
        return pixels.flatten(1, 2)[:, y, x]

    def bands(self, box: Box) -> list[Box]:
        """The parts of `box` (positions) that are convolved one after the other; the same for every latent frame, since each has its history."""
        if self.widen == 1:
            return [box]
        row = (4 + HISTORY) * (len(box.x) + 2) * self.conv.in_channels * self.conv.weight.element_size()  # a step yields four frames
        return [Box(rows, box.x) for rows in strips(box.y, max(HEAD_BYTES // row, 16))]
