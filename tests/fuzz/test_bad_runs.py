"""Run directories that were damaged, changed or are in use: one line, exit code 2, before any weight is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from muralist.cli._options import VideoOptions
from muralist.cli.generate import prepare
from muralist.store.run import RunDirectory
from tests.shell import muralist

pytestmark = pytest.mark.usefixtures("no_weights")


@pytest.fixture
def run(tiny22, tmp_path):
    """A run directory as `generate` leaves it when it is stopped at once."""
    job = prepare("a ball", VideoOptions(model=str(tiny22), size="64x64", seed=1), None)
    folder = tmp_path / "a.mp4.run"
    RunDirectory.create(folder, job.record(tmp_path / "a.mp4", folder, job.request)).close()
    return folder


def _change(folder: Path, *path: str, to) -> None:
    stored = json.loads((folder / "request.json").read_text())
    place = stored
    for name in path[:-1]:
        place = place[name]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    (folder / "request.json").write_text(json.dumps(stored))


R = ("options", "request")
CORRUPTIONS = {
    "empty": lambda f: (f / "request.json").write_text(""),
    "no request": lambda f: (f / "request.json").unlink(),
    "binary": lambda f: (f / "request.json").write_bytes(os.urandom(500)),
    "a list": lambda f: (f / "request.json").write_text("[1, 2]"),
    "nested too deep": lambda f: (f / "request.json").write_text("[" * 100_000),
    "other format": lambda f: _change(f, "format", to=99),
    "no options": lambda f: _change(f, "options", to=None),
    "options are text": lambda f: _change(f, "options", to="all"),
    "no output": lambda f: _change(f, "options", "output", to=None),
    "output is a number": lambda f: _change(f, "options", "output", to=7),
    "output elsewhere": lambda f: _change(f, "options", "output", to="no/such/folder/a.mp4"),
    "request is text": lambda f: _change(f, *R, to="a ball"),
    "no request inside": lambda f: _change(f, *R, to=None),
    "no prompt": lambda f: _change(f, *R, "prompt", to=None),
    "prompt is a list": lambda f: _change(f, *R, "prompt", to=["a", "ball"]),
    "seed is text": lambda f: _change(f, *R, "seed", to="one"),
    "seed is true": lambda f: _change(f, *R, "seed", to=True),
    "grid is gone": lambda f: _change(f, *R, "grid", to=None),
    "width is negative": lambda f: _change(f, *R, "grid", "width", to=-64),
    "width is a fraction": lambda f: _change(f, *R, "grid", "width", to=64.5),
    "unknown part": lambda f: _change(f, *R, "config", "refine", "kind", to="os.system"),
    "part without kind": lambda f: _change(f, *R, "config", "refine", "kind", to=None),
    "refine is gone": lambda f: _change(f, *R, "config", "refine", to=None),
    "surplus field": lambda f: _change(f, *R, "surplus", to=1),
    "surplus part field": lambda f: _change(f, *R, "config", "surplus", to=1),
    "unknown mode": lambda f: _change(f, *R, "config", "upsample", "mode", to="magic"),
    "steps out of range": lambda f: _change(f, *R, "config", "refine", "num_inference_steps", to=0),
    "model is gone": lambda f: _change(f, "options", "folder", to="/no/such/model"),
    "model is a number": lambda f: _change(f, "options", "folder", to=7),
}  # fmt: skip


@pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_corrupt_runs(corruption, run):
    corruption(run)
    assert muralist("resume", run).error


def test_a_run_is_not_gone_on_with_on_other_weights(base, tmp_path):
    job = prepare("a ball", VideoOptions(model=str(base), size="64x64", seed=1), None)
    folder = tmp_path / "a.mp4.run"
    RunDirectory.create(folder, job.record(tmp_path / "a.mp4", folder, job.request)).close()
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert "weights or configurations have changed" in muralist("resume", folder).error


def test_a_run_in_use(run):
    with RunDirectory.open(run):
        assert "a video of this process is open in it" in muralist("resume", run).error  # the command runs in here
