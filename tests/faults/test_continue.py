"""A run goes on where circumstances have changed, and takes nothing with it that is not its own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from muralist.cli._options import VideoOptions
from muralist.cli.compare import words
from muralist.cli.generate import prepare
from muralist.store.run import RunDirectory
from tests.shell import muralist

SMALL = ("--size", "64x64", "--num-frames", 1, "--seed", 1)


def stopped(tmp_path, **options):
    """A run directory as `generate` leaves it when it is stopped at once."""
    job = prepare("a ball", VideoOptions(size="64x64", seed=1, num_frames=1, **options), None)
    folder = tmp_path / "a.mp4.run"
    RunDirectory.create(folder, job.record(tmp_path / "a.mp4", folder, job.plan(folder).request)).close()
    return folder


def edited(folder, change):
    """The run's record with a change."""
    record = json.loads((folder / "request.json").read_text())
    change(record)
    (folder / "request.json").write_text(json.dumps(record))


@pytest.fixture
def run(tiny22, tmp_path):
    return stopped(tmp_path, model=str(tiny22))


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


def test_a_folder_named_as_the_embedded_base_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "miniature").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "--model" not in list(words(VideoOptions()))
    answer = muralist("resume", stopped(tmp_path, recipe="direct"), "--keep-run")
    assert answer.code == 0, answer.err


def test_a_base_is_the_same_wherever_it_lies(tiny22, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "base").symlink_to(tiny22)
    monkeypatch.chdir(tmp_path / "a")
    folder = stopped(tmp_path, model="base")
    monkeypatch.chdir(tmp_path / "b")
    answer = muralist("generate", "a ball", "--model", "base", "-o", folder.parent / "a.mp4", *SMALL)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("command", ("generate", "resume"))
def test_other_versions_are_told_once(command, run, tiny22, caplog):
    edited(run, lambda record: record["versions"].update(torch="1.0"))
    start = ("a ball", "--model", tiny22, "-o", run.parent / "a.mp4", *SMALL[:-2]) if command == "generate" else (run,)
    assert muralist(command, *start).code == 0
    assert ["other package versions" in text for text in caplog.messages] == [True], caplog.messages


@pytest.mark.parametrize(
    "name, value, finished",
    [
        ("num_frames", 9, ["proxy"]),
        ("num_frames", 9, ["proxy", "upsample"]),
        ("width", 192, ["proxy", "upsample"]),  # of both widths the proxy is the same
        ("width", 192, ["proxy", "upsample", "refine"]),
    ],
    ids=str,
)
def test_results_of_another_size_are_refused(name, value, finished, tiny22, tmp_path):
    """A record that was edited by hand, alike in both of its places."""
    folder = tmp_path / "a.mp4.run"
    size = ("--size", "160x64", "--num-frames", 5, "--seed", 1)
    assert muralist("generate", "a ball", "--model", tiny22, "-o", tmp_path / "a.mp4", *size, "--keep-run").code == 0
    for stage in {"proxy", "upsample", "refine", "scratch"} - set(finished):
        shutil.rmtree(folder / stage)
    edited(folder, lambda record: [record["options"][place]["grid"].update({name: value}) for place in ("typed", "request")])
    answer = muralist("resume", folder)
    assert answer.code == 2 and "the run directory is damaged" in answer.err.splitlines()[-1], answer.err


def test_steps_of_another_size_are_refused(tiny22, tmp_path):
    folder = stopped(tmp_path, model=str(tiny22), recipe="direct")
    with RunDirectory.open(folder) as run:
        run.save_step("refine", 1, {"latent": torch.zeros(1, 48, 1, 4, 6)})
    answer = muralist("resume", folder)
    assert answer.code == 2 and "the run directory is damaged" in answer.err.splitlines()[-1], answer.err
    assert not (folder / "refine").exists(), "refused before the other steps are computed"
