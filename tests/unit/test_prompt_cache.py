"""A prompt seen before needs no text encoder; nothing that can happen to the cache fails a run or writes elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import Note
from muralist.stages import prompt
from muralist.stages.prompt import encode_prompt
from muralist.store import prompt_cache


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A cache of its own, and a base that is worth caching."""
    monkeypatch.setenv(prompt_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(prompt, "WORTH_KEEPING", 0)
    return tmp_path / "cache" / "prompts"


def base_of(model: Path, dtype: torch.dtype = torch.float32) -> Base:
    return Base(inspect_base(str(model)), torch.device("cpu"), dtype)


def without_encoder(model: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    base = base_of(model)
    monkeypatch.setattr(base, "text_encoder", lambda: pytest.fail("the text encoder was asked for"))
    return base


def test_a_prompt_seen_before_comes_from_the_cache_bit_for_bit(tiny21, folder, monkeypatch):
    first = encode_prompt(base_of(tiny21), "a red ball", "blue sand")
    again = encode_prompt(without_encoder(tiny21, monkeypatch), "a  red ball ", "blue sand")
    assert torch.equal(first.positive, again.positive) and torch.equal(first.negative, again.negative)
    assert len(list(folder.iterdir())) == 2


def test_another_prompt_type_length_or_model_is_another_entry(tiny21, tiny22, folder):
    encode_prompt(base_of(tiny21), "a red ball", "")
    encode_prompt(base_of(tiny21), "a blue ball", "")
    assert len(list(folder.iterdir())) == 3
    encode_prompt(base_of(tiny21, torch.bfloat16), "a red ball", "")
    assert len(list(folder.iterdir())) == 5
    keys = {prompt_cache.key_of(**{"model": "a", "length": 512} | change) for change in ({}, {"model": "b"}, {"length": 16})}
    assert len(keys) == 3


def test_another_configuration_of_the_same_weights_is_another_entry(tiny21, folder, tmp_path):
    model = shutil.copytree(tiny21, tmp_path / "model")
    first = encode_prompt(base_of(model), "a red ball", "").positive
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_epsilon": 0.5}))
    assert not torch.equal(encode_prompt(base_of(model), "a red ball", "").positive, first) and len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["embedding.safetensors", "MANIFEST.json"])
def test_a_damaged_entry_is_computed_again_with_a_note(tiny21, folder, name, harm):
    first = encode_prompt(base_of(tiny21), "a red ball", "a red ball")
    (entry,) = folder.iterdir()
    harm(entry / name)
    with pytest.warns(UserWarning, match="computed again"):
        again = encode_prompt(base_of(tiny21), "a red ball", "a red ball")
    assert torch.equal(first.positive, again.positive) and prompt_cache.find(folder, entry.name) is not None


KEYS = [f"{i:064x}" for i in range(5)]


def test_the_oldest_entries_go_when_all_are_too_large(tmp_path):
    for i in range(4):
        prompt_cache.keep(tmp_path, KEYS[i], torch.zeros(1000), limit=3 * 4500)
        os.utime(tmp_path / KEYS[i], (i, i))
    assert prompt_cache.find(tmp_path, KEYS[1]) is not None  # of use: now the youngest
    prompt_cache.keep(tmp_path, KEYS[4], torch.zeros(1000), limit=3 * 4500)
    assert sorted(path.name for path in tmp_path.iterdir()) in ([KEYS[1], KEYS[3], KEYS[4]], [KEYS[1], KEYS[4]])


def test_only_what_the_cache_made_goes(tmp_path):
    """A user may put the cache where other things are; half entries of a killed process are the cache's own."""
    theirs = ["data", "a" * 63, "A" * 64, "a" * 64 + ".zip", "a" * 64 + ".d"]
    left_over = [KEYS[0] + ".tmp", KEYS[0] + ".old.tmp"]
    for name in (*theirs, *left_over):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bin").write_bytes(bytes(5000))
        os.utime(tmp_path / name, (1, 1))
    prompt_cache.keep(tmp_path, KEYS[1], torch.zeros(1000), limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, KEYS[1]}


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tiny21, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt, "WORTH_KEEPING", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(prompt_cache.VARIABLE, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="does not matter"):
        assert encode_prompt(base_of(tiny21), "a red ball", "").positive.shape == (1, 512, 32)


@pytest.mark.parametrize("place", ["~nosuchuser/x", "a" * 300])
def test_a_place_that_cannot_be_is_no_cache_with_a_note(tiny21, tmp_path, monkeypatch, place):
    monkeypatch.setattr(prompt, "WORTH_KEEPING", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(prompt_cache.VARIABLE, place)
    with pytest.warns(Note, match="there is none, which does not matter"):
        assert encode_prompt(base_of(tiny21), "a red ball", "").positive.shape == (1, 512, 32)
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(prompt_cache.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(Note, match="home directory"):
        assert prompt_cache.cache_folder() is None


def test_an_entry_that_cannot_be_looked_at_is_not_found(tmp_path):
    with pytest.warns(Note, match="computed again"):
        assert prompt_cache.find(tmp_path, "a" * 300) is None


def test_an_entry_whose_time_cannot_be_set_serves(tmp_path, monkeypatch):
    prompt_cache.keep(tmp_path, "a" * 64, torch.ones(2))
    monkeypatch.setattr("os.utime", Mock(side_effect=PermissionError))
    assert torch.equal(prompt_cache.find(tmp_path, "a" * 64), torch.ones(2))


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(prompt_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prompt_cache.cache_folder() == tmp_path / "muralist" / "prompts"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert prompt_cache.cache_folder() == Path.home() / ".cache" / "muralist" / "prompts"
    monkeypatch.setenv(prompt_cache.VARIABLE, "off")
    assert prompt_cache.cache_folder() is None


def test_a_small_encoder_is_not_worth_an_entry(tiny21, tmp_path, monkeypatch):
    monkeypatch.setenv(prompt_cache.VARIABLE, str(tmp_path / "cache"))
    encode_prompt(base_of(tiny21), "a red ball", "")
    assert not (tmp_path / "cache").exists()
