"""How much memory a decode takes, counted before it starts.

The same backward walk over boxes that drives the decoder gives every tensor's size, so the count follows the modules: change a layer and the
plan changes with it. Counted are the pool of work tensors and whatever else is alive at the worst moment of each operator, as `decoder_blocks` allocates them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from muralist.nn.decoder import StreamingDecoder
from muralist.nn.decoder_blocks import SCORES, Attention, ConvIn, Head, Operator, ResidualBlock, UpBlock
from muralist.nn.decoder_conv import HISTORY, STRIP_BYTES, CausalConv
from muralist.nn.packed import value_bytes
from muralist.tiling import Box

SLACK = 1.15  # allocator fragmentation and workspaces of the convolution library
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class DecodeMemory:
    """Bytes: `peak` in memory (weights, caches, work and one chunk of frames), `caches` thereof, `disk` at the worst moment, `traffic` written and
    read there in all; `largest_tensor` in elements."""

    peak: int
    caches: int
    disk: int
    traffic: int
    largest_tensor: int


@dataclass(frozen=True, slots=True)
class Saves:
    """How often all caches are saved in the course of a decode, and the most of those files that exist at a time."""

    count: int
    kept: int


@dataclass(slots=True)
class Walk:
    """Element counts while walking operators over one box: the flow's shape now, and what was needed so far."""

    frames: int
    size: Size
    channels: int
    caches: int = 0
    worst: int = 0
    largest: int = 0
    slots: dict[str, int] = field(default_factory=dict)

    def pooled(self, **slots: int) -> None:
        """These tensors live in the decoder's pool, which keeps the largest of each slot."""
        for slot, elements in slots.items():
            self.slots[slot] = max(self.slots.get(slot, 0), elements)
        self.largest = max(self.largest, *slots.values())

    def alive(self, *tensors: int) -> None:
        """These tensors outside the pool exist together."""
        self.worst = max(self.worst, sum(tensors))
        self.largest = max(self.largest, *tensors)

    def through(self, operator: Operator, box: Box, out: Box) -> None:
        """One operator from input `box` to output `out`."""
        match operator:
            case UpBlock():
                self._block(operator, box, out)
            case ResidualBlock():
                self._residual(operator, box, out)
            case Attention():
                area = out.area * self.channels
                self.alive(area * self.frames, area, area, 3 * area, min(SCORES, out.area**2))
            case ConvIn():
                buffer, result = self._conv(operator.conv, out)
                self.pooled(conv1=buffer)
                self.alive(box.area * self.channels, result)
                self.channels = operator.conv.out_channels
        self.size = (self.size[0] * operator.scale, self.size[1] * operator.scale)

    def head(self, head: Head, out: Box) -> None:
        """Counted in elements of the flow's type, of which one of the head's takes `head.widen`."""
        before, bands = self.caches, head.bands(out.over(head.scale))
        buffer, result = (max(sizes) * head.widen for sizes in zip(*(self._conv(head.conv, band) for band in bands)))
        self.caches = before + (self.caches - before) * head.widen
        self.pooled(conv1=buffer)
        self.alive(result if not head.conv.mixed else 0, buffer if head.widen > 1 else 0, out.area * self.frames * 3 * head.widen)

    def _conv(self, conv: CausalConv, out: Box) -> tuple[int, int]:
        """(buffer, result) of a pass; its cache is added to the caches."""
        self.caches += conv.cache_elements(out)
        return (self.frames + HISTORY) * conv.in_channels * out.grow(1).area, self.frames * conv.out_channels * out.area

    def _residual(self, block: ResidualBlock, box: Box, out: Box, held: int = 0) -> None:
        """`held`: elements that an enclosing block keeps meanwhile."""
        first, between = self._conv(block.conv1, out.grow(1).clip(*self.size))
        second, result = self._conv(block.conv2, out)
        # Direct convolution takes all rows at once, so what lies between the two exists whole.
        direct = 0 if self.frames in block.conv1.mixed else between
        self.pooled(conv1=first, conv2=second)
        if block.slot:
            self.pooled(**{block.slot: result})
        self.alive(held, 0 if held else box.area * self.channels * self.frames, direct, 0 if block.slot else result, result if direct else 0)
        self.channels = block.conv2.out_channels

    def _block(self, block: UpBlock, box: Box, out: Box) -> None:
        even = out.over(2).times(2) if block.space else out
        inner = block.space.needs(even, self.size) if block.space else out
        held = box.area * self.channels * self.frames if block.duplicate else 0
        for i, resnet in enumerate(block.resnets):
            target = inner.grow(2 * (len(block.resnets) - 1 - i)).clip(*self.size)
            self._residual(resnet, box, target, held)
            box = target
        if not block.space:
            return
        low = inner.area * self.channels * self.frames
        if block.time:
            self.caches += HISTORY * inner.area * self.channels
            self.alive(held, low, 2 * low, 2 * low, 2 * low)
            self.frames, low = self.frames * 2, low * 2
        self.channels = block.space.out_channels
        self.alive(held, low, inner.times(2).grow(1).area * self.channels * self.frames, held)


