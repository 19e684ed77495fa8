"""The commit protocol: nothing on disk is ever half there.

A result becomes visible by one rename, after its bytes are on the platter:

    write into NAME.tmp/  ->  fsync each file  ->  MANIFEST.json (sha256, sizes, versions)  ->  fsync  ->  rename to NAME/  ->  fsync the parent

so a process that dies at any point leaves either the old result or the new one, plus `*.tmp` leftovers that the next start removes.
There is no `latest` pointer: others lost their last good checkpoint to a pointer that moved too early; readers scan and verify instead.

Everything that changes the disk goes through five functions, `open_new`, `write`, `sync`, `publish`, `remove`, called by their module
names; a test replaces one of them to kill, fill or fail at its n-th call, which makes the crash test exhaustive instead of lucky.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from muralist.errors import UserError

PENDING = ".tmp"
_ASIDE = ".old" + PENDING
MANIFEST = "MANIFEST.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_JSON_LIMIT = 64 << 20
STRIDE = 32 << 20  # bytes that a file which is not to stay in memory has there at a time


# --- the five functions that touch the disk ---------------------------------------------------------------------------------------


def open_new(path: Path) -> BinaryIO:
    """Create `path`, which must not exist (so that no link planted there is followed)."""
    return open(path, "xb", buffering=0)


def write(handle: BinaryIO, data: Any) -> None:
    """Write all of a bytes-like object; raw files may take fewer bytes than offered when the disk fills."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[handle.write(view) :]


def sync(target: BinaryIO | Path) -> None:
    """Force an open file, a file by path or a directory's entries to the disk."""
    if not isinstance(target, Path):
        os.fsync(target.fileno())
        return
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(pending: Path, final: Path) -> None:
    """Make a finished file or directory visible under its own name: one rename."""
    os.replace(pending, final)


