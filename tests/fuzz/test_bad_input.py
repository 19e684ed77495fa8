"""Everything a user can get wrong: exit code 2, exactly one line that says where, what and how to mend it, before any weight is loaded."""

from __future__ import annotations

import inspect
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from muralist.api import load
from muralist.base_info import SILENT, inspect_base
from muralist.errors import UserError
from muralist.store.parts import load_part, save_part
from tests.shell import muralist

SECONDS = 5


pytestmark = pytest.mark.usefixtures("no_weights")


def generate(base, tmp_path, *more):
    return muralist("generate", "a red ball", "--model", base, "-o", tmp_path / "out.mp4", *more)


# --- options ----------------------------------------------------------------------------------------------------------------------

NUMBERS = ("--num-inference-steps", "--guidance-scale", "--flow-shift", "--skip-steps", "--num-frames", "--fps", "--seed", "--vram-limit")
WORDS = ("ten", "", "1,5", "0x10", "1e", "--", "½", "nil", "NaN%", "1 000")
INTERVALS = ("[0.5, 0.5]", "[0.9, 0.3]", "[-0.1, 1]", "[0, 1.1]", "[0.5]", "[0, 0.5, 1]", "0.5", "null", '["a", "b"]', "[NaN, 1]", "{}")
SETTINGS = (
    "refine", "nothing=1", "refine.nothing=1", "refine.kind=Refine", "refine.flow_shift.x=3", "refine.flow_shift=[3]", f"refine.flow_shift={10**400}",
    'refine={"kind": "Refine", "flow_shift": 3}', 'refine={"flow_shift": 3}', "proxy=3", "upsample=[1]", 'upsample={"kind": [1], "latent_scale": 2}',
    'upsample={"kind": "os.system", "latent_scale": 2}', 'upsample={"kind": "PixelInterpolation", "latent_scale": [2]}', "encode.crf=true", "encode.crf={}",
    'upsample={"kind": "PixelInterpolation", "latent_scale": ' + "[" * 500 + "]" * 500 + "}",
)  # fmt: skip
OPTIONS = [
    *((name, word) for name in NUMBERS for word in WORDS),
    ("--fps", "0.0004"), ("--revision", "main"), ("--revision", "0" * 40),
    *((name, "nan") for name in ("--guidance-scale", "--flow-shift", "--fps", "--vram-limit")),
    *((name, "inf") for name in ("--guidance-scale", "--flow-shift", "--fps", "--vram-limit")),
    *((name, "-3") for name in NUMBERS),
    *((name, str(10**30)) for name in NUMBERS),
    *((name, "0") for name in ("--num-inference-steps", "--flow-shift", "--num-frames", "--fps", "--vram-limit")),
    ("--num-inference-steps", "2.5"), ("--num-frames", "4.5"), ("--seed", "1.5"), ("--skip-steps", "4"), ("--skip-steps", "99"),
    *(("--size", size) for size in ("", "5k", "0x0", "10x10", "3841x2160", "3840x2161", "99999x64", "-64x64", "64x-64", "64*64", "64", "x", "4k4k")),
    *(("--duration", text) for text in ("", "0", "0s", "-1s", "1ms", "ten", "1h", "1e3", "nan", "infs", "99999s", "1:30")),
    ("--width", "640"), ("--height", "640"), ("--width", "abc"),
    ("--recipe", ""), ("--recipe", "Cascade"), ("--recipe", "nonsense"), ("--recipe", "../cascade"), ("--recipe", "x" * 10_000),
    ("--device", "tpu"), ("--device", ""), ("--device", "cpu:9:9"), ("--device", "cuda:99"), ("--device", "cuda:x"),
    ("--model", ""), ("--model", "nowhere"), ("--model", "/dev/null"), ("--model", "../.."), ("--model", "org/name"), ("--model", "x" * 5000),
    *(("--memory", word) for word in ("", "all", "LOW", "12GB", "x" * 1000)),
    *(("--linears", word) for word in ("", "int4", "FP8", "x" * 1000)),
    *(("--set", f"{stage}.guidance_interval={value}") for stage in ("proxy", "refine") for value in INTERVALS),
    *(("--set", f"{stage}.token_chunk={value}") for stage in ("proxy", "refine") for value in (0, -1, 1.5, "many", "[]")),
    *(("--set", f"{stage}.cache={value}") for stage in ("proxy", "refine") for value in (0, 1, -0.1, "nan", "1e400", "true", "much", "[]", "{}")),
    *(("--set", setting) for setting in SETTINGS),
    ("--no-such-option", "1"), ("--sise", "4k"), ("--output",), ("-z", "1"),
    ("--negative-prompt", "n" * 2**20),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options)[:40])
