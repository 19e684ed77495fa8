"""One network found in a released file, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """`place`: where it stands in a model's folder, and in the output; `names`: {ours: the file's} of the tensors that were matched;
    `computed`: tensors of the file that follow from the configuration, compared with ours and left out; `unmatched`: those without a place.

    `write` makes the folder that it is given. Raises UserError.
    """

    place: str
    names: dict[str, str]
    write: Callable[[Path], object]
    computed: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
