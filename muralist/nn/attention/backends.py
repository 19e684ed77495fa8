"""The one place where softmax(q k^T / sqrt(d)) v is computed: a switch between kernels that all agree with `reference` (a test holds them to it).

`sdpa` is always there and chooses among PyTorch's built-in kernels; `flash`, `cudnn`, `efficient` ask for one of those, `varlen` for its kernel
of packed sequences. `fa3`, `fa4` and `sage` are packages that people install themselves: looked for when named, never downloaded. What a kernel
takes (device, type, width of a head) is tried on a few tokens, so that no table of it has to be kept true; where one does not run, `sdpa` does.
Each takes its own layout: that is its adapter's business, here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from muralist.errors import UserError
from muralist.nn.attention.reference import reference_attention

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Name = Literal["auto", "sdpa", "flash", "cudnn", "efficient", "varlen", "fa3", "fa4", "sage", "reference"]
NAMES: tuple[str, ...] = typing.get_args(Name)
FASTEST = {"cuda": ("fa4", "fa3", "sdpa")}  # what `auto` tries; never `sage`, which computes in 8 bits
ABSENT = "it is not installed"
PACKAGES = ("flash_attn_interface", "flash_attn", "flash_attn.cute", "sageattention")  # that kernels come from
AGREES = 0.03  # of outputs of about 0.1 to 0.3: bfloat16 rounds by 0.001, 8-bit kernels by 0.01, a wrong layout is off by 0.5


# --- adapters: q [B, H, n, d], k and v [B, H, m, d] -> [B, H, n, d] ---------------------------------------------------------------


FEW_KEYS = 8192
PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's own choice; among few keys never cuDNN: windows come in hundreds of shapes, and it plans each anew for tenths of a second."""
    if q.device.type != "cuda" or k.shape[2] >= FEW_KEYS:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(PLANLESS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def _builtin(choice: SDPBackend) -> Kernel:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(choice):
            return F.scaled_dot_product_attention(q, k, v)

    return kernel


def _sequence_first(module: str, function: str) -> Kernel:
    """A kernel that takes [B, n, H, d], and in some versions gives its log-sum-exp beside the result."""
    compute = getattr(import_module(module), function)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = compute(*(x.transpose(1, 2) for x in (q, k, v)))
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return kernel


def _sage() -> Kernel:
    compute = import_module("sageattention").sageattn
    return lambda q, k, v: compute(q, k, v, tensor_layout="HND", is_causal=False)


def _varlen() -> Kernel:
    """Sequences packed end to end, [B * n, H, d]."""
    compute = import_module("torch.nn.attention.varlen").varlen_attn

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        packed = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
        starts = (torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * x.shape[2] for x in (q, k))
        return compute(*packed, *starts, q.shape[2], k.shape[2]).unflatten(0, (len(q), -1)).transpose(1, 2)

    return kernel


_loaders: dict[str, Callable[[], Kernel]] = {
    "sdpa": lambda: _sdpa,
    "flash": lambda: _builtin(SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda: _builtin(SDPBackend.CUDNN_ATTENTION),
    "efficient": lambda: _builtin(SDPBackend.EFFICIENT_ATTENTION),
    "varlen": _varlen,
    "fa3": lambda: _sequence_first("flash_attn_interface", "flash_attn_func"),
    "fa4": lambda: _sequence_first("flash_attn.cute", "flash_attn_func"),
    "sage": _sage,
    "reference": lambda: reference_attention,
}
_active: Kernel = _sdpa


# --- the switch -------------------------------------------------------------------------------------------------------------------


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, H, n, d], k and v [B, H, m, d] -> [B, H, n, d]. Four dimensions always: with five PyTorch's CPU kernel silently takes a slow path."""
    return _active(q, k, v)


@cache
def kernel(name: str) -> Kernel:
    """A kernel by its name. Raises UserError for a name that there is not, ImportError for a package that is not installed."""
    if name not in _loaders:
        raise UserError(f"no attention backend {name!r:.40}", where="attention", fix=f"use one of {', '.join(_loaders)}")
    return _loaders[name]()


def register(name: str, kernel_: Kernel) -> None:
    """Make a kernel with the signature of `attention` selectable."""
    unregister(name)
    _loaders[name] = lambda: kernel_


def unregister(name: str) -> None:
    """Forget a kernel; `sdpa` stays, it is the default."""
    if name == "sdpa":
        raise ValueError("sdpa is the default attention backend and cannot be unregistered")
    _loaders.pop(name, None)
    kernel.cache_clear()
    why_not.cache_clear()


@contextmanager
def use(name: str) -> Iterator[None]:
    """Select a kernel for all attention of this process inside the block (a plain global: backward threads must see it too)."""
    global _active
    previous, _active = _active, kernel(name)
    try:
        yield
    finally:
        _active = previous


# --- which there are --------------------------------------------------------------------------------------------------------------


def settle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str | None]:
    """(the kernel that will compute, a note if it is not the one that was asked for). Raises UserError for an unknown name."""
    if name == "auto":
        choices = FASTEST.get(device.type, ("sdpa",))
        return next((choice for choice in choices if choice == "sdpa" or not why_not(choice, device, dtype, head_dim)), "sdpa"), None
    kernel_missing = None if name == "sdpa" else why_not(name, device, dtype, head_dim)
    return ("sdpa", f"attention {name}: {kernel_missing}; sdpa computes it") if kernel_missing else (name, None)


@lru_cache(maxsize=64)
def why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a kernel does not serve, in a few words; None: it ran on a few tokens and agrees with the reference."""
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode():
            compute = kernel(name)
            q, k, v = (torch.randn(2, 2, length, head_dim, generator=generator).to(device, dtype) for length in (96, 64, 64))
            error = (compute(q, k, v).float() - reference_attention(q, k, v).float()).abs().max().item()
    except UserError:
        raise
    except ImportError as failure:
        if failure.name in PACKAGES and isinstance(failure, ModuleNotFoundError):
            return ABSENT
        return f"it cannot be loaded ({first_line(failure)})"  # made for another PyTorch or another CUDA, or something that it needs is missing
    except Exception as failure:  # whatever a package makes of a type, a device or a width that it does not take
        return f"it does not take {str(dtype).removeprefix('torch.')} heads of {head_dim} on {device.type} ({first_line(failure)})"
    return None if error <= AGREES else f"it is {error:.2g} off the reference"


def first_line(failure: Exception) -> str:
    """What an exception says, shortened; the name of its type if it says nothing."""
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:60]
