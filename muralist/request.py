"""From what a person typed to a complete `Request`, and from a run's record back to one.

The command line and the Python interface both come through here, so that they accept the same things, resolve them in the
same way and refuse them with the same words. Nothing here reads a weight.
"""

from __future__ import annotations

import json
import operator
import os
import re
import secrets
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from muralist import recipes
from muralist.base import pick_dtype
from muralist.base_info import BaseInfo, check_structure
from muralist.config import MAX_FRAMES, MAX_PROMPT, Config, Request, jsonable
from muralist.errors import UserError
from muralist.nn.attention import BranchedWindows
from muralist.nn.kernels import Kernels
from muralist.nn.kinds import INJECTOR, STEP_SIZE
from muralist.restoring import restored
from muralist.sampling.shortcut import ShortcutSteps
from muralist.store.run import SETTLED, TYPED, RunDirectory
from muralist.store.vocabulary import read_prompt
from muralist.types import Geometry, Grid, nearest_frames

if TYPE_CHECKING:  # the plan imports diffusers, which takes seconds: not for what only parses
    from muralist.cost.budget import Budget
    from muralist.plan import Machine, Plan

SIZES = {"1080p": (1920, 1080), "2k": (2560, 1440), "4k": (3840, 2160), "8k": (7680, 4320)}
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was typed; None stands for the recipe's or the base's own value. `seed` -1: drawn at random; `settings`: as `changed` takes them."""

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
    config = changed(recipes.find(asked.recipe)(info), asked.settings, _typed(asked))
    _require_parts(config, info)
    request = Request(
        prompt=_text("prompt", asked.prompt),
        negative_prompt=_text("negative_prompt", info.defaults.negative_prompt if asked.negative_prompt is None else asked.negative_prompt),
        grid=_grid(asked, info, note),
        seed=secrets.randbelow(2**31) if asked.seed == -1 else asked.seed,
        model=info.name,
        revision=asked.revision,
        recipe=asked.recipe,
        config=config,
    )
    config.encode.resolve(request.grid)  # codec and rate are checked now, not after hours of work
    _tell_what_is_not_read(request.prompt, info, note)
    return request


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
    info.require_experts(refine.experts)
    if isinstance(refine.steps, ShortcutSteps):
        info.require_part(STEP_SIZE)
    if refine.anchor != "none":
        info.require_part(INJECTOR)
    if isinstance(refine.attention, BranchedWindows):
        info.require_branches(refine.attention.branches, refine.attention.plain)
    for adapter in (refine.adapter, config.proxy and config.proxy.adapter):
        if adapter is not None and adapter not in info.adapters:
            raise UserError(f"the base {info.name} has no adapter {adapter!r:.60}", where="adapter", fix=f"use one of {', '.join(info.adapters) or 'none'}")


def check_prompt(prompt: str) -> None:
    """The checks of a prompt that need no model (`Request` makes them again for whoever builds one by hand)."""
    if not prompt.strip():
        raise UserError("the prompt is empty", where="prompt", fix="say what the video shows")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"{len(prompt)} characters", where="prompt", fix=f"use at most {MAX_PROMPT}")


def _text(name: str, text: str) -> str:
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
        frames = max(round(asked.duration * fps), 1)
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
    numbers = {"num_inference_steps": operator.index, "guidance_scale": float, "flow_shift": float, "skip_steps": operator.index}
    values = {name: _number(name, value, kind) for name, kind in numbers.items() if (value := getattr(asked, name)) is not None}
    kernels = {name: value for name in ("attention", "linears") if (value := getattr(asked, name)) is not None}
    Kernels(**kernels)  # refuses words that are none, by the names of their options
    stages = {f"{stage}.{name}": value for stage in ("proxy", "refine") for name, value in values.items()}
    return stages | {f"kernels.{name}": value for name, value in kernels.items()}


def _number(name: str, value: Any, kind: Callable[[Any], float]) -> float:
    wanted = "whole number" if kind is operator.index else "number"
    try:
        if isinstance(value, bool):
            raise TypeError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{value!r:.40} is no {wanted}", where=name, fix=f"use a {wanted}") from None


def tell_of_kernels(request: Request, info: BaseInfo, device: torch.device, note: Callable[[str], None]) -> None:
    """Tell `note` what was asked to compute with and is not on this machine. The request stays as it was asked: another machine may go on with it."""
    for text in request.config.kernels.settled(device, pick_dtype(device), info.head_dim, info.sides)[1]:
        note(text)


def changed(config: Config, settings: Sequence[str], typed: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The configuration with single values replaced: `refine.experts=["low"]`, `refine.adapter=null`, `upsample={"kind": "PixelInterpolation"}`.

    Names lead through the configuration's parts; values are JSON, bare words strings. A part may be replaced as a whole by its `kind` and
    the fields that shall differ from that kind's defaults. `typed`: values by name, for the parts that have them and where no setting says otherwise.
    With another number of steps the guide replaces the same share of them, unless told. Only all of it together has to make sense. Raises UserError.
    """
    record, told = jsonable(config), set()
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"{setting!r:.60} sets nothing", where="set", fix='write NAME=VALUE, such as refine.experts=["low"]')
        name, value = name.strip(), _value(text)
        _place(record, name, value)
        told |= {name} | ({f"{name}.{field}" for field in value} if isinstance(value, dict) else set())
    for name, value in typed.items():
        part, _, field = name.partition(".")
        if name not in told and isinstance(record[part], dict) and field in record[part]:
            _place(record, name, value)
    if "refine.skip_steps" not in told | typed.keys():
        _keep_share(record["refine"], config)
    return _judged(record, settings)


