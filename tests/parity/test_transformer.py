"""`MuralTransformer` against diffusers' `WanTransformer3DModel`: what must be equal is equal, what must differ differs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from muralist.errors import UserError
from muralist.nn.attention import FullAttention, WindowAttention
from muralist.nn.attention.reference import window_mask
from muralist.nn.block import MuralBlock
from muralist.nn.rope import RopeScale
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import partition

SHAPE = (3, 5, 7)  # token grid: no side divides it, so windows are ragged
SMALL = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32, freq_dim=16, ffn_dim=48, num_layers=3
)
IMAGE = dict(SMALL, image_dim=24, added_kv_proj_dim=32)
WINDOWS = WindowAttention((2, 2, 3))
TOLERANCE = 1e-6


def stock_model(config: dict = SMALL, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """Random weights, with attention sharp enough that it matters who attends to whom."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**config).eval()
    for block in model.blocks:
        for layer in (block.attn1.to_q, block.attn1.to_v):
            layer.weight.data.mul_(4)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # as from_pretrained(torch_dtype=...) does; `.to` would cast these too
        if not any(kept in name.split(".") for kept in model._keep_in_fp32_modules):
            tensor.data = tensor.data.to(dtype)
    return model


def mural_model(graft: Graft | None = None, **rest) -> MuralTransformer:
    model = MuralTransformer.adopt(stock_model(**rest))
    return model if graft is None else model.configure(graft)


