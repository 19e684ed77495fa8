"""The transformer of a base out of a released file that keeps Wan's original names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from muralist.base_info import BaseInfo
from muralist.recipes.imports.component import Component
from muralist.recipes.imports.source import Source, match
from muralist.store import atomic
from muralist.store.tensors import save_tensors

PLACE = "transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers looks for
FOREIGN = ("motion_encoder", "face_adapter")  # of other Wan models; diffusers' conversion would compute with these


def backbone(source: Source, base: BaseInfo) -> Component:
    """The transformer as one of `base`'s: all of its tensors must be there; what else is there is named as unmatched."""
    ours = diffusers_names(source.entries)
    found = match(source, {name: tuple(tensor.shape) for name, tensor in stock(base).state_dict().items()}, lambda name: ours.get(name, ""))

    def write(folder: Path) -> None:
        folder.mkdir()
        atomic.write_json(folder / "config.json", base.transformer_config)
        save_tensors(folder / WEIGHTS, source.load(found.names), {"format": "pt"})

    return Component(place=PLACE, names=found.names, unmatched=found.unmatched, write=write)


def stock(base: BaseInfo) -> torch.nn.Module:
    """diffusers' transformer of a base, without its weights."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel.from_config(base.transformer_config)


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """{original: diffusers'}, by diffusers' own conversion: it only renames, so that the values can carry the names through it."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    carried = {name: name for name in names if not any(part in name for part in FOREIGN)}
    return {original: name for name, original in convert_wan_transformer_to_diffusers(carried).items()}
