"""Run directories and tensors on disk: what is saved comes back bit for bit, or one line says what is wrong."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save

from muralist.errors import UserError
from muralist.store import atomic
from muralist.store.run import RunDirectory
from muralist.store.tensors import load_tensors, save_tensors

REQUEST = {"prompt": "a red ball", "size": {"height": 64, "width": 128}, "seed": 0}


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(tmp_path / "run", REQUEST) as run:
        yield run


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sample(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"z": torch.randn(1, 4, 3, 5, 7, generator=generator), "step": torch.tensor(seed)}


# --- tensors ------------------------------------------------------------------------------------------------------------------------


def test_tensors_round_trip_in_every_dtype_and_layout(tmp_path):
    base = torch.randn(6, 5)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors = {str(dtype): (base * 10).abs().to(dtype) for dtype in dtypes} | {
        "bool": base > 0,
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "transposed": base.t(),
        "strided": base[::2, 1:4],
        "parameter": torch.nn.Parameter(base),
        "naïve \n name": base,
    }
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors, {"note": "é"})
    loaded = load_tensors(path, atomic.file_sha256(path))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape and bits(loaded[name]) == bits(tensor)
    assert save(load_file(tmp_path / "x.safetensors"))  # the library's own writer accepts what it read


def test_empty_set_of_tensors(tmp_path):
    save_tensors(tmp_path / "x", {})
    assert load_tensors(tmp_path / "x") == {}


def test_unknown_dtype_is_a_bug_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        save_tensors(tmp_path / "x", {"a": torch.zeros(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


# --- results and steps --------------------------------------------------------------------------------------------------------------


def test_stage_round_trip_and_replacement(run):
    assert not run.has("proxy")
    with pytest.raises(UserError):
        run.load("proxy")
    for seed in (0, 1):
        run.save("proxy", sample(seed), {"grid": [1, 2], "seed": seed})
        tensors, info = run.load("proxy")
        assert run.has("proxy") and info == {"grid": [1, 2], "seed": seed} and all(bits(tensors[k]) == bits(v) for k, v in sample(seed).items())


def test_nothing_non_finite_is_stored(run):
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match=r"refine step 3.*'z'"):
            run.save_step("refine", 3, {"z": torch.tensor([0.0, bad])})
    assert run.latest_step("refine") is None


def test_latest_step_is_the_highest_intact_one(run):
    assert run.latest_step("refine") is None
    for step in (5, 10, 100):
        run.save_step("refine", step, sample(step), {"sigma": step / 100}, keep=3)
    (run.root / "refine-step-000200.tmp").mkdir()
    (run.root / "refine-step-000300x").mkdir()
    (run.root / "xrefine-step-000400").mkdir()
    (run.root / "refine-step-000500").mkdir()  # no manifest
    step, tensors, info = run.latest_step("refine")
    assert (step, info) == (100, {"sigma": 1.0}) and bits(tensors["z"]) == bits(sample(100)["z"])
    path = run.root / "refine-step-000100" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert run.latest_step("refine")[0] == 10
    run.drop_steps("refine")
    assert run.latest_step("refine") is None


def test_purge_keeps_two_and_counts_complete_ones_only(run):
    for step in range(4):
        run.save_step("refine", step, sample(step))
    assert sorted(p.name for p in run.root.glob("refine-*")) == ["refine-step-000002", "refine-step-000003"]
    for step in range(10, 15):  # five saves that a crash left incomplete must not evict the good ones
        (run.root / f"refine-step-{step:06d}").mkdir()
    run.save_step("refine", 4, sample(4))
    assert run.latest_step("refine")[0] == 4
    (run.root / "refine-step-000004" / "MANIFEST.json").unlink()
    assert run.latest_step("refine")[0] == 3


def test_scratch_and_stage_names(run):
    (run.scratch("decode") / "rows").write_bytes(b"x")
    assert (run.scratch("decode") / "rows").exists()
    run.drop_scratch("decode")
    assert not list(run.scratch("decode").iterdir())
    for name in ("../x", "a/b", "", "Proxy", "scratch", "lock", "a-step-000001", "x.tmp"):
        with pytest.raises(ValueError, match="not a stage name"):
            run.save(name, {})


# --- open, resume, lock -------------------------------------------------------------------------------------------------------------


def test_resume_keeps_results_and_clears_leftovers(tmp_path):
    with RunDirectory.create(tmp_path / "r", REQUEST) as run:
        run.save("proxy", sample())
        (run.root / "refine.tmp").mkdir()
        (run.root / "refine.tmp" / "half").write_bytes(b"x")
        (run.scratch("decode") / "y.tmp").write_bytes(b"x")
    with RunDirectory.create(tmp_path / "r", dict(reversed(REQUEST.items()))) as run:
        assert run.has("proxy") and not list(run.root.rglob("*.tmp"))
    with RunDirectory.open(tmp_path / "r") as run:
        assert run.request == REQUEST


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "seed = 0, now it is 1"),
        ({"size": {"height": 64, "width": 256}}, "size.width = 128, now it is 256"),
        ({"extra": True}, "extra = null, now it is true"),
        ({"seed": 0.0, "prompt": "b"}, 'prompt = "a red ball", now it is "b"'),
    ],
)
def test_other_request_names_the_first_difference(tmp_path, change, message):
    RunDirectory.create(tmp_path / "r", REQUEST).close()
    with pytest.raises(UserError, match=message):
        RunDirectory.create(tmp_path / "r", REQUEST | change)
    RunDirectory.create(tmp_path / "r", REQUEST).close()  # the lock was released


@pytest.mark.parametrize("change", [{"guidance_scale": 3.0}, {"folder": "/b/base"}, {"folder": None}], ids=str)
def test_the_same_request_said_otherwise_goes_on(tmp_path, change):
    """A number without a point, and another place of the same weights."""
    request = REQUEST | {"guidance_scale": 3, "folder": "/a/base", "weights": "same"}
    RunDirectory.create(tmp_path / "r", request).close()
    RunDirectory.create(tmp_path / "r", request | change).close()
    assert RunDirectory.stored(tmp_path / "r") == request | change  # a resume finds the weights where they are now
    with pytest.raises(UserError, match="weights or configurations have changed"):
        RunDirectory.create(tmp_path / "r", request | change | {"weights": "others"})


def test_another_type_is_told_to_who_goes_on(tmp_path, caplog):
    RunDirectory.create(tmp_path / "r", REQUEST, dtype="float32").close()
    RunDirectory.create(tmp_path / "r", REQUEST, dtype="float32").close()
    assert not caplog.records
    RunDirectory.create(tmp_path / "r", REQUEST, dtype="bfloat16").close()
    assert "started in float32 and goes on in bfloat16" in caplog.text


def test_true_is_no_number(tmp_path):
    RunDirectory.create(tmp_path / "r", {"seed": 1}).close()
    with pytest.raises(UserError, match="seed = 1, now it is true"):
        RunDirectory.create(tmp_path / "r", {"seed": True})


def test_other_versions_are_told_to_who_goes_on_only(tmp_path, caplog):
    RunDirectory.create(tmp_path / "r", REQUEST).close()
    record = tmp_path / "r" / "request.json"
    record.write_text(record.read_text().replace(atomic.versions()["torch"], "1.0"))
    RunDirectory.stored(tmp_path / "r")
    RunDirectory.open(tmp_path / "r").close()
    assert not caplog.messages
    RunDirectory.create(tmp_path / "r", REQUEST).close()
    assert ["other package versions" in text for text in caplog.messages] == [True]


def test_wrong_places_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "request.json").write_text("[]")
    for name in ("file", "full", "bad"):
        with pytest.raises(UserError):
            RunDirectory.create(tmp_path / name, REQUEST)
    for name in ("missing", "full", "bad"):
        with pytest.raises(UserError):
            RunDirectory.open(tmp_path / name)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_second_process_is_refused_and_a_dead_one_taken_over(tmp_path):
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        RunDirectory.create(tmp_path / "r", REQUEST)
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    with pytest.raises(UserError, match=f"process {pid} is working in it"):
        RunDirectory.open(tmp_path / "r")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with RunDirectory.open(tmp_path / "r") as run:
        assert run.request == REQUEST
        with pytest.raises(UserError, match="a video of this process is open in it"):
            RunDirectory.open(tmp_path / "r")


# --- damaged files ------------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One random change: flipped bit, cut, junk, repeat, zeros, or something else altogether."""
    at = rng.randrange(len(data))
    kinds = (
        data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        data[:at],
        data + rng.randbytes(1 + at % 50),
        data[:at] + rng.randbytes(8) + data[at + 8 :],
        data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :],
        rng.choice([b"", b"PK\x03\x04", b"<html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", (1 << 40).to_bytes(8, "little") + b"{}"]),
    )
    return rng.choice([k for k in kinds if k != data])


