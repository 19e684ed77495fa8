"""How near a base with fresh branches is to the base itself: relative difference of its velocity from that of full attention, on true videos made noisy.

    python benchmarks/fresh_branches.py [--model DIR]          # two minutes of one core; writes results/fresh_branches.{json,md}

Above the base's own size full attention is no truth either: it is what training starts from.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import write

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.data import latents, world
from muralist.nn.attention import BranchedWindows, FullAttention
from muralist.nn.branches import attach_branches
from muralist.nn.kinds import hierarchical
from muralist.nn.transformer import Graft
from muralist.sampling import flow
from muralist.stages.prompt import encode_prompt
from muralist.types import Grid

CASES = {"448x256": (256, 448), "896x512": (512, 896), "1792x1024": (1024, 1792)}
FRAMES, SIGMAS, SCENES = (1, 9), (0.95, 0.6, 0.3), 3
KINDS = {"windows alone": BranchedWindows(4), "with fresh branches": BranchedWindows(4, branches=("coarse", "whole"))}


def velocity(base: Base, noisy: torch.Tensor, sigma: float, text: torch.Tensor, attention: object) -> torch.Tensor:
    model = base.transformer()
    model.configure(Graft(attention=attention))
    answer = model(noisy, torch.tensor([1000 * sigma]), text, return_dict=False)[0]
    return flow.velocity_of_sample(noisy, answer, sigma) if base.info.prediction == "sample" else answer


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature")
    base = Base(inspect_base(parser.parse_args().model), torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    transformer = base.transformer()
    attach_branches(transformer.blocks, hierarchical(base.info.width, len(transformer.blocks)))
    if base.info.adapters:
        transformer.disable_adapters()
    rng, rows = np.random.default_rng(7), []
    scenes = [world.sample_scene(rng, held_out=True) for _ in range(SCENES)]
    for (size, (height, width)), frames in ((case, frames) for case in CASES.items() for frames in FRAMES):
        grid = Grid(num_frames=29, height=height, width=width)
        clean = [latents.encode(base.vae(), world.render_clip(scene, grid, frames=range(frames))[None]) for scene in scenes]
        texts = [encode_prompt(base, world.caption(scene), "").positive for scene in scenes]
        for sigma in SIGMAS:
            off = {name: [] for name in KINDS}
            for z, text in zip(clean, texts):
                noisy = (1 - sigma) * z + sigma * torch.randn(z.shape)
                full = velocity(base, noisy, sigma, text, FullAttention())
                for name, attention in KINDS.items():
                    off[name].append(((velocity(base, noisy, sigma, text, attention) - full).norm() / full.norm()).item())
            rows.append({"size": size, "frames": frames, "sigma": sigma} | {name: float(np.mean(values)) for name, values in off.items()})
            print(rows[-1], flush=True)
    write("fresh_branches", rows, f"{SCENES} held-out scenes; ||v - v_full|| / ||v_full||, K = 4, rank 64, nothing trained.")


if __name__ == "__main__":
    main()
