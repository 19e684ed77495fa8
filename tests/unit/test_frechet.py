"""Fréchet distances: against matrix square roots, closed forms, and what they are for: they grow with damage."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from muralist.data import degrade
from muralist.data.world import Crop, render, sample_scene
from muralist.eval.features.mural import Mural, load_mural
from muralist.eval.metrics import frechet
from muralist.eval.registry import Setup, Unavailable, available
from muralist.store.video_read import VideoInfo
from muralist.types import Grid

CPU = torch.device("cpu")
STRENGTHS = {"blur": (0.6, 1.2, 2.4, 4.8), "noise": (0.01, 0.02, 0.05, 0.12), "enlargement": (1.5, 2.0, 3.0, 4.0)}


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """Heusel et al., eq. 6, with a general matrix square root."""
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real))


@pytest.mark.parametrize("n, m, width", [(9, 12, 3), (200, 150, 16), (80, 300, 64)])
def test_the_distance_is_the_formula(n, m, width):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, width)) @ rng.normal(size=(width, width)), rng.normal(size=(m, width)) + 0.5
    found = frechet.frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(reference(x, y), rel=1e-6)
    assert found == pytest.approx(frechet.frechet_distance(torch.from_numpy(y), torch.from_numpy(x)), rel=1e-9)


def test_equal_sets_are_at_zero_and_a_shift_counts_squared():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert frechet.frechet_distance(x, x) < 1e-9
    assert frechet.frechet_distance(x, x + 2) == pytest.approx(8 * 4, rel=1e-6)
    assert frechet.frechet_distance(x, 3 * x - 2 * x.mean(0)) == pytest.approx(4 * float(x.double().var(dim=0).sum()), rel=1e-6)


def test_a_singular_covariance_is_no_trouble():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    x[:, 4] = x[:, 3]
    assert frechet.frechet_distance(x, x + 1) == pytest.approx(6, rel=1e-6)


def test_too_few_samples_are_refused():
    with pytest.raises(Unavailable, match="8 samples of 8 features"):
        frechet.frechet_distance(torch.rand(8, 8), torch.rand(99, 8))


class FakeSource:
    """A video by its numbers alone."""

    def __init__(self, num_frames, height, width):
        self.path = Path("a.mp4")
        self.info = VideoInfo(width, height, num_frames, 16.0, "h264", "", "yuv420p", 8, *["unspecified"] * 4)


def test_patches_of_eight_frames_go_through_the_network():
    meter = frechet.Patches("p", lambda x: x.mean(dim=(2, 3)))
    video = torch.rand(20, 520, 300, 3)
    meter.start(FakeSource(20, 520, 300))
    for frame in video:
        meter.add(frame)
    wanted = [video[t, 4 + 256 * row : 260 + 256 * row, 22:278].mean(dim=(0, 1)) for t in (0, 3, 5, 8, 11, 14, 16, 19) for row in (0, 1)]
    assert torch.allclose(meter.features(), torch.stack(wanted), rtol=1e-5)


def test_clips_are_sixteen_frames_of_patches_in_order():
    meter = frechet.Clips("c", lambda x: torch.stack([x[:, 0, :, 0, 0].sum(dim=1), x[:, 0, 3, 0, 0], torch.full((len(x),), float(x.shape[2]))], dim=1))
    video = torch.rand(35, 224, 450, 3)
    meter.start(FakeSource(35, 224, 450))
    for frame in video:
        meter.add(frame)
    wanted = [[video[a : a + 16, 0, x, 0].sum(), video[a + 3, 0, x, 0], 16.0] for a in (0, 16) for x in (1, 225)]
    assert torch.allclose(meter.features(), torch.tensor(wanted), rtol=1e-5)


def test_clip_features_are_means_and_mean_changes_over_time():
    torch.manual_seed(0)
    network = Mural().eval()
    clip = torch.rand(2, 3, 5, 32, 32)
    found = frechet.embed_clip(network)(clip)
    each = torch.stack([network(clip[:, :, t]) for t in range(5)])
    changes = sum((each[t + 1] - each[t]).abs() for t in range(4)) / 4
    assert torch.allclose(found, torch.cat([each.sum(dim=0) / 5, changes], dim=1), atol=1e-5)


def test_a_video_too_small_is_skipped_with_its_size():
    with pytest.raises(Unavailable, match=r"a\.mp4 \(320x240, 29 frames\) is smaller than a patch of 256x256, 1 frames"):
        frechet.Patches("p", torch.nn.Identity()).start(FakeSource(29, 240, 320))
    with pytest.raises(Unavailable, match="16 frames"):
        frechet.Clips("c", torch.nn.Identity()).start(FakeSource(15, 512, 512))


@pytest.mark.parametrize("name", ["fid_patch", "hd_fvd"])
def test_the_papers_names_need_the_papers_weights(name):
    metrics = available()
    with pytest.raises(Unavailable, match="no weights"):
        metrics[name].start(Setup(), None)
    meter = metrics[f"{name}[mural]"].start(Setup(), None)
    x = torch.rand(140, 128 if name == "hd_fvd" else 64, generator=torch.Generator().manual_seed(0))
    assert list(meter.distance(x, x + 1)) == [f"{name}[mural]", f"{name}[mural].samples", f"{name}[mural].reference_samples"]


def renders(count: int, side: int, seed: int) -> torch.Tensor:
    """[count, 3, side, side]: crops of held-out scenes at sizes from 448x256 to 3808x2176."""
    rng = np.random.default_rng(seed)
    crops = []
    for _ in range(count):
        height = int(rng.choice((256, 544, 1088, 2176)))
        grid = Grid(num_frames=29, height=height, width=height * 7 // 4)
        crop = Crop(int(rng.integers(height - side + 1)), int(rng.integers(grid.width - side + 1)), side, side)
        moment = int(rng.integers(29))
        crops += render(sample_scene(rng, held_out=True), grid, crop=crop, frames=range(moment, moment + 1))
    return torch.stack(crops).permute(0, 3, 1, 2)


@torch.inference_mode()
def embedded(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([load_mural(CPU)(part) for part in x.split(16)])


def check_growth(count: int, side: int) -> dict[str, list[float]]:
    """Distances of damaged renders to other, true renders grow with every step of strength, from undamaged on: 12 of 12."""
    true, others = embedded(renders(count, side, seed=1)), renders(count, side, seed=2)
    generator = torch.Generator().manual_seed(0)
    clean = frechet.frechet_distance(true, embedded(others))
    found = {}
    for kind, strengths in STRENGTHS.items():
        damaged = (embedded(degrade.degrade(others, kind, strength, generator)) for strength in strengths)
        found[kind] = [clean, *(frechet.frechet_distance(true, d) for d in damaged)]
    growing = {kind: [b > a for a, b in pairwise(row)] for kind, row in found.items()}
    assert all(all(row) for row in growing.values()), found
    return found


def test_distance_grows_with_damage():
    check_growth(96, 128)


@pytest.mark.long
@pytest.mark.timeout(1800)  # 100 s of one core; longer where others work too
def test_distance_grows_with_damage_at_full_size():
    check_growth(400, 256)
