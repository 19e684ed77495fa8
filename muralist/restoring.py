"""JSON values back into the dataclasses that they were: the inverse of `config.jsonable`."""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any


def restored(hint: Any, value: Any) -> Any:
    """`value` (JSON) as the type that `hint` names. Only classes that appear in the annotations of `hint` can come into being.

    Raises TypeError (a value of another kind), UserError (values that a part refuses) or what else a part's own checks run into.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(members(hint)) > 1:
        return restored(_member(arguments, value), value)
    if is_dataclass(hint):
        return _dataclass(hint, value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{value!r:.40} is no list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise TypeError(f"{len(value)} values instead of {len(kinds)}")
        return tuple(restored(kind, item) for kind, item in zip(kinds, value))
    if origin is typing.Literal and value not in arguments:
        raise TypeError(f"{value!r:.40} is none of {arguments}")
    if hint is float and type(value) is int:
        return value  # as it was: a float in its place would change the bytes of the file's metadata
    if isinstance(hint, type) and type(value) is not hint:
        raise TypeError(f"{value!r:.40} is no {hint.__name__}")
    return value


def members(hint: Any) -> tuple[Any, ...]:
    """Those of a union, else the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _member(among: tuple[Any, ...], value: Any) -> Any:
    """The member of a union that a JSON value belongs to."""
    if isinstance(value, dict):
        known = {m.__name__: m for m in among if is_dataclass(m)}
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in known:
            raise TypeError(f"{f'its kind {kind!r:.40}' if kind else 'what says no kind'} is none of {', '.join(known)}")
        return known[kind]
    found = [m for m in among if _takes(m, value)]
    if not found:
        raise TypeError(f"{value!r:.40} is none of {', '.join(getattr(m, '__name__', str(m)) for m in among)}")
    return found[0]


def _takes(member: Any, value: Any) -> bool:
    """Whether a member of a union is what a plain JSON value can be."""
    if isinstance(value, list):
        return typing.get_origin(member) is tuple
    return member is type(value) or (member is float and type(value) is int)


def _dataclass(hint: type, value: Any) -> Any:
    hints = typing.get_type_hints(hint)
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.40} is no {hint.__name__}")
    if value.get("kind") != hint.__name__:
        raise TypeError(f"its kind is {value.get('kind')!r:.40}, not {hint.__name__}")
    if unknown := value.keys() - hints.keys() - {"kind"}:
        raise TypeError(f"{hint.__name__} has no {sorted(unknown)[0]!r:.40}")
    return hint(**{field.name: restored(hints[field.name], value[field.name]) for field in fields(hint) if field.name in value})
