"""What we rely on in diffusers: parameter names of the real bases, and every name of its internals that we touch."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from diffusers.utils import apply_lora_scale

from muralist.nn.attention import BranchedWindows, CloseRemote, WindowAttention
from muralist.nn.block import TEXT_LENGTH, MuralBlock
from muralist.nn.branches import attach_branches
from muralist.nn.injector import AnchorInjector
from muralist.nn.kinds import InjectorConfig, hierarchical
from muralist.nn.step_size import StepSizeEmbedding
from muralist.nn.transformer import Graft, MuralTransformer

BASES = {
    "wan2.1-1.3b": dict(num_layers=30, num_attention_heads=12, ffn_dim=8960, in_channels=16, out_channels=16),
    "wan2.2-ti2v-5b": dict(num_layers=30, num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48),
    "wan2.1-14b": dict(num_layers=40, num_attention_heads=40, ffn_dim=13824, in_channels=16, out_channels=16),
    "wan2.1-14b-i2v": dict(num_layers=40, num_attention_heads=40, ffn_dim=13824, in_channels=36, out_channels=16, image_dim=1280, added_kv_proj_dim=5120),
}
BILLIONS = {"wan2.1-1.3b": 1.42, "wan2.2-ti2v-5b": 5.0, "wan2.1-14b": 14.29, "wan2.1-14b-i2v": 16.4}


def described(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


@pytest.mark.parametrize("base", BASES)
def test_graft_keeps_parameter_names_of_the_real_bases(base):
    with torch.device("meta"):
        stock = WanTransformer3DModel(**BASES[base])
    names = described(stock)
    assert sum(tensor.numel() for tensor in stock.parameters()) / 1e9 == pytest.approx(BILLIONS[base], rel=0.02)
    model = MuralTransformer.adopt(stock).configure(Graft(WindowAttention((7, 9, 15)), token_chunk=65536))
    assert described(model) == names
    assert type(model) is MuralTransformer and all(type(block) is MuralBlock for block in model.blocks)


GRAFTS = {
    "windows": WindowAttention((3, 4, 4)),
    "branches": BranchedWindows(4, branches=("coarse", "whole")),
    "close and remote windows": CloseRemote(tokens=64),
}


@pytest.mark.parametrize("attention", GRAFTS.values(), ids=GRAFTS)
@pytest.mark.parametrize("base", ["wan2.1-1.3b", "wan2.2-ti2v-5b"])
def test_grafted_base_runs_on_the_meta_device(base, attention):
    """Shapes through two real-size blocks, in windows and chunks, with branches, an anchor and sizes of steps."""
    with torch.device("meta"):
        model = MuralTransformer(**BASES[base] | {"num_layers": 2}).configure(Graft(attention, token_chunk=64))
        width, channels = 128 * BASES[base]["num_attention_heads"], BASES[base]["in_channels"]
        attach_branches(model.blocks, hierarchical(width, 2))
        model.injector, model.step_size = AnchorInjector(InjectorConfig(channels=channels, dim=width)), StepSizeEmbedding(width)
        latents, anchor = torch.empty(1, channels, 5, 16, 24), torch.empty(1, channels, 5, 8, 12)
        with torch.no_grad():
            seen = {"anchor": model.injector.refine(anchor, (5, 8, 12)), "step_size": torch.empty(1)}
            output = model(latents, torch.empty(1), torch.empty(1, 512, 4096), attention_kwargs=seen).sample
    assert output.shape == latents.shape


def test_saved_names_of_one_block_are_frozen():
    """Spelled out once: a rename in diffusers would break every published checkpoint and adapter."""
    with torch.device("meta"):
        model = MuralTransformer(**BASES["wan2.1-1.3b"] | {"num_layers": 1})
    block = {name.removeprefix("blocks.0.") for name in model.state_dict() if name.startswith("blocks.0.")}
    linear = {f"attn{i}.{layer}.{kind}" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0") for kind in ("weight", "bias")}
    norms = {f"attn{i}.norm_{which}.weight" for i in (1, 2) for which in "qk"} | {"norm2.weight", "norm2.bias"}
    ffn = {f"ffn.net.{layer}.{kind}" for layer in ("0.proj", "2") for kind in ("weight", "bias")}
    assert block == linear | norms | ffn | {"scale_shift_table"}


# -- One test for each name of diffusers' internals that nn/transformer.py touches --


@pytest.fixture(scope="module")
def small() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=1, image_dim=8, added_kv_proj_dim=24
    )


@pytest.mark.parametrize(
    "name", ["rope", "patch_embedding", "condition_embedder", "blocks", "norm_out", "proj_out", "scale_shift_table", "gradient_checkpointing"]
)
def test_model_attribute(small, name):
    assert hasattr(small, name)


@pytest.mark.parametrize("name", ["norm1", "attn1", "norm2", "attn2", "norm3", "ffn", "scale_shift_table"])
def test_block_attribute(small, name):
    assert hasattr(small.blocks[0], name)


@pytest.mark.parametrize("name", ["heads", "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "add_k_proj", "add_v_proj", "norm_added_k"])
def test_attention_attribute(small, name):
    assert hasattr(small.blocks[0].attn2, name)


def test_self_attention_and_text_only_bases_have_no_image_projection(small):
    assert small.blocks[0].attn1.add_k_proj is None


def test_output_projection_is_linear_then_dropout(small):
    assert [type(layer) for layer in small.blocks[0].attn1.to_out] == [torch.nn.Linear, torch.nn.Dropout]


def test_forward_signature_is_the_stock_one():
    ours, theirs = (list(inspect.signature(cls.forward).parameters) for cls in (MuralTransformer, WanTransformer3DModel))
    assert ours == theirs


def test_block_forward_is_called_positionally_with_these():
    assert list(inspect.signature(transformer_wan.WanTransformerBlock.forward).parameters) == [
        "self",
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "rotary_emb",
    ]


def test_condition_embedder_signature(small):
    assert list(inspect.signature(small.condition_embedder.forward).parameters) == [
        "timestep",
        "encoder_hidden_states",
        "encoder_hidden_states_image",
        "timestep_seq_len",
    ]


def test_gradient_checkpointing_func(small):
    small.enable_gradient_checkpointing()
    assert small.gradient_checkpointing and callable(small._gradient_checkpointing_func)
    small.disable_gradient_checkpointing()


def test_class_attributes_name_block_classes_that_exist():
    for listed in (MuralTransformer._no_split_modules, MuralTransformer._repeated_blocks):
        assert set(WanTransformer3DModel._no_split_modules) | {MuralBlock.__name__} == set(listed)


def test_apply_lora_scale_reads_the_named_argument():
    assert inspect.signature(apply_lora_scale).parameters["kwargs_name"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def test_text_length_is_the_one_in_the_processor():
    assert f"encoder_hidden_states.shape[1] - {TEXT_LENGTH}" in inspect.getsource(transformer_wan.WanAttnProcessor.__call__)


def test_to_json_string_writes_the_class_name(small):
    assert '"_class_name": "WanTransformer3DModel"' in small.to_json_string()
