"""What the C library does with freed memory, where it is glibc; elsewhere nothing changes.

By default it raises the size from which freed blocks go straight back to the system with every large block that is freed, up to 32 MB, and gives back
the end of its heap as soon as it is free. Both are wrong for tensors: chunks of tokens stay in the heap in pieces (1.3 to 1.7 times what a narrow
forward holds), and what comes and goes at the heap's end is mapped and cleared by the kernel each time (a third of the CPU time of encoding clips).
"""

from __future__ import annotations

import ctypes

# of malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
SMALL = 1 << 20  # bytes; smaller than any chunk of tokens, larger than what is asked for often
LARGEST = 32 << 20  # the most that glibc takes for a threshold
PAD = 256 << 20


_returning = False


def return_large_blocks() -> None:
    """Have blocks of a megabyte and more go back to the system when they are freed, for runs that are short of memory.

    It holds for the whole process, until `keep_large_blocks`, and costs time: a third to a half more where layers are as narrow as 512 (one thread).
    """
    global _returning
    _set({M_MMAP_THRESHOLD: SMALL})
    _returning = True


def keep_large_blocks() -> None:
    """Take `return_large_blocks` back, if it was called: freed blocks of up to 32 MB stay, as the C library comes to do by itself.

    And twice as much at the heap's end: once the library was told a size, it gives that end back with every free.
    """
    global _returning
    if _returning:
        _set({M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: 2 * LARGEST})
    _returning = False


def keep_freed_blocks() -> None:
    """Have freed blocks of up to 32 MB, and `PAD` bytes at the heap's end, wait for the next, for loops that make the same tensors again and again."""
    _set({M_MMAP_THRESHOLD: LARGEST, M_TOP_PAD: PAD})


def _set(options: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, value in options.items():
        mallopt(name, value)
