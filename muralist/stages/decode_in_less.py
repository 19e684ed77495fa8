"""Decoding that goes on in smaller tiles when memory runs out in spite of the plan. Tiles are exact, so the frames stay the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from diffusers import AutoencoderKLWan

from muralist.errors import UserError
from muralist.nn.out_of_memory import give_back, ran_out
from muralist.stages.decode import TILES, DecodePlan, TileMajor, TimeMajor, decode
from muralist.types import FrameChunk, Grid, LatentVideo

log = logging.getLogger("muralist")


def decode_in_less(latent: LatentVideo, vae: AutoencoderKLWan, plan: DecodePlan, *, first_frame: int = 0, **options: Any) -> Iterator[FrameChunk]:
    """As `decode`; after running out of memory again from the frame that is due, by the next smaller plan.

    Raises:
        UserError: there is too little memory for the smallest tiles.
    """
    while True:
        try:
            for chunk in decode(latent, vae, plan, first_frame=first_frame, **options):
                first_frame = chunk.start + len(chunk.frames)
                yield chunk
            return
        except RuntimeError as error:
            if not ran_out(error):
                raise
        # outside of `except`: until its end the exception holds the frames, and these the tensors
        plan = smaller(plan, latent.grid)
        log.warning("muralist: note: memory ran out in decoding; on in tiles of %d pixels, one after another", plan.tile)
        give_back()


def smaller(plan: DecodePlan, grid: Grid) -> TileMajor:
    """The plan that needs less and costs the least: tiles one after another, then smaller ones. Raises UserError after the smallest."""
    longest = max(grid.height, grid.width)
    if isinstance(plan, TimeMajor) and plan.tile < longest:
        return TileMajor(tile=plan.tile)
    side = next((side for side in TILES if side < min(plan.tile, longest)), None)
    if side is None:
        fix = "use --memory low, a smaller --size, or end what else uses the device"
        raise UserError(f"too little for tiles of {min(plan.tile, longest)} pixels", where="memory, decode", fix=fix)
    return TileMajor(tile=side)
