"""Adapters from elsewhere: every way of naming their tensors gives the same adapter, which acts, and files that do not fit are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.nn.adapters import can_merge, merge_adapter, select_adapter
from muralist.nn.transformer import Graft
from muralist.types import TextCond
from muralist.velocity import velocity_field
from tests.released import wan_name
from tests.shell import muralist

RANK = 3
TEXT = TextCond(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4, 32))
Z = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(2))
EVERY = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@pytest.fixture(scope="module")
def made(tiny21):
    """{layer: (down, up)} of every attention and FFN layer of the tiny base."""
    transformer = WanTransformer3DModel.from_pretrained(tiny21 / "transformer")
    generator = torch.Generator().manual_seed(4)
    layers = {name: module for name, module in transformer.named_modules() if name.startswith("blocks.") and name.endswith(EVERY)}
    draw = lambda *shape: torch.randn(shape, generator=generator) / 4  # noqa: E731
    return {name: (draw(RANK, module.in_features), draw(module.out_features, RANK)) for name, module in layers.items()}


def diffusers_style(made):
    return {f"transformer.{name}.lora_{side}.weight": tensor for name, pair in made.items() for side, tensor in zip("AB", pair)}


def comfy_style(made, alpha: float | None = None, sides=("down", "up")):
    named = {f"diffusion_model.{wan_name(name)}.lora_{side}.weight": tensor for name, pair in made.items() for side, tensor in zip(sides, pair)}
    alphas = {} if alpha is None else {f"diffusion_model.{wan_name(name)}.alpha": torch.tensor(alpha) for name in made}
    return named | alphas


def musubi_style(made, alpha: float):
    return {
        name.replace("diffusion_model.", "lora_unet_").replace(module, module.replace(".", "_")): tensor
        for name, tensor in comfy_style(made, alpha).items()
        for module in [name.removeprefix("diffusion_model.").split(".lora_")[0].removesuffix(".alpha")]
    }


def peft_style(made):
    return {f"base_model.model.{name}.lora_{side}.weight": tensor for name, pair in made.items() for side, tensor in zip("AB", pair)}


STYLES = {
    "diffusers": (diffusers_style, 1.0),
    "peft": (peft_style, 1.0),
    "in memory": (lambda made: {name.replace(".weight", ".default.weight"): t for name, t in diffusers_style(made).items()}, 1.0),
    "down and up": (lambda made: {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for name, t in diffusers_style(made).items()}, 1.0),
    "comfy": (comfy_style, 1.0),
    "comfy with alpha": (lambda made: comfy_style(made, 6.0), 2.0),
    "comfy, A and B": (lambda made: comfy_style(made, sides="AB"), 1.0),
    "wan": (lambda made: {name.removeprefix("diffusion_model."): t for name, t in comfy_style(made).items()}, 1.0),
    "musubi": (lambda made: musubi_style(made, 1.5), 0.5),
    "layers with alpha": (lambda made: diffusers_style(made) | {f"transformer.{name}.alpha": torch.tensor(1.5) for name in made}, 0.5),
}


def imported(tensors, base, tmp_path, metadata=None, *options):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "some_lora.safetensors", metadata)
    return muralist("import", "lora", tmp_path / "some_lora.safetensors", "--model", base, "--output", tmp_path / "out", *options)


def products(folder):
    """{layer: up @ down} of an adapter's file."""
    found = load_file(folder / "adapters" / "lora" / "pytorch_lora_weights.safetensors")
    layers = {name.partition(".lora_")[0] for name in found}
    return {layer: found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"] for layer in layers}


@pytest.mark.parametrize("style", STYLES)
def test_every_way_of_naming_gives_the_same_adapter(style, made, tiny21, tmp_path):
    named, strength = STYLES[style]
    answer = imported(named(made), tiny21, tmp_path)
    assert answer.code == 0, answer.err
    assert f"adapters/lora: {2 * len(made)} tensors matched, 0 unmatched" in answer.out
    found = products(tmp_path / "out")
    assert found.keys() == made.keys()
    for layer, (down, up) in made.items():
        assert torch.allclose(found[layer], strength * up @ down, atol=1e-5)


@pytest.fixture
def with_lora(made, tiny21, tmp_path):
    """The tiny base with the adapter in it."""
    assert imported(comfy_style(made, 6.0), tiny21, tmp_path).code == 0
    model = shutil.copytree(tiny21, tmp_path / "model")
    shutil.copytree(tmp_path / "out" / "adapters", model / "adapters", dirs_exist_ok=True)
    return model


def test_it_paints(made, with_lora, tmp_path):
    """Through the command line, in a proxy's and the target's few steps."""
    asked = ("a red ball", "--model", with_lora, "--size", "128x64", "--num-frames", 5, "--num-inference-steps", 2, "--guidance-scale", 1)
    few = ("--set", "proxy.adapter=lora", "--set", "refine.adapter=lora")
    answer = muralist("generate", *asked, *few, "--output", tmp_path / "video.mp4")
    assert answer.code == 0, answer.err
    base, plain = (Base(inspect_base(str(with_lora)), torch.device("cpu"), torch.float32) for _ in range(2))
    found = velocity_field(base, TEXT, guidance_scale=1.0, graft=Graft(), adapter="lora")(Z, 0.7)
    model = plain.transformer()
    select_adapter(model, None)
    with torch.no_grad():
        for layer, (down, up) in made.items():
            model.get_submodule(layer).weight.data.add_(2 * up @ down)
        expected = model(Z, torch.tensor([700.0]), TEXT.positive, return_dict=False)[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_bias_is_added_too(made, tiny21, tmp_path):
    """`diff_b`, of some layers: what others lack is nothing to add."""
    bias = {f"diffusion_model.{wan_name(name)}.diff_b": torch.ones(len(up)) for name, (_, up) in made.items() if ".attn1." in name}
    answer = imported(comfy_style(made) | bias, tiny21, tmp_path)
    assert answer.code == 0, answer.err
    model = shutil.copytree(tiny21, tmp_path / "model")
    shutil.copytree(tmp_path / "out" / "adapters", model / "adapters", dirs_exist_ok=True)
    beside, merged = (Base(inspect_base(str(model)), torch.device("cpu"), torch.float32).transformer() for _ in range(2))
    select_adapter(beside, "lora")
    assert can_merge(merged, "lora")
    before = merged.blocks[0].attn1.to_q.base_layer.bias.clone()
    merge_adapter(merged, "lora")
    assert torch.allclose(merged.blocks[0].attn1.to_q.base_layer.bias, before + 1)
    with torch.no_grad():
        found, expected = (m(Z, torch.tensor([700.0]), TEXT.positive, return_dict=False)[0] for m in (merged, beside))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("said, strength", [({"r": RANK, "lora_alpha": 6}, 2.0), ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0), ({}, 1.0)])
def test_the_strength_that_is_said_beside_the_tensors(said, strength, made, tiny21, tmp_path):
    for number, place in enumerate(("metadata", "file")):
        folder = tmp_path / str(number)
        folder.mkdir()
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in said.items()})} if place == "metadata" else None
        if place == "file":
            (folder / "adapter_config.json").write_text(json.dumps(said))
        assert imported(peft_style(made), tiny21, folder, metadata).code == 0
        layer, (down, up) = next(iter(made.items()))
        assert torch.allclose(products(folder / "out")[layer], strength * up @ down, atol=1e-5)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


