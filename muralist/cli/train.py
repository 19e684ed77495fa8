"""`muralist train`: make the embedded base, or a better one, within a time budget."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from muralist.cli._options import Debug, Device
from muralist.errors import UserError


@dataclass(frozen=True, slots=True)
class Training:
    """Where a training's function is (imported when it is asked for), which earlier result it starts from (its argument and usual place),
    whether it can go on from a model's weights (`--init`), and where in a model's folder its result serves."""

    module: str
    function: str
    needs: str | None = None
    place: str = ""
    init: bool = True
    serves: str = ""


MODEL = "runs/miniature-base/model"
TRAININGS = {
    "features": Training("muralist.train.features", "train_features", init=False),
    "miniature-vae": Training("muralist.train.miniature", "train_vae"),
    "miniature-decoder": Training("muralist.train.miniature", "train_decoder", "vae", "runs/miniature-vae/vae"),
    "miniature-base": Training("muralist.train.miniature", "train_base", "vae", "runs/miniature-vae/vae"),
    "miniature-uhr": Training("muralist.train.uhr", "train_uhr", "model", MODEL, init=False, serves="adapters/uhr"),
    "latent-upsampler": Training("muralist.train.latent_upsampler", "train_latent_upsampler", "model", MODEL, init=False, serves="parts/latent_upsampler"),
}
MAX_MINUTES = 60 * 24 * 30


def command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(TRAININGS)}.")],
    minutes: Annotated[float, typer.Option("--minutes", help="Time budget; the learning rate falls over its last quarter.")] = 30.0,
    device: Device = "auto",
    start: Annotated[
        str | None,
        typer.Option("--from", help="The folder it starts from: a VAE (miniature-base, miniature-decoder) or a model (miniature-uhr, latent-upsampler)."),
    ] = None,
    init: Annotated[str | None, typer.Option("--init", help="A model whose weights the VAE or the base starts from, such as miniature.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output directory; without it, a directory with checkpoints is refused.")
    ] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Directory for weights, checkpoints and the curve. [default: runs/NAME]")] = None,
    debug: Debug = False,
) -> int:
    """Train a part of the embedded base. It can be stopped at any time and continued with --resume."""
    if name not in TRAININGS:
        raise UserError(f"unknown training {name!r}", where="name", fix=f"use one of {', '.join(TRAININGS)}")
    if not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"{minutes} minutes", where="minutes", fix="use a number above 0, such as 30")
    from muralist.base import pick_device
    from muralist.cli._show import Interrupted
    from muralist.train.loop import begin

    training = TRAININGS[name]
    target, earlier, folder = pick_device(device), _earlier(training, start) | _initial(training, init), _folder(output or f"runs/{name}")
    begin(folder, resume=resume)
    try:
        result = getattr(importlib.import_module(training.module), training.function)(folder, minutes=minutes, device=target, resume=resume, **earlier)
    except KeyboardInterrupt:
        options = "".join(f" --{option} {value}" for option, value in (("from", start), ("init", init)) if value)
        again = f"muralist train {name} --minutes {minutes:g} --output {folder} --resume{options}"
        raise Interrupted(f"; go on from the newest checkpoint with: {again}") from None
    print(f"done: {result}" + (f"; a model uses it once it is copied to MODEL/{training.serves}" if training.serves else ""))
    return 0


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
