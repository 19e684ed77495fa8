"""A run: the directory that holds everything a generation has finished so far, so that it can be killed and resumed at any time.

    RUN/request.json            what was asked (resolved options) and with which versions
    RUN/proxy/                  a stage's result: tensors.safetensors, MANIFEST.json
    RUN/refine-step-000010/     a numbered step inside a stage; at least the two newest complete ones are kept
    RUN/scratch/decode/         a stage's own working files
    RUN/lock                    held while a process works here

Everything is published whole (`store.atomic`). The newest step is found by scanning names and verifying manifests, never through a
pointer. The lock is the kernel's (flock): it dies with its process, so a killed run never has to be unlocked by hand.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from muralist.errors import UserError
from muralist.store import atomic
from muralist.store.tensors import load_tensors, total_bytes, writer

FORMAT = 5  # of request.json
TYPED, WEIGHTS, SETTLED = "typed", "weights", "request"  # in it: what was asked, a digest of what computes it, and what a plan has made of it
_REQUEST, _LOCK, _SCRATCH, _TENSORS = "request.json", "lock", "scratch", "tensors.safetensors"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_STEP = re.compile(r"[a-z][a-z0-9_]*-step-\d+")
_log = logging.getLogger(__name__)

Saved = tuple[dict[str, torch.Tensor], dict[str, Any]]


class RunDirectory:
    """Results of one generation, by stage. Use `create` or `open`; close it, or use it as a context manager, to release the lock."""

    def __init__(self, root: Path, request: dict[str, Any], lock: int):
        self.root, self.request, self._lock = root, request, lock

    # --- open and close -----------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, request: Mapping[str, Any], *, dtype: str | None = None) -> RunDirectory:
        """Start a run, or resume it if `path` already holds one for the same request.

        Args:
            path: the directory; made if missing, and then empty or a run.
            request: the resolved options, JSON values.
            dtype: what the models compute in here. A run begun in another type is gone on with, and that is told.
        Raises:
            UserError: another process works here, the directory holds something else, or its request differs (the first difference is named).
        """
        path = Path(path)
        wanted = json.loads(atomic.json_bytes(dict(request)))
        with atomic.reported(path):
            _make_root(path)
        if (path / _REQUEST).exists():
            _read_request(path)  # nothing is touched in a folder that is not ours
        lock = _acquire(path)
        try:
            atomic.clean(path)
            if not (path / _REQUEST).exists():
                atomic.write_json(path / _REQUEST, {"format": FORMAT, "options": wanted, "versions": atomic.versions(), "dtype": dtype})
            stored = _read_request(path)
            _require_same(path, stored["options"], wanted)
            if stored["options"] != wanted:  # the same weights lie elsewhere now: a resume has to find them
                atomic.write_json(path / _REQUEST, stored | {"options": wanted})
            if stored.get("versions") != atomic.versions():
                _log.warning("%s was started with other package versions; the result may differ in the last bits", path)
            begun = stored.get("dtype")
            if None not in (begun, dtype) and begun != dtype:
                _log.warning("%s was started in %s and goes on in %s; the result lies between those of both", path, begun, dtype)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, wanted, lock)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run to resume or read it. Raises UserError if `path` is no run or another process works there."""
        path = Path(path)
        if not (path / _REQUEST).is_file():
            raise UserError("not a run directory", where=str(path), fix="give the directory that `muralist generate --run-dir` made")
        _read_request(path)
        lock = _acquire(path)
        try:
            atomic.clean(path)
            return cls(path, _read_request(path)["options"], lock)
        except BaseException:
            os.close(lock)
            raise

    @staticmethod
    def stored(path: Path) -> dict[str, Any] | None:
        """The options of the run at `path`, without touching it; None where there is none of this version."""
        try:
            return _read_request(Path(path))["options"]
        except UserError:
            return None

    def remove(self) -> None:
        """Release the lock and remove what the run has made, and the directory if nothing else is in it."""
        self.close()
        for entry in self.root.iterdir():
            if entry.name in (_REQUEST, _LOCK, _SCRATCH) or _is_complete(entry) or _STEP.fullmatch(entry.name):
                atomic.remove(entry)
        with suppress(OSError):  # something of somebody else's, a mount point, the current directory
            self.root.resolve().rmdir()
        if self.root.is_symlink() and not self.root.exists():
            self.root.unlink()

    def close(self) -> None:
        """Release the lock; the object is then of no more use."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- results of stages --------------------------------------------------------------------------------------------------------

    def has(self, stage: str) -> bool:
        """Whether the stage's result is there, complete by its manifest (content is verified by `load`)."""
        return _is_complete(self.root / _checked(stage))

    def save(self, stage: str, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any] | None = None) -> None:
        """Publish a stage's result. Raises FloatingPointError on NaN or infinity: nothing non-finite is ever stored."""
        self._publish(self.root / _checked(stage), stage, tensors, info)

    def load(self, stage: str) -> Saved:
        """(tensors by name, info) of a stage, sha256 verified; UserError if missing or damaged."""
        return _load(self.root / _checked(stage))

    def info(self, stage: str) -> dict[str, Any]:
        """What was saved with a stage's result beside its tensors, which are not read."""
        return atomic.read_manifest(self.root / _checked(stage))["info"]

    # --- numbered steps inside a stage --------------------------------------------------------------------------------------------

    def save_step(self, stage: str, step: int, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any] | None = None, *, keep: int = 2) -> None:
        """Publish step `step` (0 or more) of a stage, then purge all but the `keep` newest complete ones; damaged ones do not count."""
        if keep < 2:
            raise ValueError("keep at least 2 steps: the newest may turn out damaged")
        self._publish(self.root / f"{_checked(stage)}-step-{step:06d}", f"{stage} step {step}", tensors, info, cached=False)
        complete = [path for _, path in self._steps(stage) if _is_complete(path)]
        for path in complete[keep:]:
            atomic.remove(path)

    def latest_step(self, stage: str) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """(step, tensors, info) of the newest step that is intact, content verified; None if there is none."""
        for step, path in self._steps(stage):
            try:
                return (step, *_load(path))
            except UserError as error:
                _log.warning("%s is damaged, falling back to an older step: %s", path.name, error)
        return None

    def drop_steps(self, stage: str) -> None:
        """Remove all steps of a stage, once its result is published."""
        for _, path in self._steps(stage):
            atomic.remove(path)

    # --- working files ------------------------------------------------------------------------------------------------------------

    def scratch(self, stage: str) -> Path:
        """The stage's own directory for working files, made if missing. It survives kills; files ending in .tmp in it do not."""
        path = self.root / _SCRATCH / _checked(stage)
        with atomic.reported(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def drop_scratch(self, stage: str) -> None:
        """Remove the stage's working files."""
        atomic.remove(self.root / _SCRATCH / _checked(stage))

    def _publish(self, path: Path, what: str, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any] | None, cached: bool = True) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise FloatingPointError(f"{what}: tensor {name!r} holds NaN or infinity; nothing was stored")
        atomic.publish_dir(path, {_TENSORS: writer(tensors)}, info, needed=total_bytes(tensors), cached=cached)

    def _steps(self, stage: str) -> list[tuple[int, Path]]:
        """Step directories, newest first. The pattern is anchored: leftovers and neighbours with similar names never match."""
        pattern = re.compile(re.escape(_checked(stage)) + r"-step-(\d+)")
        found = ((pattern.fullmatch(path.name), path) for path in self.root.iterdir())
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _make_root(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError("not a directory", where=str(path), fix="choose another run directory")
    path.mkdir(parents=True, exist_ok=True)
    ours = {_REQUEST, _LOCK, _REQUEST + atomic.PENDING}
    names = {entry.name for entry in path.iterdir()}
    if _REQUEST not in names and names - ours:
        raise UserError("the directory is not empty and holds no run", where=str(path), fix="choose an empty or new run directory")


def _acquire(root: Path) -> int:
    """Take the lock; returns its file descriptor. The process id inside only serves the message."""
    with atomic.reported(root):
        descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        ours, fix = holder == str(os.getpid()), "wait for it to end, stop it, or choose another run directory"
        what = "a video of this process is open in it" if ours else f"process {holder} is working in it"
        raise UserError(what, where=str(root), fix="close() that video first, or choose another run directory" if ours else fix) from error
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"this file system takes no locks ({error.strerror})", where=str(root), fix="choose a run directory on a local disk") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _read_request(root: Path) -> dict[str, Any]:
    stored = atomic.read_json(root / _REQUEST)
    if not isinstance(stored, dict) or not isinstance(stored.get("options"), dict) or stored.get("format") != FORMAT:
        raise UserError("request.json is not a request of this version", where=str(root), fix="choose another run directory")
    return stored


