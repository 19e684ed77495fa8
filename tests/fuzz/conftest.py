"""Fixtures of what is damaged or wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that comes after loading began came too late."""

    def refuse(*_):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr("muralist.base.Base.__init__", refuse)


@pytest.fixture
def base(tiny22: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny22, tmp_path / "base"))
