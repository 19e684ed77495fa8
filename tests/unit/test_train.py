"""The training loop resumes exactly, stops at the first number that is not finite, and its objectives learn what they say."""

import csv
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch._dynamo.utils import counters

from muralist.data.latents import LatentPool, PoolConfig, build_pool, decode, encode
from muralist.errors import UserError
from muralist.nn import compiled
from muralist.nn.kernels import Kernels
from muralist.nn.transformer import MuralTransformer
from muralist.store.tensors import load_tensors, save_tensors
from muralist.train import state
from muralist.train.experts import train_experts
from muralist.train.latent_upsampler import train_latent_upsampler
from muralist.train.loop import Length, Schedule, _Curve, draw_curve, fit
from muralist.train.miniature import FURTHER, PHASES, Curriculum, TextToVideo, new_tokenizer, new_vae, train_base, train_decoder
from muralist.train.objectives.flow import FOCUS, Batch, FlowConfig, FlowMatching
from muralist.train.trainee import FRAMES, Trainee, give_adapter
from muralist.train.uhr import train_uhr
from muralist.types import Grid
from tests.shell import muralist


class Line:
    """A line through noisy points: the smallest objective there is; matrices under `.blocks.` so that Muon has work too."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"net": nn.ModuleDict({"blocks": nn.Linear(4, 4)})})
        self.fail_at = None

    def loss(self, step, progress):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        error = self.module["net"]["blocks"](x) - 2 * x
        return (error.square().mean() if step != self.fail_at else error.sum() * float("nan")), {}


def schedule(steps, **changes):
    return Schedule(length=Length(steps=steps), learning_rate=0.01, warmup=1, decay=0.5, save_every_minutes=0.0, **changes)


@pytest.mark.parametrize("muon", [False, True])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path, muon):
    whole = fit(Line(), schedule(20, muon=muon), tmp_path / "whole", resume=False, report=lambda line: None)
    stopped = Line()
    stopped.fail_at = 11
    with pytest.raises(FloatingPointError, match="step 11"):
        fit(stopped, schedule(20, muon=muon), tmp_path / "parts", resume=False, report=lambda line: None)
    parts = fit(Line(), schedule(20, muon=muon), tmp_path / "parts", resume=True, report=lambda line: None)
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.equal(a, b)


def test_ctrl_c_saves_the_step_it_meets(tmp_path):
    class Interrupted(Line):
        def loss(self, step, progress):
            if step == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(step, progress)

    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(), Schedule(length=Length(steps=20), save_every_minutes=60), tmp_path, resume=False, report=lambda line: None)
    assert state.load_newest(tmp_path / "checkpoints")[1]["step"] == 8


def test_ctrl_c_that_ends_a_compiler_within_a_step_saves_the_step_before(tmp_path):
    """It goes to the whole group of processes, and a compiler that was called ends with an error of its own."""

    class Compiling(Line):
        def loss(self, step, progress):
            if step == 7:
                os.kill(os.getpid(), signal.SIGINT)
                raise RuntimeError("C++ compile error")
            return super().loss(step, progress)

    with pytest.raises(KeyboardInterrupt):
        fit(Compiling(), Schedule(length=Length(steps=20), save_every_minutes=60), tmp_path, resume=False, report=lambda line: None)
    assert state.load_newest(tmp_path / "checkpoints")[1]["step"] == 7


def test_a_training_does_not_go_on_at_another_learning_rate(tmp_path):
    fit(Line(), schedule(5), tmp_path, resume=False, report=lambda line: None)
    with pytest.raises(UserError, match=r"learning rate of 0.01, it is 0.001 now"):
        fit(Line(), Schedule(length=Length(steps=9)), tmp_path, resume=True, report=lambda line: None)


def test_long_first_steps_are_no_reason_to_start_at_the_full_rate():
    """Where a step of minutes is one that compiles, a tenth of the length is over with it."""
    slow = Schedule(length=Length(minutes=30))
    assert [slow.rate(step, 0.2) / slow.learning_rate for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert slow.rate(0, 0.0) / slow.learning_rate == pytest.approx(0.01)


def test_a_folder_with_a_training_is_refused_unless_it_is_to_go_on(tmp_path):
    fit(Line(), schedule(60), tmp_path, resume=False, report=lambda line: None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step 60.*--resume, or name another --output"):
        fit(Line(), schedule(5), tmp_path, resume=False, report=lambda line: None)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_training_asks_before_it_encodes(tmp_path, monkeypatch):
    state.save(tmp_path / "checkpoints", 7, {"a": torch.zeros(1)}, {"step": 7})
    monkeypatch.setattr("muralist.data.latents.build_pool", lambda *a: pytest.fail("encoded"))
    monkeypatch.setattr("muralist.train.miniature.load_vae", lambda *a: pytest.fail("loaded"))
    for train, start in ((train_base, "vae"), (train_uhr, "model"), (train_latent_upsampler, "model"), (train_experts, "model")):
        with pytest.raises(UserError, match="step 7"):
            train(tmp_path, length=Length(minutes=1), device=torch.device("cpu"), resume=False, **{start: tmp_path})


def test_a_gradient_that_is_not_finite_ends_the_training_before_the_weights_are_touched(tmp_path):
    class Cliff(Line):
        def loss(self, step, progress):
            loss, metrics = super().loss(step, progress)
            weight = self.module["net"]["blocks"].weight
            return (loss + (weight - weight.detach()).abs().sum().sqrt() if step == 2 else loss), metrics  # zero, and infinitely steep

    line = Cliff()
    with pytest.raises(FloatingPointError, match="gradient is nan at step 2"):
        fit(line, schedule(5), tmp_path, resume=False, report=lambda line: None)
    assert all(torch.isfinite(p).all() for p in line.module.parameters())


def test_what_is_measured_from_some_step_on_gets_a_column(tmp_path):
    curve = _Curve(tmp_path, 0, every=1)
    curve.add(1, 60.0, {"loss": 1.0})
    curve.add(2, 120.0, {"loss": 0.5, "pixel": 0.25})
    _Curve(tmp_path, 2, every=1).add(3, 180.0, {"loss": 0.25})  # after a resume
    assert (tmp_path / "curve.csv").read_text().split() == ["step,minutes,loss,pixel", "1,1.0,1.0,", "2,2.0,0.5,0.25", "3,3.0,0.25,"]


def test_what_draws_the_curve_is_missed_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib"):
        fit(Line(), schedule(5), tmp_path, resume=False, report=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_another_training_are_refused(tmp_path):
    fit(Line(), schedule(2), tmp_path, resume=False, report=lambda line: None)
    other = Line()
    other.module = nn.ModuleDict({"net": nn.Linear(4, 4)})
    with pytest.raises(UserError, match="another training"):
        fit(other, schedule(5), tmp_path, resume=True, report=lambda line: None)


@pytest.mark.parametrize(
    ("later", "told"), [({}, "stand on another base"), ({"base": "b", "adapter": "c"}, "do not say on which adapter"), ({"base": "c"}, "base")]
)
def test_checkpoints_name_all_that_they_stand_on_and_nothing_else(later, told, tmp_path):
    fit(Line(), schedule(2), tmp_path, resume=False, origin={"base": "b"}, report=lambda line: None)
    with pytest.raises(UserError, match=told):
        fit(Line(), schedule(5), tmp_path, resume=True, origin=later, report=lambda line: None)
    fit(Line(), schedule(3), tmp_path, resume=True, origin={"base": "b"}, report=lambda line: None)


def test_the_curve_of_a_killed_and_resumed_training_runs_forwards(tmp_path):
    fit(Line(), schedule(110), tmp_path, resume=False, report=lambda line: None)
    with open(tmp_path / "curve.csv", "ab") as file:  # what a process wrote after its last checkpoint, the last line half
        file.write(b"150,0.1,1.0,1.0\r\n200,0.")
    fit(Line(), schedule(220), tmp_path, resume=True, report=lambda line: None)
    with open(tmp_path / "curve.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [50, 100, 160, 210]


def test_the_columns_of_a_curve_stay_whatever_a_step_measures(tmp_path):
    nan, curve = float("nan"), _Curve(tmp_path, 0, every=2)
    curve.add(1, 0.0, {"loss": 1.0, "low": nan, "high": 4.0})
    assert curve.add(2, 60.0, {"loss": 3.0, "low": nan, "high": nan}) == "step 2  minutes 1  loss 2  high 4"
    resumed = _Curve(tmp_path, 2, every=1)
    resumed.add(3, 120.0, {"high": 8.0, "loss": 5.0, "low": 6.0})
    assert (tmp_path / "curve.csv").read_text().split() == ["step,minutes,loss,low,high", "2,1.0,2.0,,4.0", "3,2.0,5.0,6.0,8.0"]


def test_a_base_is_not_trained_on_a_vae_of_other_channels(tmp_path):
    AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="48 channels"):
        train_base(tmp_path / "run", length=Length(minutes=1), device=torch.device("cpu"), resume=False, vae=tmp_path / "vae")
    with pytest.raises(UserError, match="other layers"):
        train_decoder(tmp_path / "run", length=Length(minutes=1), device=torch.device("cpu"), resume=False, vae=tmp_path / "vae")


def test_a_training_too_short_for_a_curve_is_no_error(tmp_path):
    draw_curve(tmp_path)
    assert not (tmp_path / "curve.png").exists()


def test_it_learns(tmp_path):
    objective = Line()
    before = objective.loss(999, 0)[0].item()
    fit(objective, schedule(300), tmp_path, resume=False, report=lambda line: None)
    assert objective.loss(999, 0)[0].item() < 0.2 * before
    draw_curve(tmp_path)
    assert (tmp_path / "curve.png").stat().st_size > 1000
    with open(tmp_path / "curve.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]


def test_unfinished_checkpoints_are_ignored_and_two_are_kept(tmp_path):
    for step in range(1, 6):
        state.save(tmp_path, step, {"a": torch.full((2,), float(step))}, {"step": step})
    (tmp_path / "step-9.tmp").mkdir()
    tensors, numbers = state.load_newest(tmp_path)
    assert numbers["step"] == 5 and tensors["a"].tolist() == [5, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-4", "step-5", "step-9.tmp"]


def test_a_length_is_minutes_or_steps_and_its_parts_are_equal():
    for none_or_both in ({}, {"minutes": 1.0, "steps": 1}):
        with pytest.raises(UserError, match="minutes and steps"):
            Length(**none_or_both)
    assert Length(minutes=30).part(2) == Length(minutes=15) and Length(steps=7).part(2) == Length(steps=4)
    assert Length(minutes=10).progress(1, 300) == 0.5 and Length(steps=10).progress(4, 1e9) == 0.4


def test_the_rate_falls_at_the_end():
    assert schedule(10).rate(9, 0.999) < 0.1 * schedule(10).rate(5, 0.5)


class Small(TextToVideo):
    """The same model, two thin layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.transformer = MuralTransformer(
            num_attention_heads=1,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            text_dim=128,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=64,
        )