def _require_same(root: Path, stored: Any, wanted: Any) -> None:
    """Options are told by their own names, without those of the records that hold them. Where the model lies is none: its weights are compared."""
    for name, old, new in _differences(stored, wanted):
        if name == "folder":
            continue
        if name == WEIGHTS:
            fix = "bring the earlier files back, or choose another run directory"
            raise UserError("the model's weights or configurations have changed since this run was started", where=str(root), fix=fix)
        if name.startswith(f"{SETTLED}."):
            raise UserError("another process has begun it meanwhile", where=str(root), fix="run the same command again: it goes on as that one has planned")
        own = name.removeprefix(f"{TYPED}.").removeprefix("config.")
        if own == "model":  # of the same weights it would have had the name in the run
            what = f"the model {new} has other weights or configurations than {old}, with which this run was started"
            raise UserError(what, where=str(root), fix="bring the earlier files back, or choose another run directory")
        again = "" if own == "output" and "null" in (old, new) else f"ask for {old} again to resume it, or "  # from Python there is no output
        fix = f"{again}choose another run directory"
        raise UserError(f"this run was started with {own} = {old}, now it is {new}", where=str(root), fix=fix)


def _differences(stored: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted option, stored value, new value) of every difference, in the order of names; first what was typed, last what a plan has settled."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys(), key=lambda key: (key == SETTLED, key != TYPED or key not in stored or key not in wanted, key)):
            yield from _differences(stored.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif stored != wanted or (type(stored) is not type(wanted) and {type(stored), type(wanted)} != {int, float}):  # 16 and 16.0 are one number, 1 and true not
        yield name or "request", json.dumps(stored)[:60], json.dumps(wanted)[:60]


def _is_complete(path: Path) -> bool:
    try:
        return _TENSORS in atomic.read_manifest(path)["files"]
    except UserError:
        return False


def _load(path: Path) -> Saved:
    manifest = atomic.read_manifest(path)
    if _TENSORS not in manifest["files"]:
        raise UserError(f"{_TENSORS} is not in the manifest", where=str(path), fix="remove this directory and run the same command again")
    return load_tensors(path / _TENSORS, manifest["files"][_TENSORS]["sha256"]), manifest["info"]


def _checked(stage: str) -> str:
    if not _NAME.fullmatch(stage) or stage in (_SCRATCH, _LOCK):
        raise ValueError(f"not a stage name: {stage!r}")
    return stage
