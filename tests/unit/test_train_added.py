"""What is added to a base: adapters, experts, branches, trained on the world or on footage, on either flavour."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from muralist.base import Base, pick_dtype
from muralist.base_info import inspect_base
from muralist.data import latents
from muralist.data.degrade import AnchorDamage
from muralist.data.latents import LatentPool, PoolConfig
from muralist.data.sources import World, read_footage
from muralist.errors import UserError
from muralist.nn.kinds import hierarchical
from muralist.sampling import flow
from muralist.stages import prompt
from muralist.stages.prompt import encode_prompt
from muralist.store import prompt_cache, weights
from muralist.store.parts import load_part, save_part
from muralist.train import state
from muralist.train.anchored import AnchoredConfig, train_anchored
from muralist.train.branched import SINGLE_SHARE, SINGLE_SHARE_ON, BranchedConfig, Whole, train_branched
from muralist.train.experts import LESSONS, train_experts
from muralist.train.loop import CHECKPOINTS, Length
from muralist.train.objectives.flow import Batch, from_guide
from muralist.train.trainee import Trainee, VideoData, cut_to
from muralist.train.uhr import train_uhr
from muralist.types import Grid
from tests.shell import muralist
from tests.training import CPU, quiet, spied


@pytest.mark.parametrize("data", ["world", "footage"])
def test_an_adapter_is_trained_and_serves(data, tiny_base, videos, tmp_path, small_shards):
    source = World() if data == "world" else read_footage(videos)
    model = shutil.copytree(tiny_base, tmp_path / "model")
    made = train_uhr(
        tmp_path / "run", length=Length(steps=2), device=CPU, resume=False, model=model, data=VideoData(source=source, heights=(96,), clips=2), report=quiet
    )
    shutil.copytree(made, model / "adapters" / "uhr")
    assert "uhr" in inspect_base(str(model)).adapters
    answer = muralist("generate", "a red ball", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 5, "--seed", 1)
    assert answer.code == 0, answer.err
    found = load_file(made / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)
    assert {path.name for path in (tmp_path / "run" / "latents").iterdir()} == {"enlarged-96-0000.safetensors", "upsampled-96-0000.safetensors"}
    again = train_uhr(tmp_path / "more", length=Length(steps=1), device=CPU, resume=False, model=model, data=VideoData(heights=(96,), clips=2), report=quiet)
    assert load_file(again / "pytorch_lora_weights.safetensors").keys() == found.keys()


def test_guides_are_made_by_the_upsampler_where_there_is_one_and_resumed_with_it_alone(tiny22, tiny21, tmp_path, small_shards, monkeypatch):
    model, data = shutil.copytree(tiny22, tmp_path / "model"), VideoData(heights=(96,), clips=2)
    part, encoded = model / "parts" / "latent_upsampler", tmp_path / "run" / "latents"

    def train(name: str, resume: bool = False) -> None:
        train_uhr(tmp_path / name, length=Length(steps=1), device=CPU, resume=resume, model=model, data=data, report=quiet)

    train("run")
    before = sorted(path.stat().st_mtime_ns for path in encoded.iterdir())
    kept = shutil.move(part, tmp_path / "kept")
    train("without")
    assert [path.name for path in (tmp_path / "without" / "latents").iterdir()] == ["enlarged-96-0000.safetensors"]
    with pytest.raises(UserError, match="stand on another part latent_upsampler"):
        train("run", resume=True)
    record, tensors = load_part(kept, "latent_upsampler")
    save_part(part, "latent_upsampler", record, {name: tensor * 1.5 for name, tensor in tensors.items()})
    for name in ("run", "without"):
        with pytest.raises(UserError, match="stand on another part latent_upsampler"):
            train(name, resume=True)
    assert sorted(path.stat().st_mtime_ns for path in encoded.iterdir()) == before, "encoded before it was refused"
    shutil.rmtree(part)
    shutil.copytree(tiny21 / "parts" / "latent_upsampler", part)
    monkeypatch.setattr("muralist.train.uhr.Trainee", lambda *about: pytest.fail("weights were loaded before it was refused"))
    with pytest.raises(UserError, match="latents of 16 channels"):
        train("another")
    assert not (tmp_path / "another" / "latents").exists()


def test_experts_are_trained_one_after_the_other_and_serve(tiny22, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    data = VideoData(heights=(96,), clips=2)
    made = train_experts(tmp_path / "run", length=Length(steps=4), device=CPU, resume=False, model=model, data=data, report=quiet)
    found = load_file(made / "model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in found.items() if ".up." in name), "an expert has learned nothing"
    assert (tmp_path / "run" / "latents" / "sharp-96-0000.safetensors").is_file() and (tmp_path / "run" / "latents" / "crops-96-0000.safetensors").is_file()
    shutil.rmtree(model / "parts" / "experts")
    shutil.copytree(made, model / "parts" / "experts")
    experts = inspect_base(str(model)).experts.experts
    assert experts == {name: lesson.expert for name, lesson in LESSONS.items()}
    assert muralist("generate", "a red ball", "--recipe", "luve", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 5).code == 0
    with pytest.raises(UserError, match="--resume, or name another"):
        train_experts(tmp_path / "run", length=Length(minutes=1), device=CPU, resume=False, model=model, data=data, report=quiet)
    resumed = train_experts(tmp_path / "run", length=Length(steps=4), device=CPU, resume=True, model=model, data=data, report=quiet)
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(resumed / "model.safetensors").items())


@pytest.mark.parametrize("source", ["world", "footage"])
def test_branches_are_trained_with_an_adapter_and_serve(source, tiny22, videos, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    for place in ("adapters/branched", "parts/branches"):
        shutil.rmtree(model / place)
    assert "train it (muralist train branched)" in muralist("plan", "--recipe", "ultragen", "--model", model).err
    data = VideoData(source=World() if source == "world" else read_footage(videos), heights=(96,), clips=2)
    config = BranchedConfig(branches=hierarchical(24, 2, windows=2, rank=2))
    made = train_branched(tmp_path / "run", length=Length(steps=3), device=CPU, resume=False, model=model, data=data, config=config, report=quiet)
    assert any(tensor.abs().max() > 0 for key, tensor in load_file(made / "pytorch_lora_weights.safetensors").items() if "lora_B" in key)
    found = load_file(tmp_path / "run" / "parts" / "branches" / "model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name), "a branch has learned nothing"
    for place in ("adapters/branched", "parts/branches"):
        shutil.copytree(tmp_path / "run" / place, model / place)
    size = ("--size", "192x96", "--num-frames", 5, "--steps", 4)
    answer = muralist("generate", "a red ball", "--recipe", "ultragen", "--model", model, "-o", tmp_path / "a.mp4", *size)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("height, said", [(64, "videos 64 pixels high: 5 windows along 2"), (4096, "only single frames fit")])
def test_heights_that_branches_cannot_be_trained_at_are_refused_before_anything_is_encoded(height, said, tiny22, tmp_path):
    with pytest.raises(UserError, match=said):
        train_branched(
            tmp_path / "run", length=Length(minutes=1), device=CPU, resume=False, model=tiny22, data=VideoData(heights=(height,), clips=2), report=quiet
        )
    assert not (tmp_path / "run" / "latents").exists()


def test_a_base_with_branches_goes_on_from_them(tiny22, tmp_path, small_shards, monkeypatch):
    own = inspect_base(str(tiny22)).branches
    data = VideoData(heights=(96,), clips=2)
    found = []
    for number, branches in enumerate((own, replace(own, rank=3))):
        config, folder = BranchedConfig(branches=branches), tmp_path / str(number)
        ((objective, _, names),) = spied(monkeypatch, "trainee", train_branched, folder, model=tiny22, data=data, config=config)
        assert any(".branches." in name for name in names)
        found.append((objective.transformer.blocks[0].branches["coarse"].q.lora_B.weight.any().item(), objective.source.single_share))
    assert found == [(True, SINGLE_SHARE_ON), (False, SINGLE_SHARE)]


@pytest.mark.parametrize("travel", [True, False])
def test_branches_are_trained_where_windows_stand_in_sampling(travel, tiny22, tmp_path, small_shards, monkeypatch):
    data, config = VideoData(heights=(96,), clips=2), BranchedConfig(branches=replace(inspect_base(str(tiny22)).branches, travel=travel))
    ((objective, _, _),) = spied(monkeypatch, "trainee", train_branched, tmp_path / "run", model=tiny22, data=data, config=config)
    stood = []
    configure = objective.transformer.configure
    monkeypatch.setattr(objective.transformer, "configure", lambda graft: stood.append(graft.attention.place) or configure(graft))
    for step in range(16):
        objective.loss(step, 0.0)
    assert set(stood) == ({0, 1, 2, 3} if travel else {0})
    assert objective.transformer.blocks[0].branches["coarse"].q.lora_B.weight.any(), "the base's own are gone on with, however their windows stood"


def test_a_small_base_is_trained_on_whole_lengths_and_not_gone_on_with_others(tiny22, tmp_path, small_shards, monkeypatch):
    """Seven clips' worth of its tokens would be one latent frame of these; what was begun on fewer frames is refused before anything is encoded."""
    data, config = VideoData(heights=(192,), clips=2), BranchedConfig(branches=inspect_base(str(tiny22)).branches)
    ((objective, origin, _),) = spied(monkeypatch, "trainee", train_branched, tmp_path / "run", model=tiny22, data=data, config=config)
    assert objective.source.clips[0].z.shape[2] == 2, "all latent frames of the base's own length"
    state.save(tmp_path / "run" / CHECKPOINTS, 7, {"a": torch.zeros(1)}, {"step": 7, "origin": origin | {"frames": "[1]"}})
    monkeypatch.setattr(Trainee, "encoded", lambda *_: pytest.fail("encoded"))
    with pytest.raises(UserError, match="another frames"):
        train_branched(tmp_path / "run", length=Length(steps=1), device=CPU, resume=True, model=tiny22, data=data, config=config, report=quiet)


