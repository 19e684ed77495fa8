"""Diagnosis: planted artifacts are found, clean renders are not accused, and what cannot be told is said to be so."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from muralist.eval.diagnose import light, motion, repeats, seams, subjects
from muralist.eval.diagnose.checks import Resolution, Seams
from muralist.eval.diagnose.examine import examine
from muralist.eval.diagnose.finding import Plot
from muralist.eval.diagnose.page import draw
from muralist.eval.diagnose.plant import PLANTINGS, Case, clean, find, make_case
from muralist.eval.diagnose.track import Track, reduced, register
from muralist.eval.diagnose.view import Clip
from muralist.stages.encode import encode
from muralist.types import FrameChunk, Grid
from tests.shell import muralist

FEW, MANY = range(1000, 1001), range(100)


def missed(kind: str, seeds: range, made: Callable[..., Case] = make_case) -> list[int]:
    cases = [made(seed, moving=PLANTINGS[kind].moving) for seed in seeds]
    return [case.seed for case in cases if not all(finding.found for finding in find(kind, case, PLANTINGS[kind].size))]


def accused(seeds: range) -> list[str]:
    told = ((seed, kind, findings) for seed in seeds for kind, findings in clean(make_case(seed)).items())
    return [kind for _, kind, findings in told if any(finding.found for finding in findings)]


@pytest.fixture(scope="module")
def rendered_once() -> Callable[..., Case]:
    """`make_case` whose renders serve all kinds that are planted in them."""
    return cache(make_case)


@pytest.mark.parametrize("kind", PLANTINGS)
def test_planted_artifacts_are_found(kind, rendered_once):
    assert not missed(kind, FEW, rendered_once)


def test_clean_renders_are_not_accused():
    assert not accused(FEW)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", PLANTINGS)
def test_planted_artifacts_are_found_in_95_of_100(kind):
    assert len(missed(kind, MANY)) <= 5


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_at_most_5_of_100_clean_renders_are_accused_of_each():
    flags = accused(MANY)
    assert all(flags.count(kind) <= 5 for kind in PLANTINGS), flags


# --- seams ------------------------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))


@pytest.mark.parametrize(("size", "period", "phase"), [(896, 128, 0), (896, 160, 37), (513, 100, 99), (640, 320, 0)])
def test_combs_are_found_with_period_and_phase(size, period, phase):
    profile = np.random.default_rng(0).normal(size=size)
    lines = [x for x in range(phase, size, period) if 8 <= x < size - 8]
    profile[lines] = 20
    found = seams.find_comb(profile)
    assert (found.period, list(found.lines)) == (period, lines)
    assert seams.known_comb(profile, lines).score == pytest.approx(20 * len(lines) ** 0.5)


def test_two_edges_of_a_thing_are_no_seam():
    """A light box that moves down covers part of its edges' columns in each frame."""
    meter = seams.LineMeter()
    for t in range(24):
        frame = 0.1 * noise(256, 512, seed=1).clone()
        frame[10 * t : 10 * t + 90, 150:300] += 0.5
        meter.add(frame.clamp(0, 1))
    assert seams.find_comb(meter.profile()[0]).score < 12


def test_moments_of_a_long_video_are_merged():
    meter = seams.LineMeter()
    for _ in range(200):
        meter.add(noise(128, 160))
    assert len(meter._sums) <= seams.GROUPS and sum(meter._counts) == 200


# --- light ------------------------------------------------------------------------------------------------------------------------


def test_a_move_and_a_change_of_light_are_told_apart():
    smooth = torch.nn.functional.interpolate(noise(1, 3, 20, 36), (128, 228), mode="bicubic")[0]
    move, change = register(smooth[:, :, :224], smooth[:, :, 3:227] + 0.01, torch.zeros(3))
    assert move.tolist() == pytest.approx([-3 / 128, 0, 0], abs=1e-3)
    assert change.tolist() == pytest.approx([0.01] * 3, abs=1e-3)


def lit(levels: np.ndarray) -> Track:
    """A track of a grey video whose light follows `levels`."""
    steps = [torch.full((3,), float(d)) for d in np.diff(levels)]
    return Track(light=steps, move=[torch.zeros(3)] * len(steps), colour=[torch.full((3,), 0.5)] * len(levels))


@pytest.mark.parametrize("period", [4, 7, 16])
def test_pulse_names_the_period_and_its_size_under_a_drift(period):
    frames = np.arange(4 * period + 1)
    result = light.pulse(lit(0.5 + 0.002 * (frames % period == 0) + 0.0005 * frames), 16).finding
    assert result.found and result.where == {"period": [period]} and result.value == pytest.approx(0.4, abs=0.05)


def test_drift_is_in_percent_of_the_mean_luma_a_second():
    result = light.drift(lit(0.5 - 0.01 * np.arange(33) / 16), 16).finding
    assert result.found and result.value == pytest.approx(2, rel=1e-3)
    assert light.drift(lit(np.full(33, 0.5)), 16).finding.found is False


