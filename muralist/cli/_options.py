"""The options that several commands share, their other spellings, and the way they reach a command.

Names are diffusers'. People who come from other tools type other ones (`--steps`, `--cfg`, `--num_frames`): those are accepted,
kept out of the help, and the canonical name is told once.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

ALIASES = {
    "neg": "negative-prompt", "n-prompt": "negative-prompt",
    "resolution": "size", "video-size": "size", "target-width": "width", "target-height": "height",
    "frames": "num-frames", "video-length": "num-frames", "target-video-length": "num-frames", "length": "num-frames",
    "frame-rate": "fps", "force-fps": "fps",
    "steps": "num-inference-steps", "infer-steps": "num-inference-steps",
    "cfg": "guidance-scale", "cfg-scale": "guidance-scale", "sample-guide-scale": "guidance-scale",
    "shift": "flow-shift", "sigma-shift": "flow-shift", "sample-shift": "flow-shift", "discrete-flow-shift": "flow-shift",
    "method": "recipe", "out": "output", "base": "model", "memory-limit": "vram-limit",
}  # fmt: skip

notes: list[str] = []  # what the next output shall tell once: aliases, snapped frame counts


def canonical(name: str) -> str:
    """The canonical spelling of an option's name without dashes; called by the parser for every option and command."""
    dashed = name.replace("_", "-")
    if dashed not in ALIASES:
        return dashed
    told = f"--{name} is read as --{ALIASES[dashed]}"
    if told not in notes:
        notes.append(told)
    return ALIASES[dashed]


def note(text: str) -> None:
    notes.append(text)


Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of any error.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
KeepRun = Annotated[bool, typer.Option("--keep-run", help="Keep the run directory (latents of every stage) after success.")]
Memory = Annotated[str, typer.Option("--memory", help="high, balanced, low (slower, smaller), or auto: the first that fits.")]
VramLimit = Annotated[float | None, typer.Option("--vram-limit", metavar="GB", help="Plan as if no more were free where the models compute.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoOptions:
    """What to paint: the options that `generate` and `plan` have in common. None: the recipe's or the base's own value."""

    size: Annotated[str | None, typer.Option(help="1080p, 2k, 4k, 8k or WIDTHxHEIGHT; the file has exactly this size. [default: 4k]")] = None
    width: Annotated[int | None, typer.Option(help="Pixels, instead of --size; with --height.")] = None
    height: Annotated[int | None, typer.Option(help="Pixels, instead of --size; with --width.")] = None
    num_frames: Annotated[int | None, typer.Option(help="Frames; the nearest 4n + 1 is made. [default: the base's own]")] = None
    duration: Annotated[str | None, typer.Option(help="Length instead of --num-frames, such as 10s.")] = None
    fps: Annotated[float | None, typer.Option(help="Frames per second. [default: the base's own]")] = None
    seed: Annotated[int, typer.Option(help="-1 draws one; it is recorded in the file.")] = -1
    model: Annotated[str, typer.Option(help="miniature, a diffusers folder of Wan2.1 or Wan2.2, or a hub id with --revision.")] = "miniature"
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id.")] = None
    recipe: Annotated[str, typer.Option(help="See `muralist recipes`.")] = "cascade"
    negative_prompt: Annotated[str | None, typer.Option(help="What the video shall not show. [default: the base's own]")] = None
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps of each stage. [default: the recipe's]")] = None
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance, 1 is off. [default: the recipe's]")] = None
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule. [default: the recipe's]")] = None
    skip_steps: Annotated[int | None, typer.Option(help="First refining steps that the proxy replaces. [default: the recipe's]")] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any value of the recipe's configuration, such as 'refine.experts=[\"low\"]'; often."),
    ] = None
    attention: Annotated[str | None, typer.Option(help="Kernel of attention: auto, sdpa, flash, cudnn, efficient, varlen, fa3, fa4, sage, reference.")] = None
    linears: Annotated[str | None, typer.Option(help="Linear layers of the transformer: plain, or fp8: half their memory, coarser; not every GPU can.")] = None
    device: Device = "auto"
    memory: Memory = "auto"
    vram_limit: VramLimit = None


def takes_video_options(command: Callable[..., Any], without: Collection[str] = ()) -> Callable[..., Any]:
    """Give a command, whose last parameter is `video: VideoOptions`, the fields of that class as options of its own, but those `without`."""
    hints = typing.get_type_hints(VideoOptions, include_extras=True)
    own_hints = typing.get_type_hints(command, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    taken = [f for f in fields(VideoOptions) if f.name not in without]
    shared = [inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in taken]
    own = [p.replace(kind=keyword, annotation=own_hints[name]) for name, p in inspect.signature(command).parameters.items() if name != "video"]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        video = VideoOptions(**{f.name: values.pop(f.name) for f in taken})
        return command(**values, video=video)

    wrapper.__signature__ = inspect.Signature(own + shared)
    wrapper.__annotations__ = {p.name: p.annotation for p in own + shared}
    return wrapper
