"""What LUVE's frequency experts cost: a windowed forward with the low one, with the high one, and without, in turns.

    OMP_NUM_THREADS=2 python benchmarks/experts.py         # some minutes on two cores; writes results/experts.{json,md}

The embedded base's own width with all its blocks, and the width of Wan2.1-1.3B with one. One expert works at a time, as in a run: the low one at the
highest noise levels, the high one below. LUVE's own figure is 91 against 90 minutes of a whole run (table 6's text), a factor of 1.011.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from common import write
from diffusers import WanTransformer3DModel

from muralist.nn.attention import WindowAttention
from muralist.nn.experts import ExpertConfig, attach
from muralist.nn.filters import RadialFilter
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import Shape

GOAL, ROUNDS, CHUNK = 1.03, 8, 4096
WINDOW: Shape = (8, 8, 8)
EXPERTS = {
    "low": ExpertConfig(place="attention", band=RadialFilter(band="low"), sigmas=(0.875, 1.0)),
    "high": ExpertConfig(place="ffn", band=RadialFilter(band="high"), sigmas=(0.0, 0.875)),
}
CASES: tuple[tuple[int, int, int, int, Shape], ...] = ((4, 64, 6, 1024, (8, 34, 60)), (12, 128, 1, 8960, (4, 34, 60)))  # heads, their width, blocks, FFN, grid


def measured(heads: int, head: int, layers: int, ffn: int, grid: Shape) -> list[dict[str, Any]]:
    width = heads * head
    torch.manual_seed(0)
    mural = MuralTransformer.adopt(
        WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=head, num_layers=layers, ffn_dim=ffn, text_dim=256, freq_dim=256, in_channels=16, out_channels=16,
        ).eval()
    )  # fmt: skip
    attach(mural.blocks, width, EXPERTS)
    for name, parameter in mural.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.02)  # a new one is zero, which may cost less
    given = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2]), torch.tensor([500.0]), torch.randn(1, 512, 256)
    seconds: dict[str, list[float]] = {"none": [], "low": [], "high": []}
    for number in range(ROUNDS + 1):  # the first is a warm-up
        for name, times in list(seconds.items())[:: 1 if number % 2 else -1]:  # a machine that slows down slows no side alone
            mural.configure(Graft(WindowAttention(WINDOW), token_chunk=CHUNK, experts=() if name == "none" else (name,)))
            started = time.perf_counter()
            mural(*given)
            times.append(time.perf_counter() - started)
    of_round = {name: [one / other for one, other in zip(times[1:], seconds["none"][1:])] for name, times in seconds.items()}
    shape = {"width": width, "blocks": layers, "tokens": math.prod(grid)}
    return [
        {**shape, "expert": name, "s": statistics.median(times[1:]), "with / without": statistics.median(of_round[name]), "goal": f"<= {GOAL}"}
        for name, times in seconds.items()
        if name != "none"
    ]


def main() -> None:
    with torch.inference_mode():
        rows = [row for case in CASES for row in measured(*case)]
    print(*rows, sep="\n")
    write("experts", rows, f"medians of {ROUNDS} rounds, each with and without in turn; rank 16, windows of {WINDOW}, chunks of {CHUNK}")


if __name__ == "__main__":
    main()
