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
from muralist.recipes.imports.lora import BESIDE
from muralist.recipes.imports.wan import diffusers_names
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
    "VideoX-Fun": (lambda made: {name.replace("lora_unet_", "lora_unet__"): t for name, t in musubi_style(made, 1.5).items()}, 0.5),
    "ai-toolkit": (lambda made: {name.replace("lora_unet_", "lycoris_"): t for name, t in musubi_style(made, 1.5).items()}, 0.5),
    "DiffSynth": (lambda made: {name.replace("diffusion_model.", "pipe.dit."): t for name, t in comfy_style(made, sides="AB").items()}, 1.0),
    "a prefix and diffusers' names": (lambda made: {name.replace("transformer.", "diffusion_model."): t for name, t in diffusers_style(made).items()}, 1.0),
    "whole numbers": (lambda made: comfy_style(made) | {f"diffusion_model.{wan_name(name)}.alpha": torch.tensor(6) for name in made}, 2.0),
    "zero differences": (lambda made: comfy_style(made) | {"diffusion_model.blocks.0.norm3.diff": torch.zeros(24)}, 1.0),
    "layers with alpha": (lambda made: diffusers_style(made) | {f"transformer.{name}.alpha": torch.tensor(1.5) for name in made}, 0.5),
}


def imported(tensors, base, tmp_path, metadata=None, *options):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "some_lora.safetensors", metadata)
    return muralist("import", "lora", tmp_path / "some_lora.safetensors", "--model", base, "--output", tmp_path / "out", *options)


def products(folder):
    """{layer: up @ down} of an adapter's file."""
    found = load_file(folder / "adapters" / "lora" / "pytorch_lora_weights.safetensors")
    layers = {name.partition(".lora_")[0] for name in found}
    return {layer: found[f"{layer}.lora_B.weight"].float() @ found[f"{layer}.lora_A.weight"].float() for layer in layers}


