"""LUVE's released weights: the upsampler's checkpoint, and the files of 2K and 4K that hold everything.

Sources: the public repository NJU-PCALab/LUVE (`VLUer/vlu`, names and shapes), the model card of zhihefang/LUVE (the namespaces). In the
checkpoint the tensors lie at model/sd. In a safetensors file `vlu.` is the upsampler and `hcr.` the refining transformer, a Wan2.1-1.3B in
Wan's own names, with both experts among its tensors; what the experts' tensors are called is not public, so they stay unmatched.

The upsampler's names are VRT's, as ours are, with `imnet` for `implicit.imnet`. Of every attention it also stores two tables that follow
from the window's size; ours are computed, and theirs are compared with them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from muralist.base_info import UPSAMPLER, BaseInfo
from muralist.errors import UserError
from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, paper
from muralist.recipes.imports.component import Component
from muralist.recipes.imports.source import Source, listed, match
from muralist.recipes.imports.wan import backbone
from muralist.store.parts import save_part

PLACES = (("model", "sd"), ())  # of the tensors in the checkpoint; or it was saved again without the rest
UPSAMPLER_PREFIX, BACKBONE_PREFIX = "vlu.", "hcr."
CHANNELS = 16
COMPUTED = (".relative_position_index", ".position_bias")


def released() -> LatentUpsamplerConfig:
    """The upsampler that was published."""
    return paper(CHANNELS)


def examine(source: Source, base: BaseInfo) -> list[Component]:
    """What is in the file, from its header. Raises UserError."""
    upsampler, refiner = source.below(UPSAMPLER_PREFIX), source.below(BACKBONE_PREFIX)
    if not upsampler.entries and not refiner.entries:
        return [_upsampler(source, base)]
    if stray := [name for name in source.entries if not name.startswith((UPSAMPLER_PREFIX, BACKBONE_PREFIX))]:
        what = f"{len(stray)} tensors are neither {UPSAMPLER_PREFIX} nor {BACKBONE_PREFIX}; {listed(stray)}"
        raise UserError(what, where="file", fix="give the released file")
    return [read(part, base) for part, read in ((upsampler, _upsampler), (refiner, backbone)) if part.entries]


def ours(name: str) -> str:
    """How a parameter of the released upsampler is called here."""
    return f"implicit.{name}" if name.startswith("imnet.") else name


def _upsampler(source: Source, base: BaseInfo) -> Component:
    """Every tensor has its place here, or the file holds another network."""
    if base.geometry.channels != CHANNELS:
        what = f"this upsampler is for latents of {CHANNELS} channels, {base.name} has {base.geometry.channels}"
        raise UserError(what, where="model", fix="give a Wan2.1 base")
    config = released()
    network = LatentUpsampler(config)
    computed = {name: name for name in source.entries if name.endswith(COMPUTED)}
    found = match(source.without(computed), {name: tuple(p.shape) for name, p in network.named_parameters()}, ours)
    if found.unmatched:
        what = f"{len(found.unmatched)} tensors have no place in the upsampler; {listed(found.unmatched)}"
        raise UserError(what, where="file", fix="give the released file")
    _compare(source.load(computed), network)

    def write(folder: Path) -> None:
        save_part(folder, UPSAMPLER, asdict(config), source.load(found.names))

    return Component(place=f"parts/{UPSAMPLER}", names=found.names, computed=tuple(computed), write=write)


def _compare(tables: dict[str, torch.Tensor], network: LatentUpsampler) -> None:
    """UserError unless the file's tables are those that ours computes: its windows would then be other ones."""
    own = dict(network.named_buffers())
    for name, table in tables.items():
        if name not in own or own[name].shape != table.shape or not torch.allclose(own[name].double(), table.double(), atol=1e-5):
            raise UserError(f"{name} is not that of the released windows", where="file", fix="give the released file")
