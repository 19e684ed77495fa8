"""Weights that a person brings: safetensors from a local path, checked name by name before they are used.

The published files are pickles. Convert them in an environment of your own, with the tool that they belong to:
`python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load('A.pth').items()}, 'A.safetensors')"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from muralist.errors import UserError
from muralist.store.tensors import load_tensors
from muralist.store.weights import PICKLES


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises UserError for a missing file, a pickle, a damaged file."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise UserError("this is a pickle, which can run code", where=str(path), fix="convert it to safetensors, see docs/eval-weights.md")
    if not path.is_file():
        raise UserError("no such file", where=str(path), fix="give the path of a safetensors file")
    return load_tensors(path)


def load_into(module: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    """`module` with exactly these tensors, in float32, for inference; UserError with the first name or shape that does not fit.

    BatchNorm's counters of batches are not needed and may be missing.
    """
    wanted = {name: t for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    wrong = (
        *(f"{name} is missing" for name in wanted if name not in given),
        *(f"{name} does not belong to it" for name in given if name not in wanted),
        *(f"{n} is {list(given[n].shape)}, not {list(t.shape)}" for n, t in wanted.items() if n in given and given[n].shape != t.shape),
    )
    if wrong:
        raise UserError(f"not the weights of {type(module).__name__}: {wrong[0]}", where=str(path), fix="see docs/eval-weights.md for the right file")
    module.load_state_dict({name: t.float() for name, t in given.items()}, strict=False)
    return module.eval().requires_grad_(False)
