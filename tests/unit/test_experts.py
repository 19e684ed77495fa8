"""Filters have the transfer function they name, and experts add what the formula says, in any token order."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.nn.attention import WindowAttention
from muralist.nn.experts import ExpertConfig, ExpertsConfig, attach
from muralist.nn.filters import RadialFilter
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.store.parts import save_part
from muralist.types import TextCond
from muralist.velocity import velocity_field

GRID = (2, 6, 10)
BOTH = {
    "low": ExpertConfig(place="attention", band=RadialFilter(band="low", cutoff=0.5), sigmas=(0.875, 1.0), rank=3, alpha=3.0),
    "high": ExpertConfig(place="ffn", band=RadialFilter(band="high", cutoff=0.5), sigmas=(0.0, 0.875), rank=3, alpha=6.0),
}


def cosine(height, width, ky, kx):
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    return torch.cos(2 * torch.pi * (ky * y + kx * x)).expand(2, height, width).reshape(1, -1, 1)


@pytest.mark.parametrize("height, width", [(6, 10), (7, 9), (1, 5), (68, 120)])
def test_low_and_high_are_the_whole(height, width):
    low, high = (RadialFilter(band=band, cutoff=0.4, edge=0.2) for band in ("low", "high"))
    x = torch.randn(2, 3 * height * width, 4)
    assert (low(x, (3, height, width)) + high(x, (3, height, width)) - x).abs().max() < 1e-5


@pytest.mark.parametrize("ky, kx", [(0, 0), (1, 0), (0, 3), (3, 5), (8, 12)])
def test_a_wave_comes_out_times_the_transfer_function(ky, kx):
    height, width = 24, 40
    low = RadialFilter(band="low", cutoff=0.5, edge=0.3)
    radius = 2 * ((ky / height) ** 2 + (kx / width) ** 2) ** 0.5
    gain = 1.0 if radius < 0.35 else 0.0 if radius > 0.65 else 0.5 - 0.5 * torch.sin(torch.pi * torch.tensor((radius - 0.5) / 0.3)).item()
    wave = cosine(height, width, ky, kx)
    assert (low(wave, (2, height, width)) - gain * wave).abs().max() < 1e-5
    assert low.transfer(height, width)[ky, kx].item() == pytest.approx(gain, abs=1e-6)


def test_a_sharp_mask_is_a_projection():
    sharp = RadialFilter(band="high", cutoff=0.5, edge=0.0)
    x = torch.randn(1, 60, 3)
    once = sharp(x, (1, 6, 10))
    assert (sharp(once, (1, 6, 10)) - once).abs().max() < 1e-5 and once.mean(dim=1).abs().max() < 1e-6


@pytest.mark.parametrize("wrong", [dict(band="middle"), dict(band="low", cutoff=0.0), dict(band="low", cutoff=2.0), dict(band="low", edge=-1.0)])
def test_filters_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        RadialFilter(**wrong)


def model(seed=0):
    torch.manual_seed(seed)
    transformer = MuralTransformer(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=32, num_layers=2
    )
    attach(transformer.blocks, 24, BOTH)
    return transformer.eval()


def waken(transformer):
    for block in transformer.blocks:
        for expert in block.experts.values():
            nn.init.normal_(expert.up.weight)
    return transformer


def run(transformer, graft, batch=2):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(batch, 4, 2, 12, 20, generator=generator), torch.randn(batch, 5, 8, generator=generator)
    transformer.configure(graft)
    return transformer(latents, torch.full((batch,), 500.0), text, return_dict=False)[0]


@torch.no_grad()
def test_a_new_expert_changes_nothing():
    transformer = model()
    assert torch.equal(run(transformer, Graft(experts=("low", "high"), token_chunk=1000)), run(transformer, Graft(token_chunk=1000)))


@torch.no_grad()
@pytest.mark.parametrize("names", [("low",), ("high",), ("low", "high")])
def test_experts_add_the_filtered_branch_of_the_formula(names):
    """Against hooks on stock modules: Attention(x) + LoRA(filter(x)), filtered at full width."""
    transformer = waken(model())
    got = run(transformer, Graft(experts=names))

    def beside(expert):
        return lambda module, arguments, output: output + expert.up(expert.down(expert.band(arguments[0], GRID))) * expert.scale

    hooks = [
        module.register_forward_hook(beside(block.experts[name]))
        for block in transformer.blocks
        for name, module in (("low", block.attn1), ("high", block.ffn))
        if name in names
    ]
    expected = run(transformer, Graft())
    for hook in hooks:
        hook.remove()
    assert (expected - run(transformer, Graft())).abs().max() > 1e-2
    assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_experts_are_the_same_in_window_order_and_in_chunks():
    transformer = waken(model())
    whole = run(transformer, Graft(experts=("low", "high"), attention=WindowAttention((2, 4, 4))))
    for chunk in (1, 40):
        assert (run(transformer, Graft(experts=("low", "high"), attention=WindowAttention((2, 4, 4)), token_chunk=chunk)) - whole).abs().max() < 1e-5
    full = run(transformer, Graft(experts=("low", "high")))
    one_window = run(transformer, Graft(experts=("low", "high"), attention=WindowAttention(GRID)))
    assert (full - one_window).abs().max() < 1e-5


def test_gradients_reach_the_expert_through_chunks():
    transformer = waken(model())
    grads = []
    for chunk in (None, 30):
        run(transformer, Graft(experts=("low", "high"), token_chunk=chunk)).square().mean().backward()
        grads.append([p.grad.clone() for block in transformer.blocks for p in block.experts.parameters()])
        transformer.zero_grad()
    assert all(g.abs().max() > 0 and torch.allclose(g, h, atol=1e-6) for g, h in zip(*grads))


# --- experts as a part of a base ---------------------------------------------------------------------------------------------------


def test_a_configuration_survives_the_way_through_its_record():
    config = ExpertsConfig(dim=24, layers=2, experts=BOTH | {"plain": replace(BOTH["low"], band=None, place="ffn")})
    assert ExpertsConfig.of(json.loads(json.dumps(config.record()))) == config


@pytest.mark.parametrize("wrong", [dict(place="norm"), dict(sigmas=(0.9, 0.5)), dict(sigmas=(0.0, 1.2)), dict(rank=0)])
def test_experts_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        replace(BOTH["low"], **wrong)


def test_each_expert_works_on_its_own_noise_levels():
    assert [BOTH["low"].works_at(sigma) for sigma in (1.0, 0.9, 0.875, 0.874, 0.0)] == [True, True, True, False, False]
    assert [BOTH["high"].works_at(sigma) for sigma in (1.0, 0.875, 0.874, 0.0)] == [False, False, True, True]


@torch.no_grad()
def test_a_base_uses_its_experts_where_they_work(tiny_base):
    base = Base(inspect_base(str(tiny_base)), torch.device("cpu"), torch.float32)
    text = TextCond(torch.randn(1, 4, 32), torch.zeros(1, 4, 32))
    z = torch.randn(1, base.info.geometry.channels, 2, 8, 12)

    def velocity(sigma, *names):
        return velocity_field(base, text, guidance_scale=2.0, graft=Graft(token_chunk=64, experts=names), adapter=None)(z, sigma)

    for sigma, working, idle in ((0.95, "low", "high"), (0.5, "high", "low")):
        plain = velocity(sigma)
        assert torch.equal(velocity(sigma, idle), plain)
        assert (velocity(sigma, working) - plain).abs().max() > 1e-3
        assert torch.equal(velocity(sigma, "low", "high"), velocity(sigma, working))


def test_experts_of_another_base_are_refused(tiny22, tmp_path):
    folder = shutil.copytree(tiny22, tmp_path / "copy")
    other = ExpertsConfig(dim=32, layers=2, experts=BOTH)
    save_part(folder / "parts" / "experts", "experts", other.record(), {name: torch.zeros(shape) for name, shape in other.tensors().items()})
    with pytest.raises(UserError, match="2 blocks of width 32, this base has 2 of width 24"):
        inspect_base(str(folder))


def test_experts_with_other_tensors_are_refused(tiny22, tmp_path):
    folder = shutil.copytree(tiny22, tmp_path / "copy")
    config = ExpertsConfig(dim=24, layers=2, experts=BOTH)
    tensors = {name: torch.zeros(shape) for name, shape in config.tensors().items()}
    tensors.popitem()
    save_part(folder / "parts" / "experts", "experts", config.record(), tensors)
    with pytest.raises(UserError, match="the weights are not those"):
        inspect_base(str(folder))


def test_experts_are_not_read_as_a_plain_lora(tiny22, tmp_path):
    folder = shutil.copytree(tiny22, tmp_path / "copy")
    (folder / "adapters" / "low").mkdir(parents=True)
    shutil.copy(folder / "parts" / "experts" / "model.safetensors", folder / "adapters" / "low" / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="a part of kind 'experts', not a plain LoRA"):
        inspect_base(str(folder))


def test_an_unknown_expert_is_refused_before_anything_is_loaded(tiny22):
    with pytest.raises(UserError, match="no expert 'middle'"):
        inspect_base(str(tiny22)).require_experts(("low", "middle"))


def test_two_experts_do_not_share_a_place_and_a_noise_level():
    with pytest.raises(UserError, match="work at one place and noise level"):
        ExpertsConfig(dim=24, layers=2, experts=BOTH | {"other": BOTH["low"]})
    ExpertsConfig(dim=24, layers=2, experts=BOTH | {"other": replace(BOTH["low"], sigmas=(0.0, 0.875))})
    with pytest.raises(UserError, match=r"named 'a\.b'"):
        ExpertsConfig(dim=24, layers=2, experts={"a.b": BOTH["low"]})
