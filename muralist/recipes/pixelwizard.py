"""PixelWizard (arXiv 2605.25801): a low-resolution anchor, injected into high-resolution synthesis from pure noise in four steps.

`pixelwizard`: muralist generate PROMPT --recipe pixelwizard --size 4k   (needs the base's parts `injector` and `step_size`, and
its adapter `anchored` if they were trained with one; imported weights are whole)

Ours: local windows (full attention is `--set 'refine.attention={"kind": "FullAttention"}'`), one pass a step, since guidance is learned with
the steps (the release runs both passes, `--set refine.guidance_scale=5`), one shift for all sizes (the release: 5.5 at 2K, 5.8 at 4K).
The release's anchor is 448x256 on a base tuned to that size: an adapter `anchor`, where there is one.
"""

from __future__ import annotations

from muralist.base_info import BaseInfo
from muralist.config import Config
from muralist.nn.kinds import INJECTOR, STEP_SIZE
from muralist.sampling.shortcut import ShortcutSteps
from muralist.stages.proxy import LowResolutionProxy
from muralist.stages.refine import Refine, Windows

ANCHOR, ANCHORED = "anchor", "anchored"  # adapters
HEIGHT, WIDTH = 256, 448
STEPS = 4
SHIFT = 5.5


def pixelwizard(base: BaseInfo) -> Config:
    """PixelWizard: a small anchor, then the large video from noise in four steps, the anchor added to its tokens."""
    for part in (INJECTOR, STEP_SIZE):
        base.require_part(part)
    d = base.defaults
    proxy = LowResolutionProxy(height=HEIGHT, width=WIDTH, adapter=ANCHOR if ANCHOR in base.adapters else None, **d.sampling)
    refine = Refine(
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        flow_shift=SHIFT,
        attention=Windows(tokens=1024),
        adapter=ANCHORED if ANCHORED in base.adapters else None,
        steps=ShortcutSteps(),
        anchor="injected",
    )
    return Config(proxy=proxy, upsample=None, refine=refine)
