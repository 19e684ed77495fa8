"""What the plan says of whole recipes, against PyTorch's counter over the same stages."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.cost.machine import Machine
from muralist.cost.setting import Setting
from muralist.errors import UserError
from muralist.nn.attention import BranchedWindows, GuidedWindows, Near
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import WindowAttention
from muralist.pipeline import denoise
from muralist.plan import plan
from muralist.progress import Silent
from muralist.recipes import RECIPES
from muralist.request import Asked, make_request
from muralist.sampling import flow
from muralist.stages.proxy import LowFrameRateProxy, LowResolutionProxy
from muralist.stages.refine import Refine, Windows, refine
from muralist.stages.upsample import LatentInterpolation, upsample
from muralist.store.run import RunDirectory
from muralist.types import Grid, LatentVideo, TextCond
from muralist.velocity import ProxyView, Sight, velocity_field
from tests.unit.test_plan import WAN_1_3B, WAN_21, base, counter

CPU = torch.device("cpu")


NOISY = ("refine.attention.proxy_noise=same", "refine.attention.pool=[1, 2, 2]")


@pytest.mark.parametrize(
    "recipe, settings, dtype",
    [*((name, (), torch.float32) for name in sorted(RECIPES)), ("atlasvid", NOISY, torch.float32), ("cascade", (), torch.bfloat16)],
)
def test_the_flops_of_a_recipe_are_those_counted(recipe, settings, dtype, tiny_base, tmp_path):
    info = inspect_base(str(tiny_base))
    asked = Asked(prompt="a red ball", width=320, height=192, num_frames=17, seed=1, recipe=recipe, settings=settings, num_inference_steps=5)
    request = make_request(asked, info, note=print)
    said = plan(request, info, replace(Machine.measure(CPU), dtype=str(dtype).removeprefix("torch.")))
    with RunDirectory.create(tmp_path / "run", {"test": True}) as run, counter() as counted:
        denoise(request, Base(info, CPU, dtype), run, Silent())
    stages = {stage.stage: stage.flops for stage in said.stages if stage.stage in ("prompt", "proxy", "upsample", "refine")}
    assert 0.98 <= counted.get_total_flops() / sum(stages.values()) <= 1.02, stages


@pytest.mark.parametrize(("size", "frames", "saved"), [((3840, 2160), 161, 1100), ((7680, 4320), 29, 850), ((2560, 1440), 321, 950)])
def test_a_query_in_sight_of_a_proxy_sees_about_a_thousand_keys_at_any_size(size, frames, saved):
    """The paper's three examples and its factors, on the geometry that it has them for."""
    info = replace(base(WAN_1_3B, WAN_21, trained=Grid(num_frames=81, height=480, width=832)), adapters=("proxy", "detail"))
    asked = Asked(prompt="a fox", recipe="atlasvid", width=size[0], height=size[1], num_frames=frames, seed=0)
    made = plan(make_request(asked, info, note=lambda text: None), info, Machine.of("140GB"))
    (found,) = (stage for stage in made.stages if stage.stage == "refine")
    assert found.keys_per_query <= 1100 and found.attention_saving >= saved


@pytest.mark.parametrize("frames, latent", [(29, 3), (113, 8), (321, 21), (5, 2), (1, 1)])
def test_a_proxy_of_few_frames_spans_the_target(frames, latent, tiny_base):
    geometry = inspect_base(str(tiny_base)).geometry
    proxy = LowFrameRateProxy(height=64, width=128, num_inference_steps=4, guidance_scale=2.0, flow_shift=5.0)
    target = Grid(num_frames=frames, height=2160, width=3840, fps=16)
    grid = proxy.grid(target, geometry)
    assert geometry.latent_shape(grid)[1] == latent and grid.fps == 4
    assert grid.num_frames / grid.fps >= (frames - 3) / target.fps and proxy.time_scale * (latent - 1) >= (frames - 1) // 4


