"""A VAE without storage, for its shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan


def empty_vae(config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKLWan:
    """The VAE of this configuration on the meta device, its parameters of that type; not to be changed: the next one who asks gets the same."""
    return _empty(json.dumps({name: value for name, value in config.items() if not name.startswith("_")}, sort_keys=True), dtype)


@lru_cache(maxsize=8)
def _empty(config: str, dtype: torch.dtype) -> AutoencoderKLWan:
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(json.loads(config))
    for parameter in vae.parameters():  # not `vae.to`, which warns about layers that a real cast should leave alone
        parameter.data = parameter.data.to(dtype)
    return vae
