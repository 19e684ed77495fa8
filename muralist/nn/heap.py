"""What the C library keeps of freed memory. By default glibc raises the size from which blocks go straight back to the system with every large
block that is freed, up to 32 MB; chunks of tokens then stay in its heap, in pieces: 1.3 to 1.7 times what a narrow forward holds. Giving them back
costs time, a third to a half more where layers are as narrow as 512 (one thread), so it is for runs that are short of memory."""

from __future__ import annotations

import ctypes
from functools import cache

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 1 << 20  # bytes; smaller than any chunk of tokens, larger than what is asked for often


@cache
def return_large_blocks() -> None:
    """Have blocks of `LARGE` and more go back to the system when they are freed; where the C library is another one, nothing changes."""
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    except (AttributeError, OSError, TypeError):
        return
