"""`muralist generate`: from a prompt to a file, after every check that can be made without weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muralist.cli import _show
from muralist.cli._options import Debug, Json, KeepRun, VideoOptions, note, takes_video_options
from muralist.errors import UserError

if TYPE_CHECKING:
    import torch

    from muralist.base_info import BaseInfo
    from muralist.config import Request
    from muralist.cost.budget import Budget
    from muralist.plan import Plan
    from muralist.store.run import RunDirectory


@takes_video_options
def command(
    video: VideoOptions,
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The .mp4 to write.")] = "out.mp4",
    run_dir: Annotated[str | None, typer.Option("--run-dir", help="Where finished work is kept until the file is done. [default: OUTPUT.run]")] = None,
    keep_run: KeepRun = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan, compute nothing.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Paint a video. Stopped at any time, the same command (or `muralist resume`) goes on where it was."""
    from muralist.store.paths import check_output, typed_path

    path = check_output(typed_path(output, "output"))
    run = typed_path(str(path) + ".run" if run_dir is None else run_dir, "run_dir")
    _check_run_dir(run, path)
    job = prepare(prompt, video, run)
    if dry_run:
        from muralist.cli.plan import show

        return show(job.plan(run), json=json)
    return execute(job, path, run, keep_run=keep_run, json=json)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request as it was asked, the base it runs on and where it computes. `folder`: of a base that is no name, from the root."""

    request: Request
    info: BaseInfo
    device: torch.device
    budget: Budget
    folder: str | None

    def plan(self, run_dir: Path) -> Plan:
        """Cost of the job on this machine, with its disk at the run directory; what a run there has decided and written counts."""
        from muralist.cost.machine import Machine
        from muralist.request import plan_run

        return plan_run(self.request, self.info, Machine.measure(self.device, run_dir), run_dir, self.budget)

    def record(self, output: Path, run_dir: Path, settled: Request) -> dict[str, Any]:
        """What the run directory remembers; `settled`: the request as planned. The output is relative to it, so that both can be moved together."""
        from muralist.request import run_record

        relative = os.path.relpath(output.absolute(), run_dir.absolute())
        return run_record(self.request, settled, self.info, output=relative, folder=self.folder)


def prepare(prompt: str, video: VideoOptions, run_dir: Path | None) -> Job:
    """Check all that was typed and the model's folder; nothing is loaded and nothing written."""
    from muralist import recipes
    from muralist.base import pick_device
    from muralist.base_info import inspect_base
    from muralist.cost.budget import Budget
    from muralist.request import as_begun, check_prompt, make_request, tell_of_kernels
    from muralist.store.weights import EMBEDDED, folder_of

    check_prompt(prompt)  # all of this before a model is searched, or even downloaded
    budget = Budget(video.memory, video.vram_limit)
    asked = ask(prompt, video, run_dir)
    recipes.find(video.recipe)
    device = pick_device(video.device)
    info = inspect_base(video.model, video.revision)
    request = make_request(asked, info, note)
    tell_of_kernels(request, info, device, note)
    named = request if run_dir is None else as_begun(request, info, run_dir)
    # where it goes by another name in the run, that name need not lead to it
    moved = None if named == request else request.model if request.model in EMBEDDED else str(info.folder.absolute())
    return Job(named, info, device, budget, folder_of(request.model) or moved)


def ask(prompt: str, video: VideoOptions, run_dir: Path | None):
    """The options as `muralist.request.Asked`, sizes and durations parsed."""
    from muralist.request import SIZES, Asked, parse_duration, parse_size, stored_seed

    if (video.width is None) != (video.height is None) or (video.size is not None and video.width is not None):
        raise UserError("width and height go together, without size", where="size", fix="use --size 3840x2160, or --width 3840 --height 2160")
    width, height = (video.width, video.height) if video.width is not None else parse_size(video.size) if video.size is not None else SIZES["4k"]
    seed = stored_seed(run_dir) if video.seed == -1 and run_dir is not None else video.seed
    same = {name: getattr(video, name) for name in ("num_frames", "fps", "recipe", "revision", "negative_prompt", "attention", "linears")}
    numbers = {name: getattr(video, name) for name in ("num_inference_steps", "guidance_scale", "flow_shift", "skip_steps")}
    duration = None if video.duration is None else parse_duration(video.duration)
    settings = tuple(video.settings or ())
    return Asked(prompt=prompt, width=width, height=height, duration=duration, seed=seed, settings=settings, **same, **numbers)


def _check_run_dir(run_dir: Path, output: Path) -> None:
    """Refuse what can never become a run directory before anything else is done."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a directory", where="run_dir", fix="choose another run directory")
    if not run_dir.parent.is_dir():
        raise UserError(f"{run_dir.parent} is not an existing directory", where="run_dir", fix="create it first")
    if output.resolve().is_relative_to(run_dir.resolve()):
        raise UserError(f"{output} lies inside it", where="run_dir", fix="write the video elsewhere: the run directory is removed at the end")


def execute(job: Job, output: Path, run_dir: Path, *, keep_run: bool, json: bool) -> int:
    """Run or go on with a job whose directory is `run_dir`."""
    from muralist.store.paths import check_output
    from muralist.store.run import RunDirectory

    plan = job.plan(run_dir)
    plan.check()
    check_output(output, 2 * plan.output_bytes)  # at the end the file that played while it grew and the finished one lie side by side
    for text in plan.notes:
        note(text)
    with RunDirectory.create(run_dir, job.record(output, run_dir, plan.request), dtype=plan.machine.dtype) as run:
        _paint(replace(job, request=plan.request), output, run, plan, json=json)
        if not keep_run:
            run.remove()
    return 0


def _paint(job: Job, output: Path, run: RunDirectory, plan: Plan, *, json: bool) -> None:
    from muralist.base import Base
    from muralist.cli._bars import Bars, JsonLines, resumable
    from muralist.pipeline import generate, prepare_memory

    _show.notes()
    _show.quiet()
    stages = ["prompt", *(["proxy", "upsample"] if job.request.config.proxy else []), "refine", "decode"]
    base = Base(job.info, job.device)
    prepare_memory(base, plan)
    with resumable(run.root), JsonLines() if json else Bars(stages) as observer:
        generate(job.request, base, run, output, observer)
    if json:
        result = {"event": "result", "output": str(output), "seed": job.request.seed, "request": job.request.record()}
        _show.emit(result | {"seconds": round(sum(r.seconds for r in observer.reports), 3)})
        return
    _show.report(observer.reports)
    grid = job.request.grid
    print(f"{output}: {grid.width}x{grid.height}, {grid.num_frames} frames, {grid.duration:.2f} s, seed {job.request.seed}")
