"""What to do when memory runs out in spite of the plan: the same work in smaller chunks, which gives the same result."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from muralist.errors import UserError

S, T = TypeVar("S"), TypeVar("T")
FLOOR = 256  # tokens: what a smaller chunk saves is below what a forward holds beside it
log = logging.getLogger("muralist")


class Chunks:
    """How many tokens one stage computes at a time: what its graft says, until that turns out to be too many for the device."""

    def __init__(self) -> None:
        self.most: int | None = None  # None: memory has not run out yet

    def attempt(self, work: Callable[[int | None], T], asked: int | None, tokens: int) -> T:
        """work(chunk), again with half the chunk whenever memory runs out; the chunk that served serves from then on.

        Args:
            work: may be called again after it has failed, so it must leave its inputs as they are.
            asked: the chunk to begin with, None: all `tokens` at once.

        Raises:
            UserError: there is too little memory for the smallest chunk.
        """

        def smaller(chunk: int | None) -> int:
            self.most = self._smaller(min(chunk or tokens, tokens))
            return self.most

        return in_less(work, asked if self.most is None else self.most, smaller)

    def _smaller(self, size: int) -> int:
        if size <= FLOOR:
            fix = "use --memory low, a smaller --size or fewer --num-frames, or end what else uses the device"
            raise UserError(f"too little for {size} tokens at a time", where="memory", fix=fix)
        smaller = max(size // 2, FLOOR)
        log.warning("muralist: note: memory ran out with %d tokens at a time; on with %d", size, smaller)
        return smaller


def in_less(work: Callable[[S], T], size: S, smaller: Callable[[S], S]) -> T:
    """work(size), again with `smaller` of it whenever memory runs out; `smaller` raises UserError after the smallest."""
    while True:
        try:
            return work(size)
        except RuntimeError as error:
            if not ran_out(error):
                raise
        # outside of `except`: until its end the exception holds the frames, and these the tensors
        size = smaller(size)
        give_back()


@contextmanager
def enough_for(what: str) -> Iterator[None]:
    """UserError if memory runs out for something that does not become smaller."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise UserError(f"too little for {what}", where="memory", fix="use --memory low, a smaller model, or end what else uses the device") from None


SAID = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # by the CPU's allocator, that of page-locked memory, and cuBLAS


def ran_out(error: BaseException) -> bool:
    """Whether an allocator, Python's among them, says that there is no more memory; not all have a type of their own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in SAID)


def give_back() -> None:
    """What nobody holds any more, to the device, and page-locked memory to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()
