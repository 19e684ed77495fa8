"""`muralist diagnose`: what is wrong with a video, found from its pixels."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muralist.cli import _show
from muralist.cli._options import Debug, Json
from muralist.errors import UserError

if TYPE_CHECKING:
    from muralist.eval.diagnose.examine import Diagnosis
    from muralist.eval.source import Source

STATES = {True: "FOUND", False: "no", None: "not told"}


def command(
    file: Annotated[str, typer.Argument(help="A video file of any origin.")],
    proxy: Annotated[str | None, typer.Option("--proxy", metavar="FILE", help="The small video it was made from: tells copies and slow motion.")] = None,
    tile: Annotated[str | None, typer.Option("--tile", metavar="N or WxH", help="Tiles met every N pixels (a hint: unknown seams are found too).")] = None,
    html: Annotated[str | None, typer.Option("--html", metavar="PATH", help="Write a page with plots and the seams drawn into a frame.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Look for seams, pulsing, colour drift, repeats, copies, slow motion and fake resolution."""
    from muralist.eval.diagnose.examine import diagnose
    from muralist.eval.source import open_source
    from muralist.store.paths import typed_path

    page = _page_path(html)
    source = open_source(typed_path(file, "file"))
    small = open_source(typed_path(proxy, "proxy")) if proxy is not None else None
    borders = tile_borders(tile, source.info.width, source.info.height) if tile is not None else _own_borders(source)
    with _bar(json) as progress:
        diagnosis = diagnose(source, proxy=small, borders=borders, progress=progress)
    if page:
        _write(page, diagnosis, source, small)
    _tell(diagnosis, source, json=json)
    return 0


def tile_borders(text: str, width: int, height: int) -> dict[str, list[int]]:
    """The inner borders of tiles given as N or WxH, in pixels; UserError if it is neither."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
        across, down = sides if len(sides) == 2 else (*sides, *sides)
    except ValueError:
        across = down = 0
    if across < 16 or down < 16:
        raise UserError(f"{text!r} is not a tile's size", where="tile", fix="write its side, such as 512, or width x height, such as 512x256")
    return {"x": list(range(across, width, across)), "y": list(range(down, height, down))}


def _own_borders(source: Source) -> dict[str, list[int]] | None:
    """Where the file itself says that it was decoded in tiles."""
    from muralist.compare.seams import decode_borders

    return decode_borders(source.info.metadata)


def _page_path(html: str | None) -> Path | None:
    """Checked before minutes of work."""
    from muralist.store.paths import typed_path

    if html is None:
        return None
    path = typed_path(html, "html")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{html} cannot be a file", where="html", fix="name a file in an existing directory, such as report.html")
    return path


def _write(path: Path, diagnosis: Diagnosis, source: Source, proxy: Source | None) -> None:
    from muralist.eval.diagnose.page import render
    from muralist.store import atomic

    info = source.info
    facts = [f"{info.width}x{info.height}", f"{info.num_frames} frames", f"{info.fps:g} frames a second", info.codec]
    facts += [source.prompt] if source.prompt else []
    facts += [f"proxy: {proxy.path.name}"] if proxy else ["no proxy"]
    with atomic.reported(path):
        atomic.write_file(path, render(diagnosis, title=source.path.name, facts=facts).encode("utf-8", "replace"))


@contextmanager
def _bar(json: bool):
    """A progress function for a terminal; None elsewhere."""
    if json or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=_show.console(stderr=True), transient=True) as progress:
        task = progress.add_task("looking")
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _tell(diagnosis: Diagnosis, source: Source, *, json: bool) -> None:
    if json:
        _show.emit({"event": "diagnosis", "file": str(source.path), "findings": diagnosis.record()})
        return
    for finding in diagnosis.findings:
        value = "" if finding.value is None else f"  [{finding.value:.3g} {finding.unit}; threshold {finding.threshold:g}]"
        print(f"{finding.name:<22} {STATES[finding.found]:<9} {_show.plain(finding.sentence)}{value}")
