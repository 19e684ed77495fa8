"""Trains the latent upsamplers of LUVE's Table 12: one budget, the same pairs. `upsampling.py` then sets them side by side.

    python benchmarks/upsamplers.py --steps 140 --folder runs/upsamplers
    python benchmarks/upsampling.py --parts "linear part alone=runs/upsamplers/linear part alone/parts/latent_upsampler" "no decoder=..."

Stopped at any time, the same command goes on. The base's own upsampler is left out of account: each starts as a new one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from studies import stripped

from muralist.base_info import UPSAMPLER, inspect_base
from muralist.nn.latent_upsampler import LatentUpsamplerConfig, miniature
from muralist.store.parts import WEIGHTS
from muralist.train.latent_upsampler import train_latent_upsampler
from muralist.train.loop import Length
from muralist.train.objectives.latent_upsample import LatentUpsampleConfig
from muralist.train.trainee import VideoData

LINEAR = "linear part alone"  # ours; its networks, which start at zero, get a single step


def variants(network: LatentUpsamplerConfig) -> dict[str, tuple[LatentUpsamplerConfig, LatentUpsampleConfig]]:
    usual = LatentUpsampleConfig()
    return {
        LINEAR: (network, usual),
        "no polynomial": (replace(network, polynomials=False), usual),
        "no decoder": (replace(network, decoder=None), usual),
        "no pixel loss": (network, replace(usual, pixels_from=1.0)),
        "ours": (network, usual),
    }


def main() -> None:
    options = arguments()
    info = inspect_base(options.model)
    model = stripped(info.folder, options.folder.absolute() / "base", [f"parts/{UPSAMPLER}"])
    shared = options.folder.absolute() / "latents"
    shared.mkdir(parents=True, exist_ok=True)
    for name, (network, objective) in variants(miniature(info.geometry.channels)).items():
        folder = options.folder / name
        folder.mkdir(exist_ok=True)
        if (folder / "parts" / UPSAMPLER / WEIGHTS).exists():
            continue
        if not (folder / "latents").exists():
            (folder / "latents").symlink_to(shared)
        length, data = Length(steps=1 if name == LINEAR else options.steps), VideoData(clips=options.clips)
        told = {"resume": any(folder.glob("checkpoints")), "report": lambda line, name=name: print(f"{name}: {line}", flush=True)}
        train_latent_upsampler(folder, length=length, device=torch.device("cpu"), model=model, data=data, network=network, objective=objective, **told)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--folder", type=Path, default=Path("runs/upsamplers"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
