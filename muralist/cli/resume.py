"""`muralist resume`: go on with a run where it was stopped. Everything it needs stands in the run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from muralist.cli._options import Debug, Device, Json, KeepRun, Memory, VramLimit, note
from muralist.errors import UserError


def command(
    run_dir: Annotated[str, typer.Argument(help="The directory that `muralist generate` made: OUTPUT.run, or its --run-dir.")],
    model: Annotated[str | None, typer.Option(help="The folder of the run's model, if it lies elsewhere now; its weights have to be the same.")] = None,
    device: Device = "auto",
    memory: Memory = "auto",
    vram_limit: VramLimit = None,
    keep_run: KeepRun = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Go on with an interrupted run."""
    from muralist.base import pick_device
    from muralist.base_info import inspect_base
    from muralist.cli.generate import Job, execute
    from muralist.cost.budget import Budget
    from muralist.request import tell_of_kernels
    from muralist.store.paths import check_output, typed_path
    from muralist.store.weights import is_here

    budget, folder = Budget(memory, vram_limit), typed_path(run_dir, "run_dir")
    request, output, base = read(folder)
    if model is not None:
        base = moved_to(model)
    elif base is not None and not is_here(base):
        raise UserError(f"its folder {base} is gone", where="model", fix="say by --model FOLDER where it lies now")
    path, info, target = check_output(output), inspect_base(base or request.model, None if base else request.revision), pick_device(device)
    tell_of_kernels(request, info, target, note)
    return execute(Job(request, info, target, budget, base), path, folder, keep_run=keep_run, json=json)


def moved_to(model: str) -> str:
    """The folder of a model, from the root, or its name where the package holds it; UserError if it is neither."""
    from muralist.store.weights import EMBEDDED, folder_of

    folder = model if model in EMBEDDED else folder_of(model)
    if folder is None:
        raise UserError(f"no folder {model!r}", where="model", fix="give the folder that the run's model lies in now")
    return folder


def read(folder: Path):
    """(request as it was asked, output path, folder of its base if that is no name) of a run directory; UserError if it is none or damaged."""
    from muralist.request import restore
    from muralist.store.run import TYPED, RunDirectory

    with RunDirectory.open(folder) as run:
        options = run.request
    output, model = options.get("output"), options.get("folder")
    if not isinstance(output, str) or not isinstance(model, str | None):
        raise UserError("its request.json lacks the output or the model", where=str(folder), fix="start a new run")
    request = restore(options.get(TYPED))
    return request, Path(os.path.normpath(folder / output)), model
