"""From what a person typed to a complete `Request`, and from a run's record back to one.

The command line and the Python interface both come through here, so that they accept the same things, resolve them in the
same way and refuse them with the same words. Nothing here reads a weight.
"""

from __future__ import annotations

import math
import operator
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from muralist import recipes
from muralist.base import pick_dtype
from muralist.base_info import UPSAMPLER, BaseInfo
from muralist.config import MAX_FRAMES, MAX_PROMPT, Config, Request
from muralist.errors import UserError
from muralist.nn.attention import BranchedWindows
from muralist.nn.experts import EXPERTS
from muralist.nn.kernels import Kernels
from muralist.nn.kinds import BRANCHES, INJECTOR, STEP_SIZE
from muralist.restoring import restored
from muralist.sampling.shortcut import ShortcutSteps
from muralist.settings import changed
from muralist.stages.upsample import LearnedUpsampling, upsampler_in
from muralist.store.run import SETTLED, TYPED, WEIGHTS, RunDirectory
from muralist.store.vocabulary import read_prompt
from muralist.structure import check_structure, check_upsampler
from muralist.types import Geometry, Grid, nearest_frames

if TYPE_CHECKING:  # the plan imports diffusers, which takes seconds: not for what only parses
    from muralist.cost.budget import Budget
    from muralist.plan import Machine, Plan

SIZES = {"1080p": (1920, 1080), "2k": (2560, 1440), "4k": (3840, 2160), "8k": (7680, 4320)}
STAGE_NUMBERS = {"num_inference_steps": operator.index, "guidance_scale": float, "flow_shift": float, "skip_steps": operator.index}
NEEDED = ("width", "height", "seed")  # numbers for which neither a recipe nor a base has a value
LONGEST = 10**1000  # the most of a whole number, which can still be written
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was typed; None stands for the recipe's or the base's own value (width, height and seed have none). `seed` -1: drawn at random;
    `settings`: as `changed` takes them."""

    prompt: str
    negative_prompt: str | None = None
    width: int = SIZES["4k"][0]
    height: int = SIZES["4k"][1]
    num_frames: int | None = None
    duration: float | None = None
    fps: float | None = None
    seed: int = -1
    recipe: str = recipes.DEFAULT
    revision: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    skip_steps: int | None = None
    attention: str | None = None
    linears: str | None = None
    settings: tuple[str, ...] = ()


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of `4k` or `WIDTHxHEIGHT`."""
    if match := re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip()):
        return int(match[1]), int(match[2])
    try:
        return SIZES[text.strip().lower()]
    except KeyError:
        raise UserError(f"{text!r} is not a size", where="size", fix=f"use {', '.join(SIZES)} or WIDTHxHEIGHT, such as 3840x2160") from None


def parse_duration(text: str) -> float:
    """Seconds of `10s`, `1.5`, `500ms` or `2min`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|min|m|)", text.strip().lower())
    if not match or not float(match[1]):
        raise UserError(f"{text!r} is not a duration", where="duration", fix="use seconds, such as 10s or 1.5s")
    return float(match[1]) * _UNITS[match[2]]


def make_request(asked: Asked, info: BaseInfo, note: Callable[[str], None]) -> Request:
    """Every choice made: the recipe's configuration with the overrides, the exact grid, the resolved seed. `note` is told of each adjustment."""
    asked = _with_numbers(asked)
    settings = _settings(asked.settings)
    grid = _grid(asked, info, note)
    config = _settled(changed(recipes.find(asked.recipe)(info), settings, _typed(asked)), grid, settings)
    _require_parts(config, info)
    request = Request(
        prompt=_text("prompt", asked.prompt),
        negative_prompt=_text("negative_prompt", info.defaults.negative_prompt if asked.negative_prompt is None else asked.negative_prompt),
        grid=grid,
        seed=secrets.randbelow(2**31) if asked.seed == -1 else asked.seed,
        model=info.name,
        revision=asked.revision,
        recipe=asked.recipe,
        config=config,
    )
    config.encode.resolve(request.grid)  # codec and rate are checked now, not after hours of work
    config.refine.require_fit(info.geometry.token_shape(info.geometry.legal(request.grid)))
    _require_enlarging(config, grid, info.geometry)
    _tell_what_is_not_read(request.prompt, info, note)
    if isinstance(config.refine.steps, ShortcutSteps) and config.refine.adapter is None:
        note("few steps of known size without an adapter: right where the transformer itself has learned them, as imported ones have")
    return request


