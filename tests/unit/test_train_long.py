"""Proxy and detail: what a base learns for long, large videos."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.data.sources import World, read_footage
from muralist.errors import UserError
from muralist.recipes import find
from muralist.train.long import train_detail, train_detail_uhr, train_proxy
from muralist.train.loop import Length
from muralist.train.trainee import VideoData
from tests.shell import muralist
from tests.training import CPU, quiet, spied


@pytest.mark.parametrize("source", ["world", "footage"])
def test_proxy_and_detail_are_trained_at_the_bases_own_size_and_serve(source, tiny22, videos, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    shutil.rmtree(model / "adapters")
    data = VideoData(source=World() if source == "world" else read_footage(videos), clips=2)
    for train, name in ((train_proxy, "proxy"), (train_detail, "detail")):
        made = train(tmp_path / name, length=Length(steps=2), device=CPU, resume=False, model=model, data=data, report=quiet)
        assert any(tensor.abs().max() > 0 for key, tensor in load_file(made / "pytorch_lora_weights.safetensors").items() if "lora_B" in key)
        shutil.copytree(made, model / "adapters" / name)
    assert load_file(tmp_path / "detail" / "latents" / "paired-0000.safetensors")["proxy"].shape == (2, 48, 2, 2, 4)
    command = ("generate", "a red ball", "--recipe", "atlasvid", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 17)
    answer = muralist(*command)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("source", ["world", "footage"])
def test_detail_goes_on_from_itself_on_crops_of_large_videos_and_serves(source, tiny22, videos, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    data = VideoData(source=World() if source == "world" else read_footage(videos), heights=(96,), clips=2)
    made = train_detail_uhr(tmp_path / "run", length=Length(steps=2), device=CPU, resume=False, model=model, data=data, report=quiet)
    before, after = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (model / "adapters" / "detail", made))
    assert before.keys() == after.keys() and any((after[key].float() - before[key].float()).abs().max() > 0 for key in before)
    shutil.copytree(made, model / "adapters" / "detail_uhr")
    command = ("generate", "a red ball", "--recipe", "atlasvid", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 17)
    assert muralist(*command).code == 0
    shutil.rmtree(model / "adapters" / "detail")
    assert muralist(*command[:-1], 9).code == 0, "it does not serve alone"


def test_an_adapter_whose_name_is_a_part_of_anothers_is_loaded_without_a_complaint(tiny22, tmp_path):
    model, said = shutil.copytree(tiny22, tmp_path / "model"), []
    shutil.copytree(model / "adapters" / "detail", model / "adapters" / "a_detail")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("diffusers.utils.peft_utils")
    logger.addHandler(handler)
    try:
        names = dict(Base(inspect_base(str(model)), CPU, torch.float32).transformer().named_parameters())
    finally:
        logger.removeHandler(handler)
    assert said == [] and all(any(f".{name}." in key for key in names) for name in ("detail", "a_detail"))


def test_proxy_training_sees_a_quarter_of_the_rate_at_its_true_places(tiny22, tmp_path, small_shards, monkeypatch):
    ((objective, _, names),) = spied(monkeypatch, "trainee", train_proxy, tmp_path / "run", model=tiny22, data=VideoData(clips=2))
    batch = objective.source(np.random.default_rng(0), 0.0)
    scales = []
    configure = objective.transformer.configure
    monkeypatch.setattr(objective.transformer, "configure", lambda graft: scales.append(graft.rope.t) or configure(graft))
    objective.loss(0, 0.0)
    assert batch.stride == 4 and scales == [4.0] and batch.skip_share == 0 and all(".proxy." in name for name in names)
    (shard,) = (tmp_path / "run" / "latents").glob("slow-*.safetensors")
    with safe_open(shard, "pt") as file:
        assert json.loads(file.metadata()["config"])["grid"]["fps"] == 4


def test_a_crop_in_sight_of_the_whole_starts_as_detail_and_knows_its_place(tiny22, tmp_path, small_shards, monkeypatch):
    ((objective, _, names),) = spied(monkeypatch, "trainee", train_detail_uhr, tmp_path / "run", model=tiny22, data=VideoData(heights=(96,), clips=2))
    assert names and all(".detail_uhr." in name for name in names)
    parameters = dict(objective.module.named_parameters())
    assert all(torch.equal(parameters[name], parameters[name.replace(".detail_uhr.", ".detail.")]) for name in names)
    batch = objective.source(np.random.default_rng(0), 0.0)
    (shard,) = (tmp_path / "run" / "latents").glob("sighted-96-*.safetensors")
    stored = load_file(shard)
    large = objective.module.info.geometry.token_shape(objective.module.crop_pool(96, VideoData(clips=2)).grid)
    chosen = [next(j for j, z in enumerate(stored["z"]) if torch.equal(z.float(), x.float())) for x in batch.x]
    assert set(chosen) == {0, 1}
    for index, proxy, within in zip(chosen, batch.proxy, batch.within, strict=True):
        top, left = stored["places"][index, :2].tolist()
        assert torch.equal(proxy, stored["proxy"][index].float())
        assert torch.equal(batch.guide[chosen.index(index)], stored["guide"][index].float())
        assert within.shape == pytest.approx(large, abs=1e-4) and within.origin == pytest.approx((0, top * large[1], left * large[2]), abs=1e-4)
        assert all(place == pytest.approx(round(place), abs=1e-4) for place in within.origin)


@torch.no_grad()
def test_crops_of_a_batch_are_each_in_sight_of_their_own_whole(tiny22, tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr("muralist.base.pick_dtype", lambda device: torch.float32)
    ((objective, _, _),) = spied(monkeypatch, "trainee", train_detail_uhr, tmp_path / "run", model=tiny22, data=VideoData(heights=(96,), clips=2))
    batch = objective.source(np.random.default_rng(0), 0.0)
    sigma, text = torch.full((len(batch.x),), 0.5), objective.embed(batch.captions)
    answers = objective._at(batch, batch.x.float(), sigma, text)
    for i in range(len(batch.x)):
        one = replace(batch, x=batch.x[i : i + 1], proxy=batch.proxy[i : i + 1], within=batch.within[i : i + 1])
        alone = objective._at(one, one.x.float(), sigma[:1], text[i : i + 1])
        assert (answers[i] - alone[0]).abs().max() < 1e-5
    swapped = replace(batch, proxy=batch.proxy.flip(0), within=batch.within[::-1])
    assert (objective._at(swapped, batch.x.float(), sigma, text) - answers).abs().max() > 1e-3


def test_detail_training_looks_at_a_clean_proxy_as_the_proxy_was_painted(tiny22, tmp_path, small_shards, monkeypatch):
    ((objective, _, names),) = spied(monkeypatch, "trainee", train_detail, tmp_path / "run", model=tiny22, data=VideoData(clips=2))
    seen = []
    remember = objective.transformer.remember

    def looked(z, timestep, text, time_scale):
        seen.append((tuple(z.shape[1:]), timestep.tolist(), time_scale, objective.transformer.active_adapters()))
        return remember(z, timestep, text, time_scale)

    monkeypatch.setattr(objective.transformer, "remember", looked)
    objective.loss(0, 0.0)
    assert seen == [((48, 2, 2, 4), [0.0] * 4, 4.0, ["proxy"])]
    assert objective.transformer.active_adapters() == ["detail"] and all(".detail." in name for name in names)
    windows = objective.config.graft.attention.windows
    assert windows.size[0] <= 1 and np.prod(windows.size) <= 8


def test_windows_in_sight_of_a_proxy_are_trained_for_the_adapter_that_it_is_looked_at_with(tiny22, tmp_path, small_shards):
    model, data = shutil.copytree(tiny22, tmp_path / "model"), VideoData(clips=2)
    train_detail(tmp_path / "run", length=Length(steps=1), device=CPU, resume=False, model=model, data=data, report=quiet)
    shutil.rmtree(model / "adapters" / "proxy")
    with pytest.raises(UserError, match="stand on another adapter proxy"):
        train_detail(tmp_path / "run", length=Length(steps=2), device=CPU, resume=True, model=model, data=data, report=quiet)


def test_a_training_on_another_path_is_not_gone_on_with(tiny22, tmp_path, small_shards):
    model, data = shutil.copytree(tiny22, tmp_path / "model"), VideoData(clips=2)
    train_detail(tmp_path / "run", length=Length(steps=1), device=CPU, resume=False, model=model, data=data, report=quiet)
    path = model / "muralist.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"skip_share": 0.3}))
    with pytest.raises(UserError, match="stand on another path"):
        train_detail(tmp_path / "run", length=Length(steps=2), device=CPU, resume=True, model=model, data=data, report=quiet)


def test_windows_are_trained_on_the_path_that_the_recipe_takes(tiny22, tmp_path, small_shards, monkeypatch):
    ((objective, _, _),) = spied(monkeypatch, "trainee", train_detail, tmp_path / "run", model=tiny22, data=VideoData(clips=2))
    refine = find("atlasvid")(objective.module.info).refine
    shares = [objective.source(np.random.default_rng(seed), 0.0).skip_share for seed in range(40)]
    assert max(shares) * refine.num_inference_steps == pytest.approx(refine.skip_steps, abs=0.5) and 10 < shares.count(max(shares)) < 30
