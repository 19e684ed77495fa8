"""What a released file holds, from its header, and how its names meet ours; tensors are read when everything fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from muralist.errors import UserError
from muralist.store import weights
from muralist.store.parts import FLOATS

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its name there, shape and type (as safetensors writes it)."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors of one safetensors file, by name (a prefix of the file's names may be cut off). `origin`: the file that was given, if a pickle was converted."""

    path: Path
    entries: Mapping[str, Entry]
    origin: Path

    @classmethod
    def open(cls, path: Path, origin: Path | None = None) -> Source:
        """Raises UserError if it is no whole safetensors file."""
        try:
            header = weights.check_safetensors(path)
            entries = {name: Entry(name, tuple(entry["shape"]), str(entry.get("dtype"))) for name, entry in header.items() if name != "__metadata__"}
        except UserError as error:
            raise UserError(error.what, where="file", fix=error.fix) from None
        return cls(path, entries, origin or path)

    def below(self, prefix: str) -> Source:
        """Those whose names begin with `prefix`, named without it."""
        return replace(self, entries={name.removeprefix(prefix): entry for name, entry in self.entries.items() if name.startswith(prefix)})

    def without(self, names: Iterable[str]) -> Source:
        left_out = set(names)
        return replace(self, entries={name: entry for name, entry in self.entries.items() if name not in left_out})

    def load(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """{ours: the file's tensor} for {ours: name}, mapped from the disk. Raises UserError."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return {ours: file.get_tensor(self.entries[name].name) for ours, name in names.items()}
        # The parser raises SafetensorError, but also KeyError, OSError, ValueError and TypeError on hostile headers.
        except Exception as error:
            raise UserError(f"{self.path.name} is damaged ({error})", where="file", fix="download it again") from None


@dataclass(frozen=True, slots=True)
class Match:
    """`names`: {ours: the file's}, equal in shape; `unmatched`: those of the file that have no place."""

    names: dict[str, str]
    unmatched: tuple[str, ...]


def match(source: Source, expected: Mapping[str, Shape], ours: Callable[[str], str]) -> Match:
    """Bring together a file's tensors and those of a network of ours, given how a name of the file reads with us.

    Raises:
        UserError: none of them is known, one of ours is missing (with the count and the first names), or has another shape or no float type.
    """
    names: dict[str, str] = {}
    for name in source.entries:
        names.setdefault(ours(name), name)
    names = {mine: name for mine, name in names.items() if mine in expected}
    taken = set(names.values())
    unmatched = tuple(source.entries[name].name for name in source.entries if name not in taken)
    if not names:
        raise UserError(f"none of its {len(unmatched)} tensors is known; {listed(unmatched)}", where="file", fix="give the released file of this method")
    if missing := [name for name in expected if name not in names]:
        what = f"it lacks {len(missing)} of {len(expected)} tensors; {listed(missing)}"
        raise UserError(what, where="file", fix="give the whole file, for a base like this one")
    for mine, name in names.items():
        _check(source.entries[name], expected[mine])
    return Match(names, unmatched)


def _check(entry: Entry, shape: Shape) -> None:
    if entry.shape != shape:
        raise UserError(f"{entry.name} is {list(entry.shape)}, not {list(shape)}", where="file", fix="give the released file, for a base like this one")
    require_floats(entry)


def require_floats(entry: Entry) -> None:
    if entry.dtype not in FLOATS:
        raise UserError(f"{entry.name} is of type {entry.dtype:.20}", where="file", fix=f"give weights in one of {', '.join(sorted(FLOATS))}")


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
