"""Import of PixelWizard's release: its names and shapes, spelled out from its public code; values that arrive; files that are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.nn.step_size import waves
from muralist.recipes import imports
from tests import released
from tests.shell import muralist

DIM, INNER, CHANNELS = 24, 6, 48


def mlp(name: str) -> dict[str, tuple[int, ...]]:
    return released.linear(f"{name}.0", 256, DIM) | released.linear(f"{name}.2", DIM, DIM)


def extra() -> dict[str, tuple[int, ...]]:
    """Adapter and step sizes."""
    found = {"spatial_adapter.backbone.0.weight": (INNER, CHANNELS, 1, 1, 1), "spatial_adapter.backbone.0.bias": (INNER,)}
    found |= released.norm("spatial_adapter.backbone.1", INNER)
    found |= {"spatial_adapter.backbone.3.weight": (DIM, INNER, 3, 3, 3), "spatial_adapter.backbone.3.bias": (DIM,)}
    found |= released.norm("spatial_adapter.feature_norm", DIM) | mlp("spatial_adapter.adapter_time_proj") | mlp("spatial_adapter.adapter_dt_proj")
    return found | released.linear("spatial_adapter.zero_layers.1", DIM, DIM) | mlp("dt_embedding")


@pytest.fixture(scope="module")
def file(tiny22):
    """The tiny base's own transformer under Wan's names, with what the release adds, wrapped as training wraps it."""
    torch.manual_seed(4)
    own = load_file(tiny22 / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = {released.wan_name(name): tensor for name, tensor in own.items()} | {name: torch.randn(shape) / 4 for name, shape in extra().items()}
    return {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in tensors.items()}


def imported(tensors, base, folder, **options):
    save_file(tensors, folder / "model.safetensors")
    return imports.run(imports.find("pixelwizard"), folder / "model.safetensors", inspect_base(str(base)), folder / "out", **options)


def placed(base, folder, components):
    model = shutil.copytree(base, folder / "model")
    for component in components:
        shutil.rmtree(model / component.place)
        shutil.copytree(folder / "out" / component.place, model / component.place)
    return model


def test_every_tensor_arrives_and_means_what_it_meant(file, tiny22, tmp_path):
    components = imported(file, tiny22, tmp_path)
    assert [component.place for component in components] == ["transformer", "parts/injector", "parts/step_size"]
    assert sum(len(component.names) for component in components) == len(file)
    model = placed(tiny22, tmp_path, components)
    transformer = Base(inspect_base(str(model)), torch.device("cpu"), torch.float32).transformer()
    w = {name.removeprefix("model._fsdp_wrapped_module."): tensor for name, tensor in file.items()}
    anchor, t, dt = torch.randn(1, CHANNELS, 2, 3, 5), torch.tensor([800.0]), torch.tensor([200.0])
    a = "spatial_adapter."
    x = F.silu(F.group_norm(F.conv3d(anchor, w[a + "backbone.0.weight"], w[a + "backbone.0.bias"]), 6, w[a + "backbone.1.weight"], w[a + "backbone.1.bias"]))
    x = F.silu(F.conv3d(x, w[a + "backbone.3.weight"], w[a + "backbone.3.bias"], padding=1)).flatten(2).transpose(1, 2)
    x = F.layer_norm(x, (DIM,), w[a + "feature_norm.weight"], w[a + "feature_norm.bias"], 1e-6)

    def through(name, v):
        return F.linear(F.silu(F.linear(waves(v), w[f"{name}.0.weight"], w[f"{name}.0.bias"])), w[f"{name}.2.weight"], w[f"{name}.2.bias"])

    x = x * (1 + torch.tanh(through(a + "adapter_time_proj", t) + through(a + "adapter_dt_proj", dt))[:, None])
    wanted = F.linear(x, w[a + "zero_layers.1.weight"], w[a + "zero_layers.1.bias"])
    with torch.no_grad():
        got = transformer.injector.update(1, transformer.injector.refine(anchor, (2, 3, 5)), transformer.injector.gain(t, dt))
        assert (got - wanted).abs().max() < 1e-5
        assert (transformer.step_size(dt) - through("dt_embedding", dt)).abs().max() < 1e-6
    shutil.rmtree(model / "adapters" / "anchored")  # a release is a whole transformer: it needs no adapter
    answer = muralist("generate", "a red ball", "--recipe", "pixelwizard", "--model", model, "-o", tmp_path / "a.mp4", "--size", "160x96", "--num-frames", 5)
    assert answer.code == 0 and "without an adapter" in answer.err, answer.err


def test_the_anchors_own_model_is_a_transformer(file, tiny22, tmp_path):
    plain = {name: tensor for name, tensor in file.items() if "spatial_adapter" not in name and "dt_embedding" not in name}
    (component,) = imported(plain, tiny22, tmp_path)
    assert component.place == "transformer" and len(component.names) == len(plain)


@pytest.mark.parametrize("gone", ["spatial_adapter", "dt_embedding"])
def test_a_file_with_one_of_what_was_trained_together_is_refused(gone, file, tiny22, tmp_path):
    with pytest.raises(UserError, match=rf"none {gone}\.\*"):
        imported({name: tensor for name, tensor in file.items() if gone not in name}, tiny22, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["generator", "generator_ema"])
def test_a_checkpoint_comes_in_from_either_place(place, file, tiny22, tmp_path):
    torch.save({place: file, "step": 800}, tmp_path / "model.pt")
    components = imports.run(imports.find("pixelwizard"), tmp_path / "model.pt", inspect_base(str(tiny22)), tmp_path / "out")
    assert len(components) == 3


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model._fsdp_wrapped_module.spatial_adapter.feature_norm.bias"), r"lacks 1 of \d+ tensors; norm.bias"),
        (lambda t: t.update({"model.spatial_adapter.scale_shift.weight": torch.zeros(2)}), "spatial_adapter.scale_shift.weight: .* earlier layout"),
        (
            lambda t: t.update({"model._fsdp_wrapped_module.spatial_adapter.backbone.0.weight": torch.zeros(INNER, CHANNELS, 1, 2, 2)}),
            r"\[6, 48, 1, 2, 2\], not",
        ),
        (lambda t: t.update({"model.spatial_adapter.zero_layers.9.weight": torch.zeros(DIM, DIM)}), "injects before block 9, .* has 2"),
        (lambda t: t.update({"_orig_mod.head.head.bias": torch.zeros(2)}), "head.head.bias are one tensor without their wrappers"),
        (lambda t: t.update({f"model.spatial_adapter.zero_layers.{'9' * 5000}.weight": torch.zeros(2)}), "no place here"),
        (lambda t: t.update({"model.lpips.weight": torch.zeros(2)}), "1 tensors have no place here; model.lpips.weight"),
    ],
    ids=["missing", "earlier", "patches", "another base", "twice", "a huge number", "extra"],
)
def test_what_does_not_fit_is_named(file, tiny22, tmp_path, change, said):
    tensors = dict(file)
    change(tensors)
    with pytest.raises(UserError, match=said):
        imported(tensors, tiny22, tmp_path)
    assert not (tmp_path / "out").exists()
