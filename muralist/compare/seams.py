"""Where a video was put together from pieces: the borders of its decoding tiles, for the overlay of the report."""

from __future__ import annotations

from typing import Any

import torch

from muralist.base import pick_device, pick_dtype
from muralist.base_info import BaseInfo, inspect_base
from muralist.config import Request
from muralist.errors import UserError
from muralist.request import restore
from muralist.stages.decode import plan_decode
from muralist.store import weights
from muralist.tiling import split


def decode_borders(metadata: dict[str, Any], model: str | None = None) -> dict[str, list[int]] | None:
    """Inner tile borders {"x": columns, "y": rows} in pixels of a video made by muralist; None where they cannot be known.

    Args:
        metadata: what the file says of itself (`VideoInfo.metadata`).
        model: where its base is, if not under the name that the file tells; only one that is given here is downloaded.
    """
    try:
        request = restore(metadata["request"])
        if model is None and not weights.is_here(request.model):
            return None  # not on this machine: a file must not have a model downloaded
        info = inspect_base(model or request.model, request.revision)
        return _borders(request, info, str(metadata.get("dtype")))
    except (UserError, KeyError, TypeError):
        return None


def _borders(request: Request, info: BaseInfo, dtype: str) -> dict[str, list[int]]:
    legal, factor = info.geometry.legal(request.grid), info.geometry.spatial_factor
    kind = getattr(torch, dtype) if dtype in ("bfloat16", "float32") else pick_dtype(pick_device("auto"))
    tile = max(plan_decode(info.vae_config, legal, request.config.decode, dtype=kind).tile, factor)
    return {"x": _inner(legal.width, tile, factor, request.grid.width), "y": _inner(legal.height, tile, factor, request.grid.height)}


def _inner(size: int, tile: int, factor: int, shown: int) -> list[int]:
    """Borders between the tiles of a side of `size` pixels that lie inside the `shown` ones."""
    return [span.start for span in split(size, tile, factor) if 0 < span.start < shown]