def _settled(config: Config, grid: Grid, settings: tuple[str, ...]) -> Config:
    """With the proxy of a target of this length. UserError where that leaves out what was set."""
    if config.proxy is None or (proxy := config.proxy.settled(grid)) is config.proxy:
        return config
    left_out = {"proxy.every", *(["proxy.adapter"] if config.proxy.adapter else [])}
    for name in (setting.partition("=")[0].strip() for setting in settings):
        if name in left_out:
            what = f"the base spans {grid.num_frames} frames by itself, so the proxy has all of them and nothing of a slow one"
            raise UserError(what, where=name, fix="add --set proxy.spanned=0 for a slow one, or leave this out")
    return replace(config, proxy=proxy)


def _require_enlarging(config: Config, grid: Grid, geometry: Geometry) -> None:
    """UserError if the upsampler would have to make a latent smaller."""
    if not isinstance(config.upsample, LearnedUpsampling):
        return
    proxy, target = config.proxy.grid(grid, geometry), geometry.legal(grid)
    if proxy.height > target.height or proxy.width > target.width:
        what = f"the upsampler makes latents larger, and the proxy of {proxy.width}x{proxy.height} is larger than {target.width}x{target.height}"
        raise UserError(what, where="upsample", fix="use a larger --size, or a smaller --set proxy.height=... --set proxy.width=...")


def _tell_what_is_not_read(prompt: str, info: BaseInfo, note: Callable[[str], None]) -> None:
    reading = read_prompt(info.folder / "tokenizer", prompt)
    if reading is None:
        return
    if reading.unknown:
        note(f"words that {info.name} does not know, and leaves out of account: {', '.join(reading.unknown[:8])}")
    if reading.num_tokens > (limit := info.defaults.max_sequence_length):
        note(f"the prompt has {reading.num_tokens} tokens, of which {info.name} reads the first {limit}")


def _require_parts(config: Config, info: BaseInfo) -> None:
    """UserError if the configuration asks for something that the base does not have."""
    refine = config.refine
    for kind in _parts_of(config):
        info.require_part(kind)
    info.require_experts(refine.experts)
    if isinstance(refine.attention, BranchedWindows):
        info.require_branches(refine.attention.branches, refine.attention.plain, refine.attention.windows)
    for adapter in _adapters_in(config):
        if adapter not in info.adapters:
            raise UserError(f"the base {info.name} has no adapter {adapter!r:.60}", where="adapter", fix=_adapters_of(info))


def _parts_of(config: Config) -> tuple[str, ...]:
    """The kinds of part that serve in it."""
    refine = config.refine
    asked = {
        STEP_SIZE: isinstance(refine.steps, ShortcutSteps),
        INJECTOR: refine.anchor != "none",
        UPSAMPLER: upsampler_in(config.upsample) is not None,
        EXPERTS: bool(refine.experts),
        BRANCHES: isinstance(refine.attention, BranchedWindows) and bool(refine.attention.branches),
    }
    return tuple(kind for kind, serves in asked.items() if serves)


def _adapters_in(config: Config) -> tuple[str, ...]:
    """The adapters that serve in it."""
    return tuple(dict.fromkeys(part.adapter for part in (config.refine, config.proxy) if part is not None and part.adapter is not None))


def weights_of(config: Config, info: BaseInfo) -> str:
    """A digest of the weights that a run with this configuration computes with, so that it is not gone on with on others."""
    return info.fingerprint_with(_adapters_in(config), _parts_of(config))


def _adapters_of(info: BaseInfo) -> str:
    known = f"use one of {', '.join(info.adapters)}, or " if info.adapters else ""
    return f"{known}add it: muralist train, or muralist import lora"


