"""Single values of a configuration replaced by name, as `--set` and the options for single numbers give them."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import MappingProxyType
from typing import Any

from muralist.config import Config, jsonable
from muralist.errors import UserError
from muralist.restoring import members, restored
from muralist.sampling.shortcut import ShortcutSteps


def changed(config: Config, settings: Sequence[str], typed: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The configuration with single values replaced: `refine.experts=["low"]`, `refine.adapter=null`, `upsample={"kind": "PixelInterpolation"}`.

    Names lead through the configuration's parts; values are JSON, bare words strings. A part may be replaced as a whole by its `kind` and
    the fields that shall differ from that kind's defaults. `typed`: values by name, for the parts that have them and where no setting says otherwise; in a
    recipe of few learned steps they are those of these, and not of its anchor.
    Of two settings for one name the later holds. With another number of steps the guide replaces the same share of them, unless told. Only all of it
    together has to make sense. Raises UserError.
    """
    record, told = jsonable(config), set()
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"{setting!r:.60} sets nothing", where="set", fix='write NAME=VALUE, such as refine.experts=["low"]')
        name, value = name.strip(), _value(text)
        _place(record, name, value)
        told = {each for each in told if not each.startswith(f"{name}.")}  # what a part replaces is told no more
        told |= {name} | ({f"{name}.{field}" for field in value} if isinstance(value, dict) else set())
    for name, value in typed.items():
        part, _, field = name.partition(".")
        if name in told or (part == "proxy" and f"refine.{field}" in typed.keys() - told and _takes_few_steps(config, record)):
            continue
        if field in _hints(_hints(Config, record)[part], record[part]):
            _place(record, name, value)
    if "refine.skip_steps" not in told | typed.keys():
        _keep_share(record["refine"], config)
    return _judged(record, settings)


def _takes_few_steps(config: Config, record: dict[str, Any]) -> bool:
    """Whether a recipe does, and a record of it still does."""
    steps = record["refine"].get("steps") if isinstance(record["refine"], dict) else None
    return isinstance(config.refine.steps, ShortcutSteps) and isinstance(steps, dict) and steps.get("kind") == ShortcutSteps.__name__


def _judged(record: dict[str, Any], settings: Sequence[str]) -> Config:
    """The configuration of a record that `settings` have changed. Raises UserError."""
    said = f"{' '.join(settings)!r:.80}: " if settings else ""
    try:
        return restored(Config, record)
    except UserError as error:
        raise UserError(f"{said}{error.what}", where=error.where, fix=error.fix) from None
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{said}{error}", where="set", fix="give a value of the kind that the field has, and of a part its fields") from None


def _keep_share(refine: Any, config: Config) -> None:
    """Let the guide replace the share of the steps in a record of refinement that it replaces of the configuration's."""
    own, steps = config.refine, refine.get("num_inference_steps") if isinstance(refine, dict) else None
    if own.skip_steps and type(steps) is int and 1 <= steps <= 1000 and steps != own.num_inference_steps and refine.get("skip_steps") == own.skip_steps:
        refine["skip_steps"] = min(max(round(own.skip_steps * steps / own.num_inference_steps), 1), max(steps - 1, 0))


def _value(text: str) -> Any:
    """JSON, or the text itself; numbers that JSON does not have are not read as such."""
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text


def _place(record: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    hint: Any = Config
    for part in path:
        hint, record = _hints(hint, record).get(part), record.get(part) if isinstance(record, dict) else None
    hints = _hints(hint, record)
    if last not in hints:
        raise UserError(f"the configuration has no {name!r:.60}", where="set", fix=f"use one of {', '.join(hints) or 'the names of its parts'}")
    record[last] = _completed(hints[last], value)


def _completed(hint: Any, value: Any) -> Any:
    """A typed JSON value as a record has it: parts with their defaults, and whole numbers as floats where `hint` says so. What does not fit stays, to be
    refused."""
    if isinstance(value, dict):
        hints = _hints(hint, value)
        return _defaults(hint, value) | {name: _completed(hints[name], item) if name in hints else item for name, item in value.items()}
    if isinstance(value, list):
        kinds = next((typing.get_args(member) for member in members(hint) if typing.get_origin(member) is tuple), ())
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        return [_completed(kind, item) for kind, item in zip(kinds, value)] + value[len(kinds) :]
    return float(value) if float in members(hint) and type(value) is int and abs(value) < 2**53 else value


def _defaults(hint: Any, value: dict[str, Any]) -> dict[str, Any]:
    """Those of the part that a JSON object is, as JSON."""
    part = _part(hint, value)
    return {field.name: jsonable(_default(field)) for field in fields(part) if _default(field) is not MISSING} if part else {}


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _hints(hint: Any, value: Any) -> dict[str, Any]:
    """Types of the fields of the part that a JSON object is; empty where it is none that `hint` allows."""
    part = _part(hint, value)
    return typing.get_type_hints(part) if part else {}


def _part(hint: Any, value: Any) -> type | None:
    """The one of the parts that `hint` allows which a JSON object is, by its kind."""
    known = {member.__name__: member for member in members(hint) if is_dataclass(member)}
    return known.get(str(value.get("kind"))) if isinstance(value, dict) else None
