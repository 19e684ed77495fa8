"""`muralist doctor`: what this machine offers, and what is missing."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muralist.cli import _show
from muralist.cli._options import Debug, Device, Json
from muralist.errors import UserError


def command(device: Device = "auto", json: Json = False, debug: Debug = False) -> int:
    """Check the installation: versions, device, speed, codecs, disk, the embedded model. Exit code 2 names the first thing to mend."""
    from muralist.base import pick_device

    target = pick_device(device)
    checks: dict[str, Callable[[], str]] = {
        "versions": _versions,
        "device": lambda: _device(target),
        "working type": lambda: _dtype(target),
        "attention": lambda: _attention(target),
        "8-bit linears": lambda: _fp8(target),
        "speed": lambda: _speed(target),
        "codecs": _codecs,
        "disk": lambda: f"{_show.amount(_free())} free in the current directory",
        "miniature": _miniature,
    }
    results = {name: _outcome(check) for name, check in checks.items()}
    if json:
        _show.emit({"event": "doctor", **{name: {"ok": not isinstance(found, UserError), "found": str(found)} for name, found in results.items()}})
    else:
        _show.table("", ["check", "", "found"], [(name, "mend" if isinstance(found, UserError) else "ok", found) for name, found in results.items()])
    if faults := [found for found in results.values() if isinstance(found, UserError)]:
        raise faults[0]
    return 0


def _outcome(check: Callable[[], str]) -> str | UserError:
    try:
        return check()
    except UserError as error:
        return error


def _versions() -> str:
    from muralist.store.atomic import versions

    return ", ".join(f"{name} {version}" for name, version in {"python": platform.python_version(), **versions()}.items())


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {_show.amount(torch.cuda.get_device_properties(device).total_memory)}"
    import psutil

    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, {_show.amount(psutil.virtual_memory().total)} of memory"


def _dtype(device: Any) -> str:
    from muralist.base import pick_dtype

    dtype = str(pick_dtype(device)).removeprefix("torch.")
    if device.type == "cuda":
        return f"{dtype}: the GPU multiplies it in matrix units"
    return f"{dtype}: " + ("this CPU multiplies it itself" if dtype == "bfloat16" else "this CPU does not multiply bfloat16 itself (no AMX, no AVX512_BF16)")


def _attention(device: Any) -> str:
    """The kernels that run here on heads of Wan's width, and why the others do not."""
    from muralist.base import pick_dtype
    from muralist.nn.attention import backends

    wrong = {name: backends.why_not(name, device, pick_dtype(device), 128) for name in backends.NAMES if name != "auto"}
    here, auto = [name for name, reason in wrong.items() if reason is None], backends.settle("auto", device, pick_dtype(device), 128)[0]
    absent = [name for name, reason in wrong.items() if reason == backends.ABSENT]
    refused = [f"{name} ({reason})" for name, reason in wrong.items() if reason not in (None, backends.ABSENT)]
    lists = (("", here), ("not installed: ", absent), ("not here: ", refused))
    return f"auto is {auto}; there: " + "; ".join(prefix + ", ".join(names) for prefix, names in lists if names)


def _fp8(device: Any) -> str:
    from muralist.base import pick_dtype
    from muralist.nn import fp8

    reason = fp8.why_not(device, pick_dtype(device))
    return "--linears fp8 works here" if reason is None else f"--linears fp8 does not work here: {reason}"


def _speed(device: Any) -> str:
    from muralist.cost.machine import Machine

    machine = Machine.measure(device)
    return f"{machine.matmul_flops / 1e9:,.0f} GFLOP/s in matrix products, {machine.copy_bytes_per_s / 1e9:,.0f} GB/s copied"


def _codecs() -> str:
    import av

    missing = {"libx264", "libx265"} - av.codecs_available
    if missing:
        raise UserError(f"the encoder {min(missing)} is missing", where="codecs", fix="install PyAV from its own wheel: pip install --force-reinstall av")
    return f"libx264, libx265 (PyAV {av.__version__})"


def _free() -> int:
    from muralist.store.atomic import free_bytes

    return free_bytes(Path.cwd())


def _miniature() -> str:
    """Present, every part of it there, and every tensor file as long as its header says; the tensors are not read."""
    from muralist.base_info import inspect_base

    info = inspect_base("miniature")
    return f"present, all files of full length, {_show.amount(sum(info.component_bytes.values()))}; adapters: {', '.join(info.adapters) or 'none'}"
