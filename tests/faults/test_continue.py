"""A run goes on where circumstances have changed, and takes nothing with it that is not its own."""

from __future__ import annotations

import json
import shutil

import pytest

from muralist.cli._options import VideoOptions
from muralist.cli.generate import prepare
from muralist.store.run import RunDirectory
from tests.shell import muralist

SMALL = ("--size", "64x64", "--num-frames", 1, "--seed", 1)


@pytest.fixture
def run(tiny22, tmp_path):
    """A run directory as `generate` leaves it when it is stopped at once."""
    job = prepare("a ball", VideoOptions(model=str(tiny22), size="64x64", seed=1, num_frames=1), None)
    folder = tmp_path / "a.mp4.run"
    RunDirectory.create(folder, job.record(tmp_path / "a.mp4", folder, job.plan(folder).request)).close()
    return folder


def test_with_less_memory_than_at_the_start(run, monkeypatch):
    """The decoder's plan decides the last bits, so it stays that of the start."""
    monkeypatch.setattr("muralist.cost.machine._free_memory", lambda: 2 * 10**9)
    assert muralist("resume", run).code == 0
    assert (run.parent / "a.mp4").exists() and not run.exists()


def test_the_same_command_goes_on_with_less_memory(run, tiny22, monkeypatch):
    monkeypatch.setattr("muralist.cost.machine._free_memory", lambda: 2 * 10**9)
    assert muralist("generate", "a ball", "--model", tiny22, "-o", run.parent / "a.mp4", *SMALL).code == 0


def test_a_linked_run_directory_goes_with_its_link(tiny22, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert muralist("generate", "a ball", "--model", tiny22, "-o", tmp_path / "out.mp4", "--run-dir", tmp_path / "link", *SMALL).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "out.mp4.json"]


def test_what_somebody_put_into_the_run_directory_stays(run):
    (run / "notes.txt").write_text("a thesis")
    assert muralist("resume", run).code == 0
    assert [p.name for p in run.iterdir()] == ["notes.txt"]


def test_a_configuration_with_a_newer_key_still_loads(tiny22, tmp_path):
    base = shutil.copytree(tiny22, tmp_path / "base")
    config = base / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"of_a_later_diffusers": 1}))
    assert muralist("generate", "a ball", "--model", base, "-o", tmp_path / "out.mp4", *SMALL).code == 0