def remove(path: Path) -> None:
    """Remove a file or directory if it exists. A directory first loses its name, so that half of it is never taken for the whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path
    if path.suffix != PENDING:
        doomed = path.with_name(path.name + ".gone" + PENDING)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
    shutil.rmtree(doomed)


# --- what the rest of the library calls -------------------------------------------------------------------------------------------


class Sink:
    """An open new file that counts the bytes written to it; `hashed`: and hashes them, for a manifest; not `cached`: see `write_file`."""

    def __init__(self, handle: BinaryIO, *, hashed: bool, cached: bool = True):
        self._handle, self._hash, self._cached, self.size = handle, hashlib.sha256() if hashed else None, cached, 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), STRIDE):
            part = view[start : start + STRIDE]
            write(self._handle, part)
            if self._hash is not None:
                self._hash.update(part)
            self.size += len(part)
            if not self._cached and self.size // STRIDE > (self.size - len(part)) // STRIDE:
                self.sync()

    def sync(self) -> None:
        """What has been written so far goes to the disk, and if it is not to stay, leaves the system's memory, which serves the next part again."""
        sync(self._handle)
        if not self._cached:
            with suppress(AttributeError, OSError):  # not everywhere, and no more than advice
                os.posix_fadvise(self._handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def entry(self) -> dict[str, Any]:
        """The file's line in a manifest: `{"sha256": hex, "size": bytes}`."""
        return {"sha256": self._hash.hexdigest(), "size": self.size}


Payload = bytes | Callable[[Sink], None]


def pending_path(final: Path) -> Path:
    """Where `final` is built before it is published."""
    return final.with_name(final.name + PENDING)


def write_file(final: Path, payload: Payload, *, needed: int | None = None, cached: bool = True) -> None:
    """Publish one file, replacing an older one. Raises UserError when the disk is full or refuses.

    Args:
        needed: bytes, for the message when the disk is full, where the payload is a function.
        cached: False for what only the next process would read, if this one dies: its bytes do not stay in the system's memory. Five times
            faster for gigabytes on a machine whose memory is handed to it page by page, as most virtual ones' is.
    """
    pending = pending_path(final)
    with reported(final, needed=needed or _size_of(payload)), _abandoned_on_error(pending):
        remove(pending)
        _write_new(pending, payload, hashed=False, cached=cached)
        publish(pending, final)
        sync(final.parent)


def write_json(final: Path, data: Any) -> None:
    """Publish `data` as JSON: sorted keys, ASCII (lone surrogates survive), no NaN."""
    write_file(final, json_bytes(data))


def publish_dir(final: Path, files: Mapping[str, Payload], info: Mapping[str, Any] | None = None, *, needed: int | None = None, cached: bool = True) -> None:
    """Publish a directory of files with a manifest that also carries `info` (JSON).

    A directory cannot be renamed onto another, so an older one of the same name steps aside first; `clean` brings it back if the process
    dies in between.

    Args:
        final: the directory; its parent exists.
        files: bytes, or a function that writes them to the sink it is given, by plain file name.
        needed: bytes the whole needs, for the message when the disk is full.
        cached: as for `write_file`.
    Raises:
        UserError: the disk is full or refuses; the older state is intact.
    """
    pending = pending_path(final)
    with reported(final, needed=needed or sum(map(_size_of, files.values()))), _abandoned_on_error(pending):
        remove(pending)
        pending.mkdir()
        entries = {name: _write_new(pending / name, payload, hashed=True, cached=cached).entry for name, payload in files.items()}
        _write_new(pending / MANIFEST, json_bytes({"format": 1, "files": entries, "info": dict(info or {}), "versions": versions()}), hashed=False)
        sync(pending)
        _swap(pending, final)
        sync(final.parent)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a published directory, its form checked and every listed file present at its listed size; no hashing.

    Raises UserError naming the file that is wrong and the mend.
    """
    manifest = read_json(directory / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != 1 or not isinstance(manifest.get("info"), dict):
        raise _damaged(directory / MANIFEST, "is not a manifest")
    for name, entry in files.items():
        path = directory / name
        if "/" in name or "\0" in name or name in {"", ".", ".."} or not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise _damaged(directory / MANIFEST, f"has a bad entry {name!r}")
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.get("size"):
            raise _damaged(path, "is missing or has the wrong size")
    return manifest


def verify_dir(directory: Path) -> dict[str, Any]:
    """`read_manifest`, and every file's sha256 compared with it."""
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        verify_file(directory / name, entry["sha256"])
    return manifest


def verify_file(path: Path, sha256: str) -> None:
    """Raise UserError unless the file has this content hash."""
    if file_sha256(path) != sha256:
        raise _damaged(path, "differs from its sha256")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file; UserError if it is missing, too large, or not JSON."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise _damaged(path, f"is larger than {_JSON_LIMIT >> 20} MB")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path, "is not JSON") from error


def json_bytes(data: Any) -> bytes:
    """Canonical JSON, so that equal content gives equal files."""
    return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def clean(root: Path) -> list[Path]:
    """Tidy up after a killed process: bring back directories caught stepping aside, remove every other `*.tmp` under `root`. Returns those."""
    found = [Path(folder) / name for folder, folders, names in os.walk(root) for name in (*folders, *names) if name.endswith(PENDING)]
    for path in found:
        original = path.with_name(path.name.removesuffix(_ASIDE))
        if path.name.endswith(_ASIDE) and path.is_dir() and not original.exists():
            publish(path, original)
        elif path.is_symlink() or path.exists():
            remove(path)
    return found


@cache
def versions() -> dict[str, str]:
    """Versions that decide the bits of a result; bit-identical resume holds while they stay the same."""
    return {name: _version(name) for name in ("muralist", "torch", "diffusers", "transformers", "safetensors", "av")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


@contextmanager
def reported(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn 'disk full', 'quota exceeded' and 'permission denied' into one line with the bytes needed and free; `needed` in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            need = f"{needed:,} bytes needed, " if needed else ""
            what = f"the disk is full: {need}{free_bytes(path):,} bytes free"
            raise UserError(what, where=str(path), fix="free some space (or raise the quota or file size limit) and run the same command again") from error
        if error.errno in _REFUSED:
            raise UserError(f"cannot write here ({error.strerror})", where=str(path), fix="choose another place or mend its permissions") from error
        raise


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the file system that holds `path`, or would."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def _abandoned_on_error(pending: Path) -> Iterator[None]:
    """Give the space back when a write fails; a failure to do so is left to the next start."""
    try:
        yield
    except Exception:
        with suppress(OSError):
            remove(pending)
        raise


def _swap(pending: Path, final: Path) -> None:
    """Rename `pending` to `final`, whatever directory stood there before."""
    if not final.exists():
        publish(pending, final)
        return
    aside = final.with_name(final.name + _ASIDE)
    remove(aside)
    publish(final, aside)
    try:
        publish(pending, final)
    except OSError:
        os.replace(aside, final)
        raise
    remove(aside)


def _write_new(path: Path, payload: Payload, *, hashed: bool, cached: bool = True) -> Sink:
    handle = open_new(path)
    with handle:
        sink = Sink(handle, hashed=hashed, cached=cached)
        if callable(payload):
            payload(sink)
        else:
            sink.write(payload)
        sink.sync()
    return sink


def _size_of(payload: Payload) -> int:
    return 0 if callable(payload) else len(payload)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path.name} {what}", where=str(path.parent), fix="remove this directory and run the same command again: what is in it is made anew")
