"""`latent-upsampler`: the network that enlarges latents, trained on world clips encoded at two sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from muralist.base_info import UPSAMPLER
from muralist.data.latents import PairConfig, build_pairs
from muralist.nn.latent_upsampler import LatentUpsampler, miniature
from muralist.store.parts import save_part
from muralist.train.loop import Schedule, begin, draw_curve, fit
from muralist.train.miniature import GRID, load_vae
from muralist.train.objectives.latent_upsample import LatentUpsample, LatentUpsampleConfig

SCALES = (1.5, 2.0, 3.0, 8.5)  # LUVE's three, and the step from the base's own size to 4K


def train_latent_upsampler(
    folder: Path, *, minutes: float, device: torch.device, resume: bool, model: Path, pairs: int = 200, report: Callable[[str], None] = print
) -> Path:
    """Learn to enlarge the latents of the base in `model`; writes `folder/parts/latent_upsampler`. A copy of it in `model/parts` puts it to use.

    Adam at 2e-4 falling along one cosine (LUVE restarts it after 400,000 steps and stops at 135,000).
    """
    begin(folder, resume=resume)
    vae = load_vae(model / "vae").to(device).eval()
    configs = [PairConfig(name=f"pairs-{scale:g}", count=pairs, low=GRID, scale=scale, seed=round(10 * scale)) for scale in SCALES]
    pools = [build_pairs(vae, config, folder / "latents", device, report) for config in configs]
    torch.manual_seed(0)
    network = LatentUpsampler(miniature(vae.config.z_dim)).to(device)
    objective = LatentUpsample(network, vae, pools, LatentUpsampleConfig(), device)
    schedule = Schedule(minutes=minutes, learning_rate=2e-4, decay=1.0, weight_decay=0.0, betas=(0.9, 0.999))
    network = fit(objective, schedule, folder, resume=resume, report=report)
    weights = {name: parameter.detach().half() for name, parameter in network.named_parameters()}
    made = save_part(folder / "parts" / UPSAMPLER, UPSAMPLER, asdict(network.config), weights)
    draw_curve(folder)
    return made