def test_a_target_that_the_base_spans_has_a_proxy_of_all_its_frames(tiny_base):
    info = inspect_base(str(tiny_base))

    def proxy(num_frames, *settings):
        asked = Asked(prompt="a ball", width=160, height=96, num_frames=num_frames, seed=1, recipe="atlasvid", settings=settings)
        return make_request(asked, info, note=print).config.proxy

    longer, own = proxy(9), proxy(5)
    assert isinstance(longer, LowFrameRateProxy) and longer.adapter == "proxy" and longer.every == 4
    assert type(own) is LowResolutionProxy and own.adapter is None
    assert (own.height, own.width, own.num_inference_steps) == (longer.height, longer.width, longer.num_inference_steps)
    assert proxy(5, "proxy.spanned=0") == replace(longer, spanned=0)
    assert isinstance(proxy(9, "proxy.spanned=9"), LowResolutionProxy)
    with pytest.raises(UserError, match=r"proxy\.spanned"):
        proxy(9, "proxy.spanned=-1")
    for setting in ("proxy.every=2", "proxy.adapter=nonsense"):
        with pytest.raises(UserError, match="spans 5 frames by itself"):
            proxy(5, setting)
    assert proxy(5, "refine.anchor=injected") == own  # it has the target's frames
    with pytest.raises(UserError, match="an anchor has the target's frames"):
        proxy(9, "refine.anchor=injected")
    info = replace(info, adapters=("detail",))
    assert proxy(5) == own
    with pytest.raises(UserError, match="no adapter 'proxy'"):
        proxy(9)


def test_what_fewer_frames_would_need_is_counted_with_their_own_proxy(tiny_base):
    info = inspect_base(str(tiny_base))
    asked = make_request(Asked(prompt="a ball", width=160, height=96, num_frames=65, seed=1, recipe="atlasvid"), info, note=print)
    setting = Setting(request=asked, info=info, machine=Machine.of("80GB"))
    for frames in (5, 9):
        shorter = sys.modules["muralist.plan"]._with(setting, replace(asked.grid, num_frames=frames))
        typed = Asked(prompt="a ball", width=160, height=96, num_frames=frames, seed=1, recipe="atlasvid")
        assert shorter.request == make_request(typed, info, note=print)


def test_a_proxy_of_few_frames_is_enlarged_in_time_too(tiny22):
    base = Base(inspect_base(str(tiny22)), CPU, torch.float32)
    small, large = Grid(num_frames=9, height=64, width=128, fps=4), Grid(num_frames=29, height=64, width=128, fps=16)
    z = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 48, 3, 4, 8)
    guide = upsample(LatentVideo(z, small), large, base, LatentInterpolation())
    assert guide.z[0, 0, :, 2, 3].tolist() == pytest.approx([f / 4 for f in range(8)])


def test_a_clean_proxy_is_looked_at_once_and_a_noisy_one_at_every_step(tiny22, monkeypatch):
    base, looked = Base(inspect_base(str(tiny22)), CPU, torch.float32), []
    remember = MuralTransformer.remember
    monkeypatch.setattr(MuralTransformer, "remember", lambda self, *given: looked.append(given[1].item()) or remember(self, *given))
    text = TextCond(torch.randn(1, 4, 32), torch.zeros(1, 4, 32))
    graft = Graft(attention=GuidedWindows(WindowAttention((2, 2, 2)), Near((1, 2, 2))))
    for noise, levels in (("clean", [0.0, 0.0]), ("same", [900.0, 900.0, 500.0, 500.0])):
        view = ProxyView(torch.randn(1, 48, 2, 4, 8), 4.0, "proxy", noise, seed=3)
        velocity = velocity_field(base, text, guidance_scale=2.0, graft=graft, adapter="detail", sight=Sight(proxy=view))
        for sigma in (0.9, 0.5):
            velocity(torch.randn(1, 48, 5, 8, 16), sigma)
        assert looked == pytest.approx(levels)
        looked.clear()
    level = view.level(0.3)
    z = view.at(level)
    assert level == 0.3 and torch.equal(z, view.at(0.3)) and not torch.equal(z, view.z)


