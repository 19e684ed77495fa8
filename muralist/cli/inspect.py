"""`muralist inspect`: what a video file holds, and with what it was made."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from muralist.cli import _show
from muralist.cli._options import Debug, Json


def command(
    file: Annotated[str, typer.Argument(help="A video file.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every frame instead of counting them.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Show size, codec and colour tags of a video, and prompt, seed and recipe if muralist made it."""
    from muralist.store.paths import typed_path
    from muralist.store.video_read import inspect

    info = inspect(typed_path(file, "file"), decode=decode)
    if json:
        _show.emit({"event": "video", **asdict(info)})
        return 0
    facts = asdict(info)
    metadata = facts.pop("metadata")
    facts.pop("tags")
    _show.table("", ["video", ""], list(facts.items()))
    if rows := _origin(metadata):
        _show.table("", ["made with", ""], rows)
    return 0


def _origin(metadata: dict[str, Any]) -> list[tuple[str, Any]]:
    """The lines a person wants of our metadata; a file of unknown origin may hold anything there."""
    request = metadata.get("request")
    if metadata.get("generator") != "muralist" or not isinstance(request, dict):
        return []
    names = ("prompt", "negative_prompt", "seed", "model", "revision", "recipe")
    rows = [(name, request[name]) for name in names if request.get(name) is not None]
    versions = metadata.get("versions")
    return rows + ([("versions", ", ".join(f"{k} {v}" for k, v in sorted(versions.items())))] if isinstance(versions, dict) else [])