@pytest.mark.parametrize("prediction", ["sample", "flow"])
def test_flow_matching_learns_a_constant_video(tmp_path, prediction):
    model = Small()
    x = torch.randn(1, 4, 1, 4, 4).expand(8, -1, -1, -1, -1)

    def source(rng, progress):
        return Batch(x, ["a red ball rises over sand"] * 8)

    objective = FlowMatching(model, model.transformer, model.embed, source, FlowConfig(prediction=prediction), torch.device("cpu"))
    before = objective.loss(0, 0)[0].item()
    fit(objective, Schedule(length=Length(steps=60), learning_rate=5e-3, warmup=5, muon=True), tmp_path, resume=False, report=lambda line: None)
    assert objective.loss(0, 0)[0].item() < 0.7 * before


def test_the_curriculum_keeps_true_places():
    frames = LatentPool(torch.zeros(5, 2, 1, 4, 4).half(), ["x"] * 5, torch.ones(5, 1, 4, 4, dtype=torch.bool))
    z = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(5, 2, 8, 4, 4).half()
    clips = LatentPool(z, ["x"] * 5, z[:, 0] % 2 == 0)
    small = LatentPool(z[..., :2, :2], ["x"] * 5, z[:, 0, :, :2, :2] % 2 == 0)
    kinds = {progress: set() for progress in (0.0, 0.6, 0.9)}
    for progress, seen in kinds.items():
        for step in range(60):
            batch = Curriculum(frames, clips, small)(np.random.default_rng(step), progress)
            places = [batch.first + i * batch.stride for i in range(batch.x.shape[2])]
            assert batch.x[0, 0, :, 0, 0].tolist() == places
            assert batch.x.shape[-1] * batch.spacing == 4
            if len(places) > 1:
                assert batch.focus[0, :, 0, 0].tolist() == [place % 2 == 0 for place in places]
            seen.add((len(places), batch.spacing))
    assert kinds == {0.0: {(1, 1)}, 0.6: {(1, 1), (3, 1), (8, 1), (8, 2)}, 0.9: {(1, 1), (8, 1), (8, 2)}}