def _judged(record: dict[str, Any], settings: Sequence[str]) -> Config:
    """The configuration of a record that `settings` have changed. Raises UserError."""
    said = f"{' '.join(settings)!r:.80}: " if settings else ""
    try:
        return restored(Config, record)
    except UserError as error:
        raise UserError(f"{said}{error.what}", where=error.where, fix=error.fix) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{said}{error}", where="set", fix="give a value of the kind that the field has, and of a part its fields") from None


def _keep_share(refine: Any, config: Config) -> None:
    """Let the guide replace the share of the steps in a record of refinement that it replaces of the configuration's."""
    own, steps = config.refine, refine.get("num_inference_steps") if isinstance(refine, dict) else None
    if own.skip_steps and type(steps) is int and steps not in (own.num_inference_steps, 0) and refine.get("skip_steps") == own.skip_steps:
        refine["skip_steps"] = min(max(round(own.skip_steps * steps / own.num_inference_steps), 1), max(steps - 1, 0))


def _value(text: str) -> Any:
    """JSON, or the text itself; numbers that JSON does not have are not read as such."""
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except ValueError:
        return text


def _place(record: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    hint: Any = Config
    for part in path:
        hint, record = _hints(hint, record).get(part), record.get(part) if isinstance(record, dict) else None
    if not isinstance(record, dict) or last not in record or last == "kind":
        known = ", ".join(field for field in record if field != "kind") if isinstance(record, dict) else "the names of its parts"
        raise UserError(f"the configuration has no {name!r:.60}", where="set", fix=f"use one of {known}")
    record[last] = _with_points(_hints(hint, record).get(last), value)


def _with_points(hint: Any, value: Any) -> Any:
    """A typed JSON value with its whole numbers as floats where `hint` says so, else 3 and 3.0 are two runs; what does not fit stays, to be refused."""
    if isinstance(value, dict):
        hints = _hints(hint, value)
        return {name: _with_points(hints[name], item) if name in hints else item for name, item in value.items()}
    if isinstance(value, list):
        kinds = next((typing.get_args(member) for member in _members(hint) if typing.get_origin(member) is tuple), ())
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        return [_with_points(kind, item) for kind, item in zip(kinds, value)] + value[len(kinds) :]
    return float(value) if float in _members(hint) and type(value) is int and abs(value) < 2**53 else value


def _hints(hint: Any, value: Any) -> dict[str, Any]:
    """Types of the fields of the part that a JSON object is, by its kind; empty where it is none that `hint` allows."""
    known = {member.__name__: member for member in _members(hint) if is_dataclass(member)}
    part = known.get(str(value.get("kind"))) if isinstance(value, dict) else None
    return typing.get_type_hints(part) if part else {}


def _members(hint: Any) -> tuple[Any, ...]:
    """Those of a union, else the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


# --- back from a record -----------------------------------------------------------------------------------------------------------


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
    return seed if isinstance(seed, int) else -1


def plan_run(request: Request, info: BaseInfo, machine: Machine, run_dir: Path, budget: Budget) -> Plan:
    """The plan of a request in a run directory, after checking the model's structure; what a run there has decided and written counts."""
    from muralist.plan import plan

    check_structure(info)
    begun, held = _begun(request, run_dir)
    return plan(begun or request, info, replace(machine, disk_free=machine.disk_free + held), budget=budget, begun=begun is not None)


def run_record(asked: Request, settled: Request, **more: Any) -> dict[str, Any]:
    """What a run directory remembers of its request: as it was asked, `more` that decides the result, and last with what a plan has settled (chunks, tiles)."""
    return {TYPED: asked.record(), **more, SETTLED: settled.record()}


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
