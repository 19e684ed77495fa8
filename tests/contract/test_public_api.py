"""The Python interface: three names, lazy, and honest about what they cost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import av
import pytest
import torch

import muralist
from muralist.progress import Silent

SIZE = {"width": 128, "height": 66, "num_frames": 5, "seed": 2}


@pytest.fixture(scope="module")
def pipe(tiny22):
    return muralist.load(str(tiny22), recipe="cascade", device="cpu")


@pytest.fixture(scope="module")
def video(pipe):
    with pipe("a red ball", **SIZE) as video:
        yield video


def test_the_names_are_frozen():
    assert sorted(muralist.__all__) == ["Pipeline", "UserError", "Video", "__version__", "load"]


def test_importing_is_light_and_silent():
    """No torch, no network, nothing printed."""
    script = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import muralist, muralist.cli.main\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules), 'heavy'\n"
        "muralist.load\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_frames_come_in_order_in_range_and_at_the_asked_size(video):
    chunks = list(video)
    assert [chunk.start for chunk in chunks] == [0, 1] and sum(len(chunk.frames) for chunk in chunks) == len(video) == 5
    frames = torch.cat([chunk.frames for chunk in chunks])
    assert frames.shape == (5, 66, 128, 3) and frames.min() >= 0 and frames.max() <= 1


def test_a_call_decodes_nothing(pipe, monkeypatch):
    monkeypatch.setattr("muralist.base.Base.vae", lambda _: pytest.fail("the VAE was asked for"))
    pipe("a red ball", settings=['upsample={"kind": "LatentInterpolation"}'], **SIZE).close()


def test_save_writes_the_file_with_its_origin(video, tmp_path):
    path = video.save(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        assert "a red ball" in container.metadata["comment"] and container.streams.video[0].height == 66
    assert (tmp_path / "a.mp4.json").is_file()


def test_the_same_call_gives_the_same_latent(pipe, video):
    with pipe("a red ball", **SIZE) as again:
        assert torch.equal(again.latent.z, video.latent.z)
    with pipe("a red ball", **SIZE | {"seed": 3}) as other:
        assert not torch.equal(other.latent.z, video.latent.z)


def test_a_run_directory_is_resumed_and_guarded(pipe, tmp_path):
    pipe("a red ball", run_dir=tmp_path / "run", **SIZE).close()
    observer = Silent()
    pipe("a red ball", run_dir=tmp_path / "run", observer=observer, **SIZE).close()
    assert observer.reports == []  # nothing was done again
    with pytest.raises(muralist.UserError, match="this run was started with"):
        pipe("a blue ball", run_dir=tmp_path / "run", **SIZE)


def test_a_run_goes_on_where_its_model_lies_now(tiny22, tmp_path):
    model, size = shutil.copytree(tiny22, tmp_path / "model"), SIZE | {"run_dir": tmp_path / "run"}
    muralist.load(model, device="cpu")("a red ball", **size).close()
    moved, observer = model.rename(tmp_path / "elsewhere"), Silent()
    muralist.load(moved, device="cpu")("a red ball", observer=observer, **size).close()
    assert observer.reports == []
    file = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-64] + bytes(64))
    with pytest.raises(muralist.UserError, match=r"has other weights or configurations than"):
        muralist.load(moved, device="cpu")("a red ball", **size)


def test_a_plan_checks_the_parts_that_serve(tiny22, tmp_path):
    model = shutil.copytree(tiny22, tmp_path / "model")
    file = model / "parts" / "latent_upsampler" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden": None}))
    with pytest.raises(muralist.UserError, match="latent_upsampler"):
        muralist.load(model, recipe="luve").plan()


def test_plan_costs_nothing(pipe):
    plan = pipe.plan(width=3840, height=2160, num_frames=161, machine="24GB")
    assert plan.seconds > 0 and [stage.stage for stage in plan.stages][-1] == "encode"


def test_mistakes_are_user_errors(pipe, tmp_path):
    for wrong in ({"width": 63}, {"num_frames": 0}, {"guidance_scale": float("nan")}, {"fps": -1}, {"seed": -2}):
        with pytest.raises(muralist.UserError):
            pipe("a red ball", **SIZE | wrong)
    with pytest.raises(muralist.UserError, match="unknown recipe"):
        muralist.load("miniature", recipe="nonsense")
    with pytest.raises(TypeError, match="unknown option 'hight'"):
        pipe("a red ball", hight=64)