@pytest.mark.parametrize("phase", PHASES + FURTHER)
def test_the_shares_of_a_phase_add_up(phase):
    assert phase.single + phase.small + phase.sparse + phase.whole == pytest.approx(1)


def test_a_coarse_token_stands_in_the_middle_of_those_it_covers():
    seen = []

    class Asked(nn.Module):
        def configure(self, graft):
            seen.append(graft.rope)

        def forward(self, x, *args, **kwargs):
            return (x,)

    batch = Batch(torch.zeros(1, 2, 1, 2, 2), ["x"], first=1, stride=2, spacing=2.0)
    FlowMatching(Asked(), Asked(), lambda texts: torch.zeros(1), lambda rng, progress: batch, FlowConfig(), torch.device("cpu")).loss(0, 0)
    assert [axis.tolist() for axis in seen[-1].positions((2, 2, 2))] == [[1, 3], [0.5, 2.5], [0.5, 2.5]]


def test_errors_around_the_object_weigh_more_where_the_noise_shows_where_it_is():
    model = Small()
    x = torch.randn(8, 4, 1, 4, 4)

    def loss(focus, **noise):
        def source(rng, progress):
            return Batch(x, ["a red ball rises over sand"] * 8, focus)

        return FlowMatching(model, model.transformer, model.embed, source, FlowConfig(**noise), torch.device("cpu")).loss(0, 0)[0].item()

    nowhere, everywhere = torch.zeros(8, 1, 4, 4, dtype=torch.bool), torch.ones(8, 1, 4, 4, dtype=torch.bool)
    assert loss(nowhere) == loss(None)
    assert loss(everywhere, max_sigma=0.8) == pytest.approx(FOCUS * loss(None, max_sigma=0.8), rel=1e-5)
    assert loss(everywhere, min_sigma=0.95) == pytest.approx(loss(None, min_sigma=0.95), rel=1e-5)


