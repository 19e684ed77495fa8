"""A low-rank adapter for Wan from elsewhere, such as one that paints in four steps without guidance: as an adapter of a base.

Trainers and interfaces name its tensors in many ways: a prefix, the layer by diffusers' name or by Wan's own, with dots or underscores, and what the tensor
is to the layer. All of them are read from one table of the base's linear layers; every tensor of the file has a place, is nothing but zeros, or is named.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from muralist.base_info import BaseInfo
from muralist.errors import UserError
from muralist.nn.kinds import ADAPTER_FILE
from muralist.recipes.imports.component import Component
from muralist.recipes.imports.source import Source, listed, require_floats
from muralist.recipes.imports.wan import stock
from muralist.store import atomic
from muralist.store.tensors import save_tensors

PLACES = ((),)  # of the tensors in a pickle
PLACE = "adapters/lora"
PREFIX = re.compile(r"(base_model\.model\.|model\.|pipe\.dit\.|diffusion_model\.|transformer\.|lora_unet__?|lycoris_)*")
KINDS = {
    "down": (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight"),
    "up": (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight"),
    "alpha": (".alpha",),
    "bias": (".lora_B.bias", ".diff_b"),
    "whole": (".diff",),
}
BLOCK = {f"attn{n}.{a}": f"{kind}_attn.{b}" for n, kind in ((1, "self"), (2, "cross")) for a, b in zip(("to_q", "to_k", "to_v", "to_out.0"), "qkvo")} | {
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}  # {diffusers': Wan's own}
BESIDE = {f"condition_embedder.{a}_embedder.linear_{n}": f"{a}_embedding.{m}" for a in ("text", "time") for n, m in ((1, 0), (2, 2))} | {
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
WIDEST = 256  # rank up to which a whole difference is kept as a product with the identity
METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and strength
PEFT_CONFIG, PEFT_NAMES = "adapter_config.json", "base_model.model."  # where peft does, and how one knows its files
DAMAGED = "download it again"

Strength = Callable[[str, int], float]


@dataclass(slots=True)
class Found:
    """What a file holds for one layer: {kind: (its name there, the tensor)}."""

    layer: str
    tensors: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)


def examine(source: Source, base: BaseInfo) -> list[Component]:
    """The adapter that is in the file. Raises UserError."""
    _refuse_dora(source)
    linear = {name: module for name, module in stock(base).named_modules() if isinstance(module, torch.nn.Linear)}
    found, left = _sorted_out(source, linear)
    strength = _strength(source)
    taken: dict[str, torch.Tensor] = {}
    for one in found.values():
        taken |= _pair(one, linear[one.layer], strength)
    if not taken:
        raise UserError(f"none of its {len(source.entries)} tensors is known; {listed(source.entries)}", where="file", fix="give an adapter (LoRA) for Wan")
    names = {f"{one.layer} {kind}": name for one in found.values() for kind, (name, _) in one.tensors.items()}
    return [Component(place=PLACE, names=names, unmatched=tuple(left), write=lambda folder: _write(folder, taken))]


def _write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """In 16 bits, as adapters are everywhere here; peft gives every layer a bias as soon as one has it."""
    made = {name: tensor if tensor.element_size() == 2 else tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    if any(name.endswith(".lora_B.bias") for name in made):
        ups = {name.removesuffix("weight") + "bias": up for name, up in made.items() if name.endswith(".lora_B.weight")}
        made = {name: torch.zeros(len(up), dtype=up.dtype) for name, up in ups.items()} | made
    folder.mkdir(parents=True)
    save_tensors(folder / ADAPTER_FILE, made, {"format": "pt"})


def _refuse_dora(source: Source) -> None:
    if dora := [name for name in source.entries if "dora_scale" in name or "lora_magnitude" in name]:
        raise UserError(f"it is a DoRA ({listed(dora, 1)}), which is more than a product", where="file", fix="merge it into a transformer where it was made")


def _known_as(layer: str) -> set[str]:
    """Every way in which a file may call a layer of ours, without a prefix."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", layer)
    own = block[1] + BLOCK[block[2]] if block and block[2] in BLOCK else BESIDE.get(layer, layer)
    return {way for name in (layer, own) for way in (name, name.replace(".", "_"))}


def _sorted_out(source: Source, linear: Mapping[str, torch.nn.Linear]) -> tuple[dict[str, Found], list[str]]:
    """What there is for each layer, and the names of what has no place and is not nothing."""
    layers = {way: layer for layer in linear for way in _known_as(layer)}
    tensors = source.load({name: name for name in source.entries})
    found: dict[str, Found] = {}
    left = []
    for name, tensor in tensors.items():
        layer, kind = _read(name, layers)
        if layer is None:
            if (tensor.is_floating_point() and tensor.any()) or ".diff" not in name:
                left.append(name)
            continue
        if kind != "alpha":
            require_floats(source.entries[name])
        if kind in (there := found.setdefault(layer, Found(layer)).tensors):
            raise UserError(f"{there[kind][0]} and {name} are one and the same", where="file", fix="give one of them")
        there[kind] = (name, tensor)
    return found, left