FIRST = "transformer.blocks.0.attn1.to_q.lora"
BAD = {
    "another base's": (lambda t: t | {f"{FIRST}_A.weight": torch.zeros(RANK, 7)}, "is [3, 7], not [3, 24]"),
    "half of a pair": (lambda t: without(t, f"{FIRST}_B.weight"), "it lacks blocks.0.attn1.to_q.lora_B.weight"),
    "ranks that differ": (lambda t: t | {f"{FIRST}_B.weight": torch.zeros(24, 9)}, "is [24, 9], not [24, 3]"),
    "image layers": (lambda t: t | {"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.zeros(3, 24)}, "1 tensors have no place here"),
    "no floats": (lambda t: t | {f"{FIRST}_A.weight": torch.zeros(RANK, 24, dtype=torch.int8)}, "no floating point"),
    "dora": (lambda t: t | {f"{FIRST}_magnitude_vector": torch.zeros(24)}, "it is a DoRA"),
    "something else": (lambda t: {"unet.down.lora_A.weight": torch.zeros(2, 2)}, "none of its 1 tensors is known"),
    "kohya's for another network": (lambda t: {"lora_unet_down_blocks_0_q.lora_down.weight": torch.zeros(2, 2)}, "diffusers cannot read it"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(case, made, tiny21, tmp_path):
    spoil, said = BAD[case]
    answer = imported(spoil(diffusers_style(made)), tiny21, tmp_path)
    assert said in answer.error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "said, line", [({"r": 4, "alpha_pattern": {"to_q": 2}}, "differs from layer to layer"), ({"r": "x"}, "rank and alpha is damaged"), ([], "damaged")]
)
def test_strengths_that_cannot_be_read(said, line, made, tiny21, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    assert line in imported(peft_style(made), tiny21, tmp_path).error


def test_layers_without_a_place_can_be_left_out(made, tiny21, tmp_path):
    more = {
        "transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.zeros(3, 24),
        "transformer.blocks.0.attn2.add_k_proj.lora_B.weight": torch.zeros(24, 3),
    }
    answer = imported(diffusers_style(made) | more, tiny21, tmp_path, None, "--skip-unmatched")
    assert answer.code == 0 and "2 unmatched" in answer.out
    assert products(tmp_path / "out").keys() == made.keys()


def test_what_diffusers_itself_saves_is_read(tiny21, tmp_path):
    transformer = WanTransformer3DModel.from_pretrained(tiny21 / "transformer")
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False), adapter_name="own")
    transformer.save_lora_adapter(tmp_path, adapter_name="own", weight_name="own.safetensors")
    assert muralist("import", "lora", tmp_path / "own.safetensors", "--model", tiny21, "--output", tmp_path / "out").code == 0
    layer = transformer.blocks[0].attn1.to_q
    expected = layer.get_delta_weight("own")
    assert torch.allclose(products(tmp_path / "out")["blocks.0.attn1.to_q"], expected, atol=1e-5)


def test_a_second_transformer_gets_its_own_where_there_is_one(made, with_lora):
    """High noise and low noise, as pairs for Wan2.2-A14B are made; without the second folder both get the first."""
    shutil.copytree(with_lora / "transformer", with_lora / "transformer_2")
    index = json.loads((with_lora / "model_index.json").read_text()) | {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (with_lora / "model_index.json").write_text(json.dumps(index))
    second = with_lora / "adapters" / "lora" / "transformer_2"
    alike = inspect_base(str(with_lora))
    second.mkdir()
    save_file({name.removeprefix("transformer."): -tensor for name, tensor in diffusers_style(made).items()}, second / "pytorch_lora_weights.safetensors")
    apart = inspect_base(str(with_lora))
    assert apart.fingerprint != alike.fingerprint, "a run is not gone on with on other weights"
    layer, (down, up) = next(iter(made.items()))
    plain = load_file(with_lora / "transformer" / "diffusion_pytorch_model.safetensors")[f"{layer}.weight"]
    for sigma, factor in ((0.9, 2.0), (0.5, 1.0)):  # minus times minus: the second file's strength is 1
        base = Base(apart, torch.device("cpu"), torch.float32)
        base.merge("lora")
        weight = base.transformer(sigma).get_submodule(layer).weight
        assert torch.allclose(weight, plain + factor * up @ down, atol=1e-4)
