"""Each core metric against an independent one, written down again from its definition with loops, on random small videos."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from muralist.data import world
from muralist.eval.metrics import adherence, latent, temporal
from muralist.eval.metrics._linear import Banded, area, linear
from muralist.eval.metrics.detail import Detail
from muralist.eval.metrics.pixels import Psnr, Ssim
from muralist.eval.metrics.spectrum import CENTRES, FLOOR, SpectralDistance, Spectrum
from muralist.eval.registry import Setup, Unavailable, available
from muralist.types import Grid

SIZES = [(37, 53), (64, 96), (80, 45)]
EXACT = 1e-5


def video(seed: int, height: int, width: int, frames: int = 5) -> torch.Tensor:
    """Random, with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").permute(0, 2, 3, 1)
    return (0.7 * smooth + 0.3 * torch.rand(frames, height, width, 3, generator=generator)).contiguous()


def pair(seed: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    first = video(seed, height, width)
    return first, (first + 0.2 * (video(seed + 100, height, width) - 0.5)).clamp(0, 1)


def run(meter, *videos: torch.Tensor) -> dict[str, float]:
    for frames in zip(*videos):
        meter.add(*frames)
    return meter.result()


def luma(frame: torch.Tensor) -> np.ndarray:
    f = frame.double().numpy()
    return 0.2126 * f[..., 0] + 0.7152 * f[..., 1] + 0.0722 * f[..., 2]


@pytest.fixture(params=SIZES, ids=str)
def videos(request):
    return pair(1, *request.param)


def test_psnr(videos):
    errors = [((a.double() - b.double()).numpy() ** 2).mean() for a, b in zip(*videos)]
    found = run(Psnr(), *videos)
    assert found["psnr"] == pytest.approx(np.mean([10 * math.log10(1 / e) for e in errors]), rel=EXACT)
    assert found["psnr.mse"] == pytest.approx(np.mean(errors), rel=EXACT)
    assert run(Psnr(), videos[0], videos[0])["psnr"] == 100


def test_ssim(videos):
    g = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(g, g) / np.outer(g, g).sum()

    def one(x, y):
        values = []
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, c = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        return np.mean(values)

    few = [v[:2] for v in videos]
    assert run(Ssim(), *few)["ssim"] == pytest.approx(np.mean([one(luma(a), luma(b)) for a, b in zip(*few)]), rel=EXACT)
    assert run(Ssim(), videos[0], videos[0])["ssim"] == pytest.approx(1, abs=1e-6)


def test_ssim_of_flat_pictures_is_that_of_their_means():
    """No variance: only the first factor is left. Variances of float32 are right to 1e-8, against C2 = 9e-4."""
    a, b = (torch.full((1, 40, 40, 3), v) for v in (0.9, 0.8))
    assert run(Ssim(), a, b)["ssim"] == pytest.approx((2 * 0.72 + 1e-4) / (0.81 + 0.64 + 1e-4), rel=5e-5)


def reduced_and_enlarged(picture: np.ndarray, k: int) -> np.ndarray:
    """[H, W, 3] by loops over both sides in turn."""

    def down(x):
        size, n = len(x), max(round(len(x) / 2**k), 1)
        out = np.zeros((n, *x.shape[1:]))
        for i in range(n):
            low, high = i * size / n, (i + 1) * size / n
            for j in range(math.floor(low), math.ceil(high)):
                out[i] += x[j] * (min(j + 1, high) - max(j, low)) / (high - low)
        return out

    def up(x, size):
        out = np.zeros((size, *x.shape[1:]))
        for i in range(size):
            at = min(max((i + 0.5) * len(x) / size - 0.5, 0), len(x) - 1)
            j = min(int(at), len(x) - 1)
            out[i] = x[j] + (at - j) * (x[min(j + 1, len(x) - 1)] - x[j])
        return out

    turn = lambda x: x.transpose(1, 0, 2)  # noqa: E731
    return turn(up(turn(up(turn(down(turn(down(picture)))), picture.shape[0])), picture.shape[1]))


def test_hd_mse_and_mhd_mse(videos):
    frames = [f.double().numpy() for f in videos[0]]
    each = {k: np.mean([((f - reduced_and_enlarged(f, k)) ** 2).mean() for f in frames]) for k in (3, 4, 5)}
    total, average = run(Detail("hd_mse", 1.0), videos[0]), run(Detail("mhd_mse", 1 / 3), videos[0])
    assert total["hd_mse"] == pytest.approx(sum(each.values()), rel=EXACT) and average["mhd_mse"] == pytest.approx(sum(each.values()) / 3, rel=EXACT)
    assert all(total[f"hd_mse.k{k}"] == pytest.approx(value, rel=EXACT) for k, value in each.items())
    assert run(Detail("hd_mse", 1.0), torch.full((2, 64, 64, 3), 0.3))["hd_mse"] < 1e-12


@pytest.mark.parametrize("size, smaller", [(64, 8), (135, 17), (100, 3), (5, 5), (200, 199)])
def test_banded_maps_are_their_matrices(size, smaller):
    x = torch.rand(2, size, 7, dtype=torch.float32)
    down, up = area(size, smaller), linear(smaller, size)
    assert torch.allclose(Banded(down).all_rows(x), down.float() @ x, atol=1e-6)
    assert torch.allclose(Banded(down).columns(x.mT), (down.float() @ x).mT, atol=1e-6)
    assert torch.allclose(down.sum(1), torch.ones(smaller, dtype=torch.float64)) and torch.allclose(up.sum(1), torch.ones(size, dtype=torch.float64))


def brute_levels(frames: torch.Tensor) -> np.ndarray:
    """Decibels of the quarter octaves, by a loop over all frequencies of the full transform."""
    height, width = frames.shape[1:3]
    hann = lambda n: 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / (n - 1))  # noqa: E731
    window = np.outer(hann(height), hann(width))
    total = np.zeros(len(CENTRES))
    for frame in frames:
        y = luma(frame)
        power = abs(np.fft.fft2((y - y.mean()) * window)) ** 2
        sums, counts = np.zeros(len(CENTRES)), np.zeros(len(CENTRES))
        for i in range(height):
            for j in range(width // 2 + 1):  # the half of a real picture's transform
                r = math.hypot(min(i, height - i) / height, j / width)
                if max(1 / 256, 2 / min(height, width)) <= r <= 0.5 * (1 + 1e-7):
                    band = min(int(math.log2(r * 256) * 4 + 1e-9), len(CENTRES) - 1)
                    sums[band] += power[i, j]
                    counts[band] += 1
        total += sums / np.where(counts > 0, counts, np.nan) / (window**2).sum()
    return 10 * np.log10(np.maximum(total / len(frames), FLOOR))


def test_spectrum_and_spectral_distance(videos):
    ours, theirs = (brute_levels(v) for v in videos)
    found = run(Spectrum(5), videos[0])
    bands = [found.get(f"spectrum.{c:.4f}", math.nan) for c in CENTRES]
    assert np.allclose(bands, ours, rtol=EXACT, atol=EXACT, equal_nan=True)
    octave = np.log2(CENTRES)
    used = ~np.isnan(ours) & (octave > -6)
    assert found["spectrum"] == pytest.approx(np.polyfit(octave[used], ours[used], 1)[0], rel=EXACT)
    distance = run(SpectralDistance(5), *videos)["spectral_distance"]
    assert distance == pytest.approx(math.sqrt(np.nanmean((ours - theirs) ** 2)), rel=EXACT)
    assert run(SpectralDistance(5), videos[0], videos[0])["spectral_distance"] == 0


def test_white_noise_is_flat_at_its_variance():
    found = run(Spectrum(4), 0.5 + 0.1 * torch.randn(4, 128, 128, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, 3))
    assert abs(found["spectrum"]) < 0.5 and all(abs(v + 20) < 1.5 for k, v in found.items() if "." in k and float(k[9:]) > 0.05)


def test_temporal_flickering(videos):
    frames = videos[0].double().numpy()
    expected = 1 - np.mean([abs(b - a).mean() for a, b in itertools.pairwise(frames)])
    assert run(temporal.Flickering(), videos[0])["temporal_flickering"] == pytest.approx(expected, rel=EXACT)
    with pytest.raises(Unavailable, match="single frame"):
        run(temporal.Flickering(), videos[0][:1])


def test_block_motion():
    """A random picture that moves by a known way, and one that does not; against a loop over blocks on one pair."""
    big = torch.rand(300, 400, generator=torch.Generator().manual_seed(0))
    big = torch.nn.functional.avg_pool2d(big[None], 5, 1, 2)[0]
    before, after = big[20:276, 20:340], big[13:269, 31:351]  # moves by (+7, -11)
    assert temporal.top_speed(before, after) == pytest.approx(math.hypot(7, 11), rel=EXACT)
    assert temporal.top_speed(before, before) == 0 and temporal.top_speed(torch.zeros(256, 256), torch.zeros(256, 256)) == 0
    a, b = before[:64, :80], (0.5 * after + 0.5 * before)[:64, :80]
    ways = []
    for y in (16, 32):  # the blocks that cannot leave
        for x in (16, 32, 48):
            costs = {}
            for dy in range(-16, 17):
                for dx in range(-16, 17):
                    other = b[y + dy : y + dy + 16, x + dx : x + dx + 16]
                    costs[dy, dx] = (a[y : y + 16, x : x + 16] - other).abs().mean().item() + 0.2 / 255 * math.hypot(dy, dx)
            ways.append(math.hypot(*min(costs, key=costs.get)))
    assert temporal.top_speed(a, b) == pytest.approx(max(ways), rel=EXACT)


def test_dynamic_degree():
    picture = torch.rand(256, 600, 3, generator=torch.Generator().manual_seed(0))
    fast = torch.stack([picture[:, 9 * t : 9 * t + 256] for t in range(9)])
    found = run(temporal.DynamicDegree(8), fast)
    assert found["dynamic_degree[blocks]"] == 1 and found["dynamic_degree[blocks].share"] == 1 and found["dynamic_degree[blocks].speed"] == pytest.approx(9)
    assert run(temporal.DynamicDegree(8), fast[:1].expand(9, -1, -1, -1))["dynamic_degree[blocks]"] == 0
    assert run(temporal.DynamicDegree(16), fast)["dynamic_degree[blocks].speed"] > 10  # every second frame: 18 pixels, beyond the reach


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def vae(request, tiny21, tiny22):
    return latent._load({"2.1": tiny21, "2.2": tiny22}[request.param] / "vae", torch.device("cpu"))


def test_latent_distance_is_that_of_whole_encodings(vae):
    """Fed 1 and then 4 frames at a time, against diffusers' own encoding of the whole clip."""
    ours, theirs = pair(3, 64, 96)
    ours, theirs = torch.cat([ours, theirs.flip(0)]), torch.cat([theirs, ours.flip(0)])  # 10 frames: the last one is left out

    def whole(v):
        x = v[:9].permute(3, 0, 1, 2)[None] * 2 - 1
        mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (vae.config.latents_mean, vae.config.latents_std))
        return (vae.encode(x).latent_dist.mean - mean) / std

    with torch.no_grad():
        difference = (whole(ours) - whole(theirs)).double()
    found = run(latent.LatentDistance(vae, "latent_mse"), ours, theirs)
    assert found["latent_mse"] == pytest.approx(difference.square().mean().item(), rel=EXACT)
    assert found["latent_mse.mae"] == pytest.approx(difference.abs().mean().item(), rel=EXACT)


