"""Tensors on disk: safetensors, written through the commit protocol; nothing here can run code from a file.

The safetensors library writes with a rename but without fsync and past our crash hooks, and needs the whole file in memory first; its
format is small, so we write it ourselves, tensor by tensor (a 4K latent is hundreds of MB). It is read by the library's own parser.
That parser checks structure, not content (5.6 % of 20,000 mutated files load silently), hence the sha256 of manifests, which is verified on load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from muralist.errors import UserError
from muralist.store import atomic

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, *, cached: bool = True) -> None:
    """Publish tensors (any shape, device and layout) as one safetensors file.

    `cached`: as for `atomic.write_file`.
    """
    atomic.write_file(path, writer(tensors, metadata), needed=total_bytes(tensors), cached=cached)


def load_tensors(path: Path, sha256: str | None = None, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file by name; with `sha256`, only if the file has exactly that content.

    Raises UserError naming the file when it is missing, damaged or no safetensors file.
    """
    mend = "remove it and run the same command again, or fetch it anew"
    try:
        if sha256 is not None and atomic.file_sha256(path) != sha256:
            raise UserError("the content differs from its sha256", where=str(path), fix=mend)
        return load_file(path, device=device)
    except UserError:
        raise
    # The parser raises SafetensorError, but also KeyError (dtype), OSError, ValueError and TypeError on hostile headers.
    except Exception as error:
        raise UserError(f"not a readable safetensors file ({error})", where=str(path), fix=mend) from error


def writer(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> atomic.Payload:
    """A payload for `atomic.publish_dir` that streams these tensors in safetensors form."""

    def stream(sink: atomic.Sink) -> None:
        # Widest elements first keeps every tensor aligned, as the format's own writer does.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        sink.write(_header({name: tensors[name] for name in names}, metadata))
        for name in names:
            if tensors[name].numel():
                sink.write(_raw(tensors[name]))

    return stream


def total_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors' data."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """Length (8 bytes, little-endian) and JSON index, padded to a multiple of 8 bytes."""
    index: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r}: safetensors has no {tensor.dtype}")
        end = offset + tensor.numel() * tensor.element_size()
        index[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(index, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in C order, without a copy if it lies so already."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