def test_bad_options(options, tiny22, tmp_path):
    assert generate(tiny22, tmp_path, *options).error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "prompt", ["", "   ", "\t\n", "x" * 2**20, "字" * 5000, "\ud800 lone surrogate"], ids=["empty", "blank", "space", "1 MB", "long", "surrogate"]
)
def test_bad_prompts(prompt, tiny22, tmp_path):
    assert "prompt" in muralist("generate", prompt, "--model", tiny22, "-o", tmp_path / "out.mp4").error


COMMAND_LINES = [
    ["generate"], ["generate", "a", "b"], ["paint"], ["--nonsense"], ["doctor", "--device", "tpu"],
    ["resume"], ["resume", "/nowhere"], ["resume", ".", "--memory", "some"], ["resume", ".", "--vram-limit", "nan"],
    ["resume", "/dev/null"], ["resume", ""], ["resume", "x" * 5000],
    ["inspect"], ["inspect", "/nowhere.mp4"], ["inspect", "/dev/null"], ["inspect", "."], ["inspect", "x" * 5000],
    ["plan", "--machine", "3GB"], ["plan", "--size", "0x0"],
    ["train", "miniature-base", "--from", "/nowhere"], ["train", "uhr", "--from", "/dev/null"], ["train", "miniature-vae", "--from", "."],
    ["train", "miniature-base", "--from", "."], ["train", "miniature-decoder", "--from", "."], ["train", "features", "--from", "."],
    ["train", "uhr", "--from", "."], ["train", "latent-upsampler", "--from", "."], ["train", "miniature-base", "--from", "tests"],
    ["train", "miniature-vae", "--init", "/nowhere"],
    ["train"], ["train", "everything"], ["train", "miniature-vae", "--minutes", "nan"], ["train", "miniature-vae", "--minutes", "-1"],
    ["train", "miniature-vae", "--compile"], ["train", "miniature-vae", "--steps", "0"], ["train", "miniature-vae", "--steps", "5", "--minutes", "1"],
    ["train", "miniature-vae", "--device", "tpu"], ["train", "miniature-vae", "--output", "/dev/null/x"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=lambda arguments: " ".join(arguments)[:40])
def test_bad_command_lines(arguments):
    assert muralist(*arguments).error


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200), option=st.sampled_from(["--size", "--duration", "--recipe", "--device", "--revision"]))
def test_any_text_as_an_option(text, option, tiny22, tmp_path):
    """A usable value is planned, anything else is one line; `--dry-run` keeps both cheap."""
    answer = generate(tiny22, tmp_path, "--dry-run", "--json", option, text)
    assert answer.code == 0 or answer.error


# --- paths ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no/such/folder/a.mp4", "a.avi", "a", "", ".mp4x", "a.mp4/b.mp4", "n" * 300 + ".mp4", "file/a.mp4", "a\0b.mp4"])
def test_bad_outputs(name, tiny22, tmp_path):
    (tmp_path / "file").write_text("in place of a folder")
    assert muralist("generate", "a ball", "--model", tiny22, "-o", f"{tmp_path}/{name}").error


@pytest.mark.parametrize("name", ["file", "no/such/run", "used", "n" * 300, "file/run"])
def test_bad_run_directories(name, tiny22, tmp_path):
    (tmp_path / "file").write_text("in place of a folder")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("not ours to touch")
    assert generate(tiny22, tmp_path, "--size", "64x64", "--run-dir", tmp_path / name).error