def test_tiles_lie_inside_and_apart():
    for height, width in ((256, 256), (257, 511), (512, 512), (2160, 3840), (720, 1280), (300, 5000)):
        places = latent.tile_places(height, width, 256, 256)
        assert len(places) == min((height // 256) * (width // 256), latent.TILES)
        assert all(0 <= y <= height - 256 and 0 <= x <= width - 256 for y, x in places)
        assert all(abs(a[0] - b[0]) >= 256 or abs(a[1] - b[1]) >= 256 for i, a in enumerate(places) for b in places[:i])


def test_world_adherence():
    scene = world.parse("a red star moves right over grass", seed=5)
    frames = world.render_clip(scene, Grid(num_frames=29, height=256, width=448))
    assert run(adherence.WorldAdherence(scene, 29), frames)["world_adherence"] == 1
    other = run(adherence.WorldAdherence(world.parse("a blue star moves right over grass"), 29), frames)
    assert other["world_adherence"] == 0 and other["world_adherence.colour"] == 0 and other["world_adherence.shape"] == 1


def test_every_metric_says_what_it_is():
    for metric in available().values():
        assert metric.summary and metric.origin and metric.kind in ("video", "pair", "set") and metric.better in ("higher", "lower", "neither")


def test_latent_mse_needs_its_weights():
    with pytest.raises(Unavailable, match="--weights vae"):
        available()["latent_mse"].start(Setup(), None)


def test_a_vae_that_cannot_be_streamed_is_told(tmp_path):
    from diffusers import AutoencoderKLWan

    shape = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    AutoencoderKLWan(**shape, attn_scales=[1.0]).save_pretrained(tmp_path)
    with pytest.raises(Unavailable, match="does not know"):
        latent._start("latent_mse", tmp_path, Setup(), None)
