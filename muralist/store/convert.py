"""From a pickle to safetensors, the only way a pickle comes in: a child process with limits reads it (`pickle_copy`), never this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from muralist.errors import UserError
from muralist.store import pickle_copy

Place = Sequence[str]
ZIP = b"PK\x03\x04"
LFS = b"version https://git-lfs"
MEND = "get the weights as safetensors, or save them again as a plain dictionary of tensors"


def convert(source: Path, target: Path, places: Sequence[Place] = ((),), *, timeout: float = 1800) -> int:
    """Write the tensors of the pickle `source` to the safetensors file `target`, which must not exist; returns how many there are.

    `places`: paths of keys to the dictionary of tensors in the pickle, the first that leads to one serves; `timeout` in seconds.

    Raises:
        UserError: not a file of `torch.save`, one that wants more than tensors and plain values, or one that ran out of its limits.
    """
    _check_start(source)
    command = [sys.executable, "-I", pickle_copy.__file__, str(source.absolute()), str(target.absolute()), json.dumps([list(p) for p in places])]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False, env=environment)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {"error": f"not read within {timeout:g} s"}
    except ValueError:
        answer = {"error": f"the reader stopped with code {done.returncode}, as it does out of memory or time"}
    if "error" in answer:
        target.unlink(missing_ok=True)
        raise _refused(source, answer)
    return answer["tensors"]


def _check_start(source: Path) -> None:
    """Only the zip form can be read in place; older pickles are refused before any of them is read."""
    try:
        with open(source, "rb") as handle:
            start = handle.read(len(LFS))
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})", where="file", fix="check the path") from None
    if start == LFS:
        raise UserError(f"{source.name} is a git-lfs pointer, not the weights", where="file", fix="fetch the file itself (git lfs pull)")
    if not start.startswith(ZIP):
        raise UserError(f"{source.name} is no file of torch.save in its zip form", where="file", fix=MEND)


def _refused(source: Path, answer: dict[str, str]) -> UserError:
    if "code" in answer:
        return UserError(f"{source.name} wants to run {answer['code']}, which tensors do not need; it was not run", where="file", fix=MEND)
    return UserError(f"{source.name} cannot be converted ({answer['error']:.110})", where="file", fix=MEND)
