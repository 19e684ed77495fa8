"""What a machine offers: memory, disk, and the rates at which it multiplies and copies. Measured here, or assumed for one that is elsewhere.

`Machine.measure` runs one matrix product and one copy, 0.2 to 0.4 s together; `Machine.of("24GB")` gives the numbers of a card of that memory.
`seconds` turns work into time: FLOPs over an achievable share of the matmul rate plus bytes over the copy rate. The shares are named
constants with their origin; times are estimates to plan by, while FLOPs are exact.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from muralist.base import pick_dtype
from muralist.errors import UserError
from muralist.nn import fp8

MATMUL_SIDE = {"cpu": 768, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}
BUDGET = 0.1  # seconds a calibration loop runs
READ_BYTES_PER_S = 2e9  # of weights from disk into place, page cache cold; a common NVMe drive reaches 2 to 5e9 (performance notes, 1.4, point 6)
CGROUP = Path("/sys/fs/cgroup")
# (limit, in use, droppable pages in memory.stat) of version 2 and of version 1
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """The share of the matmul rate that each kind of work reaches.

    CUDA [performance notes, header and 1.4]: GEMM 0.80; attention 0.44 with the FA2-class kernels inside PyTorch (FA3: 0.73); decoders at
    public rates on an H200, 0.22 with 96 base channels (Wan2.1), 0.46 with 256 (Wan2.2).
    CPU: guesses between what `nn/decoder_conv` reports (a convolution runs at about the speed of a matrix product) and eager overheads.
    CPU with AMX: two idle cores, the embedded base at 3840x2160 x 29 (refinement 26 s, decoding 51 s beside the encoder); the other
    shares are scaled alike. Matrix units wait for everything else; a CPU that has bfloat16 in its vectors alone reaches what it does in float32.
    """

    linear: float
    attention: float
    narrow_convolution: float
    wide_convolution: float


EFFICIENCY = {
    "cuda": Efficiency(linear=0.80, attention=0.44, narrow_convolution=0.22, wide_convolution=0.46),
    "cpu": Efficiency(linear=0.80, attention=0.50, narrow_convolution=0.50, wide_convolution=0.70),
    "cpu, amx": Efficiency(linear=0.21, attention=0.13, narrow_convolution=0.17, wide_convolution=0.24),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine to plan for.

    Args:
        name: for people.
        memory_bytes: free main memory.
        device_bytes: free memory of the accelerator; None: there is none, everything computes on the CPU.
        matmul_flops: FLOP/s of a large matrix product in `dtype`.
        copy_bytes_per_s: memory traffic (read plus write) of a large copy where the model lives.
        disk_free: free bytes where the run directory will be.
        dtype: working type of the models, such as 'bfloat16'.
        cores: CPU cores, for the video encoder.
        fp8: it multiplies 8-bit floats (`nn/fp8.py`).
        amx: a CPU with matrix units, which `dtype` uses.
        assumed: the numbers are a preset, not measured here.
    """

    name: str
    memory_bytes: int
    device_bytes: int | None
    matmul_flops: float
    copy_bytes_per_s: float
    disk_free: int
    dtype: str
    cores: int
    fp8: bool = False
    amx: bool = False
    assumed: bool = False

    @classmethod
    def measure(cls, device: torch.device | str = "cpu", where: Path | str = ".") -> Machine:
        """This machine, calibrated in 0.2 to 0.4 s; `where`: a path on the disk that will hold the run (its nearest existing parent counts)."""
        device = torch.device(device)
        dtype, cuda = pick_dtype(device), device.type == "cuda"
        matmul_flops, copy_bytes_per_s = _matmul_rate(device, dtype), _copy_rate(device)
        if cuda:
            torch.cuda.empty_cache()  # what the allocator keeps of calibration, and of a video before this one, is free for the next
        return cls(
            name=torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
            memory_bytes=_free_memory(),
            device_bytes=torch.cuda.mem_get_info(device)[0] if cuda else None,
            matmul_flops=matmul_flops,
            copy_bytes_per_s=copy_bytes_per_s,
            disk_free=shutil.disk_usage(_existing(Path(where))).free,
            dtype=str(dtype).removeprefix("torch."),
            cores=_cores(),
            fp8=fp8.why_not(device, dtype) is None,
            amx=not cuda and dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported(),
        )

    @classmethod
    def of(cls, name: str) -> Machine:
        """The preset for a card of that memory: 24GB, 80GB or 140GB. Raises UserError for another name."""
        key = name.strip().upper().replace(" ", "")
        if key not in PRESETS:
            raise UserError(f"unknown machine {name!r}", where="machine", fix=f"use one of {', '.join(PRESETS)}, or leave it out to plan for this machine")
        return PRESETS[key]

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the working type."""
        return getattr(torch, self.dtype).itemsize

    @property
    def on_cpu(self) -> bool:
        return self.device_bytes is None

    @property
    def limit(self) -> int:
        """Free bytes where the models compute."""
        return self.memory_bytes if self.device_bytes is None else self.device_bytes

    @property
    def efficiency(self) -> Efficiency:
        return EFFICIENCY[("cpu, amx" if self.amx else "cpu") if self.on_cpu else "cuda"]

    def seconds(self, *, linear: float = 0, attention: float = 0, traffic: float = 0, read: float = 0) -> float:
        """Time of FLOPs in matrix products and in attention, of elementwise traffic and of reading weights from disk (both in bytes)."""
        share = self.efficiency
        work = linear / share.linear + attention / share.attention
        return work / self.matmul_flops + traffic / self.copy_bytes_per_s + read / READ_BYTES_PER_S

    def convolution_seconds(self, flops: float, *, channels: int) -> float:
        """Time of a convolutional decoder whose last blocks are `channels` wide: narrow layers fill matrix units badly."""
        share = self.efficiency
        return flops / self.matmul_flops / (share.wide_convolution if channels >= 128 else share.narrow_convolution)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def _preset(name: str, gigabytes: int, matmul_flops: float, copy_bytes_per_s: float) -> Machine:
    """Decimal gigabytes, a few percent below what the driver reports: the rest is CUDA's own. Host: 64 GB, 16 cores, 1 TB disk."""
    return Machine(
        name=name, memory_bytes=64 * 10**9, device_bytes=gigabytes * 10**9, matmul_flops=matmul_flops, copy_bytes_per_s=copy_bytes_per_s,
        disk_free=10**12, dtype="bfloat16", cores=16, fp8=True, assumed=True,
    )  # fmt: skip


