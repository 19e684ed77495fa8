"""Fixtures of all tests, and one rule: a test never talks to the network."""

from __future__ import annotations

import os
import signal

# Before torch is imported: idle threads must not spin, or two test processes slow each other down tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from muralist.cost import machine
from muralist.nn import fp8
from muralist.stages.encode import encode
from muralist.store.video_write import EncodeOptions
from muralist.types import FrameChunk
from tests import tiny, training

# A shell starts what runs in the background with Ctrl-C ignored, and so would be every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a CUDA device is skipped where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """Two threads where the machine is ours, one where it is busy (set OMP_NUM_THREADS)."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


@pytest.fixture(scope="session", autouse=True)
def calibrated_once() -> None:
    """Every command measures the machine for its plan: a third of a second, once here and not for each of a thousand commands."""
    machine._matmul_rate, machine._copy_rate = cache(machine._matmul_rate), cache(machine._copy_rate)


@pytest.fixture(scope="session")
def tiny21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan2.1-flavoured base."""
    return tiny.add_parts(tiny.save_pipeline(tmp_path_factory.mktemp("base") / "tiny21", "2.1"))


@pytest.fixture(scope="session")
def tiny22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan2.2-flavoured base."""
    return tiny.add_parts(tiny.save_pipeline(tmp_path_factory.mktemp("base") / "tiny22", "2.2"))


@pytest.fixture(scope="session")
def wide21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny21, with sides that are multiples of 16."""
    return tiny.add_parts(tiny.save_pipeline(tmp_path_factory.mktemp("base") / "wide21", "2.1", head_dim=16))


@pytest.fixture(scope="session")
def wide22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny22, with sides that are multiples of 16."""
    return tiny.add_parts(tiny.save_pipeline(tmp_path_factory.mktemp("base") / "wide22", "2.2", head_dim=16))


@pytest.fixture
def forget_fp8() -> Iterator[None]:
    """Whether products in 8 bits run here is found out anew, and so after a test in which they were made to fail."""
    fp8.why_not.cache_clear()
    yield
    fp8.why_not.cache_clear()


@pytest.fixture(params=["2.1", "2.2"])
def tiny_base(request: pytest.FixtureRequest) -> Path:
    """Either flavour: a test that takes it runs on both."""
    return request.getfixturevalue("tiny" + request.param.replace(".", ""))


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips whose frames say which they are: red is the frame's number, blue the column."""
    folder = tmp_path_factory.mktemp("footage")
    for name in ("a", "b"):
        frames = torch.zeros(21, 96, 192, 3)
        frames[..., 0] = torch.linspace(0.1, 0.9, 21)[:, None, None]
        frames[..., 2] = torch.linspace(0, 1, 192)
        encode(iter([FrameChunk(frames, 0)]), training.SIZE, folder / f"{name}.mp4", EncodeOptions(crf=4))
    training.write(folder, [("a.mp4", "a red ball", "7"), ("b.mp4", "a blue star", "3.5")])
    return folder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of two clips a file."""
    monkeypatch.setattr("muralist.data.latents.SHARD", 2)
