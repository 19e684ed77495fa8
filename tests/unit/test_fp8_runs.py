"""Linear layers in 8 bits as runs ask for them and plans count them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import muralist as library
from muralist.base_info import inspect_base
from muralist.bench.wan import SIZES
from muralist.cost import transformer as costs
from muralist.cost.budget import Budget
from muralist.cost.denoising import held_bytes
from muralist.cost.setting import Setting
from muralist.errors import UserError
from muralist.nn import fp8
from muralist.nn.attention import WindowAttention
from muralist.nn.fp8 import quantise
from muralist.nn.kernels import Kernels
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.plan import Machine, plan
from muralist.request import Asked, make_request, restore
from muralist.settings import changed
from muralist.store import atomic
from tests.eight_bits import FP8, TYPES, apart
from tests.shell import muralist
from tests.unit.test_plan import TINY, Alive, request, stage

SMALL = ("--size", "160x96", "--num-frames", 5, "--seed", 5, "--json")

pytestmark = pytest.mark.usefixtures("forget_fp8")


# --- a run ------------------------------------------------------------------------------------------------------------------------


def paint(base, output, *more):
    return muralist("generate", "a red ball", "--model", base, "-o", output, "--linears", "fp8", *SMALL, *more)


def written(video) -> dict:
    return json.loads(video.with_name(video.name + ".json").read_text())["metadata"]


@pytest.mark.parametrize("flavour", ["wide21", "wide22"])
def test_a_run_in_8_bits_says_so_and_resumes_bit_for_bit(flavour, request, tmp_path, monkeypatch):
    base = request.getfixturevalue(flavour)
    assert (answer := paint(base, tmp_path / "whole.mp4")).code == 0, answer.err
    assert "linears" not in answer.err

    def stop(path, *arguments, publish_dir=atomic.publish_dir, **options):
        publish_dir(path, *arguments, **options)
        if path.name.startswith("refine-step"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "publish_dir", stop)
        assert paint(base, tmp_path / "a.mp4").code == 130
    assert muralist("resume", tmp_path / "a.mp4.run").code == 0
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
    found = written(tmp_path / "a.mp4")
    assert found["kernels"][0]["linears"] == "fp8" and restore(found["request"]).config.kernels.linears == "fp8"


def test_a_base_that_cannot_says_so_once_and_computes(tiny22, tmp_path):
    answer = paint(tiny22, tmp_path / "a.mp4")
    assert answer.code == 0 and answer.err.count("linears fp8: the base is 24 wide, no multiple of 16; they compute in") == 1
    found = written(tmp_path / "a.mp4")
    assert found["kernels"][0]["linears"] == "plain" and found["request"]["config"]["kernels"]["linears"] == "fp8", "as asked, beside what computed"


def test_a_run_goes_on_where_8_bits_are_gone(wide22, tmp_path, monkeypatch):
    assert paint(wide22, tmp_path / "a.mp4", "--keep-run").code == 0
    (tmp_path / "a.mp4").unlink()
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("gone")))
    fp8.why_not.cache_clear()
    answer = muralist("resume", tmp_path / "a.mp4.run")
    assert answer.code == 0 and "linears fp8: they do not run in" in answer.err
    assert [kernels["linears"] for kernels in written(tmp_path / "a.mp4")["kernels"]] == ["fp8"], "nothing was computed again"


def test_the_interface_in_python_takes_it(wide21):
    pipe = library.load(str(wide21), device="cpu")
    size = {"width": 96, "height": 64, "num_frames": 5, "seed": 5}
    latents = []
    for linears in ("plain", "fp8", "plain"):
        with pipe("a red ball", linears=linears, **size) as video:
            latents.append(video.latent.z)
    assert torch.equal(latents[0], latents[2]) and 0.001 < apart(latents[1], latents[0]) < 0.3


@pytest.mark.parametrize("typed", [("--linears", "int4"), ("--linears", ""), ("--set", "kernels.linears=fp4"), ("--set", "kernels.linears=8")])
def test_what_it_cannot_be_is_one_line(typed, tiny22, tmp_path):
    answer = muralist("generate", "a red ball", "--model", tiny22, "-o", tmp_path / "a.mp4", *typed)
    assert "fp8" in answer.error and not list(tmp_path.iterdir())


def test_a_request_keeps_it_and_plain_is_the_default(wide22):
    info = inspect_base(str(wide22))
    asked = make_request(Asked(prompt="a ball", seed=1, linears="fp8"), info, note=print)
    assert asked.config.kernels == Kernels(linears="fp8") and restore(asked.record()) == asked
    usual = make_request(Asked(prompt="a ball", seed=1), info, note=print)
    assert usual.config.kernels == Kernels() and changed(usual.config, ["kernels.linears=fp8"]) == asked.config
    with pytest.raises(UserError, match="use one of plain, fp8"):
        Kernels(linears="int8")


# --- the plan ---------------------------------------------------------------------------------------------------------------------


def settings(machine: Machine) -> tuple[Setting, Setting]:
    """(plain, 8 bits) of a 5B base."""
    info = SIZES["5B"].info("5B")
    plain = request(info.defaults.grid)
    asked = replace(plain, config=replace(plain.config, kernels=Kernels(linears="fp8")))
    return tuple(Setting(request=r, info=info, machine=machine) for r in (plain, asked))


def test_the_plan_counts_half_the_weights_and_no_gain_in_time():
    card = Machine.of("24GB")
    plain, asked = settings(card)
    assert 0.5 < held_bytes(asked)[0] / held_bytes(plain)[0] < 0.52
    (few, host), (half, half_host) = (held_bytes(replace(setting, streamed=True)) for setting in (plain, asked))
    assert half < 0.7 * few and held_bytes(plain)[0] == half_host < host, "loading holds 16 bits of all"
    made, usual = plan(asked.request, asked.info, card), plan(plain.request, plain.info, card)
    (refined, before), saved = (stage(p, "refine") for p in (made, usual)), held_bytes(plain)[0] - held_bytes(asked)[0]
    small = replace(card, device_bytes=3 * 10**9, matmul_flops=1e18)  # blocks arrive more slowly than they compute
    waiting = [plan(setting.request, setting.info, small, budget=Budget("low")) for setting in (plain, asked)]
    assert waiting[0].seconds == waiting[1].seconds and waiting[1].streamed
    assert refined.seconds == before.seconds and refined.flops == before.flops and "linear layers in 8 bits" in refined.action
    assert 0.9 * saved < before.memory_bytes - refined.memory_bytes < saved
    assert any("bench gpu --only H7" in note for note in made.notes) and not any("8 bits" in note for note in usual.notes)


def test_the_plan_of_a_machine_without_it_and_of_loading_on_a_cpu_counts_whole_weights():
    old = replace(Machine.of("24GB"), fp8=False)
    plain, asked = settings(old)
    assert held_bytes(asked) == held_bytes(plain) and asked.linears == "plain"
    cpu = replace(Machine.of("24GB"), device_bytes=None)
    plain, asked = settings(cpu)
    found = stage(plan(asked.request, asked.info, cpu), "refine")
    assert found.memory_bytes > held_bytes(plain)[0] > held_bytes(asked)[0]
    assert Machine.measure("cpu").fp8


@TYPES
@pytest.mark.parametrize("graft", [Graft(token_chunk=256), Graft(attention=WindowAttention((5, 5, 5)), token_chunk=256)], ids=["full", "windows"])
@pytest.mark.parametrize("ffn", [384, 1024])
def test_live_memory_of_a_forward_in_8_bits(dtype, graft, ffn):
    config = TINY | dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=ffn, num_layers=2)
    model = MuralTransformer(**config).to(dtype).configure(graft)
    quantise(model.blocks)
    z, text = torch.randn(1, 16, 5, 36, 40, dtype=dtype), torch.randn(1, 6, 32, dtype=dtype)
    seen = Alive(model)
    seen.weights |= {b.untyped_storage()._cdata for b in model.buffers()}
    with torch.no_grad(), seen:
        model(z, torch.ones(1), text)
    said = costs.live_bytes(costs.Dimensions.of(config), replace(graft, kernels=FP8), (5, 18, 20), dtype.itemsize)
    assert 0.9 <= said / seen.peak <= 1.2