def near(found, expected):
    """As far as 16 bits go."""
    return (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("style", STYLES)
def test_every_way_of_naming_gives_the_same_adapter(style, made, tiny21, tmp_path):
    named, strength = STYLES[style]
    answer = imported(named(made), tiny21, tmp_path)
    assert answer.code == 0, answer.err
    places = sum(name.endswith((".weight", ".alpha")) for name in named(made))
    assert f"adapters/lora: {places} tensors matched, 0 unmatched" in answer.out
    found = products(tmp_path / "out")
    assert found.keys() == made.keys()
    for layer, (down, up) in made.items():
        assert near(found[layer], strength * up @ down)


@pytest.fixture
def with_lora(made, tiny21, tmp_path):
    """The tiny base with the adapter in it."""
    assert imported(comfy_style(made, 6.0), tiny21, tmp_path).code == 0
    model = shutil.copytree(tiny21, tmp_path / "model")
    shutil.copytree(tmp_path / "out" / "adapters", model / "adapters", dirs_exist_ok=True)
    return model


def give_second(model):
    """A second transformer, for low noise."""
    shutil.copytree(model / "transformer", model / "transformer_2")
    index = json.loads((model / "model_index.json").read_text()) | {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (model / "model_index.json").write_text(json.dumps(index))


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
    assert near(found, expected)


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


SAID = [
    ({"r": RANK, "lora_alpha": 6}, 2.0),
    ({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
    ({"r": 64, "lora_alpha": 6, "rank_pattern": {"blocks": RANK}}, 2.0),  # the rank is that of the matrices
    ({"r": RANK}, 1.0),
    ({}, 1.0),
]


@pytest.mark.parametrize(("said", "strength"), SAID)
def test_the_strength_that_is_said_beside_the_tensors(said, strength, made, tiny21, tmp_path):
    for number, place in enumerate(("metadata", "file")):
        folder = tmp_path / str(number)
        folder.mkdir()
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in said.items()})} if place == "metadata" else None
        if place == "file":
            (folder / "adapter_config.json").write_text(json.dumps(said))
        assert imported(peft_style(made), tiny21, folder, metadata).code == 0
        layer, (down, up) = next(iter(made.items()))
        assert near(products(folder / "out")[layer], strength * up @ down)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


FIRST = "transformer.blocks.0.attn1.to_q.lora"
ALPHA = "transformer.blocks.0.attn1.to_q.alpha"
NAN, INF = torch.full((24, RANK), torch.nan), torch.tensor(torch.inf)
WAN = "diffusion_model.blocks"
BAD = {
    "another base's": (lambda t: t | {f"{FIRST}_A.weight": torch.zeros(RANK, 7)}, "is [3, 7], not [3, 24]"),
    "half of a pair": (lambda t: without(t, f"{FIRST}_B.weight"), "one matrix of blocks.0.attn1.to_q, and not the other (up)"),
    "ranks that differ": (lambda t: t | {f"{FIRST}_B.weight": torch.zeros(24, 9)}, "is [24, 9], not [24, 3]"),
    "rank 0": (lambda t: t | {f"{FIRST}_A.weight": torch.zeros(0, 24), f"{FIRST}_B.weight": torch.zeros(24, 0)}, "is [0, 24], a matrix of rank 0"),
    "a number for a matrix": (lambda t: t | {f"{FIRST}_A.weight": torch.tensor(1.0)}, "is [], not a matrix"),
    "image layers": (lambda t: t | {"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.zeros(3, 24)}, "1 tensors have no place here"),
    "no floats": (lambda t: t | {f"{FIRST}_A.weight": torch.zeros(RANK, 24, dtype=torch.int8)}, "is of type I8"),
    "not a number": (lambda t: t | {f"{FIRST}_B.weight": NAN}, "holds NaN or infinity"),
    "infinite strength": (lambda t: t | {ALPHA: INF}, "alpha is no number"),
    "no strength": (lambda t: t | {ALPHA: torch.zeros(2)}, "alpha is no number"),
    "overflow": (lambda t: {n: x.half() * 1e4 for n, x in t.items()} | {ALPHA: torch.tensor(300.0)}, "NaN or infinity"),
    "twice": (lambda t: t | {f"{WAN}.0.self_attn.q.lora_down.weight": torch.zeros(RANK, 24)}, "are one and the same"),
    "a changed norm": (lambda t: t | {f"{WAN}.0.norm3.diff": torch.ones(24)}, "1 tensors have no place here"),
    "a changed modulation": (lambda t: t | {f"{WAN}.0.diff_m": torch.ones(1, 6, 24)}, "1 tensors have no place here"),
    "a whole difference beside a pair": (lambda t: t | {f"{WAN}.0.self_attn.q.diff": torch.ones(24, 24)}, "is a whole difference of 24 x 24"),
    "a block that is not there": (lambda t: t | {f"{WAN}.4000000000.self_attn.q.lora_down.weight": torch.ones(3, 24)}, "1 tensors have no place"),
    "dora": (lambda t: t | {f"{FIRST}_magnitude_vector": torch.zeros(24)}, "it is a DoRA"),
    "something else": (lambda t: {"unet.down.lora_A.weight": torch.zeros(2, 2)}, "none of its 1 tensors is known"),
    "kohya's for another network": (lambda t: {"lora_unet_down_blocks_0_q.lora_down.weight": torch.zeros(2, 2)}, "none of its 1 tensors is known"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(case, made, tiny21, tmp_path):
    spoil, said = BAD[case]
    answer = imported(spoil(diffusers_style(made)), tiny21, tmp_path)
    assert said in answer.error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "said", ['{"lora_alpha": "x"}', '{"lora_alpha": 1e999}', '{"alpha_pattern": 3}', "[]", "[" * 100_000, "{", f'{{"lora_alpha": {"9" * 401}}}']
)
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_strengths_that_cannot_be_read(said, place, made, tiny21, tmp_path):
    (tmp_path / "adapter_config.json").write_text(said if place == "beside" else "{}")
    metadata = {"lora_adapter_metadata": said} if place == "inside" else None
    assert "damaged" in imported(peft_style(made), tiny21, tmp_path, metadata).error


def test_what_is_said_of_other_files_and_components_is_not_taken(made, tiny21, tmp_path):
    """peft's configuration is that of peft's own names; in diffusers' file a second transformer has a strength of its own."""
    layer, (down, up) = next(iter(made.items()))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 30}))
    assert imported(comfy_style(made, 6.0), tiny21, tmp_path).code == 0
    assert near(products(tmp_path / "out")[layer], 2 * up @ down)
    both = {"transformer.lora_alpha": 6, "transformer_2.lora_alpha": 60}
    shutil.rmtree(tmp_path / "out")
    assert imported(diffusers_style(made), tiny21, tmp_path, {"lora_adapter_metadata": json.dumps(both)}).code == 0
    assert near(products(tmp_path / "out")[layer], 2 * up @ down)


def test_a_pickle_of_peft_finds_its_configuration(made, tiny21, tmp_path):
    torch.save(peft_style(made), tmp_path / "adapter_model.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6}))
    answer = muralist("import", "lora", tmp_path / "adapter_model.pt", "--model", tiny21, "--output", tmp_path / "out")
    assert answer.code == 0, answer.err
    layer, (down, up) = next(iter(made.items()))
    assert near(products(tmp_path / "out")[layer], 2 * up @ down)


def test_layers_beside_the_blocks(made, tiny21, tmp_path):
    """A pair for the time's projection, a bias alone, and the whole difference of the narrow last layer."""
    layers = dict(WanTransformer3DModel.from_pretrained(tiny21 / "transformer").named_modules())
    time, head = layers["condition_embedder.time_proj"], layers["proj_out"]
    generator = torch.Generator().manual_seed(6)
    down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, time.in_features), (time.out_features, RANK)))
    whole = torch.randn(head.out_features, head.in_features, generator=generator)
    more = {
        "diffusion_model.time_projection.1.lora_down.weight": down,
        "diffusion_model.time_projection.1.lora_up.weight": up,
        "diffusion_model.text_embedding.0.diff_b": torch.ones(layers["condition_embedder.text_embedder.linear_1"].out_features),
        "diffusion_model.head.head.diff": whole,
    }
    answer = imported(comfy_style(made) | more, tiny21, tmp_path)
    assert answer.code == 0, answer.err
    found = products(tmp_path / "out")
    assert near(found["condition_embedder.time_proj"], up @ down) and near(found["proj_out"], whole)
    assert not found["condition_embedder.text_embedder.linear_1"].any()
    tensors = load_file(tmp_path / "out" / "adapters" / "lora" / "pytorch_lora_weights.safetensors")
    assert (tensors["condition_embedder.text_embedder.linear_1.lora_B.bias"] == 1).all()
    assert not tensors["condition_embedder.time_proj.lora_B.bias"].any() and {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_a_bias_behind_the_second_matrix_has_its_strength(tiny21, tmp_path):
    transformer = WanTransformer3DModel.from_pretrained(tiny21 / "transformer")
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], lora_bias=True, init_lora_weights=False), adapter_name="own")
    layer = transformer.blocks[0].attn1.to_q
    layer.lora_B["own"].bias.data.fill_(0.5)
    transformer.save_lora_adapter(tmp_path, adapter_name="own", weight_name="own.safetensors")
    assert muralist("import", "lora", tmp_path / "own.safetensors", "--model", tiny21, "--output", tmp_path / "out").code == 0
    found = load_file(tmp_path / "out" / "adapters" / "lora" / "pytorch_lora_weights.safetensors")
    assert (found["blocks.0.attn1.to_q.lora_B.bias"] == 0.5 * 6 / 2).all()


