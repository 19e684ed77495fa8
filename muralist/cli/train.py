"""`muralist train`: make the embedded base, or a better one, or what is added to any."""

from __future__ import annotations

import importlib
import itertools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muralist.cli._options import Debug, Device, canonical
from muralist.errors import UserError

if TYPE_CHECKING:
    import torch

    from muralist.nn.kernels import Kernels
    from muralist.train.loop import Length
    from muralist.train.trainee import VideoData


@dataclass(frozen=True, slots=True)
class Training:
    """A training by name.

    `module`, `function`: imported when it is asked for. `needs`, `place`: which earlier result it starts from (the function's argument) and where
    that usually lies. `init`: it can go on from a model's weights. `serves`: where in a model's folder its result is put to use. `data`: it
    takes footage; `whole`: whole clips of it, at the base's own size. `blocks`: a transformer's blocks are at work, which can be compiled.
    """

    module: str
    function: str
    needs: str | None = None
    place: str = ""
    init: bool = True
    serves: str = ""
    data: bool = False
    whole: bool = False
    blocks: bool = True


MODEL = "runs/miniature-base/model"
TRAININGS = {
    "features": Training("muralist.train.features", "train_features", init=False, blocks=False),
    "miniature-vae": Training("muralist.train.miniature", "train_vae", blocks=False),
    "miniature-decoder": Training("muralist.train.miniature", "train_decoder", "vae", "runs/miniature-vae/vae", blocks=False),
    "miniature-base": Training("muralist.train.miniature", "train_base", "vae", "runs/miniature-vae/vae"),
    "uhr": Training("muralist.train.uhr", "train_uhr", "model", MODEL, init=False, serves="adapters/uhr", data=True),
    "latent-upsampler": Training(
        "muralist.train.latent_upsampler", "train_latent_upsampler", "model", MODEL, init=False, serves="parts/latent_upsampler", data=True, blocks=False
    ),
    "proxy": Training("muralist.train.long", "train_proxy", "model", MODEL, init=False, serves="adapters/proxy", data=True, whole=True),
    "detail": Training("muralist.train.long", "train_detail", "model", MODEL, init=False, serves="adapters/detail", data=True, whole=True),
    "detail-uhr": Training("muralist.train.long", "train_detail_uhr", "model", MODEL, init=False, serves="adapters/detail_uhr", data=True),
    "branched": Training("muralist.train.branched", "train_branched", "model", MODEL, init=False, serves="adapters/branched (and parts/)", data=True),
    "anchored": Training("muralist.train.anchored", "train_anchored", "model", MODEL, init=False, serves="adapters/anchored (and parts/)", data=True),
    "experts": Training("muralist.train.experts", "train_experts", "model", MODEL, init=False, serves="parts/experts", data=True),
}
MAX_CLIPS = 1_000_000
MINUTES, MAX_MINUTES, MAX_STEPS = 30.0, 60 * 24 * 30, 100_000_000
CONTEXT = {"token_normalize_func": lambda name: name if name == "steps" else canonical(name)}  # elsewhere they are those of denoising


def command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(TRAININGS)}.")],
    minutes: Annotated[float | None, typer.Option("--minutes", help="How long; the learning rate falls over its last quarter. [default: 30]")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="How long in steps instead, the same on every machine.")] = None,
    device: Device = "auto",
    start: Annotated[
        str | None,
        typer.Option("--from", help="The folder it starts from: a VAE (miniature-base, miniature-decoder) or a model (all that add to one)."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help="Footage: a folder with videos.csv (file, caption, score). [default: the procedural world]")
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", help="Of footage, in pixels: what is larger is shrunk to it, what is below 90 % of it left out. [default: 2160]")
    ] = None,
    min_score: Annotated[float | None, typer.Option("--min-score", help="Footage of at least this score alone, such as 6.5 of HPSv3.")] = None,
    clips: Annotated[
        int | None, typer.Option("--clips", help="Clips of each size to train on; they are encoded first, beside the length. [default: 200 or 400]")
    ] = None,
    init: Annotated[str | None, typer.Option("--init", help="A model whose weights the VAE or the base starts from, such as miniature.")] = None,
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Compile the transformer's blocks: quicker steps, after some time that is a part of --minutes; needs a C++ compiler."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output directory; without it, a directory with checkpoints is refused.")
    ] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Directory for weights, checkpoints and the curve. [default: runs/NAME]")] = None,
    debug: Debug = False,
) -> int:
    """Train the embedded base, or what is added to any base. It can be stopped at any time and continued with --resume."""
    if name not in TRAININGS:
        raise UserError(f"unknown training {name!r}", where="name", fix=f"use one of {', '.join(TRAININGS)}")
    length = _length(minutes, steps)
    from muralist.base import pick_device
    from muralist.cli._show import Interrupted
    from muralist.nn.heap import keep_freed_blocks
    from muralist.nn.out_of_memory import ran_out
    from muralist.train.loop import begin

    keep_freed_blocks()  # by the command, whose process it is
    training = TRAININGS[name]
    target = pick_device(device)
    kernels, folder = _kernels(training, compile_, target), _folder(output or f"runs/{name}")
    earlier = _earlier(training, start) | _initial(training, init) | _videos(training, data, height, min_score, clips)
    begin(folder, resume=resume)
    try:
        with kernels.at_work():
            result = getattr(importlib.import_module(training.module), training.function)(folder, length=length, device=target, resume=resume, **earlier)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        fix = "train on another --device, or a smaller base: batches are fixed; what was saved is gone on with by --resume"
        raise UserError("the memory does not suffice for this training", where="memory", fix=fix) from error
    except KeyboardInterrupt:
        typed = {"device": device, "from": start, "init": init, "data": data, "height": height, "min-score": min_score, "clips": clips, "output": folder}
        raise Interrupted(f"; go on from the newest checkpoint with: {_again(name, length, typed, *(['--compile'] if compile_ else []))}") from None
    print(f"done: {result}" + (f"; a model uses it once it is copied to MODEL/{training.serves}" if training.serves else ""))
    return 0