def test_a_training_does_not_go_on_on_other_branches(tiny22, tmp_path, small_shards):
    """What of them is not trained is in no checkpoint."""
    model, data = shutil.copytree(tiny22, tmp_path / "model"), VideoData(heights=(96,), clips=2)
    config = BranchedConfig(branches=inspect_base(str(model)).branches)

    def train(resume):
        return train_branched(tmp_path / "run", length=Length(steps=1), device=CPU, resume=resume, model=model, data=data, config=config, report=quiet)

    train(resume=False)
    train(resume=True)
    folder = model / "parts" / "branches"
    tensors = {name: -3 * tensor if "fusion.embedding" in name else tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_part(folder, "branches", asdict(config.branches), tensors)
    with pytest.raises(UserError, match="stand on another branches"):
        train(resume=True)


def test_whole_pictures_are_single_frames_first_and_as_many_as_fit():
    def pool(name: str, *shape: int) -> LatentPool:
        return LatentPool(torch.zeros(5, 2, *shape), [name] * 5, None)

    whole = Whole((pool("frame", 1, 4, 8), pool("large frame", 1, 8, 16)), (pool("clip", 3, 4, 8), pool("large clip", 3, 8, 16)), 128, SINGLE_SHARE)
    sizes, shares = {}, []
    for progress in (0.1, 0.9):
        batches = [whole(np.random.default_rng(seed), progress) for seed in range(400)]
        sizes |= {batch.captions[0]: len(batch.x) for batch in batches}
        shares.append(sum(batch.x.shape[2] == 1 for batch in batches) / len(batches))
    assert sizes == {"frame": 4, "large frame": 1, "clip": 1, "large clip": 1}
    assert shares == pytest.approx(SINGLE_SHARE, abs=0.06) and SINGLE_SHARE[0] > SINGLE_SHARE[1]


def test_an_expert_trains_itself_alone_on_its_own_noise(tiny22, tmp_path, small_shards, monkeypatch):
    model = shutil.copytree(tiny22, tmp_path / "model")
    shutil.copytree(model / "adapters" / "detail", model / "adapters" / "uhr")
    low, high = spied(monkeypatch, "experts", train_experts, tmp_path / "run", model=model, data=VideoData(heights=(96,), clips=2))
    for (objective, origin, names), name, sigmas in ((low, "low", (0.875, 1.0)), (high, "high", (0.0, 0.875))):
        assert names and all(f".experts.{name}." in n or f"experts.{name}." in n for n in names), names
        assert (objective.config.min_sigma, objective.config.max_sigma) == sigmas and objective.config.graft.experts == (name,)
        assert origin["adapter uhr"] == weights.fingerprint(model / "adapters" / "uhr")


def test_a_stamp_leaves_caches_good_that_were_made_before_a_field(tiny22):
    vae = Base(inspect_base(str(tiny22)), CPU, torch.float32).vae()
    grid = Grid(num_frames=5, height=64, width=96)
    plain = json.loads(latents.stamp(vae, PoolConfig(name="p", count=1, grid=grid), World())["config"])
    assert plain.keys() == {"grid", "frames", "crop", "sharpen", "proxy", "damage", "guide_scale", "seed", "format", *World().identity}
    assert json.loads(latents.stamp(vae, PoolConfig(name="p", count=1, grid=grid, aimed=0.5), World())["config"]) == plain | {"aimed": 0.5}


def test_a_training_does_not_go_on_on_another_base_or_other_videos(tiny22, tmp_path, small_shards, monkeypatch):
    model = shutil.copytree(tiny22, tmp_path / "model")
    data = VideoData(heights=(96,), clips=2)
    train_uhr(tmp_path / "run", length=Length(steps=1), device=CPU, resume=False, model=model, data=data, report=quiet)
    monkeypatch.setattr("muralist.data.latents.build_pool", lambda *a: pytest.fail("encoded before it was refused"))
    for other, named in ((VideoData(heights=(128,), clips=2), "data"), (VideoData(heights=(96,), clips=3), "--clips")):
        with pytest.raises(UserError, match=f"stand on another {named}"):
            train_uhr(tmp_path / "run", length=Length(steps=2), device=CPU, resume=True, model=model, data=other, report=quiet)
    file = next((model / "transformer").glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="stand on another base"):
        train_uhr(tmp_path / "run", length=Length(steps=2), device=CPU, resume=True, model=model, data=data, report=quiet)


@pytest.mark.parametrize("source", ["world", "footage"])
def test_anchored_synthesis_is_trained_and_serves(source, tiny22, videos, tmp_path, small_shards):
    model = shutil.copytree(tiny22, tmp_path / "model")
    for folder in ("adapters/anchored", "parts/injector", "parts/step_size"):
        shutil.rmtree(model / folder)
    data = VideoData(source=World() if source == "world" else read_footage(videos), heights=(96,), clips=2)
    made = train_anchored(tmp_path / "run", length=Length(steps=3), device=CPU, resume=False, model=model, data=data, report=quiet)
    shutil.copytree(made, model / "adapters" / "anchored")
    for kind, learned in (("injector", "out.1.weight"), ("step_size", "linear_2.weight")):
        tensors = load_file(tmp_path / "run" / "parts" / kind / "model.safetensors")
        assert tensors[learned].abs().max() > 0, f"{kind} has learned nothing"
        shutil.copytree(tmp_path / "run" / "parts" / kind, model / "parts" / kind)
    command = ("generate", "a red ball", "--recipe", "pixelwizard", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 5)
    answer = muralist(*command)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("gate", ["the base's own", "none"])
def test_anchored_synthesis_goes_on_from_what_the_base_has(gate, tiny22, tmp_path, small_shards, monkeypatch):
    trained, said = [], []
    monkeypatch.setattr("muralist.train.anchored.fit_adapter", lambda trainee, *about: trained.append(trainee.transformer))
    config = AnchoredConfig(injector=replace(inspect_base(str(tiny22)).injector, gate="none")) if gate == "none" else None
    data = VideoData(heights=(96,), clips=2)
    train_anchored(tmp_path / "run", length=Length(steps=1), device=CPU, resume=False, model=tiny22, data=data, config=config, report=said.append)
    for kind, projection in (("injector", "features.0.weight"), ("step_size", "linear_1.weight")):
        (_, before), (_, after) = (load_part(folder / "parts" / kind, kind) for folder in (tiny22, tmp_path / "run"))
        assert all(p.requires_grad for p in getattr(trained[0], kind).parameters()), f"{kind} would stay as it is"
        anew = kind == "injector" and gate == "none"
        assert torch.equal(before[projection].half(), after[projection]) is not anew
        assert after.keys() == before.keys() or anew
    assert any("a new one takes its place" in text for text in said) is (gate == "none")


def test_an_anchor_is_cut_where_its_crop_lies():
    whole = torch.arange(20.0).view(1, 1, 1, 1, 20).expand(1, 2, 3, 10, 20)  # every latent says its column
    place = torch.tensor([[0.5, 0.25, 0.2, 0.5]])
    cut = cut_to(whole, place, (2, 4, 10))
    assert cut.shape == (1, 2, 2, 4, 10) and cut[0, 0, 0, 0].tolist() == pytest.approx([5.0 + i for i in range(10)], abs=1e-4)
    halves = cut_to(whole, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), (1, 10, 40))
    assert halves[0, 0, 0, 0, 1:-1].tolist() == pytest.approx([-0.25 + 0.5 * i for i in range(1, 39)], abs=1e-4)


