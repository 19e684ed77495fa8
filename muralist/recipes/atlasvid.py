"""AtlasVid (arXiv 2605.16649): long ultra-high-resolution video by a semantic proxy and local windows.

`atlasvid`: muralist generate PROMPT --recipe atlasvid --size 4k --duration 10s

Needs one of the base's adapters `detail`, trained at its own resolution, and `detail_uhr` (the paper's optional fine-tuning at 4K), and for videos longer
than the base's own `proxy`. Where it has `detail_uhr`, windows are painted with that, in those that it was trained in; without: `--set
refine.adapter=detail`, with tokens and reach of `detail`'s training (`ProxyWindows.trained`; the embedded base: `--set refine.attention.tokens=112 --set
'refine.attention.reach=[6.5, 4, 4]'`, and at 4K, where its windows lie within an object whole, with less noise: `--set refine.skip_steps=8`).

Known of the method: a proxy of low resolution and frame rate with rotary positions scaled by 4 in time; joint denoising in reordered
space-time windows with aligned guidance of the proxy, asymmetric; LoRA trained at the base's resolution alone; at most 1,208 times fewer
attention FLOPs a layer. Ours, since only abstract, captions and two sentences are public: the numbers below, that the proxy is seen clean, and that
the first steps are its own, at the target's size and rate: a window then never has to guess where in it the object is.

| value | here | why |
|---|---|---|
| `refine.skip_steps` | the base's own share | as `cascade` starts from its guide |
| `proxy.every` | 4 | the paper's r_t; 81 proxy frames then span 321 of the target, its longest example |
| `proxy.spanned` | the base's own frames | a shorter video has a proxy of all its frames, by the base alone: few slow frames hardly move |
| `refine.attention.tokens` | 1,024 | with the proxy's 64 about 1,100 keys a query, for the paper's factor; what an adapter was trained in, if less |
| `refine.attention.near` | 4 x 4 x 4 | the proxy's own rows and columns around a window |
| `refine.attention.proxy_noise` | clean | its keys are then computed once; `same` is the alternative |
"""

from __future__ import annotations

from muralist.base_info import BaseInfo
from muralist.config import Config
from muralist.stages.proxy import LowFrameRateProxy
from muralist.stages.refine import ProxyWindows, Refine
from muralist.stages.upsample import LATENT_SCALE, PixelInterpolation

PROXY, DETAIL, DETAIL_UHR = "proxy", "detail", "detail_uhr"  # adapters


def atlasvid(base: BaseInfo) -> Config:
    """AtlasVid: a proxy with a quarter of the frames, and every window of the large video painted in sight of it."""
    detail = DETAIL_UHR if DETAIL_UHR in base.adapters else DETAIL
    base.require_adapter(detail)  # that of the proxy once it is known whether this video has a slow one
    d = base.defaults
    own = base.geometry.token_shape(base.geometry.legal(d.grid))
    windows = ProxyWindows.of_crops(own) if detail == DETAIL_UHR else ProxyWindows.trained(own)
    return Config(
        proxy=LowFrameRateProxy(height=d.grid.height, width=d.grid.width, adapter=PROXY, spanned=d.grid.num_frames, **d.sampling),
        upsample=PixelInterpolation(latent_scale=LATENT_SCALE),
        refine=Refine(attention=windows, adapter=detail, **d.refining, skip_steps=round(d.skip_share * d.refine_steps)),
    )