# Peaks of performance.md: 4090-class 150 TFLOP/s bf16 and 0.92 TB/s (a guess there); H200 790 TFLOP/s and 4.3 TB/s (measured). An H100 has the
# H200's arithmetic with 3.35 instead of 4.8 TB/s nominal, hence 3.0 TB/s at the same share.
PRESETS = {
    "24GB": _preset("24 GB card (RTX 4090 class)", 24, 150e12, 0.92e12),
    "80GB": _preset("80 GB card (H100 class)", 80, 790e12, 3.0e12),
    "140GB": _preset("140 GB card (H200 class)", 140, 790e12, 4.3e12),
}


def _free_memory() -> int:
    """Free main memory: the system's, or what is left of the container's limit where that is less."""
    free = psutil.virtual_memory().available
    for limit, used, cache in _CGROUP_FILES:
        try:
            held = int((CGROUP / used).read_text()) - _statistic(CGROUP / Path(used).parent / "memory.stat", cache)
            free = min(free, max(int((CGROUP / limit).read_text()) - held, 0))
        except (OSError, ValueError):  # not this version of control groups, or the limit is "max"
            continue
    return free


def _statistic(path: Path, name: str) -> int:
    """A line of memory.stat: pages of files that can be dropped count as used, but are free for whoever asks."""
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[:1] == [name]), 0)


def _cores() -> int:
    """Cores this process may use; systems without affinities offer all of them."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: a @ b, device)


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of the repetitions that fit the budget, after one to warm up: what is slower was disturbed."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    work()
    wait()
    best, end = float("inf"), time.perf_counter() + BUDGET
    while best == float("inf") or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