@pytest.mark.parametrize("run_dir", [".", "d", "d/.."])
def test_an_output_inside_the_run_directory_is_refused(run_dir, tiny22, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "lies inside" in muralist("generate", "a ball", "--model", tiny22, "--size", "64x64", "--run-dir", run_dir, "-o", "d/out.mp4").error


def test_a_foreign_folder_is_not_touched(tmp_path):
    folder = tmp_path / "foreign"
    (folder / "sub").mkdir(parents=True)
    (folder / "request.json").write_text('{"mine": 1}')
    (folder / "sub" / "notes.tmp").write_text("thesis")
    assert muralist("resume", folder).error
    assert sorted(p.name for p in folder.rglob("*")) == ["notes.tmp", "request.json", "sub"]


def test_too_little_disk(tiny22, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert "disk" in generate(tiny22, tmp_path, "--size", "640x640").error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", ["auto", "high", "balanced", "low"])
def test_too_little_memory(memory, tiny22, tmp_path):
    assert "memory" in generate(tiny22, tmp_path, "--size", "4k", "--vram-limit", "0.01", "--memory", memory).error


# --- models -----------------------------------------------------------------------------------------------------------------------


def _with_header(path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def _retensor(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def _part(base: Path, kind: str, drop: str = "", add: str = "", dtype=None, **numbers) -> None:
    """Damage a part so that its two files still belong together."""
    folder = base / "parts" / kind
    record, tensors = load_part(folder, kind)
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items() if name != drop} | ({add: torch.zeros(2)} if add else {})
    save_part(folder, kind, record | numbers, tensors)


DAMAGES = {
    "empty folder": lambda f: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in f.iterdir()],
    "no index": lambda f: (f / "model_index.json").unlink(),
    "index is no JSON": lambda f: (f / "model_index.json").write_text("<html>"),
    "index is a list": lambda f: (f / "model_index.json").write_text("[]"),
    "index is binary": lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"),
    "other pipeline": lambda f: _edit(f / "model_index.json", _class_name="StableDiffusionPipeline"),
    "truncated transformer": lambda f: _truncate(f / WEIGHTS),
    "truncated VAE": lambda f: _truncate(f / "vae/diffusion_pytorch_model.safetensors"),
    "truncated text encoder": lambda f: _truncate(f / "text_encoder/model.safetensors"),
    "empty weights": lambda f: (f / WEIGHTS).write_bytes(b""),
    "a header of brackets": lambda f: _with_header(f / WEIGHTS, b"[" * 100_000),
    "a header that ends at infinity": lambda f: _with_header(f / WEIGHTS, b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'),
    "git-lfs pointer": lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "web page": lambda f: (f / WEIGHTS).write_text("<!doctype html>" * 50),
    "zip": lambda f: (f / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(500)),
    "huge header": lambda f: (f / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + bytes(500)),
    "broken header": lambda f: (f / WEIGHTS).write_bytes((20).to_bytes(8, "little") + b"{" * 600),
    "too long": lambda f: (f / WEIGHTS).open("ab").write(b"tail"),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "pickle beside weights": lambda f: (f / "transformer" / "pytorch_model.bin").write_bytes(b"\x80\x04."),
    "pickle in place of weights": lambda f: (f / WEIGHTS).rename(f / "transformer" / "model.pt"),
    "shard missing": lambda f: (f / "transformer" / "m.safetensors.index.json").write_text('{"weight_map": {"a": "m-1.safetensors"}}'),
    "shard outside": lambda f: (f / "transformer" / "m.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
    "index without shards": lambda f: (f / "transformer" / "m.safetensors.index.json").write_text("{}"),
    "no transformer": lambda f: shutil.rmtree(f / "transformer"),
    "no VAE": lambda f: shutil.rmtree(f / "vae"),
    "no text encoder": lambda f: shutil.rmtree(f / "text_encoder"),
    "no tokenizer": lambda f: shutil.rmtree(f / "tokenizer"),
    "other transformer": lambda f: _edit(f / "transformer/config.json", _class_name="FluxTransformer2DModel"),
    "VAE with attention": lambda f: _edit(f / "vae/config.json", attn_scales=[0.5]),
    "other VAE": lambda f: _edit(f / "vae/config.json", _class_name="AutoencoderKL"),
    "tensor missing": lambda f: _retensor(f / WEIGHTS, lambda t: t.pop("blocks.0.attn1.to_q.weight")),
    "VAE tensor missing": lambda f: _retensor(f / "vae/diffusion_pytorch_model.safetensors", lambda t: t.pop("decoder.conv_out.bias")),
    "text tensor missing": lambda f: _retensor(f / "text_encoder/model.safetensors", lambda t: t.pop("encoder.block.0.layer.0.SelfAttention.q.weight")),
    "more layers than weights": lambda f: _edit(f / "transformer/config.json", num_layers=3),
    "other widths": lambda f: _edit(f / "transformer/config.json", ffn_dim=48),
    "layers in words": lambda f: _edit(f / "transformer/config.json", num_layers="many"),
    "other text encoder": lambda f: _edit(f / "text_encoder/config.json", model_type="clip"),
    "no text configuration": lambda f: (f / "text_encoder/config.json").unlink(),
    "text heads in words": lambda f: _edit(f / "text_encoder/config.json", num_heads="x"),
    "truncated tokenizer": lambda f: _truncate(f / "tokenizer/tokenizer.json"),
    "latent statistics of another length": lambda f: _edit(f / "vae/config.json", latents_mean=[0.0]),
    "weights are a broken link": lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("/nowhere/blob")),
    "boundary in words": lambda f: _edit(f / "model_index.json", boundary_ratio="x", transformer_2=["diffusers", "WanTransformer3DModel"]),
    "second transformer is a number": lambda f: _edit(f / "model_index.json", transformer_2=5),
    "channels disagree": lambda f: _edit(f / "vae/config.json", z_dim=16),
    "image-to-video": lambda f: _edit(f / "transformer/config.json", in_channels=36),
    "config missing": lambda f: (f / "vae/config.json").unlink(),
    "channels are text": lambda f: _edit(f / "vae/config.json", z_dim="many"),
    "patch is text": lambda f: _edit(f / "transformer/config.json", patch_size="1,2,2"),
    "patch is short": lambda f: _edit(f / "transformer/config.json", patch_size=[2]),
    "factor is zero": lambda f: _edit(f / "vae/config.json", scale_factor_spatial=-16),
    "defaults miss a name": lambda f: (f / "muralist.json").write_text('{"grid": {}}'),
    "defaults are text": lambda f: _edit(f / "muralist.json", num_inference_steps="four"),
    "branches lack a tensor": lambda f: _part(f, "branches", drop="0.whole.pool_bias"),
    "branches have one more": lambda f: _part(f, "branches", add="0.whole.more"),
    "branches of another type": lambda f: _part(f, "branches", dtype=torch.int32),
    "branches with a rank in halves": lambda f: _part(f, "branches", rank=2.5),
    "branches with a width in halves": lambda f: _part(f, "branches", dim=24.5),
    "branches of a block in halves": lambda f: _part(f, "branches", blocks=[0.0, 1.0]),
    "branches beside other blocks": lambda f: _part(f, "branches", blocks=[0, 7]),
    "branches with a huge stride": lambda f: _part(f, "branches", branches={"whole": {"stride": 10**6}}),
    "branches without a number of windows": lambda f: _part(f, "branches", windows=None),
    "an injector that lacks a tensor": lambda f: _part(f, "injector", drop="norm.bias"),
    "an injector for channels in halves": lambda f: _part(f, "injector", channels=4.5),
    "guidance nowhere": lambda f: _edit(f / "muralist.json", guidance_interval=[0.9, 0.1]),
    "guidance at one level": lambda f: _edit(f / "muralist.json", guidance_interval=[0.9]),
    "defaults out of range": lambda f: _edit(f / "muralist.json", guidance_scale=-1),
    "a guide that replaces all": lambda f: _edit(f / "muralist.json", skip_share=1.0),
    "a guide that replaces less than nothing": lambda f: _edit(f / "muralist.json", skip_share=-0.1),
    "a guide that replaces yes": lambda f: _edit(f / "muralist.json", skip_share=True),
    "a VAE of no width": lambda f: _edit(f / "vae" / "config.json", base_dim=None),
    "a text encoder of no width": lambda f: _edit(f / "text_encoder" / "config.json", d_model=None),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_models(damage, base, tmp_path):
    damage(base)
    assert generate(base, tmp_path, "--size", "64x64").error
    assert muralist("plan", "--model", base, "--size", "64x64").error
    assert not (tmp_path / "out.mp4.run").exists()


NO_WHOLES = [
    *(("ffn_dim", value) for value in (None, "x", [32], 32.0, 0, -16, True, 10**12)), ("num_layers", None), ("num_attention_heads", None),
    ("attention_head_dim", "16"), ("in_channels", [48]), ("out_channels", None), ("text_dim", "wide"), ("freq_dim", 0.5), ("rope_max_seq_len", None),
    *(("patch_size", value) for value in (None, 2, [1, 2], [1, 2, "2"], [1, 2, 0])), ("cross_attn_norm", None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), NO_WHOLES, ids=lambda value: str(value)[:20])
def test_what_is_no_whole_number_is_named_by_every_command(field, value, base, tmp_path):
    config = base / "transformer" / "config.json"
    _edit(config, **{field: value})
    for linears in ("plain", "fp8"):
        told = [generate(base, tmp_path, "--linears", linears).error, muralist("plan", "--model", base, "--linears", linears).error]
        assert all(f"{config}: {field} is {value!r}" in line for line in told)
    with pytest.raises(UserError, match=field):
        load(str(base))


def test_a_silent_transformer_is_as_in_diffusers(base):
    config, usual = base / "transformer" / "config.json", inspect.signature(WanTransformer3DModel.__init__).parameters
    assert {name: usual[name].default for name in SILENT} == SILENT | {"patch_size": (1, 2, 2)}
    shutil.rmtree(base / "parts")
    config.write_text(json.dumps({"_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 48}))
    assert inspect_base(str(base)).sides == (40 * 128, 13824)


# --- as a process of its own ------------------------------------------------------------------------------------------------------

PROCESSES = {
    "recipe": ["generate", "a ball", "--recipe", "nonsense"],
    "model": ["generate", "a ball", "--model", "/nowhere"],
    "size": ["generate", "a ball", "--size", "5k"],
    "number": ["generate", "a ball", "--guidance-scale", "nan", "--model", "BASE"],
    "prompt": ["generate", "x" * 100_000],
    "resume": ["resume", "/nowhere"],
}


@pytest.mark.parametrize("arguments", PROCESSES.values(), ids=PROCESSES.keys())
def test_refusals_are_quick(arguments, tiny22, tmp_path):
    """Processor time, not wall time: the promise is for a machine that does nothing else, and tests may share theirs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "muralist.cli.main", *(str(tiny22) if a == "BASE" else a for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("muralist: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
