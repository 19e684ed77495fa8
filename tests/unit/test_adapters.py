"""Adapters as parts of the weights: the same velocity, nothing left behind for the next one, and what cannot be merged stays beside them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.nn import adapters
from muralist.nn.adapters import can_merge, merge_adapter, merged_adapter, select_adapter
from muralist.nn.attention.guided import GuidedWindows, Near
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import WindowAttention
from muralist.types import TextCond
from muralist.velocity import ProxyView, Sight, velocity_field

CPU = torch.device("cpu")
TEXT = TextCond(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4, 32))
Z = torch.randn(1, 48, 3, 8, 12, generator=torch.Generator().manual_seed(2))
TIME = torch.tensor([700.0])


def base_of(folder, dtype: torch.dtype = torch.float32) -> Base:
    return Base(inspect_base(str(folder)), CPU, dtype)


@torch.no_grad()
def output(transformer) -> torch.Tensor:
    dtype = transformer.patch_embedding.weight.dtype
    return transformer(Z.to(dtype), TIME, TEXT.positive.to(dtype), return_dict=False)[0].float()


@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_merged_weights_compute_what_the_adapter_adds(tiny22, dtype, within):
    beside, merged, plain = (base_of(tiny22, dtype).transformer() for _ in range(3))
    select_adapter(beside, "detail")
    merge_adapter(merged, "detail")
    select_adapter(plain, None)
    expected, found, without = (output(model) for model in (beside, merged, plain))
    scale = expected.abs().max()
    assert (found - expected).abs().max() < within * scale
    assert (without - expected).abs().max() > 4 * (found - expected).abs().max()


def test_a_merged_layer_multiplies_once(tiny22, monkeypatch):
    base, products = base_of(tiny22), []
    transformer = base.transformer()
    for layer in [m for m in transformer.modules() if isinstance(m, Linear)]:
        layer.lora_A["detail"].register_forward_hook(lambda *_: products.append(1))
    field = velocity_field(base, TEXT, guidance_scale=1.0, graft=Graft(), adapter="detail")
    field(Z, 0.7)
    assert base.transformer() is transformer and merged_adapter(transformer) == "detail" and not products
    select_adapter(base_of(tiny22).transformer(), "detail")
    monkeypatch.setattr("muralist.nn.adapters.can_merge", lambda *_: False)
    other = base_of(tiny22)
    for layer in [m for m in other.transformer().modules() if isinstance(m, Linear)]:
        layer.lora_A["detail"].register_forward_hook(lambda *_: products.append(1))
    found = velocity_field(other, TEXT, guidance_scale=1.0, graft=Graft(), adapter="detail")(Z, 0.7)
    assert products and (found - field(Z, 0.7)).abs().max() < 1e-4


def test_another_adapter_or_none_finds_the_weights_as_they_were(tiny22):
    used = base_of(tiny22)
    for adapter in ("detail", None, "proxy", "detail", None):
        field = velocity_field(used, TEXT, guidance_scale=2.0, graft=Graft(token_chunk=16), adapter=adapter)
        fresh = velocity_field(base_of(tiny22), TEXT, guidance_scale=2.0, graft=Graft(token_chunk=16), adapter=adapter)
        assert torch.equal(field(Z, 0.5), fresh(Z, 0.5))


@pytest.mark.parametrize("noise, loads", [("clean", 2), ("same", 1)])
def test_adapters_that_take_turns_at_every_step_stay_beside_the_weights(tiny22, noise, loads, monkeypatch):
    """One adapter for a clean proxy and another from then on: loaded once for each. Turn by turn: loaded once, never merged."""
    loaded = []
    original = Base._load_transformer
    monkeypatch.setattr(Base, "_load_transformer", lambda self, name: loaded.append(name) or original(self, name))
    base = base_of(tiny22)
    view = ProxyView(torch.randn(1, 48, 2, 4, 8, generator=torch.Generator().manual_seed(3)), 4.0, "proxy", noise, seed=3)
    graft = Graft(attention=GuidedWindows(WindowAttention((2, 2, 2)), Near((1, 2, 2))))
    field = velocity_field(base, TEXT, guidance_scale=2.0, graft=graft, adapter="detail", sight=Sight(proxy=view))
    found = [field(Z, sigma) for sigma in (0.9, 0.5)]
    assert len(loaded) == loads and merged_adapter(base.transformer()) == ("detail" if noise == "clean" else None)
    with monkeypatch.context() as patch:  # the same, all of it beside the weights
        patch.setattr(adapters, "can_merge", lambda *_: False)
        beside = velocity_field(base_of(tiny22), TEXT, guidance_scale=2.0, graft=graft, adapter="detail", sight=Sight(proxy=view))
        for merged, expected in zip(found, [beside(Z, sigma) for sigma in (0.9, 0.5)]):
            assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()


def test_what_is_more_than_a_product_is_not_merged(tiny22):
    transformer = base_of(tiny22).transformer()
    with adapters.several_adapters():
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), adapter_name="dora")
        transformer.add_adapter(LoraConfig(r=2, target_modules=["patch_embedding"], init_lora_weights=False), adapter_name="convolution")
    for name in ("dora", "convolution"):
        assert not can_merge(transformer, name)
        before = transformer.blocks[0].attn1.to_q.base_layer.weight.clone()
        merge_adapter(transformer, name)
        assert merged_adapter(transformer) is None and torch.equal(transformer.blocks[0].attn1.to_q.base_layer.weight, before)


def test_an_adapter_that_is_not_there_is_named(tiny22):
    with pytest.raises(UserError, match="no adapter 'sepia'"):
        velocity_field(base_of(tiny22), TEXT, guidance_scale=1.0, graft=Graft(), adapter="sepia")(Z, 0.5)
    with pytest.raises(UserError, match="no adapter 'detail'"):
        can_merge(nn.Linear(2, 2), "detail")


def test_merged_weights_serve_no_other_adapter(tiny22):
    transformer = base_of(tiny22).transformer()
    merge_adapter(transformer, "detail")
    select_adapter(transformer, "detail")
    for other in ("proxy", None):
        with pytest.raises(ValueError, match="'detail' is a part of the weights"):
            select_adapter(transformer, other)


class Stops:
    """Stands for `torch.addmm`; fails at one call."""

    def __init__(self, monkeypatch, error, at=4):
        self.inner, self.error, self.at, self.calls = torch.addmm, error, at, 0
        monkeypatch.setattr(torch, "addmm", self)

    def __call__(self, *given, **options):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.inner(*given, **options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=["memory", "Ctrl-C"])
def test_a_merge_that_is_stopped_leaves_nothing_behind(tiny22, error, monkeypatch):
    base = base_of(tiny22)
    base.transformer()
    field = velocity_field(base, TEXT, guidance_scale=1.0, graft=Graft(token_chunk=64), adapter="detail")
    with monkeypatch.context() as patch, pytest.raises(UserError if isinstance(error, RuntimeError) else KeyboardInterrupt) as stopped:
        Stops(patch, error)
        field(Z, 0.5)
    assert isinstance(error, KeyboardInterrupt) or "too little for the weights of the transformer" in str(stopped.value)
    for adapter in ("detail", None):
        again = velocity_field(base, TEXT, guidance_scale=1.0, graft=Graft(token_chunk=64), adapter=adapter)
        fresh = velocity_field(base_of(tiny22), TEXT, guidance_scale=1.0, graft=Graft(token_chunk=64), adapter=adapter)
        assert torch.equal(again(Z, 0.5), fresh(Z, 0.5))


def test_products_are_computed_on_one_device_wherever_the_weights_are(tiny22, monkeypatch):
    """In place on the device or at loading in main memory: another device would round otherwise, and a resumed run end in other bits."""
    seen = []
    inner = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda weight, *given, **options: seen.append(weight.device.type) or inner(weight.cpu(), *given, **options))
    transformer = base_of(tiny22).transformer()
    merge_adapter(transformer, "detail", torch.device("cpu"))
    assert set(seen) == {"cpu"}
    seen.clear()
    with pytest.raises((NotImplementedError, RuntimeError)):  # the meta device holds no values
        merge_adapter(base_of(tiny22).transformer(), "detail", torch.device("meta"))
    assert set(seen) <= {"meta"}


def test_a_proxy_is_remembered_for_the_prompts_that_have_their_turn(tiny22, monkeypatch):
    looked = []
    remember = MuralTransformer.remember
    monkeypatch.setattr(MuralTransformer, "remember", lambda self, *given: looked.append(1) or remember(self, *given))
    view = ProxyView(torch.randn(1, 48, 2, 4, 8, generator=torch.Generator().manual_seed(3)), 4.0, "proxy", "clean", seed=3)
    graft = Graft(attention=GuidedWindows(WindowAttention((2, 2, 2)), Near((1, 2, 2))))
    options = dict(guidance_scale=2.0, guidance_interval=(0.85, 1.0), graft=graft, adapter="detail", sight=Sight(proxy=view))
    for levels, prompts in (((0.9, 0.5), 2), ((0.5, 0.3), 1)):
        field = velocity_field(base_of(tiny22), TEXT, **options, grafts=dict.fromkeys(levels, graft))
        for sigma in levels:
            field(Z, sigma)
        assert len(looked) == prompts
        looked.clear()


def test_equal_adapters_take_no_turns(tiny22):
    view = ProxyView(torch.randn(1, 48, 2, 4, 8, generator=torch.Generator().manual_seed(3)), 4.0, "detail", "same", seed=3)
    base = base_of(tiny22)
    graft = Graft(attention=GuidedWindows(WindowAttention((2, 2, 2)), Near((1, 2, 2))))
    velocity_field(base, TEXT, guidance_scale=1.0, graft=graft, adapter="detail", sight=Sight(proxy=view))(Z, 0.5)
    assert merged_adapter(base.transformer()) == "detail"