def test_short_videos_are_not_judged():
    track = lit(np.full(4, 0.5))
    assert light.pulse(track, 16).finding.found is None and light.drift(track, 16).finding.found is None


# --- content ----------------------------------------------------------------------------------------------------------------------


def moving(num_frames: int, step: int = 1) -> torch.Tensor:
    picture = torch.nn.functional.interpolate(noise(1, 1, 4, 32), (32, 320), mode="bilinear")[0, 0]
    return torch.stack([picture[:, step * t : step * t + 56] for t in range(num_frames)])


def test_repeats_name_frames_and_lag():
    video = moving(40)
    video[30:38] = video[5:13]
    result = repeats.repeats(video, 16).finding
    assert result.found and result.where == {"frames": [5, 30], "lag": [25]}
    assert "loops every 13 frames" in repeats.repeats(moving(13).repeat(3, 1, 1), 16).finding.sentence
    assert repeats.repeats(moving(40), 16).finding.found is False


def test_what_stands_still_cannot_come_back():
    assert repeats.repeats(moving(1).repeat(30, 1, 1), 16).finding.found is None


def test_speed_ratio_at_another_frame_rate():
    file, proxy = moving(80, step=1), moving(40, step=4)
    assert motion.slow_motion(file, 24, proxy, 12).finding.value == pytest.approx(0.5, abs=0.1)
    assert motion.slow_motion(file, 24, file[::2], 12).finding.value == pytest.approx(1, abs=0.02)
    assert motion.slow_motion(file, 24, None, 0).finding.found is None


def test_a_thing_that_is_elsewhere_is_no_copy():
    ground = 0.1 * noise(3, 128, 224)
    proxy, moved, twice = (ground.clone() for _ in range(3))
    red = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    proxy[:, 40:80, 30:70] = red
    moved[:, 40:80, 140:180] = red
    twice[:, 40:80, 30:70] = twice[:, 50:90, 140:180] = red
    assert subjects.copies(moved, proxy) == [] and subjects.copies(proxy, proxy) == []
    assert subjects.copies(twice, proxy) == [pytest.approx((160 / 224, 70 / 128), abs=0.02)]


def test_without_proxy_only_the_world_is_judged():
    frames = [reduced(noise(256, 448, 3, seed=k)) for k in range(5)]
    assert subjects.subjects(frames, None).finding.found is None


def test_pictures_too_small_to_tell():
    clip = Clip(iter(noise(3, 64, 96, 3)), 3, 16.0)
    assert [finding.found for finding in examine(clip, [Seams(), Resolution(3)]).findings] == [None, None]


# --- the command ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A video with seams and a drift, its proxy, and one of another shape."""
    folder = tmp_path_factory.mktemp("diagnose")
    grid = Grid(num_frames=17, height=256, width=448)
    case = Case(1001, make_case(1001).scene, grid)
    tiles = (torch.arange(448) // 128 % 2)[None, None, :, None] * 3 / 255
    write = lambda name, frames, g: encode(iter([FrameChunk(frames.clamp(0, 1), 0)]), g, folder / name)  # noqa: E731
    write("<b>&.mp4", case.frames + tiles + torch.arange(17)[:, None, None, None] * 0.001, grid)
    write("proxy.mp4", case.frames[:, ::2, ::2], grid.resized(height=128, width=224))
    write("square.mp4", case.frames[:, :128, :128], grid.resized(height=128, width=128))
    return folder


def test_command_finds_and_writes_a_page(files, tmp_path):
    answer = muralist("diagnose", files / "<b>&.mp4", "--proxy", files / "proxy.mp4", "--tile", 128, "--json", "--html", tmp_path / "a.html")
    assert answer.code == 0, answer.err
    findings = {finding["name"]: finding for finding in answer.events[0]["findings"]}
    assert [name for name, finding in findings.items() if finding["found"]] == ["seams", "seams at known borders", "colour drift"]
    assert findings["seams"]["where"] == {"x": [128, 256, 384]}
    page = (tmp_path / "a.html").read_text()
    assert "&lt;b&gt;&amp;.mp4" in page and "<b>" not in page and page.count("<svg") >= 6
    assert not re.search(r"(src|href)=(?!['\"]?data:)", page) and "http" not in page.replace("http-equiv", "") and "<script" not in page


def test_mistakes_are_named(files, tmp_path):
    file = files / "proxy.mp4"
    assert "another shape" in muralist("diagnose", file, "--proxy", files / "square.mp4").error
    assert "tile" in muralist("diagnose", file, "--tile", "huge").error
    assert "html" in muralist("diagnose", file, "--html", tmp_path / "nowhere" / "a.html").error
    assert "no such file" in muralist("diagnose", tmp_path / "none.mp4").error


def test_plots_keep_peaks_and_survive_constants():
    assert "NaN" not in draw(Plot(title="t", x_label="x", y_label="y", x=[0.0], y=[0.0]))
    y = np.zeros(5000)
    y[1234] = 7
    assert f">{6}<" in draw(Plot(title="t", x_label="x", y_label="y", x=range(5000), y=y))