@pytest.mark.parametrize("name", ["tensors.safetensors", "MANIFEST.json"])
def test_200_mutations_load_whole_or_not_at_all(run, name):
    run.save("proxy", sample(), {"grid": [29, 64, 128]})
    path, rng = run.root / "proxy" / name, random.Random(name)
    good = path.read_bytes()
    refused = 0
    for _ in range(200):
        path.write_bytes(mutated(good, rng))
        try:
            tensors, _ = run.load("proxy")
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
        else:  # a change in the manifest's own prose (info, versions) may pass; the tensors never differ
            assert name == "MANIFEST.json" and bits(tensors["z"]) == bits(sample()["z"])
        run.has("proxy")
    assert refused == 200 or (name == "MANIFEST.json" and refused > 100)


@pytest.mark.parametrize("make", ["directory", "link", "missing"])
def test_not_a_plain_file(run, make, tmp_path):
    run.save("proxy", sample())
    path = run.root / "proxy" / "tensors.safetensors"
    os.rename(path, tmp_path / "away")
    if make == "directory":
        path.mkdir()
    elif make == "link":
        path.symlink_to(tmp_path / "away")
    assert not run.has("proxy")
    with pytest.raises(UserError):
        run.load("proxy")


def test_disk_full_in_a_step_keeps_the_older_one(run, monkeypatch):
    run.save_step("refine", 1, sample(1))
    monkeypatch.setattr(atomic, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"1,\d\d\d bytes needed|\d+ bytes needed"):
        run.save_step("refine", 2, sample(2))
    monkeypatch.undo()
    assert run.latest_step("refine")[0] == 1 and not list(run.root.glob("*.tmp"))
    run.save_step("refine", 2, sample(2))
    assert run.latest_step("refine")[0] == 2