def check_prompt(prompt: str) -> None:
    """The checks of a prompt that need no model (`Request` makes them again for whoever builds one by hand)."""
    if not prompt.strip():
        raise UserError("the prompt is empty", where="prompt", fix="say what the video shows")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"{len(prompt)} characters", where="prompt", fix=f"use at most {MAX_PROMPT}")


def _text(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f"{_shown(text)} is no text", where=name, fix="give a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the text is not valid Unicode", where=name, fix="type it in UTF-8") from None
    return text


def _grid(asked: Asked, info: BaseInfo, note: Callable[[str], None]) -> Grid:
    fps = info.defaults.grid.fps if asked.fps is None else asked.fps
    if not 0.01 <= fps <= 1000:
        raise UserError(f"{fps} frames per second", where="fps", fix="use 0.01 to 1000, such as 24")
    if asked.num_frames is not None and asked.duration is not None:
        raise UserError("both num_frames and duration are given", where="duration", fix="give one of them")
    frames = info.defaults.grid.num_frames if asked.num_frames is None else asked.num_frames
    if asked.duration is not None:
        if not 0 < asked.duration * fps < math.inf:
            raise UserError(f"{asked.duration} seconds", where="duration", fix="use a number above 0")
        if (frames := round(asked.duration * fps)) < 1:
            raise UserError(f"{asked.duration:g} seconds at {fps:g} frames per second", where="duration", fix=f"use at least {1 / fps:.3g}s, one frame")
    return Grid(num_frames=_snapped(frames, fps, info.geometry, note), height=asked.height, width=asked.width, fps=float(fps))


def _snapped(frames: int, fps: float, geometry: Geometry, note: Callable[[str], None]) -> int:
    """The nearest count the base can make; a count out of range is refused, not moved into it."""
    if not 1 <= frames <= MAX_FRAMES:
        raise UserError(f"{frames} frames", where="num_frames", fix=f"use 1 to {MAX_FRAMES}")
    nearest = nearest_frames(frames, geometry.temporal_factor)
    if nearest != frames:
        note(f"{frames} frames become {nearest} ({nearest / fps:.2f} s at {fps:g} fps): the base makes {geometry.temporal_factor}n + 1 frames")
    return nearest


def _typed(asked: Asked) -> dict[str, Any]:
    """What was typed in place of the recipe's own numbers, by its name in the configuration, for every stage that may have it. Raises UserError."""
    values = {name: value for name in STAGE_NUMBERS if (value := getattr(asked, name)) is not None}
    kernels = {name: value for name in ("attention", "linears") if (value := getattr(asked, name)) is not None}
    Kernels(**kernels)  # refuses words that are none, by the names of their options
    stages = {f"{stage}.{name}": value for stage in ("proxy", "refine") for name, value in values.items()}
    return stages | {f"kernels.{name}": value for name, value in kernels.items()}


def _with_numbers(asked: Asked) -> Asked:
    """The same, its numbers of their own types whatever a caller of the Python interface gave. Raises UserError."""
    kinds = dict.fromkeys((*NEEDED, "num_frames"), operator.index) | dict.fromkeys(("duration", "fps"), float) | STAGE_NUMBERS
    given = {name: getattr(asked, name) for name in kinds}
    return replace(asked, **{name: _number(name, value, kinds[name]) for name, value in given.items() if value is not None or name in NEEDED})


def _settings(settings: Any) -> tuple[str, ...]:
    if settings is None:
        return ()
    if not isinstance(settings, list | tuple) or not all(isinstance(setting, str) for setting in settings):
        raise UserError(f"{_shown(settings)} is no list of settings", where="settings", fix="give a list of NAME=VALUE strings")
    return tuple(settings)


def _number(name: str, value: Any, kind: Callable[[Any], float]) -> float:
    wanted = "whole number" if kind is operator.index else "number"
    try:
        if isinstance(value, bool | str | bytes) or type(value).__name__ in ("bool", "bool_"):  # truth values of numpy are numbers too
            raise TypeError
        number = kind(value)
        if isinstance(number, int) and abs(number) > LONGEST:
            raise OverflowError
        return number
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{_shown(value)} is no {wanted}", where=name, fix=f"use a {wanted}") from None


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.40}"
    except ValueError:  # a whole number of thousands of digits
        return "this"