def _again(name: str, length: Length, typed: Mapping[str, object], *flags: str) -> str:
    """The command that goes on with a training."""
    options = {"minutes": None if length.minutes is None else f"{length.minutes:g}", "steps": length.steps, **typed}
    words = itertools.chain.from_iterable((f"--{option}", str(value)) for option, value in options.items() if value is not None)
    return shlex.join(["muralist", "train", name, *words, *flags, "--resume"])


def _kernels(training: Training, wanted: bool, device: torch.device) -> Kernels:
    """How its blocks compute. Raises UserError where they are to be compiled and there are none, or nothing to compile them with."""
    from muralist.nn import compiled
    from muralist.nn.kernels import Kernels

    if not wanted:
        return Kernels()
    if not training.blocks:
        raise UserError("no transformer is at work in this training", where="compile", fix="leave it out")
    if lacking := compiled.why_not(device):
        raise UserError(f"nothing to compile with: {lacking}", where="compile", fix="install it, or leave --compile out")
    return Kernels(compile="blocks")


def _length(minutes: float | None, steps: int | None) -> Length:
    if minutes is not None and steps is not None:
        raise UserError("both minutes and steps are given", where="steps", fix="give one of them")
    if minutes is not None and not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"{minutes} minutes", where="minutes", fix="use a number above 0, such as 30")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise UserError(f"{steps} steps", where="steps", fix=f"use 1 to {MAX_STEPS:,}")
    from muralist.train.loop import Length

    return Length(steps=steps) if steps is not None else Length(minutes=MINUTES if minutes is None else minutes)


def _earlier(training: Training, start: str | None) -> dict[str, Path]:
    """The earlier result as an argument, checked from names and headers."""
    from muralist.base_info import inspect_base
    from muralist.store.paths import typed_path
    from muralist.store.weights import EMBEDDED

    if training.needs is None:
        if start is not None:
            raise UserError("this training starts from nothing", where="from", fix="leave it out")
        return {}
    path = typed_path(start or training.place, "from")
    if not path.is_dir() and not (training.needs == "model" and start in EMBEDDED):
        raise UserError(f"no {training.needs} in {path}", where="from", fix=f"give the folder of the {training.needs} that it starts from")
    try:
        return {training.needs: inspect_base(start or training.place).folder if training.needs == "model" else _vae(path)}
    except UserError as error:
        raise UserError(error.what, where="from", fix=f"give the folder of a {training.needs} as diffusers lays it out") from None


def _vae(folder: Path) -> Path:
    """The folder, if a VAE is in it."""
    from muralist.base_info import CLASSES
    from muralist.store.weights import check_component, read_config

    kind = read_config(folder / "config.json").get("_class_name")
    if kind != CLASSES["vae"]:
        raise UserError(f"{folder} holds a {str(kind)!r:.40}", where="from", fix=f"a {CLASSES['vae']} of diffusers")
    check_component(folder)
    return folder


def _initial(training: Training, init: str | None) -> dict[str, Path]:
    """The model whose weights are gone on with, checked as any model is."""
    if init is None:
        return {}
    if not training.init:
        raise UserError("this training starts from nothing", where="init", fix="leave it out")
    from muralist.base_info import inspect_base

    return {"init": inspect_base(init).folder}


def _videos(training: Training, data: str | None, height: int | None, min_score: float | None, clips: int | None) -> dict[str, Any]:
    """What to train on as an argument; none for a training that makes its own videos."""
    for name, value in (("data", data), ("clips", clips)):
        if value is not None and not training.data:
            raise UserError("this training makes its own videos", where=name, fix="leave it out")
    for name, value in (("min_score", min_score), ("height", height)):
        if value is not None and data is None:
            raise UserError("it is about footage", where=name, fix="leave it out, or give --data")
    if clips is not None and not 1 <= clips <= MAX_CLIPS:
        raise UserError(f"{clips} clips", where="clips", fix=f"use 1 to {MAX_CLIPS:,}")
    if not training.data:
        return {}
    from muralist.train.trainee import VideoData

    wanted = VideoData(clips=clips)
    return {"data": wanted if data is None else _footage(training, wanted, data, height, min_score)}


def _footage(training: Training, wanted: VideoData, data: str, height: int | None, min_score: float | None) -> VideoData:
    """The same from a folder of videos."""
    if training.whole and height is not None:
        raise UserError("this training takes whole clips at the base's own size", where="height", fix="leave it out")
    height = 2160 if height is None else height
    if not 64 <= height <= 8640:
        raise UserError(f"{height} pixels", where="height", fix="use 64 to 8640")
    from muralist.data.sources import read_footage
    from muralist.store.paths import typed_path

    return replace(wanted, source=read_footage(typed_path(data, "data"), min_score=min_score), heights=(height,))


def _folder(text: str) -> Path:
    from muralist.store import atomic
    from muralist.store.paths import typed_path

    path = typed_path(text, "output")
    try:
        with atomic.reported(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path} is not a directory", where="output", fix="name a directory") from None
    return path
