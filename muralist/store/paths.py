"""Checks on paths before anything is computed or written.

A name that comes from outside (a manifest, a request, a server's client) goes through `safe_join`, the only way from a name to a path.
An output path goes through `check_output` before the first second of work: a run of hours must not end at a missing folder.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from muralist.errors import UserError
from muralist.store.atomic import free_bytes

VIDEO_SUFFIXES = (".mp4",)
_NAME_LIMIT = 255  # bytes of one path component on common file systems


def safe_join(root: Path, name: str) -> Path:
    """The path of `name` below `root`, links resolved; UserError if it would lie anywhere else.

    Forward slashes separate folders. Refused: absolute paths, `..` (also in compatibility forms such as full-width dots), backslashes,
    colons (drives, streams), control characters, empty and overlong parts, and links that lead out of the root.
    """
    folded = unicodedata.normalize("NFKC", name)
    parts = name.split("/")
    bad = (
        not name
        or any(not character.isprintable() or character in "\\:" for character in name + folded)
        or any(part.strip(" .") == "" for part in (*parts, *folded.split("/")))
        or any(len(part.encode("utf-8", "replace")) > _NAME_LIMIT for part in parts)
    )
    if bad:
        raise _outside(root, name)
    base = root.resolve()
    try:
        path = base.joinpath(*parts).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise _outside(root, name) from error
    if path == base or not path.is_relative_to(base):
        raise _outside(root, name)
    return path


def typed_path(text: str, where: str) -> Path:
    """The path that a person typed as `where`, home directory resolved; UserError if no file system could have it."""
    if not text:
        raise UserError("an empty path", where=where, fix="give a name, or . for the current directory")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError):
        raise UserError(f"{text[:40]!r} is not a usable path", where=where, fix="use a shorter, plain name") from None
    return path


def check_output(path: Path, bytes_needed: int = 0) -> Path:
    """`path` as given, if a video can be written there: known suffix, existing writable parent, enough free space (bytes)."""
    if not _is_usable(path):
        raise UserError("not a usable file name", where="output", fix="choose a shorter, plain name such as out.mp4")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"{path.name} has no known video suffix", where="output", fix=f"use one of {', '.join(VIDEO_SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"{path} is a directory", where="output", fix="name a file in it, such as out.mp4")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not an existing directory", where="output", fix="create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path.parent} is not writable", where="output", fix="choose another directory or mend its permissions")
    free = free_bytes(path)
    if free < bytes_needed:
        raise UserError(f"{bytes_needed:,} bytes needed, {free:,} bytes free", where=str(path.parent), fix="free some space or choose another disk")
    return path


def _is_usable(path: Path) -> bool:
    """Whether the system takes this path at all, and the working names derived from it; the video library takes names in UTF-8 only."""
    try:
        str(path).encode()
        return b"\0" not in os.fsencode(path) and len(os.fsencode(path.name)) <= _NAME_LIMIT - len(".json.tmp")
    except UnicodeEncodeError:
        return False


def _outside(root: Path, name: str) -> UserError:
    return UserError(
        f"{name!r} is not a plain name inside the directory", where=str(root), fix="use letters, digits and / only, no .. and no links that lead out"
    )