def _read(name: str, layers: Mapping[str, str]) -> tuple[str | None, str]:
    """(our layer or None, kind) of a tensor of the file."""
    for kind, endings in KINDS.items():
        for ending in endings:
            if name.endswith(ending):
                module = name.removesuffix(ending)
                return layers.get(module[PREFIX.match(module).end() :]), kind
    return None, ""


def _pair(found: Found, linear: torch.nn.Linear, strength: Strength) -> dict[str, torch.Tensor]:
    """The two matrices of a layer, in full strength, and what is added to its bias if there is any. Raises UserError unless they fit it."""
    tensors = {kind: tensor for kind, (_, tensor) in found.tensors.items()}
    if "whole" in tensors:
        tensors |= _as_product(found, linear)
    if "bias" in tensors and not {"down", "up"} & tensors.keys():  # of a layer whose matrix stays as it is
        tensors |= {"down": torch.zeros(1, linear.in_features), "up": torch.zeros(linear.out_features, 1)}
    if missing := {"down", "up"} - tensors.keys():
        raise UserError(f"it has one matrix of {found.layer}, and not the other ({', '.join(missing)})", where="file", fix="give the whole file")
    rank = _checked_rank(found, tensors, linear)
    factor = _alpha(found) / rank if "alpha" in tensors else strength(found.layer, rank)
    made = {"lora_A.weight": tensors["down"], "lora_B.weight": _scaled(tensors["up"], factor if "whole" not in tensors else 1.0)}
    if "bias" in tensors:  # peft's stands behind the second matrix, before the factor; a difference is added as it is
        made["lora_B.bias"] = _scaled(tensors["bias"], 1.0 if found.tensors["bias"][0].endswith(".diff_b") else factor)
    for side, tensor in made.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{found.layer}.{side} holds NaN or infinity", where="file", fix=DAMAGED)
    return {f"{found.layer}.{side}": tensor for side, tensor in made.items()}


def _checked_rank(found: Found, tensors: Mapping[str, torch.Tensor], linear: torch.nn.Linear) -> int:
    """UserError unless the shapes are those of a pair for this layer."""
    down, fix = tensors["down"], "give the adapter of a base like this one"
    rank = down.shape[0] if down.ndim == 2 else 0
    if not rank:
        what = "a matrix of rank 0" if down.ndim == 2 else "not a matrix"
        raise UserError(f"{found.tensors['down'][0]} is {list(down.shape)}, {what}", where="file", fix=fix)
    expected = {"down": (rank, linear.in_features), "up": (linear.out_features, rank), "bias": (linear.out_features,)}
    for kind, shape in expected.items():
        if kind in tensors and tuple(tensors[kind].shape) != shape:
            raise UserError(f"{found.tensors[kind][0]} is {list(tensors[kind].shape)}, not {list(shape)}", where="file", fix=fix)
    return rank


def _as_product(found: Found, linear: torch.nn.Linear) -> dict[str, torch.Tensor]:
    """A whole difference of a narrow layer as a product with the identity."""
    name, whole = found.tensors["whole"]
    if {"down", "up"} & found.tensors.keys() or tuple(whole.shape) != (linear.out_features, linear.in_features) or min(whole.shape) > WIDEST:
        what = f"{name} is a whole difference of {' x '.join(map(str, whole.shape))}"
        raise UserError(what, where="file", fix="merge it into a transformer where it was made")
    if linear.out_features <= linear.in_features:
        return {"down": whole, "up": torch.eye(linear.out_features)}
    return {"down": torch.eye(linear.in_features), "up": whole}


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)


def _alpha(found: Found) -> float:
    name, tensor = found.tensors["alpha"]
    if tensor.numel() != 1 or not math.isfinite(float(tensor)):
        raise UserError(f"{name} is no number", where="file", fix=DAMAGED)
    return float(tensor)


def _strength(source: Source) -> Strength:
    """(layer, rank) -> the factor of layers that have no alpha of their own, as the file or peft's configuration says; else 1, as in diffusers."""
    said = _said(source)
    alpha, each = said.get("lora_alpha"), said.get("alpha_pattern") or {}

    def strength(layer: str, rank: int) -> float:
        own = each.get(layer, alpha)
        if own is None:
            return 1.0
        return float(own) / (math.sqrt(rank) if said.get("use_rslora") else rank)

    try:
        if not all(math.isfinite(float(value)) for value in (*each.values(), alpha or 0)):
            raise ValueError
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise UserError("what it says of its strength is damaged", where="file", fix=DAMAGED) from None
    return strength


def _said(source: Source) -> dict[str, Any]:
    """Of rank and alpha: by diffusers in the file, of the first transformer; by peft in a file of its own, if the names are its own."""
    with safe_open(source.path, framework="pt") as file:
        inside = (file.metadata() or {}).get(METADATA)
    beside = source.origin.parent / PEFT_CONFIG
    try:
        if inside:
            return {key.removeprefix("transformer."): value for key, value in json.loads(inside).items()}
        if beside.is_file() and any(name.startswith(PEFT_NAMES) for name in source.entries):
            return dict(atomic.read_json(beside).items())
    except (ValueError, AttributeError, RecursionError):
        raise UserError("what it says of its strength is damaged", where="file", fix=DAMAGED) from None
    return {}