def test_names_are_those_that_diffusers_reads_too(made):
    """Where its conversion knows a file, ours finds the same layers."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    theirs = WanLoraLoaderMixin.lora_state_dict(comfy_style(made, 6.0))
    assert {name.removeprefix("transformer.").partition(".lora_")[0] for name in theirs} == made.keys()
    beside = {wan: ours for ours, wan in BESIDE.items()}
    converted = diffusers_names([f"{wan}.weight" for wan in beside])
    assert {wan.removesuffix(".weight"): name.removesuffix(".weight") for wan, name in converted.items()} == beside


@pytest.mark.parametrize("second", [False, True])
def test_an_adapter_of_another_base_is_one_line_before_anything_is_loaded(second, made, with_lora, tmp_path):
    folder = with_lora / "adapters" / "lora"
    if second:
        give_second(with_lora)
        folder = folder / "transformer_2"
        folder.mkdir()
    asked = ("a ball", "--model", with_lora, "--set", "refine.adapter=lora", "--size", "128x64", "--num-frames", 5)
    save_file({f"{FIRST.removeprefix('transformer.')}_A.weight": torch.zeros(3, 77)}, folder / "pytorch_lora_weights.safetensors")
    for command in (("plan", *asked), ("generate", *asked, "--output", tmp_path / "v.mp4")):
        assert "lora_A.weight [3, 77] fits no layer of this base" in muralist(*command).error
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "model.safetensors")
    assert "lacks pytorch_lora_weights.safetensors" in muralist("plan", *asked).error


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
    assert near(products(tmp_path / "out")["blocks.0.attn1.to_q"], expected)


def test_a_second_transformer_gets_its_own_where_there_is_one(made, with_lora):
    """High noise and low noise, as pairs for Wan2.2-A14B are made; without the second folder both get the first."""
    give_second(with_lora)
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
        assert near(weight - plain, factor * up @ down)
