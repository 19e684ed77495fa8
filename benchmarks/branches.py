"""Local windows with compressed branches: their forms against each other and against full attention, in turn, in one process.

    python benchmarks/branches.py              # about 13 minutes on two cores; writes results/branches_{forms,forward}.{json,md}
    python benchmarks/branches.py --quick      # small sizes, prints only

Width and depth of the embedded base (256, six blocks, FFN 1,024), K = 4, rank 64, random weights. The ratios are what counts.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from common import write
from windows import best

from muralist.cost import transformer as cost
from muralist.nn.attention import BranchedWindows, CloseRemote, FullAttention
from muralist.nn.branches import attach_branches
from muralist.nn.kinds import BranchesConfig, hierarchical
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import Shape

SIZES = dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, text_dim=128, freq_dim=128, in_channels=48, out_channels=48)
WIDTH, TEXT, CHUNK = 256, 16, 8192
GRIDS: dict[int, Shape] = {4096: (4, 32, 32), 32768: (8, 64, 64), 65536: (16, 64, 64)}
BRANCHED = BranchedWindows(4, branches=("coarse", "whole"))


def model(layers: int, branches: BranchesConfig | None) -> MuralTransformer:
    torch.manual_seed(0)
    made = MuralTransformer(**SIZES, num_layers=layers).eval()
    if branches is not None:
        attach_branches(made.blocks, branches)
    return made


def seconds(made: MuralTransformer, shape: Shape, attention: object, repeats: int) -> float:
    f, y, x = shape
    z, text = torch.randn(1, 48, f, 2 * y, 2 * x), torch.randn(1, TEXT, 128)
    made.configure(Graft(attention=attention, token_chunk=CHUNK))
    with torch.inference_mode():
        return best(lambda: made(z, torch.tensor([500.0]), text), repeats)


def flops(layers: int, shape: Shape, attention: object, branches: BranchesConfig | None) -> int:
    return cost.forward(cost.Dimensions.of({**SIZES, "num_layers": layers}), Graft(attention=attention), shape, TEXT, branches).flops


def forms(tokens: int, repeats: int) -> list[dict]:
    """One block in every form: what is projected, and what restores."""
    rows = []
    for restoring, projecting in product(("separable", "depthwise", "dense"), ("each", "once")):
        branches = hierarchical(WIDTH, 1, restoring=restoring, projecting=projecting)
        taken, count = seconds(model(1, branches), GRIDS[tokens], BRANCHED, repeats), flops(1, GRIDS[tokens], BRANCHED, branches)
        rows.append({"restoring": restoring, "projecting": projecting, "seconds": taken, "gflop": count / 1e9})
    dense = next(row for row in rows if row["restoring"] == "dense" and row["projecting"] == "each")
    return [row | {"dense_ratio": dense["seconds"] / row["seconds"], "by_flops": dense["gflop"] / row["gflop"]} for row in rows]


def against_full(tokens: int, repeats: int) -> dict:
    """Whole forwards of six blocks."""
    branches = hierarchical(WIDTH, 6)
    made, shape = model(6, branches), GRIDS[tokens]
    full, fast, apart = (seconds(made, shape, attention, repeats) for attention in (FullAttention(), BRANCHED, CloseRemote()))
    counted = [flops(6, shape, attention, branches) for attention in (FullAttention(), BRANCHED)]
    return {
        "tokens": tokens, "full_s": full, "branched_s": fast, "ratio": full / fast, "by_flops": counted[0] / counted[1], "close_remote_s": apart,
        "close_remote_ratio": full / apart,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    sizes = (4096,) if quick else (32768, 65536)
    rows = forms(sizes[0], 3)
    forwards = [against_full(tokens, 1 if tokens > 40000 else 2) for tokens in sizes]
    for row in (*rows, *forwards):
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
    if not quick:
        write("branches_forms", rows, f"One block, {sizes[0]:,} tokens; `dense_ratio`: how much longer the dense form takes, `by_flops`: the same by counting.")
        write("branches_forward", forwards, "Six blocks: full attention, compressed branches in their fast form, close and remote windows of 2,048 tokens.")


if __name__ == "__main__":
    main()
