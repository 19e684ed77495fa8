"""Detail by deep features: against the formula written out, frame by frame; what is skipped, and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from muralist.errors import UserError
from muralist.eval.metrics import perceptual
from muralist.eval.registry import Setup, Unavailable, available
from muralist.eval.source import Source
from muralist.store.video_read import VideoInfo
from tests.unit.test_features import random_lpips, reference_lpips


def source(num_frames: int, height: int, width: int) -> Source:
    return Source(Path("a.mp4"), VideoInfo(width, height, num_frames, 16.0, "h264", "", "yuv420p", 8, *["unspecified"] * 4))


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file(random_lpips("alex").state_dict(), path)
    return Setup(weights={"lpips": path})


def linear(small: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement along the first axis, pixel centres aligned, borders held: position i + 1/2 of `size` lies at (i + 1/2) n / size."""
    n = len(small)
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.minimum(at.astype(int), max(n - 2, 0))
    share = (at - low).reshape(-1, *[1] * (small.ndim - 1))
    return small[low] * (1 - share) + small[np.minimum(low + 1, n - 1)] * share


def rebuilt(frame: np.ndarray, factor: int) -> np.ndarray:
    height, width, _ = frame.shape
    small = frame.reshape(height // factor, factor, width // factor, factor, 3).mean(axis=(1, 3))
    return linear(linear(small, height).swapaxes(0, 1), width).swapaxes(0, 1)


def run(name: str, setup: Setup, *videos: torch.Tensor) -> dict[str, float]:
    meter = available()[name].start(setup, source(*videos[0].shape[:3]))
    for frames in zip(*videos):
        meter.add(*frames)
    return meter.result()


def test_detail_is_the_papers_sum_and_mean(setup):
    video = torch.rand(3, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    weights = random_lpips("alex").state_dict()
    chw = lambda image: torch.as_tensor(np.asarray(image)).float().permute(2, 0, 1)  # noqa: E731
    scales = [np.mean([reference_lpips(weights, "alex", chw(f), chw(rebuilt(f.double().numpy(), 2**k))) for f in video]) for k in (3, 4, 5)]
    found = run("hd_lpips", setup, video)
    assert list(found) == ["hd_lpips", "hd_lpips.k3", "hd_lpips.k4", "hd_lpips.k5", "hd_lpips.frames"]
    assert list(found.values()) == pytest.approx([sum(scales), *scales, 3], rel=1e-5)
    assert run("mhd_lpips", setup, video)["mhd_lpips"] == pytest.approx(sum(scales) / 3, rel=1e-5)


def test_likeness_is_the_mean_over_frames(setup):
    a, b = torch.rand(2, 2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    weights = random_lpips("alex").state_dict()
    wanted = np.mean([reference_lpips(weights, "alex", x.permute(2, 0, 1), y.permute(2, 0, 1)) for x, y in zip(a, b)])
    assert run("lpips", setup, a, b)["lpips"] == pytest.approx(wanted, rel=1e-5)
    assert run("lpips[mural]", setup, a, a)["lpips[mural]"] == 0 < run("lpips[mural]", setup, a, b)["lpips[mural]"]


def test_long_videos_are_looked_at_sixteen_times(monkeypatch, setup):
    seen = []
    monkeypatch.setattr(perceptual, "detail", lambda network, frame: seen.append(int(frame[0, 0, 0])) or torch.zeros(3))
    perceptual._shared_detail.cache_clear()
    values = run("hd_lpips", setup, torch.arange(46).view(46, 1, 1, 1).expand(46, 32, 32, 3).float())
    perceptual._shared_detail.cache_clear()
    assert seen == list(range(0, 46, 3)) and values["hd_lpips.frames"] == 16


def test_both_forms_share_one_computation(monkeypatch, setup):
    calls = []
    original = perceptual.distances
    monkeypatch.setattr(perceptual, "distances", lambda *a: calls.append(1) or original(*a))
    meters = [available()[name].start(setup, source(1, 64, 64)) for name in ("hd_lpips", "mhd_lpips")]
    frame = torch.rand(64, 64, 3)
    for meter in meters:
        meter.add(frame)
    assert len(calls) == 1


def test_detail_falls_when_a_frame_is_blurred():
    frame = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    soft = torch.nn.functional.avg_pool2d(frame.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1)
    assert run("hd_lpips[mural]", Setup(), soft)["hd_lpips[mural]"] < run("hd_lpips[mural]", Setup(), frame)["hd_lpips[mural]"]


def test_missing_weights_and_small_frames_are_told(setup, tmp_path):
    metrics = available()
    for name in ("hd_lpips", "mhd_lpips", "lpips"):
        with pytest.raises(Unavailable, match="no weights for lpips"):
            metrics[name].start(Setup(), source(1, 64, 64))
    with pytest.raises(Unavailable, match="smaller than 32 pixels"):
        metrics["hd_lpips"].start(setup, source(1, 16, 64))
    with pytest.raises(UserError, match="no such file"):
        metrics["hd_lpips"].start(Setup(weights={"lpips": tmp_path / "none.safetensors"}), source(1, 64, 64))
