"""PixelWizard's released weights: a Wan2.2-TI2V-5B in Wan's own names, the anchor's injector and the embedding of step sizes.

Source: the public repository VisionForge-arch/PixelWizard (the adapter and the model with step sizes; names, shapes and what is computed with
them). The tensors lie at `generator` (or, averaged, at `generator_ema`), behind the names of whatever wrapped the model in training.
Injector and step sizes are found by `spatial_adapter.` and `dt_embedding.`; the low-resolution model has neither and is a transformer alone.
Earlier layouts of the adapter have other shapes and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from muralist.base_info import BaseInfo
from muralist.errors import UserError
from muralist.nn.kinds import INJECTOR, STEP_SIZE, InjectorConfig
from muralist.nn.step_size import StepSizeEmbedding
from muralist.recipes.imports.component import Component
from muralist.recipes.imports.source import Shape, Source, listed, match
from muralist.recipes.imports.wan import backbone
from muralist.store.parts import save_part

PLACES = (("generator",), ("generator_ema",), ())
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIX, ADAPTER, STEPS = "model.", "spatial_adapter.", "dt_embedding."
OURS = {"backbone.": "features.", "feature_norm.": "norm.", "adapter_time_proj.": "gate_t.", "adapter_dt_proj.": "gate_dt.", "zero_layers.": "out."}
OLDER = ("scale_shift", "shift_proj", "blocks")  # beginnings of names that only earlier adapters have


def examine(source: Source, base: BaseInfo) -> list[Component]:
    """What is in the file, from its header. Raises UserError."""
    source = _unwrapped(source)
    adapter, steps = source.below(ADAPTER), source.below(STEPS)
    rest = source.without(name for name in source.entries if name.startswith((ADAPTER, STEPS)))
    if bool(adapter.entries) != bool(steps.entries):
        have, lack = (ADAPTER, STEPS) if adapter.entries else (STEPS, ADAPTER)
        raise UserError(
            f"there are tensors {have}* and none {lack}*: what was trained with both does not serve with one", where="file", fix="give the whole file"
        )
    found = [backbone(rest, base)]
    if adapter.entries:
        found.append(_injector(adapter, base))
    if steps.entries:
        with torch.device("meta"):
            shapes = {name: tuple(parameter.shape) for name, parameter in StepSizeEmbedding(base.width).named_parameters()}
        found.append(_part(steps, STEP_SIZE, {"dim": base.width}, shapes, _step_name))
    return found


def _unwrapped(source: Source) -> Source:
    """Named as the model itself names them."""
    entries = {}
    for name, entry in source.entries.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        plain = name.removeprefix(PREFIX)
        if plain in entries:
            raise UserError(f"{entries[plain].name} and {entry.name} are one tensor without their wrappers' names", where="file", fix="give the released file")
        entries[plain] = entry
    return replace(source, entries=entries)


def _injector(adapter: Source, base: BaseInfo) -> Component:
    if older := [name for name in adapter.entries if name.startswith(OLDER)]:
        what = f"{listed(ADAPTER + name for name in older)}: this adapter is of an earlier layout"
        raise UserError(what, where="file", fix="give a file of the published release")
    blocks = tuple(sorted({int(found[1]) for name in adapter.entries if (found := re.match(r"zero_layers\.([0-9]{1,4})\.", name))}))
    if blocks and blocks[-1] >= base.transformer_config["num_layers"]:
        what = f"it injects before block {blocks[-1]}, {base.name} has {base.transformer_config['num_layers']}"
        raise UserError(what, where="model", fix="give a Wan2.2-TI2V-5B")
    config = InjectorConfig(channels=base.geometry.channels, dim=base.width, blocks=blocks or (1,))
    return _part(adapter, INJECTOR, asdict(config), config.tensors(), _injector_name)


def _part(source: Source, kind: str, record: Mapping[str, Any], shapes: Mapping[str, Shape], ours: Callable[[str], str]) -> Component:
    found = match(source, shapes, ours)

    def write(folder: Path) -> None:
        save_part(folder, kind, dict(record), source.load(found.names))

    return Component(place=f"parts/{kind}", names=found.names, unmatched=found.unmatched, write=write)


def _injector_name(name: str) -> str:
    beginning = next((theirs for theirs in OURS if name.startswith(theirs)), "")
    return OURS.get(beginning, "") + name.removeprefix(beginning)


def _step_name(name: str) -> str:
    return name.replace("0.", "linear_1.", 1) if name.startswith("0.") else name.replace("2.", "linear_2.", 1)