def test_training_from_a_guide_follows_refinement():
    x, noise, guide = torch.randn(3, 2, 4, 3, 5, 5).unbind()
    start = flow.shifted(0.4, 3.0)
    far = from_guide(x, noise, Batch(x, ["", ""], guide=guide, skip_share=0.6), start)
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


def test_an_anchor_is_blurred_as_the_release_blurs_it():
    """At 240 rows: a deviation of 3 to 5 pixels, cut off by a kernel of 7 to 11, measured where an edge was."""
    edge = torch.zeros(1, 240, 240, 3)
    edge[:, :, 120:] = 1
    slopes = [AnchorDamage(factor=(1, 1), noise=(0, 0))(edge, np.random.default_rng(seed))[0, 120, :, 0].diff() for seed in range(8)]
    places = torch.arange(239.0)
    spread = [((places - (s * places).sum()) ** 2 * s).sum().sqrt().item() for s in slopes]
    assert min(spread) >= 1.7 and max(spread) <= 3.0


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
    painted_with = Base(trainee.info, CPU, pick_dtype(CPU))
    expected = encode_prompt(painted_with, "a cube", "").positive
    assert torch.equal(trainee.embed(["a cube"]), expected.half().float())


def test_two_transformers_are_refused(tiny22, tmp_path):
    model = shutil.copytree(tiny22, tmp_path / "model")
    shutil.copytree(model / "transformer", model / "transformer_2")
    index = json.loads((model / "model_index.json").read_text()) | {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="two transformers"):
        Trainee(model, CPU)
