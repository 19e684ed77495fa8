"""Prompt embeddings that were computed once, kept in the user's cache so that a text encoder of gigabytes is not loaded for a prompt seen before.

An entry is a published directory (`atomic`), `KEY/` with one tensor file and its manifest; KEY is a sha256 of all that decides the embedding.
Nothing in here can fail a run: an entry that is damaged is computed again, a cache that cannot be used is done without, with a note.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from muralist.errors import Note, UserError
from muralist.store import atomic
from muralist.store.tensors import load_tensors, writer

VARIABLE = "MURALIST_CACHE"  # another folder, or `off`
LIMIT = 1 << 30  # bytes of all entries; one of Wan's is 4 MB in bfloat16
_FILE, _TENSOR = "embedding.safetensors", "embedding"
_OURS = re.compile(r"[0-9a-f]{64}((\.old)?\.tmp)?")  # an entry, or one that `atomic.publish_dir` was killed in


def cache_folder() -> Path | None:
    """Where embeddings are kept: $MURALIST_CACHE, else the user's cache directory; None: nowhere."""
    asked = os.environ.get(VARIABLE)
    if asked is not None and asked.lower() in ("", "0", "off", "no"):
        return None
    try:
        folder = _default_folder() if asked is None else Path(asked).expanduser() / "prompts"
        folder.is_dir()  # a name that is too long, a folder that may not be looked into
        return folder
    except (RuntimeError, OSError) as error:  # a user without a home directory, or one that does not exist
        warnings.warn(f"prompt cache: there is none, which does not matter ({error})", Note, stacklevel=2)
        return None


def _default_folder() -> Path:
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # the specification: a relative path is invalid and left out of account
    root = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return root / "muralist" / "prompts"


def key_of(**facts: object) -> str:
    """The name of an entry, by everything that decides its bits; versions of the libraries do too."""
    return hashlib.sha256(atomic.json_bytes({**{name: str(fact) for name, fact in facts.items()}, "versions": atomic.versions()})).hexdigest()


def find(folder: Path | None, key: str) -> torch.Tensor | None:
    """The embedding of an entry, on the CPU; None if there is none. A damaged one is removed, with a note."""
    if folder is None:
        return None
    try:
        if not (folder / key).is_dir():
            return None
        manifest = atomic.read_manifest(folder / key)
        tensor = load_tensors(folder / key / _FILE, manifest["files"][_FILE]["sha256"])[_TENSOR]
        with suppress(OSError):  # another user's entry serves too
            os.utime(folder / key)  # the oldest go first, and this one was just of use
        return tensor
    except (UserError, OSError, KeyError) as error:
        warnings.warn(f"prompt cache: {folder / key} cannot be used and is computed again ({error})", Note, stacklevel=2)
        if not isinstance(error, OSError):  # one that cannot be read may be whole
            shutil.rmtree(folder / key, ignore_errors=True)
        return None


def keep(folder: Path | None, key: str, embedding: torch.Tensor, limit: int = LIMIT) -> None:
    """Add an entry; the oldest ones go while all take more than `limit` bytes."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.publish_dir(folder / key, {_FILE: writer({_TENSOR: embedding})})
        _make_room(folder, limit)
    except (UserError, OSError) as error:
        warnings.warn(f"prompt cache: {folder} cannot be written, which does not matter ({error})", Note, stacklevel=2)


def _make_room(folder: Path, limit: int) -> None:
    """Also removes what a killed process left half done, which is as old as any. What else a user keeps in that folder is left alone."""
    entries = [path for path in folder.iterdir() if _OURS.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    entries.sort(key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in entries}
    total = sum(sizes.values())
    for path in entries[:-1]:
        if total <= limit:
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= sizes[path]
