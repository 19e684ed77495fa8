"""`muralist plan`: what a video would cost, stage by stage, before a second is spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muralist.cli import _show
from muralist.cli._options import Debug, Json, VideoOptions, note, takes_video_options

if TYPE_CHECKING:
    from muralist.plan import Plan, StagePlan

ANY = "a"  # prompt: a word that every base knows, else it would be told of as unknown


@takes_video_options
def command(
    video: VideoOptions,
    prompt: Annotated[str, typer.Argument(help="May be left out: it does not change the cost.", show_default=False)] = ANY,
    machine: Annotated[str | None, typer.Option("--machine", help="Plan for a card of that memory: 24GB, 80GB or 140GB. [default: this machine]")] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Show tokens, work, memory, disk and time of a video; exit code 2 if it cannot be made."""
    from muralist.cli.generate import prepare

    job = prepare(prompt, video, None)

    from muralist.cost.machine import Machine  # these import diffusers, which takes seconds: not for what is refused
    from muralist.plan import plan
    from muralist.request import check_weights

    check_weights(job.request.config, job.info)
    where = Machine.measure(job.device, Path()) if machine is None else Machine.of(machine)
    return show(plan(job.request, job.info, where, budget=job.budget), json=json)


def show(plan: Plan, *, json: bool) -> int:
    """Print a plan, then raise the first thing that makes it impossible."""
    for text in plan.notes:
        note(text)
    if not plan.refusals:  # else the refusal is the one line there is to say
        _show.notes()
    if json:
        _show.emit({"event": "plan", **plan.record()})
    else:
        columns = ["stage", "tokens", "TFLOP", "time", "memory", "disk"]
        rows = [_row(stage) for stage in plan.stages]
        _show.table("", columns, rows, numbers=columns[1:])
        for stage in plan.stages:
            print(f"  {stage.stage}: {_show.plain(', '.join(filter(None, (stage.work, _attention(stage), stage.action))))}")
        print()
        memory, disk = _show.amount(plan.memory_bytes), _show.amount(plan.disk_bytes)
        print(f"about {_show.span(plan.seconds)} on {plan.machine.name}, {memory} of memory at most, {disk} of disk")
    plan.check()
    return 0


def _attention(stage: StagePlan) -> str:
    if stage.attention_saving <= 1:
        return ""
    return f"{stage.keys_per_query:,.0f} keys a query, {stage.attention_saving:,.0f} times fewer attention FLOPs than over all tokens"


def _row(stage: StagePlan) -> list[str]:
    tokens, work = f"{stage.tokens:,}" if stage.tokens else "", f"{stage.flops / 1e12:,.3g}" if stage.flops else ""
    return [stage.stage, tokens, work, _show.span(stage.seconds), _show.amount(stage.memory_bytes), _show.amount(stage.disk_bytes)]
