"""UltraGen (Hu et al., arXiv 2510.18775): the large video from pure noise, end to end, with no proxy.

`ultragen`: muralist generate PROMPT --recipe ultragen --size 1080p   (needs the base's part `branches`, and its adapter `branched` if it was trained as one)

Attention is local in K x K windows (K + 1 in odd blocks), beside it windows twice as wide on a quarter of the tokens and the whole picture on a
K-th of them along each side, fused by weights that follow the noise level. 30 steps and shift 5 are the paper's, guidance is the base's own
(5 for Wan, as in the paper). At K = 4 the attention map
costs a twelfth of the full one where all blocks have K windows and these stand still (equation 13), a fifteenth as they alternate.
Where branches were trained so (`BranchesConfig.travel`), windows stand elsewhere at every step, which is ours: where they stand still, as in the paper and the
release, objects are cut along their borders (seen). With a cache (`refine.cache`), which compares steps, they stand still.
New branches change the windows by a tenth each, but for the view of the whole above a noise level of 0.6: it leads there (`nn/branches.py`), since
windows alone paint an object each. Above its own size the embedded base's velocity is then within 0.11 to 0.31 of that with full attention (relative
norm; where windows stand still), with windows alone within 0.13 to 0.36 (`benchmarks/fresh_branches.py`): that is where training starts from.

Ablations of Table 4 are other values of this configuration (`--set NAME=VALUE`, or `override` in `muralist.compare.ablation`):

| without | value |
|---|---|
| global attention | `refine.attention.branches` = ("coarse",) |
| hierarchical attention | `refine.attention.branches` = ("whole",) |
| cross-window attention | `refine.attention.odd` = same |
| the windows' own scheme: Swin's | `refine.attention.odd` = shifted |
| travel (ours) | `refine.attention.travel` = false |
| domain-aware LoRA | trained without: `BranchesConfig.rank` = 0 |

Where paper and release differ (the release's values are those of an imported part): alpha weighs the global branch (release: the local one),
keys have their own projection (release: the global branch takes the query's), all blocks are alike (release: three at each end keep full
attention), edges are pooled as they are (release: the tokens are resized), no low-rank change of the FFN, which comes after the fusion and so
sees no branch (the paper names one, the release has none). As in the release and not in the paper: a sigmoid makes alpha, and the low-rank
changes have biases. Pooled tokens are of each block's own input, so no two blocks share a branch; they share how the grid is cut.
"""

from __future__ import annotations

from muralist.base_info import BaseInfo
from muralist.config import Config
from muralist.nn.attention import BranchedWindows
from muralist.nn.kinds import BRANCHES
from muralist.stages.refine import Refine

BRANCHED = "branched"  # the adapter
STEPS = 30
SHIFT = 5.0


def ultragen(base: BaseInfo) -> Config:
    """UltraGen: from noise to the large video at once, local windows fused with two coarser views of the whole."""
    base.require_part(BRANCHES)
    branches = base.branches
    plain = tuple(sorted(set(range(base.transformer_config["num_layers"])) - set(branches.blocks)))
    windows = BranchedWindows(branches.windows, branches=tuple(branches.branches), plain=plain, travel=branches.travel)
    refine = Refine(
        **base.defaults.sampling | {"num_inference_steps": STEPS, "flow_shift": SHIFT},
        attention=windows,
        adapter=BRANCHED if BRANCHED in base.adapters else None,
    )
    return Config(proxy=None, upsample=None, refine=refine)
