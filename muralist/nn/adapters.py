"""A transformer's named adapters (LoRA, kept by peft): one is switched on, or becomes a part of the weights that it is added to.

Beside the weights an adapter costs two small products and two passes over the tokens in every linear layer; as a part of them it costs nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer

from muralist.errors import UserError
from muralist.nn.kinds import ADAPTER_FILE

HALF_MERGED = ""  # the name of what is a part of some weights and not of others, after a stop: they have to be loaded again


def load_adapter(transformer: torch.nn.Module, name: str, folder: Path) -> None:
    """Add the adapter in a folder to a diffusers model, beside those that it has."""
    with several_adapters(), _without_others(name):
        # without both names diffusers falls back to a pickle
        transformer.load_lora_adapter(str(folder), prefix=None, adapter_name=name, weight_name=ADAPTER_FILE, use_safetensors=True)


def select_adapter(transformer: torch.nn.Module, adapter: str | None) -> None:
    """Switch one loaded adapter on, or all of them off. Raises UserError if there is no such one, ValueError if another is a part of the weights."""
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        if adapter is not None:
            raise UserError(f"the base has no adapter {adapter!r}", where="adapter", fix="choose a base or a recipe that has it")
        return
    if adapter is not None and adapter not in transformer.peft_config:
        raise UserError(f"the base has no adapter {adapter!r}", where="adapter", fix=f"use one of {', '.join(transformer.peft_config)}")
    if (merged := merged_adapter(transformer)) is not None:
        if merged != adapter:
            raise ValueError(f"{merged!r} is a part of the weights, {adapter!r} was asked for")
        return
    if _is_selected(transformer, adapter):
        return
    if adapter is None:
        transformer.disable_adapters()
    else:
        transformer.enable_adapters()
        transformer.set_adapters([adapter])


def can_merge(transformer: torch.nn.Module, adapter: str) -> bool:
    """Whether an adapter is nothing but products to be added to weights of linear layers; DoRA's, for one, is more. UserError if there is no such one."""
    select_adapter(transformer, adapter)
    return all(isinstance(layer, Linear) and adapter not in layer.lora_variant for layer in _layers_of(transformer, adapter))


def merge_adapter(transformer: torch.nn.Module, adapter: str, device: torch.device | None = None) -> None:
    """Make an adapter a part of the weights, rounded once, if it can be (`can_merge`).

    What the weights were is not kept: they have to be loaded again for another adapter, or none. Not for weights in 8 bits, nor for those that wait elsewhere.

    Args:
        device: where the products are computed, wherever the weights are: another device may round otherwise. None: where they are.
    """
    if not can_merge(transformer, adapter):
        return
    transformer.merged_adapter = HALF_MERGED  # until the last one is
    with torch.inference_mode(False), torch.no_grad():  # the first step of a run asks inside one: its tensors could serve nowhere else
        for layer in _layers_of(transformer, adapter):
            weight, (a, b) = layer.base_layer.weight, (side[adapter].weight.to(device).float() for side in (layer.lora_A, layer.lora_B))
            weight.data = torch.addmm(weight.to(device).float(), b, a, alpha=layer.scaling[adapter]).to(weight)
            if layer.lora_bias[adapter]:
                bias, more = layer.base_layer.bias, layer.lora_B[adapter].bias.to(device).float()
                bias.data = torch.add(bias.to(device).float(), more, alpha=layer.scaling[adapter]).to(bias)
    transformer.disable_adapters()
    transformer.merged_adapter = adapter


def merged_adapter(transformer: torch.nn.Module) -> str | None:
    """The adapter that is a part of the weights."""
    return getattr(transformer, "merged_adapter", None)


def _layers_of(transformer: torch.nn.Module, adapter: str) -> list[BaseTunerLayer]:
    """Those that the adapter adds to."""
    return [layer for layer in _layers(transformer) if adapter in layer.lora_A or adapter in layer.lora_embedding_A]


def _layers(transformer: torch.nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in transformer.modules() if isinstance(module, BaseTunerLayer))


def _is_selected(transformer: torch.nn.Module, adapter: str | None) -> bool:
    """Whether every layer that has adapters stands so already: to ask is much faster than to switch them all."""
    if adapter is None:
        return all(layer.disable_adapters for layer in _layers(transformer))
    return all(not layer.disable_adapters and layer.active_adapters == [adapter] for layer in _layers(transformer))


@contextmanager
def several_adapters() -> Iterator[None]:
    """peft warns of a second adapter in a model; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield


@contextmanager
def _without_others(name: str) -> Iterator[None]:
    """diffusers counts the weights of adapters that are loaded already, and whose names contain this one's, as missing ones of it."""

    def of_this_one(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "missing keys" not in text or f".{name}." in text

    logger = logging.getLogger("diffusers.utils.peft_utils")
    logger.addFilter(of_this_one)
    try:
        yield
    finally:
        logger.removeFilter(of_this_one)
