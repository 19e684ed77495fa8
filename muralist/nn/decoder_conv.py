"""The causal 3x3x3 convolution of the Wan decoder, on tiles, in row strips, with its temporal cache.

Activations are [t, H, W, C] contiguous (channels last, no batch): the layout that oneDNN and cuDNN convolve fastest, and in which a
norm over channels, a temporal mix and a row strip are all contiguous. Four ideas make it quick and exact:

* *Valid convolution on an explicit border.* A pass owns a buffer one position wider than its output. Positions outside the image are
  zero there (the convolution's own padding), positions beside a tile hold real neighbours. So a tile is right at every kind of edge.
* *Row strips.* Norm, SiLU, temporal mix and residual run on strips that stay in the CPU's second-level cache.
* *No products with zeros.* Nothing stands before the first frame, so only the last tap in time is convolved there.
* *Fewer multiplications.* fp32 on a CPU is compute bound here (a convolution already runs at the speed of a matrix product). The kernel
  is three taps long in time and a step yields four frames, so Winograd's F(4, 3) over *time* (Lavin and Gray 2015, one-dimensional)
  replaces twelve 2-D convolutions by six, F(2, 3) six by four. The two mixes are matrix products with a 6-row matrix. With the points
  0, 1, -1, 2, -1/2, infinity the rounding error is 2.7 times that of the direct sum (rms, fp32), far below the 1e-5 that decode promises.
  Other dtypes and devices convolve directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from muralist.tiling import Box, Span

HISTORY = 2  # frames that a kernel of three taps remembers
STRIP_BYTES = 1 << 22  # of one strip of activations through a convolution; 4 MiB was 10 % quicker than 1 MiB
FEED_BYTES = 1 << 20  # of one strip through norm, SiLU and temporal mix, which touch it six times: it should stay in the second-level cache
_POINTS = (0.0, 1.0, -1.0, 2.0, -0.5)  # small and of mixed size: the least rounding among the usual choices


@dataclass(frozen=True, slots=True)
class TimeMix:
    """F(m, 3) over time: frames [n] -> n mixed frames -> 2-D convolution each -> m frames, n = m + 2.

    `before` [n, n] mixes input frames, `taps` [n, 3] mixes kernel taps, `after` [m, n] mixes the results; column 1 of `after` is all
    ones (the point 1), so a bias added to result 1 reaches every frame.
    """

    before: torch.Tensor
    taps: torch.Tensor
    after: torch.Tensor


@cache
def time_mix(frames: int) -> TimeMix:
    """Cook-Toom matrices of F(frames, 3) in fp64, `before` scaled to rows of largest entry one; one frame is the plain sum of three taps."""
    n = frames + HISTORY
    if frames == 1:
        return TimeMix(torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64))
    points = torch.tensor(_POINTS[: n - 1], dtype=torch.float64)

    def powers(columns: int) -> torch.Tensor:
        infinity = torch.zeros(1, columns, dtype=torch.float64)
        infinity[0, -1] = 1
        return torch.cat([points[:, None] ** torch.arange(columns), infinity])

    before = torch.linalg.inv(powers(n)).T
    scale = before.abs().amax(dim=1, keepdim=True)
    return TimeMix(before=before / scale, taps=powers(3) * scale, after=powers(frames).T)


class Pool:
    """Work tensors of a decoder, kept from tile to tile, one a slot.

    A C allocator hands large blocks back to the system, and getting them again costs a page fault for every 4 KiB: a quarter of the whole
    decode where measured. Devices have caching allocators of their own, so there every call gets a new tensor.
    """

    def __init__(self) -> None:
        self._slots: dict[str, torch.Tensor] = {}

    def take(self, slot: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor; whatever the slot held before is overwritten."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        if slot not in self._slots or self._slots[slot].numel() < size:
            self._slots.pop(slot, None)  # free the smaller one first
            self._slots[slot] = torch.empty(size, dtype=torch.uint8)  # bytes, since the head computes in another type
        return self._slots[slot][:size].view(like.dtype).view(shape)


def uses_time_mix(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type in ("cpu", "meta")


class CausalConv:
    """One `WanCausalConv3d` of kernel 3x3x3, its weights laid out for channels-last work.

    Args:
        name: the module's path in the decoder; the key of its cache.
        conv: weights [Co, C, 3, 3, 3] and bias.
        pool: where its buffers come from, in slots named after `slot`; passes that run at the same time need different ones.
        order: permutation of the output channels, if another order suits what follows.
        dtype: of the arithmetic, that of the weights by default.
    """

    def __init__(self, name: str, conv: WanCausalConv3d, pool: Pool, slot: str, order: list[int] | None = None, dtype: torch.dtype | None = None):
        if conv.kernel_size != (3, 3, 3) or conv.stride != (1, 1, 1):
            raise ValueError(f"{name} has kernel {conv.kernel_size} and stride {conv.stride}; the streaming decoder knows 3x3x3, stride 1")
        self.name, self.pool, self.slot = name, pool, slot
        order = order or list(range(conv.out_channels))
        weight, self.bias = conv.weight.detach()[order].to(dtype), conv.bias.detach()[order].to(dtype)
        self.out_channels, self.in_channels = weight.shape[:2]
        self.weight = weight.contiguous(memory_format=torch.channels_last_3d)
        self.mixed = {t: self._mix(weight, time_mix(t)) for t in (1, 2, 4)} if uses_time_mix(conv.weight) else {}

    @staticmethod
    def _mix(weight: torch.Tensor, mix: TimeMix) -> list[torch.Tensor]:
        mixed = torch.einsum("nk,oikyx->noiyx", mix.taps.to(weight.device), weight.double()).float()
        return [w.contiguous(memory_format=torch.channels_last) for w in mixed]

    def start(self, frames: int, out: Box, size: tuple[int, int], caches: dict[str, torch.Tensor], part: str = "") -> ConvPass:
        """Begin `frames` new frames of the output box `out` of an image of `size` [H, W].

        `caches` holds this tile's history; where a tile is convolved in parts, each has a name.
        """
        return ConvPass(self, frames, out, out.grow(1), out.grow(1).clip(*size), caches, self.name + part)

    def cache_elements(self, out: Box) -> int:
        return HISTORY * self.in_channels * out.grow(1).area


@dataclass(slots=True)
class ConvPass:
    """Some frames of one convolution on one box: feed input rows, then take output rows.

    `frame` is the buffer's box (the output grown by one), `real` the part of it inside the image, which is all that `feed` accepts; `fresh`: the frame
    is the first one, before which all is zero; `striped`: rows are fed in strips that stay in cache.
    """

    conv: CausalConv
    frames: int
    out: Box
    frame: Box
    real: Box
    caches: dict[str, torch.Tensor]
    key: str
    fresh: bool = field(init=False)
    striped: bool = field(init=False)
    buffer: torch.Tensor = field(init=False)
    strip: torch.Tensor = field(init=False)
    mix: TimeMix | None = field(init=False)

    def __post_init__(self) -> None:
        weight = self.conv.weight
        self.fresh, self.striped = self.frames == 1 and self.key not in self.caches, self.frames in self.conv.mixed
        self.mix = None
        if self.striped and not self.fresh:
            mix = time_mix(self.frames)
            self.mix = TimeMix(*(m.to(weight) for m in (mix.before, mix.taps, mix.after)))
        shape = (self.frames + HISTORY, *self.frame.shape, self.conv.in_channels)
        self.buffer = self.conv.pool.take(f"{self.conv.slot}.buffer", shape, weight)
        self._zero_outside(self.buffer)
        self.strip = weight.new_zeros((shape[0], self._rows(FEED_BYTES, 1), *shape[2:])) if self.mix else self.buffer
        if self.key not in self.caches:
            self.caches[self.key] = weight.new_zeros((HISTORY, *shape[1:]))

    def _zero_outside(self, buffer: torch.Tensor) -> None:
        y, x = self.real.inside(self.frame)
        for border in (buffer[:, : y.start], buffer[:, y.stop :], buffer[:, :, : x.start], buffer[:, :, x.stop :]):
            border.zero_()

    def strip_rows(self) -> int:
        """Rows a convolution takes at a time: few enough to stay in cache on a CPU, all of them otherwise (a device wants few large kernels)."""
        return self._rows(STRIP_BYTES, 4) if self.striped else len(self.frame.y)

    def _rows(self, strip_bytes: int, least: int) -> int:
        row = self.frames * len(self.frame.x) * self.conv.in_channels * self.conv.weight.element_size()
        return min(max(strip_bytes // row, least), len(self.frame.y))

    def feed(self, rows: Span, x: torch.Tensor, write: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        """Input rows `rows` (image rows within `real`), x [t, rows, width of real, C]; `write(into, x)` turns them into activations."""
        height = self._rows(FEED_BYTES, 1) if self.striped else len(rows)
        for part in strips(rows, height):
            self._feed(part, x[:, part.inside(rows)], write)

    def _feed(self, rows: Span, x: torch.Tensor, write: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        y, columns = rows.inside(self.frame.y), self.real.x.inside(self.frame.x)
        past = self.caches[self.key][:, y]
        strip = self.strip[:, : len(rows)] if self.mix else self.buffer[:, y]
        strip[:HISTORY] = past
        write(strip[HISTORY:, :, columns], x)
        past.copy_(strip[-HISTORY:])
        if self.mix:
            n, row = len(strip), strip[0, 0].numel()
            mixed = self.buffer.view(n, -1)[:, y.start * row : y.stop * row]
            torch.mm(self.mix.before, strip.reshape(n, -1), out=mixed)

    def take(self, rows: Span) -> torch.Tensor:
        """Output rows `rows` of `out` as [t, rows, W, Co], once the rows one above to one below have been fed."""
        y = rows.grow(1).inside(self.frame.y)
        if self.fresh:
            return F.conv2d(self.buffer[-1:, y].permute(0, 3, 1, 2), self.conv.weight[:, :, -1], self.conv.bias).permute(0, 2, 3, 1)
        if not self.mix:
            x = self.buffer[None, :, y].permute(0, 4, 1, 2, 3)
            return F.conv3d(x, self.conv.weight, self.conv.bias)[0].permute(1, 2, 3, 0)
        shape = (len(self.buffer), len(rows), len(self.out.x), self.conv.out_channels)
        results = self.conv.pool.take("results", shape, self.buffer)
        for i, weight in enumerate(self.conv.mixed[self.frames]):
            x = self.buffer[i : i + 1, y].permute(0, 3, 1, 2)
            results[i] = F.conv2d(x, weight, self.conv.bias if i == 1 else None)[0].permute(1, 2, 0)
        return torch.mm(self.mix.after, results.view(len(results), -1)).view(self.frames, *results.shape[1:])


def strips(rows: Span, height: int) -> list[Span]:
    """`rows` in consecutive spans of at most `height`."""
    return [Span(start, min(start + height, rows.stop)) for start in range(rows.start, rows.stop, height)]
