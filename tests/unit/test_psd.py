"""The trajectory analysis finds what is known in advance, and the command writes it down, or says in one line why not."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import shutil

import pytest
import torch

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.eval import trajectory
from muralist.eval.trajectory import Curves, Spectra, Study, follow, require_room
from muralist.progress import Silent
from muralist.sampling import flow
from muralist.stages.prompt import encode_prompt
from muralist.stages.proxy import LowResolutionProxy, make_proxy
from tests.shell import muralist

HEIGHT, WIDTH = 16, 24


def wave(ky, kx):
    """[1, 2, 3, h, w]: one frequency in every channel and frame."""
    y, x = torch.arange(HEIGHT)[:, None] / HEIGHT, torch.arange(WIDTH) / WIDTH
    return torch.cos(2 * torch.pi * (ky * y + kx * x) + 0.3).expand(1, 2, 3, HEIGHT, WIDTH).contiguous()


LOW, HIGH = wave(0, 1), wave(5, 6)  # 0.08 and 0.80 of Nyquist: a window that moves them by one cycle leaves them in their bands


def followed(velocity, noise, steps, tmp_path, shift=1.0):
    return follow(velocity, noise, flow.sigmas(steps, shift), Spectra(HEIGHT, WIDTH, 0.25), tmp_path, lambda step, z: None)


def prescribed(low_at, high_at, width=0.05):
    """A velocity whose clean estimate is chosen: settled shares that are logistic in sigma, one half at the given levels."""

    def velocity(z, sigma):
        shares = (1 / (1 + math.exp((sigma - centre) / width)) for centre in (low_at, high_at))
        low, high = (1 - math.sqrt(1 - share) for share in shares)
        return flow.velocity_of_sample(z, low * LOW + high * HIGH, sigma)

    return velocity


# --- the definitions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_crossing_is_where_the_rates_are_equal(shift, tmp_path):
    """Two curves of one shape, 0.4 apart: the lead of the first is largest in the middle, under any schedule."""
    curves = followed(prescribed(0.8, 0.4), torch.randn(LOW.shape), 60, tmp_path, shift)
    assert curves.crossing == pytest.approx(0.6, abs=0.01)
    assert curves.half_settled == pytest.approx((0.8, 0.4), abs=0.01)
    assert curves.settled[-1].tolist() == [1, 1] and curves.settled[0, 1] < 0.01
    middles = (curves.sigma[1:] + curves.sigma[:-1]) / 2
    faster = curves.rate[:, 1] > curves.rate[:, 0] + 0.05
    assert not faster[middles > 0.62].any() and faster[(middles > 0.3) & (middles < 0.55)].all()
    assert curves.at(curves.settled[:, 0], 0.8) == pytest.approx(0.5, abs=0.02)


def test_detail_that_comes_first_is_never_overtaken(tmp_path):
    curves = followed(prescribed(0.4, 0.8), torch.randn(LOW.shape), 30, tmp_path)
    assert curves.crossing is None and curves.half_settled == pytest.approx((0.4, 0.8), abs=0.02)


def test_a_gaussian_base_settles_as_the_formula_says(tmp_path):
    """For data of amplitude a in a band, x_sigma = sqrt((1 - sigma)^2 a^2 + sigma^2) xi solves the flow, and the clean estimate is a multiple of it."""
    amplitudes = (2.0, 0.5)

    def velocity(z, sigma):
        gains = ((1 - sigma) * a**2 / ((1 - sigma) ** 2 * a**2 + sigma**2) for a in amplitudes)
        parts = ((z * basis).sum() / basis.square().sum() * basis for basis in (LOW, HIGH))
        return flow.velocity_of_sample(z, sum(gain * part for gain, part in zip(gains, parts)), sigma)

    curves, spectra = followed(velocity, LOW + HIGH, 200, tmp_path), Spectra(HEIGHT, WIDTH, 0.25)
    alone = spectra.bands(spectra.power(LOW[0] + HIGH[0]))
    for band, a in enumerate(amplitudes):
        reached = (1 - curves.sigma) * a / ((1 - curves.sigma) ** 2 * a**2 + curves.sigma**2).sqrt()
        assert (curves.settled[:, band] - (1 - (1 - reached) ** 2)).abs().max() < 0.03
        assert curves.half_settled[band] == pytest.approx(a / (a + 0.306), abs=0.01)
        assert curves.gain[:, band].diff().min() > 0 and curves.power[-1, band] == pytest.approx(a**2 * alone[band].item(), rel=0.03)
    assert curves.half_settled[1] < curves.crossing < curves.half_settled[0]


def test_white_noise_is_flat_and_the_bands_are_the_whole():
    generator = torch.Generator().manual_seed(0)
    noise = 3 * torch.randn(16, 20, 32, 48, generator=generator)
    spectra = Spectra(32, 48, 0.25)
    power = spectra.power(noise)
    rings, bands = spectra.rings(power), spectra.bands(power)
    assert rings.shape == spectra.frequency.shape == (17,) and spectra.frequency[-1] == 1
    assert (rings / 9 - 1).abs().max() < 0.2 and (rings[4:] / 9 - 1).abs().max() < 0.05
    window = torch.hann_window(32)[:, None] * torch.hann_window(48)
    assert bands.sum().item() == pytest.approx(((noise * window).square().sum((2, 3)).mean() / window.square().sum()).item(), rel=1e-5)
    assert (bands[0] / bands.sum()).item() == pytest.approx(math.pi / 64, rel=0.1)  # a quarter of Nyquist: a disc in the square of frequencies


def test_borders_are_no_detail():
    """A slope does not wrap around; only without the window would its jump be power of high frequencies."""
    slope = torch.linspace(-1, 1, 48).expand(1, 1, 32, 48)
    spectra = Spectra(32, 48, 0.25)
    low, high = spectra.bands(spectra.power(slope))
    assert high < 1e-3 * low


@pytest.mark.parametrize("height, width", [(4, 8), (5, 9), (7, 4)])
def test_small_and_odd_latents_have_both_bands(height, width):
    spectra = Spectra(height, width, 0.25)
    power = spectra.power(torch.randn(4, 2, height, width))
    assert spectra.bands(power).min() > 0 and spectra.rings(power).isfinite().all() and spectra.frequency.max() <= 1


def test_what_ends_without_power_counts_as_settled():
    power = torch.tensor([[1.0, 0.0]] * 5, dtype=torch.float64)
    curves = Curves(sigma=torch.linspace(1, 0.1, 5), psd=power, power=power, error=power * torch.tensor([[1.0], [1], [1], [1], [0]]))
    assert curves.settled[:, 1].tolist() == [1] * 5 and curves.crossing is None and curves.half_settled[1] == 1


# --- on a base --------------------------------------------------------------------------------------------------------------------


def study(base, **changed):
    d = base.defaults
    numbers = {"num_inference_steps": d.num_inference_steps, "guidance_scale": d.guidance_scale, "flow_shift": d.flow_shift}
    given = {"prompts": ("a red ball",), "seeds": (3,), "negative_prompt": "", "grid": d.grid} | numbers | changed
    return Study(**given)


@pytest.mark.parametrize("interval", [flow.WHOLE, (0.0, 0.8)], ids=str)
def test_the_trajectory_is_that_of_a_proxy(tiny_base, tmp_path, interval):
    base = Base(inspect_base(str(tiny_base)), torch.device("cpu"), torch.float32)
    how = study(base.info, guidance_interval=interval)
    found = trajectory.run(how, base, tmp_path, Silent())
    numbers = {name: getattr(how, name) for name in ("num_inference_steps", "guidance_scale", "guidance_interval", "flow_shift")}
    proxy = LowResolutionProxy(height=how.grid.height, width=how.grid.width, **numbers)
    text = encode_prompt(base, how.prompts[0], how.negative_prompt)
    latent = make_proxy(base, text, proxy, how.grid, seed=3, saved=None, after_step=lambda step, z: None).z[0]
    spectra = Spectra(*latent.shape[2:], how.cutoff)
    assert torch.equal(found.mean.power[-1], spectra.bands(spectra.power(latent)))
    assert list(tmp_path.iterdir()) == []


def test_videos_are_averaged_by_their_power(tiny22, tmp_path):
    base = Base(inspect_base(str(tiny22)), torch.device("cpu"), torch.float32)
    both = trajectory.run(study(base.info, seeds=(1, 2)), base, tmp_path, Silent())
    each = [trajectory.run(study(base.info, seeds=(seed,)), base, tmp_path, Silent()).mean for seed in (1, 2)]
    assert torch.allclose(both.mean.psd, (each[0].psd + each[1].psd) / 2)
    expected = 1 - (each[0].error + each[1].error) / (each[0].power[-1] + each[1].power[-1])
    assert torch.allclose(both.mean.settled, expected.clamp(min=0))
    assert [video.seed for video in both.videos] == [1, 2] and torch.equal(both.videos[1].settled, each[1].settled)


def test_the_command_writes_picture_and_numbers(tiny_base, tmp_path):
    output = tmp_path / "a.png"
    answer = muralist("psd", "a red ball", "blue sand $_{", "--model", tiny_base, "-o", output, "--seeds", "0,4", "--steps", 5)
    assert answer.code == 0, answer.err
    assert "half settled at sigma" in answer.out and "at the published switch, 0.875" in answer.out and "4 videos" in answer.out
    assert output.read_bytes().startswith(b"\x89PNG") and sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.json", "a.png"]
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["sigma"]) == len(found["settled"]["low"]) == len(found["psd"]["power"]) == 5 and len(found["rate"]["high"]) == 4
    assert [(v["prompt"], v["seed"]) for v in found["videos"]] == [(p, s) for p in ("a red ball", "blue sand $_{") for s in (0, 4)]
    assert found["summary"]["crossing_of_videos"]["of"] == 4 and found["study"]["grid"]["height"] == 64 and "torch" in found["versions"]
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [float(row["sigma"]) for row in rows] == found["sigma"] and rows[-1]["rate_low"] == "" and "psd.1.0000" in rows[0]


def test_the_command_takes_another_size_and_speaks_json(tiny22, tmp_path):
    answer = muralist("psd", "a ball", "--model", tiny22, "-o", tmp_path / "a.png", "--size", "96x64", "--num-frames", 8, "--cutoff", 0.5, "--json")
    assert answer.events[-1]["event"] == "result" and answer.events[-1]["base"]["cutoff_of_tokens"] == 1.0 and "8 frames become 9" in answer.err
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["study"]["grid"] | {"kind": 0} == {"kind": 0, "num_frames": 9, "height": 64, "width": 96, "fps": 16.0}


def test_the_command_guides_where_the_base_does(tiny22, tmp_path):
    model = shutil.copytree(tiny22, tmp_path / "model")
    (model / "muralist.json").write_text(json.dumps(json.loads((model / "muralist.json").read_text()) | {"guidance_interval": [0.0, 0.8]}))
    assert muralist("psd", "a ball", "--model", model, "-o", tmp_path / "a.png").code == 0
    assert json.loads((tmp_path / "a.json").read_text())["study"]["guidance_interval"] == [0.0, 0.8]


# --- mistakes ---------------------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("prompt", ["", "-o", "a.png"]), ("prompt", ["a\ud800", "-o", "a.png"]), ("PROMPT", ["-o", "a.png"]),
    *(("output", ["a", "-o", name]) for name in ("a.jpg", "", ".", "no/such/a.png", "folder.png", "n" * 250 + ".png")),
    *(("cutoff", ["a", "--cutoff", value]) for value in ("0", "1", "-1", "nan", "high")),
    *(("seeds", ["a", "--seeds", value]) for value in ("", "-1", "1-0", "x")), ("seed", ["a", "--seeds", "9999999999999999999"]),
    ("num_inference_steps", ["a", "--steps", "3"]), ("num_inference_steps", ["a", "--steps", "0"]), ("guidance_scale", ["a", "--cfg", "nan"]),
    ("flow_shift", ["a", "--shift", "0"]), ("size", ["a", "--size", "5k"]), ("height", ["a", "--size", "128x0"]), ("num_frames", ["a", "--frames", "0"]),
    ("device", ["a", "--device", "tpu"]), ("model", ["a", "--model", "nowhere"]), ("negative_prompt", ["a", "--negative-prompt", "n" * 5000]),
]  # fmt: skip


@pytest.mark.parametrize("where, arguments", MISTAKES, ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else value)
def test_mistakes_are_one_line_before_weights_are_loaded(where, arguments, tiny22, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr("muralist.base.Base.__init__", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    model = [] if "--model" in arguments else ["--model", tiny22]
    assert where in muralist("psd", *arguments, *model).error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_missing_matplotlib_is_told_at_once(tiny22, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in muralist("psd", "a ball", "--model", tiny22, "-o", tmp_path / "a.png").error


def test_a_disk_without_room_is_told_at_once(tiny22, tmp_path, monkeypatch):
    monkeypatch.setattr("muralist.store.atomic.free_bytes", lambda path: 1000)
    info = inspect_base(str(tiny22))
    with pytest.raises(UserError, match="1,000 bytes free"):
        require_room(study(info), info.geometry.latent_shape(info.defaults.grid), tmp_path)