def tell_of_kernels(request: Request, info: BaseInfo, device: torch.device, note: Callable[[str], None]) -> None:
    """Tell `note` what was asked to compute with and is not on this machine. The request stays as it was asked: another machine may go on with it."""
    for text in request.config.kernels.settled(device, pick_dtype(device), info.head_dim, info.sides)[1]:
        note(text)


# --- what a run directory remembers ---------------------------------------------------------------------------------------------


def restore(record: Any) -> Request:
    """The Request whose `record()` this is; UserError if it is not one of this version."""
    try:
        request = restored(Request, record)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _foreign(str(error)) from None
    if request.record() != record:
        raise _foreign("fields differ")
    return request


def stored_seed(run_dir: Path) -> int:
    """The seed that an interrupted run drew, so that the same call without a seed goes on; -1 where there is none."""
    try:
        seed = (RunDirectory.stored(run_dir) or {})[TYPED]["seed"]
    except (KeyError, TypeError):
        return -1
    return seed if type(seed) is int and seed >= 0 else -1


def as_begun(asked: Request, info: BaseInfo, run_dir: Path) -> Request:
    """The request with the name that the run at `run_dir` has for its model, if that is of the same weights: where a model lies is no option."""
    stored = RunDirectory.stored(run_dir) or {}
    named = stored.get(TYPED)
    if not isinstance(named, dict) or stored.get(WEIGHTS) != weights_of(asked.config, info):
        return asked
    model, revision = named.get("model"), named.get("revision")
    return replace(asked, model=model, revision=revision) if isinstance(model, str) and isinstance(revision, str | None) else asked


def plan_run(request: Request, info: BaseInfo, machine: Machine, run_dir: Path, budget: Budget) -> Plan:
    """The plan of a request in a run directory, after checking the model's structure; what a run there has decided and written counts."""
    from muralist.plan import plan

    _require_parts(request.config, info)  # again: a run that goes on may stand on another base by now
    check_weights(request.config, info)
    begun, held = _begun(request, run_dir)
    return plan(begun or request, info, replace(machine, disk_free=machine.disk_free + held), budget=budget, begun=begun is not None)


def check_weights(config: Config, info: BaseInfo) -> None:
    """UserError unless the weights of the model, and of the upsampler that the configuration enlarges by, are those that their configurations build."""
    check_structure(info)
    if upsampler_in(config.upsample) is not None:
        check_upsampler(info)


def run_record(asked: Request, settled: Request, info: BaseInfo, **more: Any) -> dict[str, Any]:
    """What a run directory remembers: the request as it was asked, the weights that decide its result, `more`, and last the request with what a plan
    has settled (chunks, tiles)."""
    return {TYPED: asked.record(), WEIGHTS: weights_of(settled.config, info), **more, SETTLED: settled.record()}


def _begun(asked: Request, run_dir: Path) -> tuple[Request | None, int]:
    """(the request as a run at `run_dir` that was asked for the same has settled it, if there is one; bytes that the run there holds)"""
    stored = RunDirectory.stored(run_dir)
    if stored is None:
        return None, 0
    held = _bytes_in(run_dir)
    if stored.get(TYPED) != asked.record():  # said when the run is opened, with the first difference
        return None, held
    begun = restore(stored.get(SETTLED))
    if _as_typed(begun, asked) != asked:
        raise _foreign("what was planned is not what was asked")
    return begun, held


def _as_typed(settled: Request, asked: Request) -> Request:
    """A settled request with those values of the typed one that a plan may choose."""
    config, typed = settled.config, asked.config
    proxy = config.proxy and typed.proxy and replace(config.proxy, token_chunk=typed.proxy.token_chunk)
    refine = replace(config.refine, token_chunk=typed.refine.token_chunk)
    return replace(settled, config=replace(config, proxy=proxy, refine=refine, decode=typed.decode))


def _bytes_in(folder: Path) -> int:
    """Of all files under it; what another process removes meanwhile is left out."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(root, name), follow_symlinks=False).st_size
    return total


def _foreign(why: str) -> UserError:
    return UserError(f"its request cannot be read ({why})", where="run_dir", fix="use the version that started the run, or start a new one")
