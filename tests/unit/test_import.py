"""Import of released files: names and shapes of the release, values that arrive, networks that compute what the release's names mean, and
files that are refused."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from muralist.base import Base
from muralist.base_info import UPSAMPLER, inspect_base
from muralist.errors import UserError
from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, VrtConfig, paper
from muralist.recipes import imports
from muralist.recipes.imports import luve
from muralist.store import pickle_copy
from muralist.store.convert import convert
from muralist.store.parts import load_part, save_part
from muralist.structure import check_structure, check_upsampler
from tests import released, released_reference
from tests.shell import muralist

SMALL = LatentUpsamplerConfig(
    encoder=VrtConfig(in_channels=16, dim=12, depth=4, refine_dim=24, refine_depth=2, groups=2, heads=3, window=(4, 4, 4), still_groups=1),
    hidden=(16, 8),
    decoder=VrtConfig(in_channels=16, dim=12, depth=1, refine_dim=12, refine_depth=1, groups=1, heads=3, window=(4, 4, 4), still_groups=0),
)


@pytest.fixture(autouse=True)
def small_release(monkeypatch):
    """As if LUVE had published a small upsampler."""
    monkeypatch.setattr(luve, "released", lambda: SMALL)


@pytest.fixture(scope="module")
def upsampler():
    return released.tensors(released.SMALL)


@pytest.fixture(scope="module")
def backbone(tiny21):
    """The tiny base's own transformer under Wan's names, with other values."""
    torch.manual_seed(7)
    found = load_file(tiny21 / "transformer" / "diffusion_pytorch_model.safetensors")
    return {released.wan_name(name): torch.randn_like(tensor) for name, tensor in found.items()}


def saved(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name)
    return folder / name


def imported(file, base, folder, **options):
    imports.check_paths(file, folder)
    return imports.run(imports.find("luve"), file, inspect_base(str(base)), folder, **options)


def ours(name):
    return name.replace("imnet.", "implicit.imnet.")


# --- the upsampler -------------------------------------------------------------------------------------------------------------------


def test_the_paper_configuration_has_the_releases_names_and_shapes():
    with torch.device("meta"):
        network = LatentUpsampler(paper())
    parameters = {name: tuple(p.shape) for name, p in network.named_parameters()}
    tables = {name: tuple(b.shape) for name, b in network.named_buffers()}
    assert {ours(name): shape for name, shape in released.FULL.items()} == parameters | tables
    assert (len(parameters), len(tables)) == (1592, 132)


def test_every_tensor_arrives_and_the_part_serves(upsampler, tiny21, tmp_path):
    (component,) = imported(saved(tmp_path, upsampler), tiny21, tmp_path / "out")
    assert len(component.names) + len(component.computed) == len(upsampler) and not component.unmatched
    record, tensors = load_part(tmp_path / "out" / "parts" / UPSAMPLER, UPSAMPLER)
    assert LatentUpsamplerConfig.of(record) == SMALL
    back = {name.replace("implicit.", ""): tensor for name, tensor in tensors.items()}
    assert set(back) == {name for name in upsampler if not name.endswith(luve.COMPUTED)}
    assert all(torch.equal(back[name], upsampler[name]) for name in back)
    model = shutil.copytree(tiny21, tmp_path / "model")
    shutil.rmtree(model / "parts" / UPSAMPLER)
    shutil.copytree(tmp_path / "out" / "parts" / UPSAMPLER, model / "parts" / UPSAMPLER)
    network = Base(inspect_base(str(model)), torch.device("cpu"), torch.float32).latent_upsampler()
    assert network(torch.randn(1, 16, 2, 8, 8), (12, 16)).shape == (1, 16, 2, 12, 16)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "size"), [(4, (64, 32)), (8, (32, 32))], ids=["larger", "more frames than a window"])
def test_the_imported_network_computes_what_the_releases_names_mean(upsampler, tiny21, tmp_path, frames, size):
    """Against a reference that knows none of our networks. In float64: with random weights, rounding alone would look like a mistake."""
    imported(saved(tmp_path, upsampler), tiny21, tmp_path / "out")
    _, tensors = load_part(tmp_path / "out" / "parts" / UPSAMPLER, UPSAMPLER)
    network = LatentUpsampler(SMALL).eval()
    network.load_state_dict(tensors)
    z = torch.randn(16, frames, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = released_reference.upsample({name: t.double() for name, t in upsampler.items() if t.is_floating_point()}, z, size)
    got = network.double()(z[None], size)[0]
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("encoder.stage3.linear2.bias"), r"lacks 1 of \d+ tensors; encoder.stage3.linear2.bias"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("decoder.")], r"lacks \d+ of \d+ tensors; decoder.conv_first.weight, .* and \d+ more"),
        (lambda t: t.update({"encoder.spynet.mean": torch.zeros(3)}), "1 tensors have no place in the upsampler; encoder.spynet.mean"),
        (lambda t: t.update({"conv.weight": torch.zeros(16, 13, 1, 1)}), r"conv.weight is \[16, 13, 1, 1\], not \[16, 12, 1, 1\]"),
        (lambda t: t.update({"conv.bias": torch.zeros(16, dtype=torch.int64)}), "conv.bias is of type I64"),
        (lambda t: t.update({"decoder.stage1.residual_group2.blocks.0.attn.relative_position_index": torch.zeros(64, 64).long()}), "released windows"),
        (lambda t: [t.clear(), t.update({"a.b": torch.zeros(2)})], "none of its 1 tensors is known; a.b"),
    ],
    ids=["missing", "half", "extra", "shape", "type", "table", "foreign"],
)
def test_what_does_not_fit_is_counted_and_named(upsampler, tiny21, tmp_path, change, said):
    tensors = dict(upsampler)
    change(tensors)
    with pytest.raises(UserError, match=said):
        imported(saved(tmp_path, tensors), tiny21, tmp_path / "out", skip_unmatched=True)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_another_bases_latents_are_refused(upsampler, tiny22, tmp_path):
    with pytest.raises(UserError, match="16 channels"):
        imported(saved(tmp_path, upsampler), tiny22, tmp_path / "out")


# --- the file of everything ----------------------------------------------------------------------------------------------------------


def whole(upsampler, backbone, **more):
    return {f"vlu.{name}": t for name, t in upsampler.items()} | {f"hcr.{name}": t for name, t in backbone.items()} | more


def test_both_networks_of_a_released_file_serve_a_base(upsampler, backbone, tiny21, tmp_path):
    components = imported(saved(tmp_path, whole(upsampler, backbone)), tiny21, tmp_path / "out")
    assert [component.place for component in components] == ["parts/latent_upsampler", "transformer"]
    assert len(components[1].names) == len(backbone)
    written = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {released.wan_name(name) for name in written} == set(backbone)
    assert all(torch.equal(tensor, backbone[released.wan_name(name)]) for name, tensor in written.items())
    model = shutil.copytree(tiny21, tmp_path / "model")
    for component in components:
        shutil.rmtree(model / component.place)
        shutil.copytree(tmp_path / "out" / component.place, model / component.place)
    info = inspect_base(str(model))
    check_structure(info)
    assert info.fingerprint != inspect_base(str(tiny21)).fingerprint


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda part, other: shutil.copytree(other, part, dirs_exist_ok=True), "48 channels, those of .* have 16"),
        (lambda part, other: save_part(part, UPSAMPLER, load_part(part, UPSAMPLER)[0], {"conv.weight": torch.zeros(3)}), "the weights are not those that"),
    ],
)
def test_an_upsampler_that_does_not_fit_is_refused_with_the_model(harm, said, tiny21, tiny22, tmp_path):
    model = shutil.copytree(tiny21, tmp_path / "model")
    part = "parts/latent_upsampler"
    harm(model / part, tiny22 / part)
    with pytest.raises(UserError, match=said):
        check_upsampler(inspect_base(str(model)))
    assert muralist("plan", "--recipe", "luve", "--model", model, "--size", "192x96").code == 2
    assert muralist("plan", "--recipe", "direct", "--model", model, "--size", "192x96").code == 0


def test_the_experts_tensors_are_named_and_left_out_only_on_demand(upsampler, backbone, tiny21, tmp_path):
    experts = {"hcr.blocks.0.self_attn.low.A": torch.zeros(2), "hcr.motion_encoder.enc.net_app.convs.1.bias": torch.zeros(2)}
    file, told = saved(tmp_path, whole(upsampler, backbone, **experts)), []
    with pytest.raises(UserError, match=r"2 tensors have no place here; hcr.blocks.0.self_attn.low.A, hcr.motion_encoder.* --skip-unmatched"):
        imported(file, tiny21, tmp_path / "out", tell=told.append)
    assert told[1].unmatched == tuple(experts) and not (tmp_path / "out").exists()
    imported(file, tiny21, tmp_path / "out", skip_unmatched=True)
    assert (tmp_path / "out" / "transformer" / "config.json").is_file()


@pytest.mark.parametrize("missing", ["patch_embedding.weight", "blocks.1.norm3.bias", "head.modulation"])
def test_half_a_transformer_is_refused(backbone, tiny21, tmp_path, missing):
    tensors = {f"hcr.{name}": tensor for name, tensor in backbone.items() if name != missing}
    with pytest.raises(UserError, match=r"lacks 1 of \d+ tensors"):
        imported(saved(tmp_path, tensors), tiny21, tmp_path / "out", skip_unmatched=True)


def test_a_third_namespace_is_refused(upsampler, backbone, tiny21, tmp_path):
    with pytest.raises(UserError, match=r"1 tensors are neither vlu. nor hcr.; vae.x"):
        imported(saved(tmp_path, whole(upsampler, backbone) | {"vae.x": torch.zeros(1)}), tiny21, tmp_path / "out")


# --- pickles -------------------------------------------------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_the_checkpoint_comes_in_through_the_converter(upsampler, tiny21, tmp_path):
    adam = {"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999), "params": [0]}]}
    checkpoint = {"model": {"name": "liif", "args": {"feat_unfold": True}, "sd": upsampler}, "optimizer": {"name": "adam", "sd": adam}, "iter": 5}
    torch.save(checkpoint, tmp_path / "model.pth")
    (component,) = imported(tmp_path / "model.pth", tiny21, tmp_path / "out")
    _, tensors = load_part(tmp_path / "out" / component.place, UPSAMPLER)
    assert all(torch.equal(tensors[ours(name)], tensor) for name, tensor in upsampler.items() if not name.endswith(luve.COMPUTED))
    assert sorted(os.listdir(tmp_path)) == ["model.pth", "out"] and os.listdir(tmp_path / "out") == ["parts"]


def test_code_in_a_pickle_is_refused_and_not_run(tiny21, tmp_path):
    torch.save({"model": {"sd": {"a": torch.zeros(1)}}, "iter": Evil(tmp_path / "ran")}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model.pth wants to run \w+.mkdir, .* it was not run"):
        imported(tmp_path / "model.pth", tiny21, tmp_path / "out")
    assert os.listdir(tmp_path) == ["model.pth"]


def test_a_small_file_that_poses_as_a_large_one_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="claim 4,398,046,511,104 bytes"):
        convert(tmp_path / "model.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_layouts_that_the_format_does_not_know_are_laid_out_anew(tmp_path):
    tensor = torch.arange(6.0).view(2, 3)
    torch.save({"plain": tensor, "again": tensor, "turned": tensor.T, "half": tensor[1:], "number": 3}, tmp_path / "model.pt")
    assert convert(tmp_path / "model.pt", tmp_path / "out.safetensors") == 4
    got = load_file(tmp_path / "out.safetensors")
    assert torch.equal(got["again"], tensor) and torch.equal(got["turned"], tensor.T) and torch.equal(got["half"], tensor[1:])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 321581766\n", "git-lfs pointer"),
        (b"", "no file of torch.save"),
        (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "no file of torch.save"),
        ("cut", "cannot be converted"),
        ("elsewhere", "no tensors at model/sd or its top, but 'weights'"),
    ],
    ids=["lfs", "empty", "old form", "truncated", "elsewhere"],
)
def test_what_is_no_checkpoint_is_refused(tiny21, tmp_path, content, said):
    buffer = io.BytesIO()
    torch.save({"weights": {"a": torch.zeros(4096)}}, buffer)
    content = {"cut": buffer.getvalue()[:-100], "elsewhere": buffer.getvalue()}.get(content, content)
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(UserError, match=said):
        imported(tmp_path / "model.pth", tiny21, tmp_path / "out")
    assert os.listdir(tmp_path) == ["model.pth"]


def test_the_readers_limits_hold(tmp_path, monkeypatch):
    """A file that asks for more memory than its size justifies ends the child, not this process."""
    torch.save({"a": torch.zeros(4)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            # bytearray(1 << 36), a call that the reader for weights allows
            new.writestr(entry, b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R." if entry.filename.endswith("data.pkl") else data)
    with pytest.raises(UserError, match="MemoryError"):
        convert(tmp_path / "big.pt", tmp_path / "out.safetensors")


def test_the_child_uses_nothing_of_ours():
    with open(pickle_copy.__file__) as file:
        assert "muralist" not in "".join(line for line in file if line.lstrip().startswith(("import", "from")))


# --- the command ---------------------------------------------------------------------------------------------------------------------


def command(method, file, model, output):
    return muralist("import", method, file, "--model", model, "--output", output)


def test_the_command_tells_what_it_found(upsampler, tiny21, tmp_path):
    answer = command("luve", saved(tmp_path, upsampler), tiny21, tmp_path / "new" / "out")
    assert answer.code == 0, answer.err
    said, tables = answer.out.splitlines(), sum(name.endswith(luve.COMPUTED) for name in upsampler)
    assert said[0] == f"parts/latent_upsampler: {len(upsampler) - tables} tensors matched, {tables} that are computed here, 0 unmatched"
    assert "copied to MODEL/parts/latent_upsampler" in said[1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a, where: a.update(method="sora"), "unknown method 'sora'; use one of luve"),
        (lambda a, where: a.update(file=where / "none.safetensors"), "no file"),
        (lambda a, where: a.update(file=where), "no file"),
        (lambda a, where: a.update(file=where / "notes.txt"), "neither safetensors nor a pickle"),
        (lambda a, where: a["file"].write_bytes(a["file"].read_bytes()[:-8]), "bytes instead of"),
        (lambda a, where: a["file"].write_bytes(b"version https://git-lfs"), "not a safetensors file"),
        (lambda a, where: a.update(output=where), "is not empty"),
        (lambda a, where: a.update(output=where / "notes.txt"), "is not a directory"),
        (lambda a, where: a.update(output=where / "notes.txt" / "out"), "is not a directory"),
        (lambda a, where: a.update(model=where), "model_index.json is missing"),
    ],
)
def test_mistakes_are_one_line(upsampler, tiny21, tmp_path, spoil, said):
    (tmp_path / "notes.txt").write_text("x")
    arguments = {"method": "luve", "file": saved(tmp_path, upsampler), "model": tiny21, "output": tmp_path / "out"}
    spoil(arguments, tmp_path)
    assert said in command(**arguments).error
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "notes.txt"]


def test_what_the_part_says_of_itself_survives_json():
    assert LatentUpsamplerConfig.of(asdict(luve.released())) == SMALL
