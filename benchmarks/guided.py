"""Windows that see a proxy: against full attention, and time against tokens.

    OMP_NUM_THREADS=2 python benchmarks/guided.py          # about five minutes on two cores; writes results/guided.{json,md}

The width of the CPU goals (256, 4 heads of 64, FFN 1,536, 512 text tokens), two layers; windows of 8 x 8 x 8 and of 8 x 8 x 16 tokens, each in sight of
4 x 4 x 4 tokens of a proxy of 448x256. Gathering, rotating and joining the proxy's keys is part of what is timed; which ones lie around a window is
found once. Times are minima: of ten for windows, of two for full attention, which takes half a minute, and for a step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from common import write
from windows import CHUNK, HEADS, TEXT, WIDTH, best, model

from muralist.nn.attention import attend_full, attend_windows
from muralist.nn.attention.guided import GuidedWindows, Near, Within, joined, neighbours, places
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import Shape, WindowAttention, partition

PROXY: Shape = (8, 8, 14)
GRIDS: tuple[Shape, ...] = ((8, 32, 64), (8, 64, 64), (16, 64, 64), (16, 64, 128), (16, 128, 128))  # 16K to 262K tokens
WINDOWS: tuple[Shape, ...] = ((8, 8, 8), (8, 8, 16))
TIME_SCALE, LAYERS = 4.0, 2
GOALS = {"full / windows": 40.0, "slope": 1.05}


def against_full(grid: Shape) -> list[dict[str, Any]]:
    """One layer of self-attention: all keys, against those of a window and of the proxy around it."""
    tokens, head = math.prod(grid), WIDTH // HEADS
    q, k, v = (torch.randn(1, tokens, HEADS, head) for _ in range(3))
    key, value = (torch.randn(1, math.prod(PROXY), HEADS, head) for _ in range(2))
    full_s = best(lambda: attend_full(q, k, v), 2)
    rows = []
    for window in WINDOWS:
        cut, near = partition(grid, window), Near().within(PROXY)
        seen = joined([(neighbours(cut, PROXY, places(PROXY, Within(tuple(map(float, grid))), TIME_SCALE), near, head), key, value)])
        seconds = best(lambda cut=cut, seen=seen: attend_windows(q, k, v, cut.groups, seen), 10)
        keys = math.prod(window) + math.prod(near.count)
        rows.append({"what": "full attention / windows with proxy keys, one layer", "window": window, "tokens": tokens, "keys": keys, "s": seconds})
        rows[-1] |= {"other_s": full_s, "ratio": full_s / seconds, "goal": f">= {GOALS['full / windows']:.0f}"}
    return rows


def against_tokens(window: Shape) -> list[dict[str, Any]]:
    """A step as the grid grows, and the slope of a line through the logarithms."""
    near = Near().within(PROXY)
    attention = GuidedWindows(WindowAttention(window), near)
    mural = MuralTransformer.adopt(model(torch.float32, WIDTH, LAYERS)).configure(Graft(attention, token_chunk=CHUNK))
    text, timestep = torch.randn(1, TEXT, WIDTH), torch.tensor([500.0])
    coarse = torch.randn(1, 16, PROXY[0], 2 * PROXY[1], 2 * PROXY[2])
    memory = mural.remember(coarse, timestep, text, TIME_SCALE)
    keys, rows = math.prod(window) + math.prod(near.count), []
    for grid in GRIDS:
        z = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2])
        seconds = best(lambda z=z: mural(z, timestep, text, attention_kwargs={"proxy": memory}), 2)
        rows.append({"what": "a step, two layers", "window": window, "tokens": math.prod(grid), "keys": keys, "s": seconds})
        rows[-1] |= {"other_s": None, "ratio": seconds / rows[-2]["s"] if len(rows) > 1 else None, "goal": None}
        print(rows[-1], flush=True)
    slope = float(np.polyfit(np.log([row["tokens"] for row in rows]), np.log([row["s"] for row in rows]), 1)[0])
    last = rows[-1] | {"what": "slope of log time over log tokens", "s": None, "ratio": slope, "goal": f"<= {GOALS['slope']}"}
    return [*rows, last]


def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = against_full((16, 64, 64))
        print(rows, flush=True)
        rows += [row for window in WINDOWS for row in against_tokens(window)]
    write("guided", rows, f"width {WIDTH}, {HEADS} heads, proxy of {PROXY} tokens, chunks of {CHUNK}")


if __name__ == "__main__":
    main()
