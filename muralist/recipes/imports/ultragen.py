"""UltraGen's released weights: a Wan2.1 transformer in Wan's own names, and in its middle blocks the tensors of two compressed branches.

Source: the public repository sjtuplayer/UltraGen (`diffsynth/models/wan_video_dit.py`, names, shapes and what is computed with them). Blocks
without such tensors keep full attention. In a block's `self_attn` the low-rank changes numbered 1, the convolutions without a suffix and the
fusion weight without a number are those of the whole picture; 2, `_hierachcal` (sic) and 2 those of the coarse windows. The released fusion
weight is that of what stands beside the branch, and keys of the whole picture come from the query's projection: the part says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange

from muralist.base_info import BaseInfo
from muralist.errors import UserError
from muralist.nn.kinds import BRANCHES, BranchConfig, BranchesConfig
from muralist.recipes.imports.component import Component
from muralist.recipes.imports.source import Shape, Source, match
from muralist.recipes.imports.wan import backbone
from muralist.store.parts import save_part

PLACES = ((), ("state_dict",))  # of the tensors in the checkpoint
WINDOWS = 4
KINDS = {"whole": BranchConfig(stride=WINDOWS, key_of_query=True), "coarse": BranchConfig(stride=2, windows=WINDOWS // 2, alternate=True)}
LORA, SUFFIX, NUMBER = {"whole": "1", "coarse": "2"}, {"whole": "", "coarse": "_hierachcal"}, {"whole": "", "coarse": "2"}
OWN = re.compile(r"blocks\.([0-9]{1,4})\.self_attn\.(?:[qkv]_lora_|alpha_time_|downsample_conv|upsample_conv)")
POOL = ".pool_"  # tensors that we lay out otherwise


def examine(source: Source, base: BaseInfo) -> list[Component]:
    """What is in the file, from its header. Raises UserError."""
    own = {name: int(found[1]) for name in source.entries if (found := OWN.match(name))}
    if not own:
        raise UserError("no block of it has compressed branches", where="file", fix="give the released file")
    return [backbone(source.without(own), base), _branches(source, own, base)]


def _branches(source: Source, own: Mapping[str, int], base: BaseInfo) -> Component:
    config = _config(source, own, base)
    biased = any(name.endswith("downsample_conv.bias") for name in own)
    theirs = {ours: name for ours, name in _names(config).items() if biased or not ours.endswith("pool_bias")}
    ours = {name: mine for mine, name in theirs.items()}
    only = source.without(set(source.entries) - set(own))
    found = match(only, {mine: _shape(mine, shape, config) for mine, shape in config.tensors().items() if mine in theirs}, lambda name: ours.get(name, ""))

    def write(folder: Path) -> None:
        tensors = {name: _laid_out(name, tensor) for name, tensor in source.load(found.names).items()}
        missing = {name: torch.zeros(shape) for name, shape in config.tensors().items() if name not in tensors}
        save_part(folder, BRANCHES, asdict(config), tensors | missing)

    return Component(place=f"parts/{BRANCHES}", names=found.names, unmatched=found.unmatched, write=write)


def _config(source: Source, own: Mapping[str, int], base: BaseInfo) -> BranchesConfig:
    """The release's variant, with the rank and the blocks that the file has."""
    rank = next((source.entries[name].shape[0] for name in own if name.endswith("q_lora_1.lora_A.weight") and len(source.entries[name].shape) == 2), 64)
    blocks = tuple(sorted(set(own.values())))
    if blocks[-1] >= base.transformer_config["num_layers"]:
        what = f"it has branches beside block {blocks[-1]}, {base.name} has {base.transformer_config['num_layers']} blocks"
        raise UserError(what, where="model", fix="give the base that it was made from, Wan2.1-T2V-1.3B")
    branches = {name: KINDS[name] for name in ("coarse", "whole")}
    return BranchesConfig(
        dim=base.width, blocks=blocks, branches=branches, windows=WINDOWS, rank=rank, restoring="depthwise", projecting="each", of_branch=False
    )


def _names(config: BranchesConfig) -> dict[str, str]:
    """{ours: theirs}"""
    names = {}
    for block in config.blocks:
        for branch in config.branches:
            here, there = f"{block}.{branch}", f"blocks.{block}.self_attn"
            number, suffix = NUMBER[branch], SUFFIX[branch]
            pairs = {f"{x}.lora_{side}": f"{x}_lora_{LORA[branch]}.lora_{side}" for x in "qkv" for side in "AB"}
            pairs |= {f"fusion.embedding.{i}": f"alpha_time_embedding{number}.{i}" for i in (0, 2)}
            pairs |= {"fusion.projection": f"alpha_time_projection{number}.1", "restoring": f"upsample_conv{suffix}"}
            names |= {f"{here}.{mine}.{kind}": f"{there}.{other}.{kind}" for mine, other in pairs.items() for kind in ("weight", "bias")}
            names |= {f"{here}.pool_{kind}": f"{there}.downsample_conv{suffix}.{kind}" for kind in ("weight", "bias")}
    return names


def _shape(name: str, shape: Shape, config: BranchesConfig) -> Shape:
    """Theirs, where it differs: a strided convolution has the shape [D, 1, s, s], its bias [D]."""
    if POOL not in name:
        return shape
    side = config.branches[name.split(".")[1]].stride
    return (config.dim, 1, side, side) if name.endswith("weight") else (config.dim,)


def _laid_out(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if POOL not in name:
        return tensor
    return rearrange(tensor, "d 1 y x -> 1 (y x) d").contiguous() if name.endswith("weight") else tensor[None].contiguous()
