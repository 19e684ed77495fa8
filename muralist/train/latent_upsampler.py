"""`latent-upsampler`: the network that enlarges latents, trained on world clips encoded at two sizes."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from muralist.base import load_latent_upsampler
from muralist.base_info import UPSAMPLER, BaseInfo, inspect_base
from muralist.data.latents import PairConfig, build_pairs
from muralist.data.sources import Footage
from muralist.errors import UserError
from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, OutdatedPart, miniature, paper
from muralist.store import weights
from muralist.store.parts import save_part
from muralist.train import state
from muralist.train.loop import CHECKPOINTS, Length, Report, Schedule, begin, draw_curve, fit
from muralist.train.miniature import load_vae
from muralist.train.objectives.latent_upsample import LatentUpsample, LatentUpsampleConfig
from muralist.train.objectives.least_squares import fit_polynomial
from muralist.train.trainee import VideoData

SCALES = (1.5, 2.0, 3.0)  # LUVE's; `_scales` adds the step from the base's own size to 4K
HEIGHT_4K = 2176
CLIPS = 200  # pairs of each scale
SIDE = 128  # pixels of a small crop: one of the network's windows, at sixteen pixels to a latent
FRAMES = 29  # of a pair, if the base makes as many: eight latent frames, more than one window in time
PIXELS = 12e6  # of a large crop with all of its frames: the step to 4K has fewer of them
NEW, FITTED = "new", "new, polynomials fitted together"  # what a training stands on that starts from nothing; once each polynomial was fitted for itself
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

    It goes on from the base's own, if there is one; a new one's polynomial starts as the solution of least squares. `network` and `objective`:
    others than the paper's (the miniature's for a small base), for ablations. Adam at 2e-4 falling along one cosine (LUVE restarts it after
    400,000 steps and stops at 135,000).
    """
    begin(folder, resume=resume)
    vae = load_vae(model / "vae").to(device).eval()
    info = inspect_base(str(model))
    data = (data or VideoData()).settled(clips=CLIPS)
    upsampler, stands_on = _begun(info, network or _usual(info), report)
    shape = json.dumps(asdict(upsampler.config), sort_keys=True)
    origin = {"vae": info.fingerprints["vae"], UPSAMPLER: stands_on, "network": shape, **data.origin}
    state.require_origin(folder / CHECKPOINTS, origin)
    pools = [build_pairs(vae, _pairs(info, scale, data.clips), folder / "latents", report, data.source) for scale in _scales(info.defaults.grid.height, data)]
    if upsampler.polynomial is not None and stands_on == FITTED and not state.is_begun(folder / CHECKPOINTS):
        report("least squares of the linear part")
        fit_polynomial(upsampler.polynomial, pools)
    upsampler = upsampler.to(device)
    goal = LatentUpsample(upsampler, vae, pools, objective or LatentUpsampleConfig(), device)
    schedule = Schedule(length=length, learning_rate=2e-4, decay=1.0, weight_decay=0.0, betas=(0.9, 0.999))
    upsampler = fit(goal, schedule, folder, resume=resume, origin=origin, report=report)
    tensors = {name: parameter.detach().half() for name, parameter in upsampler.named_parameters()}
    made = save_part(folder / "parts" / UPSAMPLER, UPSAMPLER, asdict(upsampler.config), tensors)
    draw_curve(folder)
    return made


def _scales(own: int, data: VideoData) -> list[float]:
    """The factors to learn for a base of `own` rows; of footage those that it is large enough for. Crops of 128 pixels stay legal at quarters."""
    scales = sorted({*SCALES, max(HEIGHT_4K * 4 // own / 4, SCALES[0])})
    if isinstance(data.source, Footage):
        scales = [scale for scale in scales if scale * own <= max(data.heights)]
    if not scales:
        raise UserError(f"footage of {max(data.heights)} rows is less than {SCALES[0]:g} times the base's {own}", where="height", fix="use a larger --height")
    return scales


def _pairs(info: BaseInfo, scale: float, count: int) -> PairConfig:
    """Pairs of the base's own size and `scale` times it, of as many frames as PIXELS allow."""
    own, step = info.defaults.grid, info.geometry.temporal_factor
    fitting = 1 + step * (max(int(PIXELS / (SIDE * scale) ** 2) - 1, 0) // step)
    frames = min(FRAMES, own.num_frames, fitting)
    return PairConfig(name=f"pairs-{scale:g}", count=count, low=own, scale=scale, side=SIDE, frames=frames, seed=round(10 * scale))


def _begun(info: BaseInfo, config: LatentUpsamplerConfig, report: Report) -> tuple[LatentUpsampler, str]:
    """The base's own network if it is of this configuration, else a new one; and which of the two a checkpoint stands on."""
    own = info.folder / "parts" / UPSAMPLER
    if own.is_dir():
        with suppress(OutdatedPart):
            if (begun := load_latent_upsampler(own)).config == config:
                return begun.float(), weights.fingerprint(own)
        report("the base's own upsampler is of another configuration or an earlier form: a new one takes its place")
    torch.manual_seed(0)
    return LatentUpsampler(config), FITTED if config.polynomials else NEW


def _usual(info: BaseInfo) -> LatentUpsamplerConfig:
    """The paper's network, or for a base far below Wan's sizes one that costs no more than the base."""
    return (paper if info.width >= WIDE else miniature)(info.geometry.channels)
