"""A low-rank adapter for Wan from elsewhere, such as one that paints in four steps without guidance: as an adapter of a base.

diffusers knows the names that trainers and interfaces give its tensors (`WanLoraLoaderMixin`): `diffusion_model.` (ComfyUI, Wan's own), `lora_unet_` (Musubi,
kohya), `transformer.` (diffusers). What it makes of them is compared with the base's linear layers, so that nothing is missing or left over at the first step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from muralist.base_info import BaseInfo
from muralist.errors import UserError
from muralist.recipes.imports.component import Component
from muralist.recipes.imports.source import Source, listed
from muralist.store import atomic
from muralist.store.parts import FLOATS
from muralist.store.tensors import save_tensors

PLACES = ((),)  # of the tensors in a pickle
PLACE = "adapters/lora"
WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
WITHIN = ("transformer.", "base_model.model.")  # what stands before the names of modules
WAN_NAMES = (".self_attn.", ".cross_attn.", ".ffn.0.", ".ffn.2.")  # of modules, with nothing before `blocks.`
CONVERTED = ("diffusion_model.", "lora_unet_")  # names that diffusers' conversion reads as they are
METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and strength
PEFT_CONFIG = "adapter_config.json"  # where peft does
ALPHA, DOWN, UP, BIAS = ".alpha", ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"

Tensors = dict[str, torch.Tensor]


def examine(source: Source, base: BaseInfo) -> list[Component]:
    """The adapter that is in the file. Raises UserError."""
    tensors = _named_as_diffusers_does(source)
    layers = _linear_layers(base)
    taken: Tensors = {}
    for layer in sorted({name.partition(".lora_")[0] for name in tensors} & layers.keys()):
        taken |= _checked(layer, tensors, layers[layer])
    if any(name.endswith(BIAS) for name in taken):  # peft gives all of them one then
        taken |= {f"{layer}{BIAS}": torch.zeros(len(up)) for name, up in tuple(taken.items()) for layer in [name.removesuffix(UP)] if name.endswith(UP)} | taken
    if not taken:
        raise UserError(f"none of its {len(source.entries)} tensors is known; {listed(source.entries)}", where="file", fix="give an adapter (LoRA) for Wan")
    unmatched = tuple(name for name in tensors if name not in taken)
    return [Component(place=PLACE, names={name: name for name in taken}, unmatched=unmatched, write=lambda folder: _write(folder, taken))]


def _write(folder: Path, tensors: Tensors) -> None:
    folder.mkdir(parents=True)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def _named_as_diffusers_does(source: Source) -> Tensors:
    """{module.lora_A.weight: tensor}, strengths (alpha over rank) multiplied in."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    if strange := [name for name, entry in source.entries.items() if entry.dtype not in FLOATS]:
        raise UserError(f"{listed(strange)}: no floating point", where="file", fix=f"give weights in one of {', '.join(sorted(FLOATS))}")
    if dora := [name for name in source.entries if "dora_scale" in name or "lora_magnitude" in name]:
        raise UserError(f"it is a DoRA ({listed(dora, 1)}), which is more than a product", where="file", fix="merge it into a transformer where it was made")
    tensors = {_module(name): tensor for name, tensor in source.load({name: name for name in source.entries}).items()}
    if any(part in name for name in tensors for part in WAN_NAMES):
        tensors = {f"diffusion_model.{name.removeprefix('diffusion_model.')}": tensor for name, tensor in tensors.items()}
    try:
        found = WanLoraLoaderMixin.lora_state_dict(tensors)
    except Exception as error:  # KeyError, ValueError and others, by what it meets first
        raise UserError(f"diffusers cannot read it as a LoRA of Wan ({error!s:.120})", where="file", fix="give an adapter (LoRA) for Wan") from None
    return _in_full_strength({_module(name): tensor for name, tensor in found.items()}, _strength(source.path))


def _module(name: str) -> str:
    """Without what stands before the module, and with peft's names for the two matrices."""
    for prefix in WITHIN:
        name = name.removeprefix(prefix)
    name = name.replace(".default.", ".")
    return name if name.startswith(CONVERTED) else name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")


def _in_full_strength(tensors: Tensors, strength: float) -> Tensors:
    """With `strength`, or what a layer says itself, in the second matrix and the bias."""
    alphas = {name.removesuffix(ALPHA): float(tensor) for name, tensor in tensors.items() if name.endswith(ALPHA)}
    scaled = {}
    for name, tensor in tensors.items():
        layer, _, side = name.partition(".lora_")
        if name.endswith(ALPHA):
            continue
        factor = strength
        if layer in alphas and (down := tensors.get(layer + DOWN)) is not None:
            factor = alphas[layer] / len(down)
        scaled[name] = tensor * factor if side.startswith("B.") and factor != 1 else tensor
    return scaled


def _strength(path: Path) -> float:
    """alpha over rank, where the file or peft's configuration beside it says so; diffusers takes 1 where nothing is said."""
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(METADATA)
    beside = path.parent / PEFT_CONFIG
    try:
        told = json.loads(said) if said else atomic.read_json(beside) if beside.is_file() else {}
        told = {key.rpartition(".")[2]: value for key, value in told.items()}
        rank = int(told.get("r") or 1)
        alpha = float(told.get("lora_alpha") or rank)
    except (ValueError, TypeError, AttributeError):
        raise UserError("what it says of its rank and alpha is damaged", where="file", fix="download it again") from None
    if told.get("rank_pattern") or told.get("alpha_pattern"):
        raise UserError("its strength differs from layer to layer", where="file", fix="give one of a single rank and alpha")
    return alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)


def _linear_layers(base: BaseInfo) -> Mapping[str, torch.nn.Linear]:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        stock = WanTransformer3DModel.from_config(base.transformer_config)
    return {name: module for name, module in stock.named_modules() if isinstance(module, torch.nn.Linear)}


def _checked(layer: str, tensors: Tensors, linear: torch.nn.Linear) -> Tensors:
    """The two matrices of a layer, and what is added to its bias if there is any. Raises UserError unless they fit it."""
    down, up, bias = (f"{layer}{side}" for side in (DOWN, UP, BIAS))
    if missing := [name for name in (down, up) if name not in tensors]:
        raise UserError(f"it lacks {listed(missing)}", where="file", fix="give the whole file")
    rank = len(tensors[down])
    expected = {down: (rank, linear.in_features), up: (linear.out_features, rank), bias: (linear.out_features,)}
    there = {name: tensors[name] for name in expected if name in tensors}
    for name, tensor in there.items():
        if tuple(tensor.shape) != expected[name]:
            raise UserError(f"{name} is {list(tensor.shape)}, not {list(expected[name])}", where="file", fix="give the adapter of a base like this one")
    return there
