"""Training checkpoints: tensors in safetensors, numbers in JSON, no pickle; the newest complete one is resumed.

A checkpoint is a directory `step-N` that appears by rename, so it exists only complete. All randomness of training is
keyed by the step number, hence a checkpoint needs no generator state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from muralist.errors import UserError
from muralist.store import atomic
from muralist.store.tensors import load_tensors, total_bytes, writer

KEEP = 2
TENSORS = "state.safetensors"


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], numbers: dict) -> Path:
    """Publish `folder/step-N` and remove all but the newest `KEEP` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    held = {name: tensor.detach() for name, tensor in tensors.items()}
    atomic.publish_dir(final, {TENSORS: writer(held)}, numbers, needed=total_bytes(held))
    for old in _complete(folder)[:-KEEP]:
        atomic.remove(folder / f"step-{old}")
    return final


def require_unused(folder: Path) -> None:
    """Raise UserError if there are checkpoints in `folder`: a new training would mix its own with them and remove the older numbers."""
    if steps := _complete(folder):
        raise UserError(f"a training is here already (step {steps[-1]})", where=str(folder), fix="go on from it with --resume, or name another --output")


def is_begun(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder`, so that a training goes on from it instead of beginning."""
    return bool(_complete(folder))


def load_newest(folder: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """Tensors and numbers of the newest checkpoint, or None where there is none. Raises UserError if it is damaged."""
    steps = _complete(folder)
    if not steps:
        return None
    newest = folder / f"step-{steps[-1]}"
    manifest = atomic.read_manifest(newest)
    return load_tensors(newest / TENSORS, manifest["files"][TENSORS]["sha256"]), manifest["info"]


def require_origin(folder: Path, origin: Mapping[str, str]) -> None:
    """Raise UserError if the newest checkpoint in `folder` stands on something else, by the name of the first that differs. Tensors are not read.

    What `origin` does not name is not compared: early in a training not all of it is known.
    """
    steps = _complete(folder)
    if steps:
        _compare(folder, atomic.read_manifest(folder / f"step-{steps[-1]}")["info"], lambda name, value: origin.get(name, value) == value)


def require_whole_origin(folder: Path, numbers: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Raise UserError unless a checkpoint's `numbers` name what `origin` does, nothing else, and the same of all."""
    _compare(folder, numbers, lambda name, value: origin.get(name) == value)
    if unsaid := [name for name in origin if name not in numbers.get("origin", {})]:
        fix = "name another --output, or resume with the version that began it"
        raise UserError(f"these checkpoints do not say on which {unsaid[0]} they stand", where=str(folder), fix=fix)


def _compare(folder: Path, numbers: Mapping[str, Any], agrees: Callable[[str, str], bool]) -> None:
    if other := [name for name, value in numbers.get("origin", {}).items() if not agrees(name, value)]:
        fix = "resume with the same one and the version that began it, or name another --output"
        raise UserError(f"these checkpoints stand on another {other[0]}", where=str(folder), fix=fix)


def _complete(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for m in (re.fullmatch(r"step-(\d+)", p.name) for p in folder.iterdir()) if m)


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizers under `optimizer.{number}.{parameter}.{name}`."""
    return {
        f"optimizer.{number}.{index}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if match := re.fullmatch(rf"optimizer\.{number}\.(\d+)\.(\w+)", key):
                state.setdefault(int(match[1]), {})[match[2]] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
