"""Time and peak memory of a piece of work, on a GPU or a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

ENOUGH = 3.0  # seconds after which no further repetition is begun


@dataclass(frozen=True, slots=True)
class Cost:
    """Median seconds, and the most bytes that were allocated while it ran, beyond those before (GPU: of the allocator; CPU: resident, so a lower bound)."""

    seconds: float
    peak_bytes: int


def cost(work: Callable[[], object], device: torch.device, repeats: int = 3) -> Cost:
    """After one run to warm up, in which kernels may be compiled; long work is then timed once."""
    before = _start(device)
    first = _timed(work, device)
    peak = _allocated(device) - before
    times = [first]
    while len(times) < 2 or (len(times) < repeats + 1 and sum(times) < ENOUGH):
        times.append(_timed(work, device))
    return Cost(statistics.median(times[1:]), max(peak, 0))


def once(work: Callable[[], object], device: torch.device) -> Cost:
    """Work that is too long, or changes too much, to be run twice."""
    before = _start(device)
    return Cost(_timed(work, device), max(_allocated(device) - before, 0))


def _start(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _allocated(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Between two events on the device's own clock; on a CPU, wall."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    start.record(stream)
    work()
    stop.record(stream)
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1000
