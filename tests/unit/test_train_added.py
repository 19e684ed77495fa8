"""What is added to a base: adapter and experts, trained on the world or on footage, on either flavour; footage chosen by score."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.data import latents
from muralist.data.degrade import AnchorDamage
from muralist.data.latents import PairConfig, PoolConfig
from muralist.data.sharpen import Unsharp
from muralist.data.sources import Footage, World, read_footage
from muralist.errors import UserError
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.encoder import StreamingEncoder
from muralist.nn.enlarge import EnlargedPixels, enlarged
from muralist.nn.kinds import hierarchical
from muralist.sampling import flow
from muralist.stages import prompt
from muralist.stages.encode import encode
from muralist.stages.prompt import encode_prompt
from muralist.stages.upsample import LATENT_SCALE, PixelInterpolation, upsample
from muralist.store import prompt_cache, weights
from muralist.store.video_write import EncodeOptions
from muralist.tiling import Box
from muralist.train.anchored import train_anchored
from muralist.train.branched import BranchedConfig, train_branched
from muralist.train.experts import LESSONS, train_experts
from muralist.train.long import train_detail, train_detail_uhr, train_proxy
from muralist.train.objectives.flow import Batch, from_guide
from muralist.train.trainee import Trainee, VideoData, cut_to
from muralist.train.uhr import train_uhr
from muralist.types import FrameChunk, Grid, LatentVideo
from tests.shell import muralist

CPU = torch.device("cpu")
SIZE = Grid(num_frames=21, height=96, width=192, fps=16)


def quiet(line):
    pass


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two clips whose frames say which they are: red is the frame's number, blue the column."""
    folder = tmp_path_factory.mktemp("footage")
    for name in ("a", "b"):
        frames = torch.zeros(21, 96, 192, 3)
        frames[..., 0] = torch.linspace(0.1, 0.9, 21)[:, None, None]
        frames[..., 2] = torch.linspace(0, 1, 192)
        encode(iter([FrameChunk(frames, 0)]), SIZE, folder / f"{name}.mp4", EncodeOptions(crf=4))
    write(folder, [("a.mp4", "a red ball", "7"), ("b.mp4", "a blue star", "3.5")])
    return folder


