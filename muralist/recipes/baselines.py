"""The two recipes without a method of their own: what every other recipe is compared with.

`direct`: muralist generate PROMPT --recipe direct --size WIDTHxHEIGHT
`cascade`: muralist generate PROMPT --size 4k   (the default; no training needed on a Wan base, relatives: CineScale, FreeSwim)
"""

from __future__ import annotations

from muralist.base_info import BaseInfo
from muralist.config import Config
from muralist.nn.attention import FullAttention
from muralist.stages.proxy import LowResolutionProxy
from muralist.stages.refine import Refine, Windows
from muralist.stages.upsample import LATENT_SCALE, PixelInterpolation

UHR = "uhr"  # the adapter that a base may bring for sizes above its own
WINDOW_FRAMES = 8  # latent frames: 512 tokens are then 8 x 8 x 8, and a longer video gets more windows instead of flatter ones


def direct(base: BaseInfo) -> Config:
    """Full attention at the target size from pure noise: exact, and quadratic in the number of tokens."""
    return Config(proxy=None, upsample=None, refine=Refine(**base.defaults.sampling, attention=FullAttention()))


def cascade(base: BaseInfo) -> Config:
    """A proxy at the base's own size, enlarged through pixels, re-noising, and refinement in shifted local windows."""
    d = base.defaults
    proxy = LowResolutionProxy(height=d.grid.height, width=d.grid.width, **d.sampling)
    refine = Refine(
        **d.refining,
        skip_steps=round(d.skip_share * d.refine_steps),
        attention=Windows(tokens=512, max_frames=WINDOW_FRAMES),
        adapter=UHR if UHR in base.adapters else None,
    )
    return Config(proxy=proxy, upsample=PixelInterpolation(latent_scale=LATENT_SCALE), refine=refine)
