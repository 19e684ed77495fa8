"""Importers: released weights of a method in, folders of ours out. As with recipes, a method's name lives here and nowhere else.

An importer looks at names and shapes only and says what fits (`Component`); nothing is written before everything does. The output appears
whole: it is made beside its place and renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from muralist.base_info import BaseInfo
from muralist.errors import UserError
from muralist.recipes.imports import lora, luve, pixelwizard, ultragen
from muralist.recipes.imports.component import Component
from muralist.recipes.imports.source import Source, listed
from muralist.store import atomic
from muralist.store.convert import Place, convert
from muralist.store.weights import PICKLES

CONVERTED = "converted.safetensors"


@dataclass(frozen=True, slots=True)
class Importer:
    """`examine`: from a file and the base that it is for to what is in it; `places`: where in a pickle of the release the tensors lie."""

    examine: Callable[[Source, BaseInfo], list[Component]]
    places: Sequence[Place]


IMPORTERS = {
    "luve": Importer(luve.examine, luve.PLACES),
    "pixelwizard": Importer(pixelwizard.examine, pixelwizard.PLACES),
    "ultragen": Importer(ultragen.examine, ultragen.PLACES),
    "lora": Importer(lora.examine, lora.PLACES),
}


def find(name: str) -> Importer:
    """The importer of that name; UserError names the known ones."""
    if name not in IMPORTERS:
        raise UserError(f"unknown method {name!r:.40}", where="method", fix=f"use one of {', '.join(IMPORTERS)}")
    return IMPORTERS[name]


def check_paths(file: Path, folder: Path) -> None:
    """UserError unless `file` can be one of weights and `folder` is free."""
    if not file.is_file():
        raise UserError(f"no file {file}", where="file", fix="check the path")
    if file.suffix.lower() not in {".safetensors", *PICKLES}:
        raise UserError(f"{file.name} is neither safetensors nor a pickle", where="file", fix="give the released file under its own name")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if folder.is_symlink() or not above.is_dir():
        raise UserError(f"{folder if folder.is_symlink() else above} is not a directory", where="output", fix="name a new one")
    with atomic.reported(folder):
        if above == folder and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty", where="output", fix="name a new directory")


def run(
    importer: Importer, file: Path, base: BaseInfo, folder: Path, *, skip_unmatched: bool = False, tell: Callable[[Component], object] = lambda component: None
) -> list[Component]:
    """Import `file` for `base` into the new `folder`; `tell` hears of every component before any is written. Raises UserError.

    `skip_unmatched`: leave out tensors that have no place here instead of refusing the file.
    """
    folder = folder.resolve()
    pending = atomic.pending_path(folder)
    with atomic.reported(folder):
        try:
            atomic.remove(pending)
            pending.mkdir(parents=True)
            components = importer.examine(_source(file, pending / CONVERTED, importer.places), base)
            for component in components:
                tell(component)
            if not skip_unmatched:
                _refuse_unmatched(components)
            for component in components:
                component.write(pending / component.place)
            atomic.remove(pending / CONVERTED)
            atomic.publish(pending, folder)
            atomic.sync(folder.parent)
        finally:
            with suppress(OSError):
                atomic.remove(pending)
    return components


def _source(file: Path, converted: Path, places: Sequence[Place]) -> Source:
    if file.suffix.lower() not in PICKLES:
        return Source.open(file)
    convert(file, converted, places)
    return Source.open(converted, origin=file)


def _refuse_unmatched(components: Sequence[Component]) -> None:
    if names := [name for component in components for name in component.unmatched]:
        what = f"{len(names)} tensors have no place here; {listed(names)}"
        raise UserError(what, where="file", fix="--skip-unmatched leaves them out")