def measure(decoder: StreamingDecoder, frames: int, size: Size, tiles: Sequence[Box], *, saves: Saves | None) -> DecodeMemory:
    """Memory of decoding `frames` latent frames of `size` [h, w] on pixel boxes `tiles`.

    `saves`: time-major: the caches of all tiles exist at once, are saved now and then, and frames leave as they come. None: tile-major: those of
    one tile, and finished tiles and the first part's results go to disk.
    """
    whole = Walk(1, size, decoder.mean.numel())
    for operator in decoder.whole:
        height, width = whole.size
        whole.through(operator, Box.whole(height, width), Box.whole(height * operator.scale, width * operator.scale))
    kinds = {tile: (_tile(decoder, whole, tile), count) for tile, count in decoder.kinds(tiles, size).items()}
    walks = [walk for walk, _ in kinds.values()]
    each = decoder.post_quant[0].element_size()
    between = whole.channels * whole.frames * whole.size[0] * whole.size[1] * each
    pixels = sum(tile.area for tile in tiles) * 3
    kept = sum(walk.caches * count for walk, count in kinds.values()) if saves else max(walk.caches for walk in walks)
    caches = (whole.caches + kept) * each
    everything = [whole, *walks]
    work = (pool(everything) + max(walk.worst for walk in everything)) * each
    # The caller may still hold one chunk of frames while the next is made.
    peak = caches + int(SLACK * (work + between + 2 * decoder.temporal_factor * pixels * 4)) + 8 * STRIP_BYTES + _weights(decoder)
    largest = max(walk.largest for walk in everything)
    if saves:
        return DecodeMemory(peak, caches, saves.kept * caches, saves.count * caches, largest)
    # the first part's caches: those in use and those that replace them; written once, or as
    # often as takes a tenth of the time (`store/pace.py`)
    tiles_and_first = ((frames - 1) * decoder.temporal_factor + 1) * pixels * value_bytes(decoder.dtype) + frames * between
    first_caches = whole.caches * each
    return DecodeMemory(peak, caches, tiles_and_first + 2 * first_caches, 2 * tiles_and_first + first_caches, largest)


def _tile(decoder: StreamingDecoder, whole: Walk, tile: Box) -> Walk:
    walk = Walk(whole.frames, whole.size, whole.channels)
    boxes = decoder.boxes(tile, whole.size)
    for operator, box, out in zip(decoder.tiled, boxes[:-1], boxes[1:]):
        walk.through(operator, box, out)
    walk.head(decoder.head, tile)
    return walk


def pool(walks: Sequence[Walk]) -> int:
    """Elements of the work tensors that all these share, each as large as the largest of them needs it."""
    return sum(max(walk.slots.get(slot, 0) for walk in walks) for slot in {slot for walk in walks for slot in walk.slots})


def _weights(decoder: StreamingDecoder) -> int:
    """Bytes of diffusers' weights of the convolutions and of their copies."""
    convs = [*convolutions(decoder.whole + decoder.tiled), decoder.head.conv]
    return sum(conv.weight.numel() * conv.weight.element_size() for conv in convs) + copies(convs)


def copies(convs: Iterable[CausalConv]) -> int:
    """Bytes of the convolutions' weights in this layout and of the kernels mixed over time (3 + 4 + 6 planes instead of 3)."""
    return sum(int(conv.weight.numel() * conv.weight.element_size() * (1 + (13 / 3 if conv.mixed else 0))) for conv in convs)


def convolutions(operators: Iterable[Operator]) -> Iterable[CausalConv]:
    for operator in operators:
        match operator:
            case ConvIn():
                yield operator.conv
            case ResidualBlock():
                yield from (operator.conv1, operator.conv2)
            case UpBlock():
                yield from convolutions(operator.resnets)
