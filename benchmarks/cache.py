"""What the first-block cache saves and changes: the shipped miniature at its own size, full attention, against the same run without a cache.

    python benchmarks/cache.py [--prompts 2] [--thresholds 0.05 0.1 0.2]

Runs of a prompt follow each other in one process. The one without a cache goes first and, as a yardstick for times, once more at the end; videos
are compared with its own, by latents and by frames. Results go to results/cache.{json,md}.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from common import write

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.config import Request
from muralist.eval.metrics.pixels import psnr_of
from muralist.nn.block_cache import FirstBlockCache
from muralist.pipeline import frames
from muralist.request import Asked, make_request
from muralist.stages.prompt import encode_prompt
from muralist.stages.refine import refine
from muralist.types import TextCond

PROMPTS = ("a red ball moves right over grass", "a blue star falls over sand")
STEPS = 50


@dataclass(frozen=True, eq=False)
class Run:
    """One video: latent [1, C, F, h, w], frames [T, H, W, 3] in [0, 1], what its denoising took, and how many steps were computed in full."""

    z: torch.Tensor
    frames: torch.Tensor
    seconds: float
    full: int


def paint(base: Base, text: TextCond, request: Request, threshold: float | None) -> Run:
    cache, full = threshold and FirstBlockCache(threshold), []
    config, grid = request.config.refine, base.info.geometry.legal(request.grid)
    started = time.perf_counter()
    latent = refine(
        base, text, None, grid, config, seed=0, saved=None, after_step=lambda step, z: full.append(cache is None or cache.whole), cache=cache
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return Run(latent.z, torch.cat([chunk.frames for chunk in frames(latent, request, base)]), seconds, sum(full))


def row(prompt: str, name: str, run: Run, plain: Run) -> dict[str, object]:
    error = (run.z - plain.z).square().mean()
    return {
        "prompt": prompt,
        "threshold": name,
        "steps computed": run.full / STEPS,
        "denoising_s": run.seconds,
        "time / without": run.seconds / plain.seconds,
        "latent difference": (error / plain.z.square().mean()).sqrt().item(),
        "PSNR of frames, dB": sum(psnr_of((a - b).square().mean().item()) for a, b in zip(run.frames, plain.frames)) / len(run.frames),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    options, rows = parser.parse_args(), []
    info = inspect_base("miniature")
    base = Base(info, torch.device("cpu"))
    for prompt in PROMPTS[: options.prompts]:
        asked = Asked(prompt=prompt, width=448, height=256, seed=0, recipe="direct", num_inference_steps=STEPS)
        request = make_request(asked, info, note=print)
        text = encode_prompt(base, prompt, request.negative_prompt)
        base.transformer()  # loaded before the clock runs
        plain = paint(base, text, request, None)
        for name in ("none", *options.thresholds, "none, again"):
            run = plain if name == "none" else paint(base, text, request, name if isinstance(name, float) else None)
            rows.append(row(prompt, str(name), run, plain))
            print(rows[-1], flush=True)
    note = f"miniature, direct, 448x256 x29, {STEPS} steps; latent difference: RMS, relative to the latent's own"
    write("cache", rows, note)


if __name__ == "__main__":
    main()