def write(folder, rows, columns=("file", "caption", "score")):
    with open(folder / "videos.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([columns, *rows])


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("muralist.data.latents.SHARD", 2)


@pytest.mark.parametrize("data", ["world", "footage"])
def test_an_adapter_is_trained_and_serves(data, tiny_base, videos, tmp_path, small_shards):
    source = World() if data == "world" else read_footage(videos)
    model = shutil.copytree(tiny_base, tmp_path / "model")
    made = train_uhr(tmp_path / "run", minutes=0.03, device=CPU, resume=False, model=model, data=VideoData(source=source, heights=(96,), clips=2), report=quiet)
    shutil.copytree(made, model / "adapters" / "uhr")
    assert "uhr" in inspect_base(str(model)).adapters
    answer = muralist("generate", "a red ball", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 5, "--seed", 1)
    assert answer.code == 0, answer.err
    found = load_file(made / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)
    again = train_uhr(tmp_path / "more", minutes=0.01, device=CPU, resume=False, model=model, data=VideoData(heights=(96,), clips=2), report=quiet)
    assert load_file(again / "pytorch_lora_weights.safetensors").keys() == found.keys()


def test_experts_are_trained_one_after_the_other_and_serve(tiny22, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    data = VideoData(heights=(96,), clips=2)
    made = train_experts(tmp_path / "run", minutes=0.06, device=CPU, resume=False, model=model, data=data, report=quiet)
    found = load_file(made / "model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in found.items() if ".up." in name), "an expert has learned nothing"
    assert (tmp_path / "run" / "latents" / "sharp-96-0000.safetensors").is_file() and (tmp_path / "run" / "latents" / "crops-96-0000.safetensors").is_file()
    shutil.rmtree(model / "parts" / "experts")
    shutil.copytree(made, model / "parts" / "experts")
    experts = inspect_base(str(model)).experts.experts
    assert experts == {name: lesson.expert for name, lesson in LESSONS.items()}
    assert muralist("generate", "a red ball", "--recipe", "luve", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 5).code == 0
    with pytest.raises(UserError, match="--resume, or name another"):
        train_experts(tmp_path / "run", minutes=1, device=CPU, resume=False, model=model, data=data, report=quiet)
    resumed = train_experts(tmp_path / "run", minutes=0.06, device=CPU, resume=True, model=model, data=data, report=quiet)
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(resumed / "model.safetensors").items())


@pytest.mark.parametrize("source", ["world", "footage"])
def test_branches_are_trained_with_an_adapter_and_serve(source, tiny22, videos, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    for place in ("adapters/branched", "parts/branches"):
        shutil.rmtree(model / place)
    assert "train it (muralist train branched)" in muralist("plan", "--recipe", "ultragen", "--model", model).err
    data = VideoData(source=World() if source == "world" else read_footage(videos), heights=(96,), clips=2)
    config = BranchedConfig(branches=hierarchical(24, 2, windows=2, rank=2))
    made = train_branched(tmp_path / "run", minutes=0.1, device=CPU, resume=False, model=model, data=data, config=config, report=quiet)
    assert any(tensor.abs().max() > 0 for key, tensor in load_file(made / "pytorch_lora_weights.safetensors").items() if "lora_B" in key)
    found = load_file(tmp_path / "run" / "parts" / "branches" / "model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name), "a branch has learned nothing"
    for place in ("adapters/branched", "parts/branches"):
        shutil.copytree(tmp_path / "run" / place, model / place)
    answer = muralist("generate", "a red ball", "--recipe", "ultragen", "--model", model, "-o", tmp_path / "a.mp4", "--size", "192x96", "--num-frames", 5)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("height, said", [(64, "videos 64 pixels high: 5 windows along 2"), (4096, "only single frames fit")])
def test_heights_that_branches_cannot_be_trained_at_are_refused_before_anything_is_encoded(height, said, tiny22, tmp_path):
    with pytest.raises(UserError, match=said):
        train_branched(tmp_path / "run", minutes=1, device=CPU, resume=False, model=tiny22, data=VideoData(heights=(height,), clips=2), report=quiet)
    assert not (tmp_path / "run" / "latents").exists()


def test_a_base_with_branches_goes_on_from_them(tiny22, tmp_path, small_shards, monkeypatch):
    own = inspect_base(str(tiny22)).branches
    data = VideoData(heights=(96,), clips=2)
    found = []
    for number, branches in enumerate((own, replace(own, rank=3))):
        config, folder = BranchedConfig(branches=branches), tmp_path / str(number)
        ((objective, _, names),) = spied(monkeypatch, "trainee", train_branched, folder, model=tiny22, data=data, config=config)
        assert any(".branches." in name for name in names)
        found.append(objective.transformer.blocks[0].branches["coarse"].q.lora_B.weight.any().item())
    assert found == [True, False]


@pytest.mark.parametrize("source", ["world", "footage"])
def test_proxy_and_detail_are_trained_at_the_bases_own_size_and_serve(source, tiny22, videos, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    shutil.rmtree(model / "adapters")
    data = VideoData(source=World() if source == "world" else read_footage(videos), clips=2)
    for train, name in ((train_proxy, "proxy"), (train_detail, "detail")):
        made = train(tmp_path / name, minutes=0.03, device=CPU, resume=False, model=model, data=data, report=quiet)
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
    made = train_detail_uhr(tmp_path / "run", minutes=0.03, device=CPU, resume=False, model=model, data=data, report=quiet)
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


def spied(monkeypatch, module, train, *arguments, **options):
    """What a training hands to the loop: its objective, its origin, and the names of what is trainable."""
    seen = {}

    def fit(objective, schedule, folder, *, resume, origin=None, report=print):
        names = [name for name, parameter in objective.module.named_parameters() if parameter.requires_grad]
        seen[str(folder)] = (objective, origin, names)
        if module == "trainee":  # what is saved after it is no longer in float32
            raise KeyboardInterrupt
        return objective.module

    monkeypatch.setattr(f"muralist.train.{module}.fit", fit)
    with suppress(KeyboardInterrupt):
        train(*arguments, minutes=1, device=CPU, resume=False, report=quiet, **options)
    return list(seen.values())


def test_an_expert_trains_itself_alone_on_its_own_noise(tiny22, tmp_path, small_shards, monkeypatch):
    model = shutil.copytree(tiny22, tmp_path / "model")
    shutil.copytree(model / "adapters" / "detail", model / "adapters" / "uhr")
    low, high = spied(monkeypatch, "experts", train_experts, tmp_path / "run", model=model, data=VideoData(heights=(96,), clips=2))
    for (objective, origin, names), name, sigmas in ((low, "low", (0.875, 1.0)), (high, "high", (0.0, 0.875))):
        assert names and all(f".experts.{name}." in n or f"experts.{name}." in n for n in names), names
        assert (objective.config.min_sigma, objective.config.max_sigma) == sigmas and objective.config.graft.experts == (name,)
        assert origin["adapter"] == weights.fingerprint(model / "adapters" / "uhr")


def test_proxy_training_sees_a_quarter_of_the_rate_at_its_true_places(tiny22, tmp_path, small_shards, monkeypatch):
    ((objective, _, names),) = spied(monkeypatch, "trainee", train_proxy, tmp_path / "run", model=tiny22, data=VideoData(clips=2))
    batch = objective.source(np.random.default_rng(0), 0.0)
    scales = []
    configure = objective.transformer.configure
    monkeypatch.setattr(objective.transformer, "configure", lambda graft: scales.append(graft.rope.t) or configure(graft))
    objective.loss(0, 0.0)
    assert batch.stride == 4 and scales == [4.0] and all(".proxy." in name for name in names)
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
        assert within.shape == pytest.approx(large, abs=1e-4) and within.origin == pytest.approx((0, top * large[1], left * large[2]), abs=1e-4)
        assert all(place == pytest.approx(round(place), abs=1e-4) for place in within.origin)


@torch.no_grad()
def test_crops_of_a_batch_are_each_in_sight_of_their_own_whole(tiny22, tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr("muralist.train.objectives.flow.pick_dtype", lambda device: torch.float32)
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
    train_detail(tmp_path / "run", minutes=0.01, device=CPU, resume=False, model=model, data=data, report=quiet)
    shutil.rmtree(model / "adapters" / "proxy")
    with pytest.raises(UserError, match="stand on another adapter proxy"):
        train_detail(tmp_path / "run", minutes=0.02, device=CPU, resume=True, model=model, data=data, report=quiet)


def test_a_stamp_tells_what_is_not_as_by_default(tiny22):
    """A field that is new leaves caches good which were made without it."""
    vae = Base(inspect_base(str(tiny22)), CPU, torch.float32).vae()
    grid = Grid(num_frames=5, height=64, width=96)
    plain = json.loads(latents.stamp(vae, PoolConfig(name="p", count=1, grid=grid), World())["config"])
    assert plain.keys() == {"grid", "format", *World().identity}
    assert json.loads(latents.stamp(vae, PoolConfig(name="p", count=1, grid=grid, aimed=0.5), World())["config"]) == plain | {"aimed": 0.5}


def test_a_training_does_not_go_on_on_another_base_or_other_videos(tiny22, tmp_path, small_shards, monkeypatch):
    model = shutil.copytree(tiny22, tmp_path / "model")
    data = VideoData(heights=(96,), clips=2)
    train_uhr(tmp_path / "run", minutes=0.01, device=CPU, resume=False, model=model, data=data, report=quiet)
    monkeypatch.setattr("muralist.data.latents.build_pool", lambda *a: pytest.fail("encoded before it was refused"))
    for other, named in ((VideoData(heights=(128,), clips=2), "data"), (VideoData(heights=(96,), clips=3), "--clips")):
        with pytest.raises(UserError, match=f"stand on another {named}"):
            train_uhr(tmp_path / "run", minutes=0.02, device=CPU, resume=True, model=model, data=other, report=quiet)
    file = next((model / "transformer").glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="stand on another base"):
        train_uhr(tmp_path / "run", minutes=0.02, device=CPU, resume=True, model=model, data=data, report=quiet)


@pytest.mark.parametrize("source", ["world", "footage"])
def test_anchored_synthesis_is_trained_and_serves(source, tiny22, videos, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    for folder in ("adapters/anchored", "parts/injector", "parts/step_size"):
        shutil.rmtree(model / folder)
    data = VideoData(source=World() if source == "world" else read_footage(videos), heights=(96,), clips=2)
    made = train_anchored(tmp_path / "run", minutes=0.08, device=CPU, resume=False, model=model, data=data, report=quiet)
    shutil.copytree(made, model / "adapters" / "anchored")
    for kind, learned in (("injector", "out.1.weight"), ("step_size", "linear_2.weight")):
        tensors = load_file(tmp_path / "run" / "parts" / kind / "model.safetensors")
        assert tensors[learned].abs().max() > 0, f"{kind} has learned nothing"
        shutil.copytree(tmp_path / "run" / "parts" / kind, model / "parts" / kind)
    command = ("generate", "a red ball", "--recipe", "pixelwizard", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 5)
    answer = muralist(*command)
    assert answer.code == 0, answer.err


def test_an_anchor_is_cut_where_its_crop_lies():
    whole = torch.arange(20.0).view(1, 1, 1, 1, 20).expand(1, 2, 3, 10, 20)  # every latent says its column
    place = torch.tensor([[0.5, 0.25, 0.2, 0.5]])
    cut = cut_to(whole, place, (2, 4, 10))
    assert cut.shape == (1, 2, 2, 4, 10) and cut[0, 0, 0, 0].tolist() == pytest.approx([5.0 + i for i in range(10)], abs=1e-4)
    halves = cut_to(whole, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), (1, 10, 40))
    assert halves[0, 0, 0, 0, 1:-1].tolist() == pytest.approx([-0.25 + 0.5 * i for i in range(1, 39)], abs=1e-4)


def test_a_guide_of_training_is_the_guide_of_refinement(tiny22):
    """A crop that is the whole frame has the guide that the stage makes of the same small video."""
    small, large = Grid(num_frames=5, height=64, width=96), Grid(num_frames=5, height=128, width=192)
    base = Base(inspect_base(str(tiny22)), CPU, torch.float32)
    video = torch.rand(5, small.height, small.width, 3)
    config = PoolConfig(name="p", count=1, grid=large, crop=(large.height, large.width), proxy=small, guide_scale=LATENT_SCALE)
    vae = base.vae()
    trained = latents._guide(StreamingEncoder(vae), StreamingDecoder(vae), config, video, (0.0, 0.0, 1.0, 1.0)).float()
    refined = upsample(LatentVideo(latents.encode(base.vae(), video[None]), small), large, base, PixelInterpolation(latent_scale=LATENT_SCALE)).z
    assert trained.shape == refined.shape and (trained - refined).abs().max() < 0.01 * refined.std()


@pytest.mark.parametrize("large", [(768, 1024), (320, 448)], ids=["over twice its own size", "less"])
@pytest.mark.parametrize("named", [1.0, 1.07], ids=["", "footage that is smaller than the grid"])
def test_the_guide_of_a_crop_is_that_part_of_the_guide_of_the_whole(large, named, tiny22, monkeypatch):
    vae = Base(inspect_base(str(tiny22)), CPU, torch.float32).vae()
    video = torch.rand(5, 192, 256, 3)

    def pooled(encoder, video):  # an encoder that looks at nothing beside its latents: what is left is where they lie
        return torch.nn.functional.avg_pool2d(video.permute(0, 3, 1, 2), 16).permute(1, 0, 2, 3)[None]

    monkeypatch.setattr(latents, "_encode", pooled)
    monkeypatch.setattr(latents, "_decode", lambda decoder, z: video)
    target = tuple(side // 16 for side in large)
    encoded = PixelInterpolation(latent_scale=LATENT_SCALE).size((12, 16), target)
    pixels = EnlargedPixels(video, tuple(16 * side for side in encoded), "bicubic", CPU)
    whole = enlarged(pooled(None, pixels(range(5), Box.whole(*(16 * side for side in encoded)))), target, "bicubic")

    top, left, side = 64, 128, 192
    place = (top / large[0], left / large[1], side / large[0], side / large[1])
    grid = Grid(num_frames=5, height=round(large[0] * named), width=round(large[1] * named))
    config = PoolConfig(name="p", count=1, grid=grid, crop=(side, side), guide_scale=LATENT_SCALE)
    guide = latents._guide(StreamingEncoder(vae), StreamingDecoder(vae), config, video, place).float()
    part = whole[..., top // 16 : (top + side) // 16, left // 16 : (left + side) // 16]
    assert guide.shape == part.shape and (guide - part).abs().max() < 0.03 * part.std() + 2e-3
    assert (guide - part.roll(1, dims=-1)).abs().max() > 0.1 * part.std()


def test_training_from_a_guide_follows_refinement():
    x, noise, guide = torch.randn(3, 2, 4, 3, 5, 5).unbind()
    start = flow.shifted(0.4, 3.0)
    far = from_guide(x, noise, Batch(x, ["", ""], proxy=guide, skip_share=0.6), start)
    assert torch.allclose(flow.renoise(x, far, start), flow.renoise(guide, noise, start), atol=1e-6), "the path does not begin in the re-noised guide"
    z, level = flow.renoise(guide, noise, start), 0.3
    moved = flow.euler_step(z, flow.velocity_of_sample(z, x, start), start, level)
    assert torch.allclose(moved, flow.renoise(x, far, level), atol=1e-5), "a step that predicts well leaves the path"
    assert from_guide(x, noise, Batch(x, ["", ""]), 1.0) is noise


def test_the_damage_of_an_anchor_takes_detail_and_keeps_the_rest():
    video = 0.5 + 0.2 * torch.randn(2, 256, 448, 3)
    video[:, :, 200:] += 0.2
    damaged = AnchorDamage()(video.clamp(0, 1), np.random.default_rng(0))
    assert damaged.shape == video.shape and damaged.diff(dim=2).abs().mean() < 0.3 * video.diff(dim=2).abs().mean()
    assert (damaged[:, :, 220:].mean() - damaged[:, :, :180].mean()).item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(damaged, AnchorDamage()(video.clamp(0, 1), np.random.default_rng(0)))


def test_a_trainee_embeds_what_it_was_told(tiny21):
    trainee = Trainee(tiny21, CPU)
    trainee.learn_captions(["a red ball", "a star over grass"])
    both = trainee.embed(["a star over grass", ""])
    assert both.shape == (2, 512, 32) and both[0].abs().sum() > both[1].abs().sum() > 0
    with pytest.raises(KeyError):
        trainee.embed(["a cube"])


def test_captions_are_embedded_once_each_and_leave_the_users_cache_alone(tiny21, tmp_path, monkeypatch):
    monkeypatch.setenv(prompt_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(prompt, "WORTH_KEEPING", 0)
    texts, embed = [], prompt._embed
    monkeypatch.setattr(prompt, "_embed", lambda tokenizer, encoder, text, length: texts.append(text) or embed(tokenizer, encoder, text, length))
    trainee = Trainee(tiny21, CPU)
    trainee.learn_captions(["a red ball", "a star over grass", "a red ball"])
    trainee.learn_captions(["a cube", "a red ball"])
    assert sorted(texts) == ["", "a cube", "a red ball", "a star over grass"] and not (tmp_path / "cache").exists()
    expected = encode_prompt(trainee.base, "a cube", "").positive
    assert torch.equal(trainee.embed(["a cube"]), expected.half().float())


def test_two_transformers_are_refused(tiny22, tmp_path):
    model = shutil.copytree(tiny22, tmp_path / "model")
    shutil.copytree(model / "transformer", model / "transformer_2")
    index = json.loads((model / "model_index.json").read_text()) | {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="two transformers"):
        Trainee(model, CPU)


# --- footage ------------------------------------------------------------------------------------------------------------------------


def test_an_excerpt_is_what_the_file_shows_there(videos):
    footage = Footage(read_footage(videos).clips[:1])
    half = Grid(num_frames=5, height=48, width=80, fps=8)  # every second frame, at half the size
    drawn = footage.draw(np.random.default_rng(3), PoolConfig(name="p", count=1, grid=half, crop=(32, 32), frames=3))
    pixels = drawn.pixels()
    assert pixels.shape == (3, 32, 32, 3) and drawn.caption == "a red ball" and drawn.near_object(16, 4) is None
    red = torch.linspace(0.1, 0.9, 21)[drawn.first : drawn.first + 5 : 2]
    assert (pixels[..., 0].mean(dim=(1, 2)) - red).abs().max() < 0.02
    left = (8 + drawn.crop.left) / 96  # the grid is the middle of the file's wider picture
    assert pixels[0, 0, 0, 2].item() == pytest.approx(left, abs=0.04) and pixels[0, 0, -1, 2].item() == pytest.approx(left + 1 / 3, abs=0.04)


def test_a_pair_is_one_clip_at_two_sizes(videos):
    low, high = read_footage(videos).pair(
        np.random.default_rng(0), PairConfig(name="p", count=1, low=SIZE.resized(height=48, width=80), scale=2.0, side=32, frames=5)
    )
    assert low.shape == (5, 32, 32, 3) and high.shape == (5, 64, 64, 3)
    assert (low - high.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean(dim=(2, 4))).abs().max() < 0.05


def test_footage_is_chosen_by_score(videos):
    told = []
    assert [clip.caption for clip in read_footage(videos, min_score=6.5, report=told.append).clips] == ["a red ball"]
    assert told == ["1 of 2 clips have a score of at least 6.5"]
    assert read_footage(videos).identity != read_footage(videos, min_score=6.5, report=quiet).identity


def test_footage_that_is_too_small_is_not_enlarged(videos):
    slow = PoolConfig(name="p", count=1, grid=Grid(num_frames=3, height=48, width=80, fps=24))
    with pytest.raises(UserError, match="with 3 frames at 24 fps"):
        read_footage(videos).draw(np.random.default_rng(0), slow)
    with pytest.raises(UserError, match="hardly a clip has 3840x2160"):
        read_footage(videos).draw(np.random.default_rng(0), PoolConfig(name="p", count=1, grid=Grid(num_frames=5, height=2160, width=3840, fps=16)))


def test_footage_of_the_height_that_was_asked_for_serves_though_a_grid_is_rounded_up(videos):
    footage = read_footage(videos)
    asked = PoolConfig(name="p", count=1, grid=Grid(num_frames=5, height=100, width=200, fps=16), crop=(64, 96), frames=3)
    drawn = footage.draw(np.random.default_rng(0), asked)
    assert (drawn.grid.height, drawn.grid.width) == (96, 192) and drawn.pixels().shape == (3, 64, 96, 3)
    with pytest.raises(UserError, match="hardly"):
        footage.draw(np.random.default_rng(0), replace(asked, grid=replace(asked.grid, height=120, width=240)))


def test_crops_larger_than_the_picture_are_told(videos, tmp_path):
    answer = muralist("train", "uhr", "--from", "miniature", "--data", videos, "--height", 96, "-o", tmp_path / "run")
    assert answer.code == 2 and ("do not fit" in answer.error or "hardly a clip" in answer.error)


@pytest.mark.parametrize(
    "options, told",
    [
        (("uhr", "--height", 720), "it is about footage"),
        (("proxy", "--data", "DIR", "--height", 720), "whole clips"),
        (("features", "--data", "DIR"), "its own videos"),
    ],
)  # fmt: skip
def test_options_without_a_use_are_refused(options, told, videos, tmp_path):
    options = [str(videos) if option == "DIR" else option for option in options]
    model = () if options[0] == "features" else ("--from", "miniature")
    answer = muralist("train", *options, *model, "-o", tmp_path / "run")
    assert answer.code == 2 and told in answer.error, answer.error


@pytest.mark.parametrize(
    "rows, columns, told",
    [
        ([("a.mp4", "a ball", "high")], ("file", "caption", "score"), "line 2: the score 'high' is no number"),
        ([("a.mp4", "a ball", "nan")], ("file", "caption", "score"), "is no number"),
        ([("a.mp4", "a ball")], ("file", "caption"), "no column 'score'"),
        ([("a.mp4", "", "7")], ("file", "caption", "score"), "line 2: the caption is empty"),
        ([("z.mp4", "a ball", "7")], ("file", "caption", "score"), "no file 'z.mp4'"),
        ([("../a.mp4", "a ball", "7")], ("file", "caption", "score"), "is not a plain name"),
        ([("a.mp4", "a ball", "2")], ("file", "caption", "score"), "no clip of a score of at least 6.5"),
        ([("a.mp4", "a ball", " rolling", "7")], ("file", "caption", "score"), "line 2: more or fewer cells"),
        ([("a.mp4", "a ball")], ("file", "caption", "score"), "line 2: more or fewer cells"),
    ],
)
def test_a_wrong_manifest_is_told_in_one_line(rows, columns, told, videos, tmp_path):
    shutil.copy(videos / "a.mp4", tmp_path)
    write(tmp_path, rows, columns)
    answer = muralist("train", "uhr", "--from", "miniature", "--data", tmp_path, "--min-score", 6.5, "-o", tmp_path / "run")
    assert answer.code == 2 and told in answer.error, answer.error


def test_unsharp_masking_steepens_edges_and_keeps_flat_parts():
    video = torch.full((2, 16, 16, 3), 0.4)
    video[:, :, 8:] = 0.6
    sharp = Unsharp(radius=1.0, amount=0.5)(video)
    assert sharp[0, 0, 7, 0] < 0.38 and sharp[0, 0, 8, 0] > 0.62
    assert (sharp[:, :, [0, 15]] - video[:, :, [0, 15]]).abs().max() < 1e-4
    assert Unsharp(amount=100.0)(video).amin() == 0 and Unsharp(amount=100.0)(video).amax() == 1


# --- scores -------------------------------------------------------------------------------------------------------------------------


def test_scores_fill_the_column_where_there_is_none(videos, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(videos / name, tmp_path)
    write(tmp_path, [("a.mp4", "a red ball", "7"), ("b.mp4", "a blue star", "")])
    answer = muralist("score", tmp_path, "--metric", "temporal_flickering")
    assert answer.code == 0, answer.err
    first, second = read_footage(tmp_path).clips
    assert first.score == 7 and 0 < second.score <= 100 and second.scored_by == "temporal_flickering"
    assert "holds scores of temporal_flickering" in muralist("score", tmp_path, "--metric", "hd_mse").error


def test_a_clip_that_cannot_be_measured_costs_no_other(videos, tmp_path):
    shutil.copy(videos / "a.mp4", tmp_path)
    (tmp_path / "b.mp4").write_bytes((videos / "b.mp4").read_bytes()[:2000])
    write(tmp_path, [("b.mp4", "a blue star"), ("a.mp4", "a red ball")], ("file", "caption"))
    answer = muralist("score", tmp_path, "--metric", "temporal_flickering")
    assert answer.code == 0 and "b.mp4: not measured" in answer.out and "1 clips scored" in answer.out and "1 could not be" in answer.out
    assert [clip.score is None for clip in read_footage(tmp_path).clips] == [True, False]


def test_a_tool_that_is_not_there_is_told_in_one_line(videos, monkeypatch):
    monkeypatch.delenv("MURALIST_EVAL_ENV", raising=False)
    write(videos, [("a.mp4", "a red ball", "")])
    answer = muralist("score", videos)
    assert answer.code == 2 and "hpsv3 runs in an environment of its own" in answer.error
    assert "no metric 'beauty'" in muralist("score", videos, "--metric", "beauty").error