@pytest.mark.parametrize(("skip", "idle"), [(1, 0), (6, 1)])
def test_an_expert_that_meets_no_step_is_told(skip, idle):
    info = inspect_base("miniature")
    typed = Asked(prompt="a ball", recipe="luve", width=896, height=512, num_frames=5, num_inference_steps=10, flow_shift=3.0, skip_steps=skip, seed=0)
    notes = plan(make_request(typed, info, note=lambda text: None), info, Machine.of("80GB")).notes
    told = [note for note in notes if "it has nothing to do" in note]
    assert len(told) == idle and all(note.startswith("the expert low works at noise levels from 0.875 to 1, refinement from 0.25 to 0.667") for note in told)


BRANCHED = BranchedWindows(2, branches=("coarse", "whole"), travel=True)


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({}, 4), ({"attention": Windows(tokens=32, travel=False)}, 1), ({"cache": 0.1}, 1),
        ({"attention": BRANCHED}, 4), ({"attention": replace(BRANCHED, travel=False)}, 1), ({"attention": BRANCHED, "cache": 0.1}, 1),
    ],
)  # fmt: skip
def test_windows_travel_from_step_to_step_and_the_plan_counts_each(change, different, tiny22, tmp_path, monkeypatch):
    """With the same passes for both prompts, the same windows after a resume, and FLOPs that are those counted."""
    info = inspect_base(str(tiny22))
    base, (positive, negative) = Base(info, CPU, torch.float32), torch.randn(2, 1, info.defaults.max_sequence_length, 32)
    text = TextCond(positive, negative)
    how = Refine(**{"num_inference_steps": 5, "guidance_scale": 2.0, "flow_shift": 1.0, "attention": Windows(tokens=32)} | change)
    grid = info.geometry.legal(Grid(num_frames=5, height=256, width=512))
    transformer, grafts, shape = base.transformer(), [], info.geometry.token_shape(grid)
    configure = transformer.configure
    monkeypatch.setattr(transformer, "configure", lambda graft: grafts.append(tuple(cut.axes for cut in graft.attention.partitions(shape))) or configure(graft))
    steps = {}
    with counter() as counted:
        refine(base, text, None, grid, how, seed=0, saved=None, after_step=lambda step, z: steps.update({step: z.clone()}), cache=None)
    assert len(set(grafts)) == different and all(grafts[k] == grafts[k + 1] for k in range(0, 10, 2))
    again = refine(base, text, None, grid, how, seed=0, saved=(3, steps[3]), after_step=lambda *_: None)
    assert (again.z - steps[5]).abs().max() < 1e-5 and grafts[10:] == grafts[6:10]  # enlarging pooled tokens is put together otherwise while it is counted
    typed = Asked(prompt="a ball", recipe="direct", width=512, height=256, num_frames=5, seed=0)
    request = make_request(typed, info, note=lambda text: None)
    made = plan(replace(request, config=replace(request.config, refine=how)), info, Machine.of("80GB"))
    planned = next(stage for stage in made.stages if stage.stage == "refine")
    assert planned.flops / counted.get_total_flops() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("skip", "told"), [(0, True), (1, False)])
def test_a_guide_that_no_step_begins_with_is_told(skip, told):
    info = inspect_base("miniature")
    typed = Asked(prompt="a ball", width=896, height=512, num_frames=5, skip_steps=skip, seed=0)
    notes = plan(make_request(typed, info, note=lambda text: None), info, Machine.of("80GB")).notes
    assert any("made and not used" in note for note in notes) == told


def test_a_noisy_view_lies_on_the_path_from_the_noise_that_the_proxy_was_painted_from():
    z = torch.randn(1, 48, 2, 4, 8)
    noise = flow.keyed_noise(tuple(z.shape), seed=3, stage="proxy")  # `make_proxy`'s
    assert torch.equal(ProxyView(z, 4.0, None, "same", seed=3).at(1.0), noise)
    assert torch.allclose(ProxyView(z, 4.0, None, "same", seed=3).at(0.25), 0.75 * z + 0.25 * noise)
