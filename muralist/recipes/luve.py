"""LUVE: low-resolution motion, a learned latent upsampler, and refinement with two frequency experts.

Source: "LUVE: Latent-Cascaded Ultra-High-Resolution Video Generation with Dual Frequency Experts"; the switch at sigma 0.875 is that of the
released runtime (the paper's 0.417 is an index of a schedule of shift 5, and means the same).

`luve`: muralist generate PROMPT --recipe luve --size 4k   (needs the base's parts `latent_upsampler` and `experts`)

Up to three times the proxy's size the upsampler goes all of the way, as in the paper. It is trained for no more there, and from 448x256 to 4K at once, 8.5
times, a grid of the proxy's latents stays in the picture (looked at): from there on pixels are enlarged to a third of the target and encoded first.

Cost beside `cascade`: 45 of 50 refining steps instead of 30; at 4K the upsampler takes the place of more than half of the pixels to encode.
The embedded base, in whose windows objects of their own come up at high noise, keeps six of ten steps of its guide as in `cascade`. Ablations of
the paper are other values of this configuration (`--set NAME=VALUE`, or `override` in `muralist.compare.ablation`):

| table | switch |
|---|---|
| 5 | `upsample` = `PixelInterpolation`, `LatentInterpolation`, `LearnedUpsampling` (the paper's; the default is it behind pixels) |
| 6 | `refine.experts` = (), ("low",), ("high",), ("low", "high"); without a cascade: the recipe `direct` with the adapter `uhr` |
| 7 | `refine.skip_steps` = 2, 5, 10, 15 of 50 |
"""

from __future__ import annotations

from dataclasses import replace

from muralist.base_info import SKIP_SHARE as USUAL
from muralist.base_info import BaseInfo
from muralist.config import Config
from muralist.recipes.baselines import cascade
from muralist.stages.upsample import LEARNED_SCALE, LearnedUpsampling, PixelInterpolation

SKIP_SHARE = 0.1  # S = 5 of 50 steps (Table 7); the released runtime skips 10
EXPERTS = ("low", "high")


def luve(base: BaseInfo) -> Config:
    """LUVE: a proxy, the learned latent upsampler, most of the steps again at full size with the two frequency experts."""
    plain = cascade(base)
    kept = base.defaults.skip_share  # a base that does not know large sizes keeps as much of its guide here as elsewhere
    share = kept if kept > USUAL else SKIP_SHARE
    refine = replace(plain.refine, skip_steps=round(share * plain.refine.num_inference_steps), experts=EXPERTS)
    return replace(plain, upsample=PixelInterpolation(latent_scale=LEARNED_SCALE, rest=LearnedUpsampling()), refine=refine)
