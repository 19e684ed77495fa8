"""Blocks whose weights wait in main memory and come to the device one after another, the next one while the last one computes.

diffusers' group offloading does the same by hooks on a block's `forward`. Ours are called, and read, in other ways too: a graft changes a block's
class, which such a hook would not notice, and a proxy's keys are taken from a block before it runs. So the loop over the blocks says itself whose
turn it is (`in_turn`). Two slots of device memory take turns; a slot is written again when what was computed with it is done, so that neither the
number of blocks nor how far the processor runs ahead changes the memory that is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

SLOTS = 2
ALIGNED = 256  # bytes, as the allocator aligns them: kernels may ask for 16


class BlockStream:
    """The weights of `blocks` (same modules, changed in place) in page-locked main memory, and two slots on `device` that they visit.

    Between its turns a block's weights are those in main memory: a forward out of turn fails on a GPU. Weights must not be added or replaced afterwards;
    switching adapters on and off does neither.
    """

    def __init__(self, blocks: Sequence[torch.nn.Module], device: torch.device):
        self.blocks = blocks
        self._tensors = [_tensors(block) for block in blocks]
        sizes = [sum(_room(t) for t in tensors) for tensors in self._tensors]
        self._device, cuda = device, device.type == "cuda"
        self._slots = [torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device) for _ in range(min(SLOTS, len(blocks)))]
        self._away = [_views(self._slots[n % SLOTS], tensors) for n, tensors in enumerate(self._tensors)]
        self._side = torch.cuda.Stream(device) if cuda else None
        self._arrived, self._left = ([torch.cuda.Event() if cuda else None for _ in blocks] for _ in range(2))
        self._host, self._at_home = [], []
        for tensors, size in zip(self._tensors, sizes):  # a block at a time: no more than one is there twice
            self._host.append(torch.empty(size, dtype=torch.uint8, pin_memory=cuda))
            self._at_home.append(_views(self._host[-1], tensors))
            for tensor, place in zip(tensors, self._at_home[-1]):
                place.copy_(tensor.data)
            _place(tensors, self._at_home[-1])
        self._sent: int | None = None  # the block that is on its way, or there

    def in_turn(self) -> Iterator[torch.nn.Module]:
        """Every block in order; its weights are on the device until the next one is asked for."""
        for number, block in enumerate(self.blocks):
            self.bring(number)
            try:
                yield block
            finally:
                self.take_away(number)

    def bring(self, number: int) -> None:
        """Have a block's weights on the device, and send for the next one's."""
        if self._sent != number:
            self._send(number)
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[number])
        _place(self._tensors[number], self._away[number])
        if number + 1 < len(self.blocks):
            self._send(number + 1)

    def take_away(self, number: int) -> None:
        """The block has computed: its slot is free for the one after the next."""
        if self._side is not None:
            self._left[number].record(torch.cuda.current_stream(self._device))
        _place(self._tensors[number], self._at_home[number])

    def _send(self, number: int) -> None:
        slot, memory = self._slots[number % SLOTS], self._host[number]
        with torch.cuda.stream(self._side) if self._side is not None else contextlib.nullcontext():
            if self._side is not None:
                for other in range(number % SLOTS, len(self.blocks), SLOTS):  # whoever used the slot; events that were never recorded are no wait
                    self._side.wait_event(self._left[other])
            slot[: memory.numel()].copy_(memory, non_blocking=True)
            if self._side is not None:
                self._arrived[number].record(self._side)
        self._sent = number


def streamed_by_hooks(blocks: Sequence[torch.nn.Module], device: torch.device) -> BlockStream:
    """The same for blocks whose loop is not ours: each comes and goes with its own forward."""
    stream = BlockStream(blocks, device)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: stream.bring(number))
        block.register_forward_hook(lambda *_, number=number: stream.take_away(number))
    return stream


def rest_to(module: torch.nn.Module, stream: BlockStream, device: torch.device) -> None:
    """Everything of the module but the streamed blocks to the device, for good."""
    streamed = {id(tensor) for tensors in stream._tensors for tensor in tensors}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)


def _tensors(block: torch.nn.Module) -> list[torch.Tensor]:
    return [*block.parameters(), *block.buffers()]


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


def _views(memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Where each tensor stands in a block's memory, in its own type and shape."""
    places, start = [], 0
    for tensor in tensors:
        places.append(memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _room(tensor)
    return places


def _place(tensors: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
    for tensor, place in zip(tensors, places):
        tensor.data = place
