"""Parts: networks of ours that stand beside a base, one folder each, `config.json` (kind and numbers) and `model.safetensors`.

A part is not a LoRA and does not load as one: its kind is in the configuration, and in the weights' header too, so that a file that lost
its folder still says what it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from muralist.errors import UserError
from muralist.store import atomic, weights
from muralist.store.tensors import load_tensors, save_tensors

FLOATS = {"F64", "F32", "F16", "BF16"}
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_part(folder: Path, kind: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write a part; an older one in its place is replaced file by file, weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"kind": kind, **config}
    atomic.write_json(folder / CONFIG, record)
    save_tensors(folder / WEIGHTS, tensors, {"muralist": json.dumps(record, sort_keys=True)})
    return folder


def read_part(folder: Path, kind: str) -> dict[str, Any]:
    """The numbers of a part, after checking from names and headers that it is whole and of this kind. Raises UserError naming what is wrong."""
    record = weights.read_config(folder / CONFIG)
    if record.get("kind") != kind:
        raise UserError(f"{folder} holds a {str(record.get('kind'))!r:.40}", where="part", fix=f"give the folder of a {kind}")
    weights.check_component(folder)
    entries = weights.check_safetensors(folder / WEIGHTS)
    header = entries.get("__metadata__") or {}
    if strange := [name for name, entry in entries.items() if name != "__metadata__" and entry["dtype"] not in FLOATS]:
        raise UserError(f"{folder}: {strange[0]} is of type {entries[strange[0]]['dtype']:.20}", where="part", fix="fetch both files again")
    if header.get("muralist") != json.dumps(record, sort_keys=True):
        raise UserError(f"{folder}: weights and {CONFIG} do not belong together", where="part", fix="fetch both files again")
    return {name: value for name, value in record.items() if name != "kind"}


def refuse_part(folder: Path) -> None:
    """UserError if the weights in `folder`, which is read as a plain adapter, are a part: as one they would do something else, or nothing."""
    for file in sorted(folder.glob("*.safetensors")):
        if said := (weights.check_safetensors(file).get("__metadata__") or {}).get("muralist"):
            kind = json.loads(said).get("kind")
            raise UserError(f"{file.parent.name} is a part of kind {kind!r}, not a plain LoRA", where="adapter", fix=f"move its folder to parts/{kind}")


def load_part(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Numbers and tensors of a part."""
    return read_part(folder, kind), load_tensors(folder / WEIGHTS)
