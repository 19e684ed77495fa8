"""How well latents are enlarged, and how fast: LUVE's Table 12 and the latency column of its Table 5, on held-out world clips.

    python benchmarks/upsampling.py --parts ours=runs/latent-upsampler/parts/latent_upsampler "no decoder"=DIR "no pixel loss"=DIR [--model miniature]

For each scale: PSNR and MSE of the decoded result against the true large video, MAE and MSE against its latent. The scales 2.5 and 4 are
not trained on. Latency: 448x256 x 29 frames to 3840x2176, best of three. Writes results/upsampling.{json,md}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import write

from muralist.base import load_latent_upsampler
from muralist.base_info import inspect_base
from muralist.data import latents
from muralist.data.latents import PairConfig
from muralist.data.sources import World
from muralist.nn.enlarge import enlarged
from muralist.train.miniature import GRID, load_vae

TRAINED, UNSEEN = (1.5, 2.0, 3.0, 8.5), (2.5, 4.0)
SIDE, FRAMES = 128, {8.5: 9}  # pixels of a small clip's side; frames of pairs whose large clip would take the decoder too long, else all
PAPER = {"pixel interpolation": (29.87, 0.0014, 0.19, 0.071, 40.12), "latent interpolation": (23.22, 0.0069, 0.23, 0.104, 0.004)}
PAPER |= {"no decoder": (26.02, 0.0038, 0.18, 0.064, None), "no pixel loss": (29.09, 0.0020, 0.14, 0.037, None), "ours": (29.42, 0.0018, 0.14, 0.039, 0.922)}
Enlarge = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]


@torch.inference_mode()
def main() -> None:
    options = arguments()
    vae = load_vae(inspect_base(options.model).folder / "vae").eval()
    methods: dict[str, Enlarge] = {"pixel interpolation": through_pixels(vae), "latent interpolation": interpolate}
    for named in options.parts:
        name, _, folder = named.partition("=")
        methods[name] = load_latent_upsampler(Path(folder)).eval()
    rows = [row(name, enlarge, scale, vae, options.count) for scale in TRAINED + UNSEEN for name, enlarge in methods.items()]
    rows += [] if options.no_latency else [latency(name, enlarge) for name, enlarge in methods.items()]
    write("upsampling", rows, note=f"{options.count} clips a scale; paper: LUVE's Tables 5 and 12 (Wan2.1, other clips); latency there on a GPU")


def row(name: str, enlarge: Enlarge, scale: float, vae, count: int) -> dict:
    rng, found = np.random.default_rng(7), []
    config = PairConfig(name="", count=0, low=GRID, scale=scale, side=SIDE, frames=FRAMES.get(scale, GRID.num_frames))
    for _ in range(count):
        small, large = World(held_out=True).pair(rng, config)
        low, high = (latents.encode(vae, video[None]) for video in (small, large))
        made = enlarge(low, tuple(high.shape[-2:]))
        error = (latents.decode(vae, made) - large).square().mean()
        found.append([-10 * error.log10().item(), error.item(), (made - high).abs().mean().item(), (made - high).square().mean().item()])
    result = dict(zip(("psnr_rgb", "mse_rgb", "mae_latent", "mse_latent"), np.mean(found, axis=0).tolist()))
    paper = dict(zip((f"paper {key}" for key in result), PAPER.get(name, (None,) * 4)))
    print(name, scale, result, flush=True)
    return {"method": name, "scale": scale, "trained on": scale in TRAINED} | result | paper | {"seconds": None, "paper seconds": None}


def latency(name: str, enlarge: Enlarge) -> dict:
    z, times = torch.randn(1, 48, 8, 16, 28), []
    for _ in range(3):
        started = time.perf_counter()
        enlarge(z, (136, 240))
        times.append(time.perf_counter() - started)
    print(name, f"{min(times):.3g} s", flush=True)
    blank = dict.fromkeys([f"{p}{key}" for p in ("", "paper ") for key in ("psnr_rgb", "mse_rgb", "mae_latent", "mse_latent")])
    paper = PAPER.get(name, (None,) * 5)[4]
    return {"method": name, "scale": "448x256 to 3840x2176", "trained on": None} | blank | {"seconds": min(times), "paper seconds": paper}


def interpolate(z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return enlarged(z, size, "bicubic")


def through_pixels(vae) -> Enlarge:
    factor = vae.config.scale_factor_spatial

    def enlarge(z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        frames = latents.decode(vae, z).permute(0, 3, 1, 2)
        large = F.interpolate(frames, size=[side * factor for side in size], mode="bicubic", align_corners=False).clamp(0, 1)
        return latents.encode(vae, large.permute(0, 2, 3, 1)[None])

    return enlarge


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--parts", nargs="*", default=[], metavar="NAME=DIR")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--no-latency", action="store_true", help="leave the times out, as on a busy machine")
    return parser.parse_args()


if __name__ == "__main__":
    main()