def test_a_latent_pool_is_made_once_and_is_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr("muralist.data.latents.SHARD", 2)
    config = PoolConfig(name="p", count=3, grid=Grid(num_frames=5, height=64, width=112), frames=1)
    vae = new_vae().eval()
    first = build_pool(vae, config, tmp_path / "a", report=lambda line: None)
    second = build_pool(vae, config, tmp_path / "b", report=lambda line: None)
    monkeypatch.setattr("muralist.data.latents._encode", lambda *a: pytest.fail("encoded again"))
    again = build_pool(vae, config, tmp_path / "a", report=lambda line: None)
    assert first.z.shape == (3, 48, 1, 4, 7) and len(first.captions) == 3 and first.near_object.shape == (3, 1, 4, 7)
    assert torch.equal(first.z, second.z) and torch.equal(first.z, again.z) and first.captions == again.captions


def pool(folder, vae, **changes):
    config = PoolConfig(**{"name": "p", "count": 1, "grid": Grid(num_frames=1, height=64, width=112), "frames": 1, **changes})
    return build_pool(vae, config, folder, report=lambda line: None)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder with one shard of two videos and the VAE that encoded it."""
    monkeypatch.setattr("muralist.data.latents.SHARD", 2)
    vae = new_vae().eval()
    pool(tmp_path, vae)
    return tmp_path, vae


def test_a_pool_of_another_encoder_or_configuration_is_refused(made):
    folder, vae = made
    with pytest.raises(UserError, match=r"another encoder.*remove this folder"):
        pool(folder, new_vae(seed=1))
    with pytest.raises(UserError, match="another configuration"):
        pool(folder, vae, seed=9)
    vae.encoder.conv_in.weight.data[0] += 1e-3
    with pytest.raises(UserError, match="another encoder"):
        pool(folder, vae)


def test_a_pool_serves_a_new_decoder_and_grows(made):
    folder, vae = made
    for parameter in (*vae.decoder.parameters(), *vae.post_quant_conv.parameters()):
        parameter.data.zero_()
    assert len(pool(folder, vae, count=3).captions) == 3


def test_a_pool_that_does_not_say_what_made_it_or_is_damaged_is_refused(made):
    folder, vae = made
    shard = folder / "p-0000.safetensors"
    data = shard.read_bytes()
    save_tensors(shard, load_tensors(shard), {"captions": "[]"})
    with pytest.raises(UserError, match="does not say which encoder"):
        pool(folder, vae)
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match="remove p-0000"):
        pool(folder, vae)


def test_encode_and_decode_are_on_the_same_scale():
    vae = new_vae().eval()
    vae.register_to_config(latents_mean=[0.5] * 48, latents_std=[2.0] * 48)
    video = torch.rand(1, 64, 64, 3)
    with torch.no_grad():
        expected = (vae.decode(vae.encode(video.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mean).sample[0, :, 0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    assert (decode(vae, encode(vae, video[None]))[0] - expected).abs().max() < 1e-5


def test_the_tokenizer_knows_every_word_of_the_world_and_nothing_else():
    tokenizer = new_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer("An orange star moves left over lava, camera zooms in")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("a red dinosaur rises over sand")["input_ids"]


def test_steps_of_a_training_are_its_own_option_and_told_to_go_on(tmp_path, monkeypatch):
    """Elsewhere `--steps` is another spelling of the number of denoising steps."""

    def stopped(folder, *, length, **options):
        assert length == Length(steps=7)
        raise KeyboardInterrupt

    monkeypatch.setattr("muralist.train.features.train_features", stopped)
    answer = muralist("train", "features", "--steps", 7, "-o", tmp_path / "run")
    assert answer.code == 130 and "--steps 7" in answer.err and "--minutes" not in answer.err and "is read as" not in answer.err
    assert "no such option" in muralist("train", "features", "--num-inference-steps", 7).error.lower()


@pytest.mark.parametrize("typed", [(), ("--compile",)])
def test_blocks_are_compiled_where_that_is_asked_for_and_again_after_a_stop(typed, tiny22, tmp_path, monkeypatch):
    def stopped(folder, **options):
        assert compiled._compiling is bool(typed)
        raise KeyboardInterrupt

    monkeypatch.setattr("muralist.train.uhr.train_uhr", stopped)
    monkeypatch.setattr(compiled, "why_not", lambda device: None)
    answer = muralist("train", "uhr", "--from", tiny22, *typed, "-o", tmp_path / "run")
    assert answer.code == 130 and ("--compile" in answer.err) is bool(typed) and not compiled._compiling
    monkeypatch.setattr(compiled, "why_not", lambda device: "there is no C++ compiler (g++)")
    answer = muralist("train", "uhr", "--from", tiny22, *typed, "-o", tmp_path / "run")
    assert (answer.code == 2 and "no C++ compiler" in answer.error) if typed else answer.code == 130


@pytest.mark.slow
def test_a_compiled_step_of_a_training_is_the_plain_one(tiny22, monkeypatch):
    """Of an adapter: the same loss and gradients. No stock block is trained, for nothing of it would be compiled."""
    monkeypatch.setattr("muralist.base.pick_dtype", lambda device: torch.float32)  # in which nothing is rounded that a graph would not round
    steps = []
    for how in ("off", "blocks"):
        trainee = Trainee(tiny22, torch.device("cpu"))
        give_adapter(trainee, "uhr")
        trainee.learn_captions(["a red ball"])
        torch.manual_seed(1)
        for parameter in (p for p in trainee.parameters() if p.requires_grad):  # a fresh adapter's second matrices are zero and let no gradient through
            torch.nn.init.normal_(parameter, std=0.1)
        batch = Batch(torch.randn(2, 48, 3, 4, 6, generator=torch.Generator().manual_seed(0)), ["a red ball"] * 2)
        objective = FlowMatching(trainee, trainee.transformer, trainee.embed, lambda *_, batch=batch: batch, FlowConfig(), torch.device("cpu"))
        torch._dynamo.reset()
        counters.clear()
        with Kernels(compile=how).at_work():
            loss, _ = objective.loss(1, 0.5)
            loss.backward()
        assert (counters["stats"]["unique_graphs"] > 0) is (how == "blocks")
        steps.append([loss.detach(), *(p.grad for p in trainee.parameters() if p.requires_grad)])
    off = [((plain - fast).norm() / plain.norm()).item() for plain, fast in zip(*steps)]
    assert max(off) < 1e-3, off
    assert all(grad.any() for grad in steps[0][1:]) and len(steps[0]) > 10


def test_a_training_without_memory_says_what_a_training_can_do_about_it(tmp_path, monkeypatch):
    def too_large(folder, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("muralist.train.features.train_features", too_large)
    answer = muralist("train", "features", "--steps", 7, "-o", tmp_path / "run")
    assert answer.code == 2 and "--device" in answer.error and "--size" not in answer.error


def test_crops_with_a_guide_are_long_and_half_of_them_lie_on_the_object():
    own = Grid(num_frames=29, height=256, width=448)
    crops = PoolConfig(name="crops", count=1, grid=own, frames=17)
    made = Trainee.guided_pool(SimpleNamespace(own_grid=own, crop_pool=lambda height, data: crops), "enlarged", 1088, None, None)
    assert (made.aimed, made.length, made.proxy.num_frames) == (0.5, 17, 17)
    assert FRAMES == 17  # more latents than three, which all meet the padding before a clip