def inputs(shape=SHAPE, *, batch: int = 2, per_token: bool = False, image: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    f, y, x = shape
    made = {
        "hidden_states": torch.randn(batch, 4, f, 2 * y, 2 * x, generator=generator).to(dtype),
        "timestep": torch.tensor([700.0, 30.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, 512 if image else 6, 32, generator=generator).to(dtype),
    }
    if per_token:
        made["timestep"] = torch.randint(0, 3, (batch, f * y * x), generator=generator) * 300.0
    if image:
        made["encoder_hidden_states_image"] = torch.randn(batch, 9, 24, generator=generator).to(dtype)
    return made


def run(model: torch.nn.Module, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).sample


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


class MaskedProcessor(WanAttnProcessor):
    """diffusers' own attention with a mask: the stock model made windowed by brute force."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask[None, None]  # with two dimensions diffusers could take it for [batch, keys]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def masked_model(size, *, shift: bool = True, shape=SHAPE, **rest) -> WanTransformer3DModel:
    model = stock_model(**rest)
    for index, block in enumerate(model.blocks):
        block.attn1.set_processor(MaskedProcessor(window_mask(shape, size, shifted=shift and index % 2 == 1)))
    return model


# -- Unconfigured: diffusers, bit for bit --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("config", [SMALL, IMAGE, dict(SMALL, cross_attn_norm=False)], ids=["text", "image", "no cross norm"])
def test_unconfigured_is_diffusers_bit_for_bit(config, per_token, dtype):
    given = inputs(per_token=per_token, image="image_dim" in config, dtype=dtype)
    expected = run(stock_model(config, dtype), **given)
    assert torch.equal(run(mural_model(config=config, dtype=dtype), **given), expected)
    assert expected.abs().max() > 0.1


def test_unconfigured_gradients_are_those_of_diffusers():
    gradients = []
    for model in (stock_model(), mural_model()):
        model(**inputs()).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_configuring_back_to_nothing_restores_the_stock_model():
    model, given = mural_model(Graft(WINDOWS, token_chunk=10)), inputs()
    assert all(type(block) is MuralBlock for block in model.blocks)
    model.configure(Graft())
    assert all(type(block) is WanTransformerBlock for block in model.blocks)
    assert torch.equal(run(model, **given), run(stock_model(), **given))


def test_stock_signature_positional_and_tuple():
    given = inputs()
    (result,) = mural_model()(given["hidden_states"], given["timestep"], given["encoder_hidden_states"], None, False, {"scale": 1.0})
    assert torch.equal(result, stock_model()(**given).sample)


# -- Grafts that must change nothing --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [SHAPE, (9, 9, 9)])
def test_one_window_is_full_attention(size, dtype):
    given = inputs(dtype=dtype)
    assert torch.equal(run(mural_model(Graft(WindowAttention(size)), dtype=dtype), **given), run(stock_model(dtype=dtype), **given))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("attention", [FullAttention(), WindowAttention(SHAPE)])
@pytest.mark.parametrize("token_chunk", [1, 16, 104, 105, 1000])
def test_chunking_changes_nothing(attention, token_chunk, per_token):
    given = inputs(per_token=per_token)
    assert difference(run(mural_model(Graft(attention, token_chunk=token_chunk)), **given), run(stock_model(), **given)) < TOLERANCE


def test_chunking_serves_image_conditioned_bases():
    given = inputs(image=True)
    assert difference(run(mural_model(Graft(token_chunk=16), config=IMAGE), **given), run(stock_model(IMAGE), **given)) < TOLERANCE


@pytest.mark.parametrize("per_token", [False, True])
def test_reordering_alone_changes_nothing(monkeypatch, per_token):
    """Full attention over tokens that stand in (alternating) window-major order."""
    monkeypatch.setattr(FullAttention, "partitions", lambda self, shape: WINDOWS.partitions(shape))
    given = inputs(per_token=per_token)
    assert difference(run(mural_model(Graft(token_chunk=1000)), **given), run(stock_model(), **given)) < TOLERANCE
    assert len(WINDOWS.partitions(SHAPE)) == 2


# -- Windows: the stock model with masks --


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 50)),
    st.booleans(),
)
def test_windowed_model_is_the_masked_stock_model(shape, size, shift, token_chunk, per_token):
    given = inputs(shape, per_token=per_token)
    windowed = run(mural_model(Graft(WindowAttention(size, shift=shift), token_chunk=token_chunk)), **given)
    assert difference(windowed, run(masked_model(size, shift=shift, shape=shape), **given)) < 2e-5


def test_windows_shift_and_rope_all_matter():
    """The comparison above would notice a wrong partition, a missing shift, or positions that stay behind."""
    given = inputs()
    windowed = run(mural_model(Graft(WINDOWS)), **given)
    for other in (Graft(), Graft(WindowAttention((2, 2, 3), shift=False)), Graft(WindowAttention((1, 2, 3))), Graft(WINDOWS, RopeScale(x=0.5))):
        assert difference(windowed, run(mural_model(other), **given)) > 1e-2


def test_windowed_gradients_are_those_of_the_masked_stock_model():
    gradients = []
    for model in (masked_model(WINDOWS.size), mural_model(Graft(WINDOWS, token_chunk=20))):
        given = inputs()
        given["hidden_states"].requires_grad_()
        model(**given).sample.square().mean().backward()
        gradients.append([given["hidden_states"].grad, *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert difference(a, b) < 1e-4
    assert gradients[0][0].abs().max() > 1e-4


@pytest.mark.parametrize("graft", [Graft(), Graft(token_chunk=16), Graft(WINDOWS), Graft(WINDOWS, RopeScale(t=4.0), 16)])
def test_gradient_checkpointing_gives_the_same_gradients(graft):
    gradients = []
    for checkpointing in (False, True):
        model = mural_model(graft).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs()).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(difference(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))


def test_inference_leaves_its_inputs_alone():
    given = inputs()
    before = copy.deepcopy(given)
    run(mural_model(Graft(WINDOWS, token_chunk=16)), **given)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_training_follows_inference_mode():
    """What a sampler has cached in inference mode must not spoil a later backward pass."""
    partition.cache_clear()
    model = mural_model(Graft(WINDOWS))
    with torch.inference_mode():
        model(**inputs())
    assert not partition(SHAPE, WINDOWS.size).order.is_inference()
    model(**inputs(per_token=True)).sample.mean().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


# -- Positions --


@pytest.mark.parametrize("attention", [FullAttention(), WINDOWS])
def test_scaled_positions_take_rows_of_a_finer_table(attention):
    """Scale 2 on the stock path equals diffusers with its tables thinned out; the windowed path agrees with its masked version."""
    given = inputs()
    theirs = stock_model() if attention == FullAttention() else masked_model(WINDOWS.size)
    table = theirs.rope
    table.freqs_cos[:512, :8], table.freqs_sin[:512, :8] = table.freqs_cos[::2, :8].clone(), table.freqs_sin[::2, :8].clone()
    scaled = run(mural_model(Graft(attention, RopeScale(t=2.0))), **given)
    assert difference(scaled, run(theirs, **given)) < 1e-5
    assert difference(scaled, run(mural_model(Graft(attention)), **given)) > 1e-2


def test_grids_longer_than_diffusers_table():
    given = inputs((1, 1, 1030), batch=1)
    config = dict(SMALL, num_layers=1)
    with pytest.raises(RuntimeError):
        run(stock_model(config), **given)
    longer = run(stock_model(dict(config, rope_max_seq_len=1030)), **given)
    assert torch.equal(run(mural_model(config=config), **given), longer)


# -- One model among others: loading, saving, adapters, pipelines --


def test_adopt_copies_nothing_and_refuses_what_it_does_not_know():
    stock = stock_model()
    storages = [parameter.data_ptr() for parameter in stock.parameters()]
    model = MuralTransformer.adopt(stock)
    assert model is stock and [parameter.data_ptr() for parameter in model.parameters()] == storages
    assert MuralTransformer.adopt(model) is model
    with pytest.raises(TypeError, match="Linear"):
        MuralTransformer.adopt(torch.nn.Linear(2, 2))


def test_models_with_hooks_are_refused():
    stock = stock_model()
    stock.blocks[1].forward = stock.blocks[1].forward
    with pytest.raises(ValueError, match="hooks"):
        MuralTransformer.adopt(stock).configure(Graft(WINDOWS))


def test_saved_folder_loads_as_the_stock_class_and_as_ours(tmp_path):
    given = inputs()
    model = mural_model(Graft(WINDOWS))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    assert torch.equal(run(WanTransformer3DModel.from_pretrained(tmp_path).eval(), **given), run(stock_model(), **given))
    loaded = MuralTransformer.from_pretrained(tmp_path).eval().configure(Graft(WINDOWS))
    assert torch.equal(run(loaded, **given), run(model, **given))


@pytest.mark.parametrize("graft", [Graft(), Graft(WINDOWS, token_chunk=16)])
def test_adapters_train_scale_and_switch_off(graft):
    given, model = inputs(), mural_model(graft)
    before = run(model, **given)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"], init_lora_weights=False))
    adapted = run(model, **given)
    assert difference(adapted, before) > 1e-3
    with torch.no_grad():
        assert difference(model(**given, attention_kwargs={"scale": 0.0}).sample, before) < 1e-6
    model(**given).sample.mean().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all("lora" in name for name in trained)
    assert {name.split(".lora")[0].split(".", 2)[2] for name in trained} >= {"attn1.to_q", "attn2.to_k", "ffn.net.2"}
    model.disable_adapters()
    assert difference(run(model, **given), before) < 1e-6


def test_stock_pipeline_samples_with_a_grafted_transformer():
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    embeds = dict(prompt_embeds=torch.randn(1, 6, 32), negative_prompt_embeds=torch.zeros(1, 6, 32))
    frames = []
    for model in (masked_model((2, 2, 2), shape=(2, 3, 4)), mural_model(Graft(WindowAttention((2, 2, 2)), token_chunk=8))):
        pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=model)
        pipe.set_progress_bar_config(disable=True)
        result = pipe(**embeds, height=48, width=64, num_frames=5, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
        frames.append(result.frames)
    assert difference(*frames) < 1e-4


# -- Cost: what is promised about timesteps and memory --


def test_per_token_timesteps_are_embedded_once_each(monkeypatch):
    model, seen = mural_model(Graft(WINDOWS, token_chunk=16)), []
    model.condition_embedder.time_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    run(model, **inputs(per_token=True))
    assert seen == [(3, 32)]


def test_window_attention_never_projects_the_whole_sequence():
    model, lengths = mural_model(Graft(WINDOWS, token_chunk=24)), []
    for block in model.blocks:
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn2.to_q, block.ffn.net[0].proj):
            layer.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    run(model, **inputs())
    assert max(lengths) <= 24
    assert sum(lengths) == 105 * 5 * 3


def test_bad_chunk_is_refused():
    with pytest.raises(UserError, match="token_chunk"):
        Graft(token_chunk=0)
