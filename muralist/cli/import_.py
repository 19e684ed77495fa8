"""`muralist import`: released weights of a method as parts of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from muralist.cli._options import Debug
from muralist.cli._show import plain

if TYPE_CHECKING:
    from muralist.recipes.imports.component import Component

SHOWN = 10  # unmatched names


def command(
    method: Annotated[str, typer.Argument(help="The method they belong to, or lora; a wrong name is answered with the known ones.")],
    file: Annotated[str, typer.Argument(help="The released file: safetensors, or a pickle (.pth, .pt), which a process of its own converts.")],
    model: Annotated[str, typer.Option("--model", help="The base they are for: a diffusers folder, or a hub id with --revision.")],
    output: Annotated[str, typer.Option("--output", "-o", help="A new directory for what was in the file.")],
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id.")] = None,
    skip_unmatched: Annotated[bool, typer.Option("--skip-unmatched", help="Leave out tensors that have no place here, instead of refusing the file.")] = False,
    debug: Debug = False,
) -> int:
    """Import released weights of a method, as far as they have a place here, or any LoRA for Wan."""
    from muralist.base_info import inspect_base
    from muralist.recipes import imports
    from muralist.store.paths import typed_path

    importer, source, folder = imports.find(method), typed_path(file, "file"), typed_path(output, "output")
    imports.check_paths(source, folder)
    components = imports.run(importer, source, inspect_base(model, revision), folder, skip_unmatched=skip_unmatched, tell=_tell)
    for component in components:
        print(f"done: {folder / component.place}; a model uses it once it is copied to MODEL/{component.place}")
    return 0


def _tell(component: Component) -> None:
    """What was matched, and the first names of what was not."""
    found, computed, unmatched = component.names, component.computed, component.unmatched
    also = f", {len(computed)} that are computed here" if computed else ""
    print(f"{component.place}: {len(found)} tensors matched{also}, {len(unmatched)} unmatched")
    for name in unmatched[:SHOWN]:
        print(f"  {plain(name)}")
    if len(unmatched) > SHOWN:
        print(f"  and {len(unmatched) - SHOWN} more")
