"""`latent-upsampler`: the network that enlarges latents, trained on world clips encoded at two sizes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from muralist.base_info import UPSAMPLER, BaseInfo, inspect_base
from muralist.data.latents import PairConfig, build_pairs
from muralist.data.sources import Footage
from muralist.errors import UserError
from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, miniature, paper
from muralist.store.parts import save_part
from muralist.train import state
from muralist.train.loop import CHECKPOINTS, Length, Report, Schedule, begin, draw_curve, fit
from muralist.train.miniature import load_vae
from muralist.train.objectives.latent_upsample import LatentUpsample, LatentUpsampleConfig
from muralist.train.trainee import VideoData

SCALES = (1.5, 2.0, 3.0)  # LUVE's; `_scales` adds the step from the base's own size to 4K
HEIGHT_4K = 2176
CLIPS = 200  # pairs of each scale
WIDE = 1024  # the width of a base from which it gets the paper's network; Wan2.1-1.3B has 1,536


def train_latent_upsampler(
    folder: Path,
    *,
    length: Length,
    device: torch.device,
    resume: bool,
    model: Path,
    data: VideoData | None = None,
    network: LatentUpsamplerConfig | None = None,
    objective: LatentUpsampleConfig | None = None,
    report: Report = print,
) -> Path:
    """Learn to enlarge the latents of the base in `model`; writes `folder/parts/latent_upsampler`. A copy of it in `model/parts` puts it to use.

    `network` and `objective`: others than the paper's (the miniature's for a small base), for ablations. Adam at 2e-4 falling along one cosine
    (LUVE restarts it after 400,000 steps and stops at 135,000).
    """
    begin(folder, resume=resume)
    vae = load_vae(model / "vae").to(device).eval()
    info = inspect_base(str(model))
    data, own = (data or VideoData()).settled(clips=CLIPS), info.defaults.grid
    origin = {"base": info.fingerprint, **data.origin}
    state.require_origin(folder / CHECKPOINTS, origin)
    configs = [PairConfig(name=f"pairs-{scale:g}", count=data.clips, low=own, scale=scale, seed=round(10 * scale)) for scale in _scales(own.height, data)]
    pools = [build_pairs(vae, config, folder / "latents", report, data.source) for config in configs]
    torch.manual_seed(0)
    upsampler = LatentUpsampler(network or _usual(info)).to(device)
    goal = LatentUpsample(upsampler, vae, pools, objective or LatentUpsampleConfig(), device)
    schedule = Schedule(length=length, learning_rate=2e-4, decay=1.0, weight_decay=0.0, betas=(0.9, 0.999))
    upsampler = fit(goal, schedule, folder, resume=resume, origin=origin, report=report)
    weights = {name: parameter.detach().half() for name, parameter in upsampler.named_parameters()}
    made = save_part(folder / "parts" / UPSAMPLER, UPSAMPLER, asdict(upsampler.config), weights)
    draw_curve(folder)
    return made


def _scales(own: int, data: VideoData) -> list[float]:
    """The factors to learn for a base of `own` rows; of footage those that it is large enough for. Crops of 128 pixels stay legal at quarters."""
    scales = sorted({*SCALES, HEIGHT_4K * 4 // own / 4})
    if isinstance(data.source, Footage):
        scales = [scale for scale in scales if scale * own <= max(data.heights)]
    if not scales:
        raise UserError(f"footage of {max(data.heights)} rows is less than {SCALES[0]:g} times the base's {own}", where="height", fix="use a larger --height")
    return scales


def _usual(info: BaseInfo) -> LatentUpsamplerConfig:
    """The paper's network, or for a base far below Wan's sizes one that costs no more than the base."""
    return (paper if info.width >= WIDE else miniature)(info.geometry.channels)
