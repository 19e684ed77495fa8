"""Does compiling the blocks win? The embedded base's transformer, eager and compiled, in one run; and what the text's keys and values cost.

    python benchmarks/compiling.py [--steps 6]

Forwards take turns, the medians are compared, so that a busy machine slows both. Compilation is counted apart. Results go to results/compiling.{json,md}.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import write

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.nn.attention import FullAttention, WindowAttention
from muralist.nn.block import _text_keys
from muralist.nn.kernels import PLAIN, Kernels
from muralist.nn.transformer import Graft
from muralist.stages.refine import Windows, window_size
from muralist.types import Grid

SIZES = {"448x256 x29": (256, 448), "1920x1080 x29": (1080, 1920)}
COMPILED = Kernels(attention="sdpa", compile="blocks")


def graft(shape: tuple[int, int, int], kernels: Kernels) -> Graft:
    """Full attention at the base's own size, the cascade's windows above it."""
    small = shape[0] * shape[1] * shape[2] < 1000
    attention = FullAttention() if small else WindowAttention(window_size(Windows(), shape))
    return Graft(attention=attention, token_chunk=8192, kernels=kernels)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def measure(base: Base, name: str, size: tuple[int, int], steps: int) -> dict[str, object]:
    geometry, transformer = base.info.geometry, base.transformer()
    grid = geometry.legal(Grid(num_frames=29, height=size[0], width=size[1]))
    z = torch.randn(1, *geometry.latent_shape(grid), dtype=base.dtype)
    text, level = torch.randn(1, base.info.defaults.max_sequence_length, base.info.transformer_config["text_dim"], dtype=base.dtype), torch.tensor([500.0])

    def forward(kernels: Kernels) -> None:
        transformer.configure(graft(geometry.token_shape(grid), kernels))
        transformer(z, level, text, return_dict=False)

    warm = timed(lambda: forward(PLAIN)), timed(lambda: forward(COMPILED))
    pairs = [(timed(lambda: forward(PLAIN)), timed(lambda: forward(COMPILED))) for _ in range(steps)]
    eager, compiled = (statistics.median(times) for times in zip(*pairs))
    context = torch.randn(1, text.shape[1], base.info.width, dtype=base.dtype)
    keys = statistics.median(timed(lambda: [_text_keys(block.attn2, context) for block in transformer.blocks]) for _ in range(20))
    ratios = {"eager / compiled": eager / compiled, "text keys / eager": keys / eager}
    return {"size": name, "dtype": str(base.dtype), "eager_s": eager, "compiled_s": compiled, "compiling_s": warm[1] - compiled, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    options, rows = parser.parse_args(), []
    info = inspect_base("miniature")
    base = Base(info, torch.device("cpu"))
    for name, size in SIZES.items():
        rows.append(measure(base, name, size, options.steps))
        print(rows[-1], flush=True)
    write(
        "compiling",
        rows,
        "one forward of the miniature's transformer, medians of forwards in turns; text keys: those of all blocks, which a forward computes once",
    )


if __name__ == "__main__":
    main()
