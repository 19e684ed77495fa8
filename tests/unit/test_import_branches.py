"""Import of UltraGen's release: its names and shapes, spelled out from its public code; values that arrive; files that are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.recipes import RECIPES, imports
from muralist.store.parts import load_part
from tests import released
from tests.shell import muralist

DIM, RANK = 24, 3


def extra(block: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one block with branches."""
    found, place = {}, f"blocks.{block}.self_attn"
    for x in "qkv":
        for number in (1, 2):
            found |= released.linear(f"{place}.{x}_lora_{number}.lora_A", DIM, RANK) | released.linear(f"{place}.{x}_lora_{number}.lora_B", RANK, DIM)
    for number in ("", "2"):
        found |= released.linear(f"{place}.alpha_time_embedding{number}.0", 256, DIM) | released.linear(f"{place}.alpha_time_embedding{number}.2", DIM, DIM)
        found |= released.linear(f"{place}.alpha_time_projection{number}.1", DIM, DIM)
    for suffix, side in (("", 4), ("_hierachcal", 2)):
        found |= {f"{place}.downsample_conv{suffix}.weight": (DIM, 1, side, side), f"{place}.downsample_conv{suffix}.bias": (DIM,)}
        found |= {f"{place}.upsample_conv{suffix}.weight": (DIM, 1, 3, 3, 3), f"{place}.upsample_conv{suffix}.bias": (DIM,)}
    return found


@pytest.fixture(scope="module")
def file(tiny21):
    """The tiny base's own transformer under Wan's names, with branches beside its second block."""
    torch.manual_seed(3)
    own = load_file(tiny21 / "transformer" / "diffusion_pytorch_model.safetensors")
    return {released.wan_name(name): tensor for name, tensor in own.items()} | {name: torch.randn(shape) / 4 for name, shape in extra(1).items()}


def imported(tensors, base, folder, name="model.safetensors", **options):
    save_file(tensors, folder / name)
    return imports.run(imports.find("ultragen"), folder / name, inspect_base(str(base)), folder / "out", **options)


def test_every_tensor_arrives_and_the_recipe_paints(file, tiny21, tmp_path):
    transformer, branches = imported(file, tiny21, tmp_path)
    assert (transformer.place, branches.place) == ("transformer", "parts/branches")
    assert len(transformer.names) + len(branches.names) == len(file) and not transformer.unmatched + branches.unmatched
    model = shutil.copytree(tiny21, tmp_path / "model")
    shutil.rmtree(model / "adapters" / "branched")
    for place in (transformer.place, branches.place):
        shutil.rmtree(model / place)
        shutil.copytree(tmp_path / "out" / place, model / place)
    info = inspect_base(str(model))
    config = RECIPES["ultragen"](info)
    assert config.refine.attention.plain == (0,) and config.refine.adapter is None and info.branches.rank == RANK
    assert not config.refine.attention.travel  # as in the release
    loaded = Base(info, torch.device("cpu"), torch.float32).transformer().blocks[1].branches
    place = "blocks.1.self_attn"
    x = torch.randn(1, DIM, 8, 12)
    for name, suffix in (("whole", ""), ("coarse", "_hierachcal")):
        weight, bias = (file[f"{place}.downsample_conv{suffix}.{kind}"] for kind in ("weight", "bias"))
        side = weight.shape[-1]
        pooled = torch.nn.functional.conv2d(x, weight, bias, stride=side, groups=DIM)
        row = sum(x[0, :, i, j] * loaded[name].pool_weight[0, i * side + j] for i in range(side) for j in range(side))
        assert torch.allclose(pooled[0, :, 0, 0], row + loaded[name].pool_bias[0], atol=1e-5)
    assert torch.equal(loaded["coarse"].k.lora_B.weight, file[f"{place}.k_lora_2.lora_B.weight"])
    assert torch.equal(loaded["whole"].fusion.projection.bias, file[f"{place}.alpha_time_projection.1.bias"])
    answer = muralist("generate", "a red ball", "--recipe", "ultragen", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 5)
    assert answer.code == 0, answer.err


def test_convolutions_without_a_bias_have_none(file, tiny21, tmp_path):
    tensors = {name: tensor for name, tensor in file.items() if "downsample" not in name or name.endswith("weight")}
    imported(tensors, tiny21, tmp_path)
    _, found = load_part(tmp_path / "out" / "parts" / "branches", "branches")
    assert not found["1.whole.pool_bias"].any() and found["1.whole.pool_weight"].any()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("blocks.1.self_attn.v_lora_2.lora_A.bias"), r"lacks 1 of \d+ tensors; 1.coarse.v.lora_A.bias"),
        (lambda t: t.update({"blocks.1.self_attn.q_lora_3.lora_A.weight": torch.zeros(2, 2)}), "1 tensors have no place here; blocks.1.self_attn.q_lora_3"),
        (lambda t: t.update({"blocks.1.self_attn.upsample_conv.weight": torch.zeros(DIM, DIM, 3, 3, 3)}), r"upsample_conv.weight is \[24, 24, 3, 3, 3\]"),
        (lambda t: [t.pop(name) for name in extra(1)], "no block of it has compressed branches"),
        (lambda t: t.update({name.replace("s.1.", "s.7."): t[name].clone() for name in extra(1)}), "branches beside block 7, .* has 2 blocks"),
    ],
    ids=["missing", "extra", "shape", "none", "another base"],
)
def test_what_does_not_fit_is_named(file, tiny21, tmp_path, change, said):
    tensors = dict(file)
    change(tensors)
    with pytest.raises(UserError, match=said):
        imported(tensors, tiny21, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_comes_in_too(file, tiny21, tmp_path):
    torch.save(file, tmp_path / "ultragen_1080p.ckpt")
    components = imports.run(imports.find("ultragen"), tmp_path / "ultragen_1080p.ckpt", inspect_base(str(tiny21)), tmp_path / "out")
    assert [component.place for component in components] == ["transformer", "parts/branches"]
