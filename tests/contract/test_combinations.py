"""Parts of different methods work together: each one that is taken from another recipe changes the picture, and what cannot go together is one line."""

from __future__ import annotations

import itertools
import shutil
from contextlib import nullcontext

import pytest
import torch

import muralist
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.request import Asked, make_request, weights_of

SIZED = {"width": 160, "height": 96, "num_frames": 9, "seed": 1}
FEW = ("refine.num_inference_steps=3", "refine.skip_steps=1", "refine.guidance_scale=1")
# parts of four methods at once, in the default recipe
TOGETHER = {
    "upsampler": 'upsample={"kind": "LearnedUpsampling"}',
    "experts": 'refine.experts=["low", "high"]',
    "steps": 'refine.steps={"kind": "ShortcutSteps"}',
    "anchor": "refine.anchor=injected",
    "attention": 'refine.attention={"kind": "ProxyWindows", "tokens": 16}',
}
SLOW = 'proxy={"kind": "LowFrameRateProxy", "height": 64, "width": 128, "num_inference_steps": 2, "guidance_scale": 1, "flow_shift": 5}'
PROXIES = {"none": "proxy=null", "whole": "proxy.num_inference_steps=2", "slow": SLOW}
UPSAMPLERS = {kind: f'upsample={{"kind": "{kind}"}}' for kind in ("LatentInterpolation", "LearnedUpsampling", "PixelInterpolation")}
ATTENTIONS = {kind: f'refine.attention={{"kind": "{kind}"}}' for kind in ("FullAttention", "Windows", "ProxyWindows", "CloseRemote")}
ATTENTIONS["BranchedWindows"] = 'refine.attention={"kind": "BranchedWindows", "windows": 2}'  # more do not fit the few tokens


@pytest.fixture(scope="module")
def painter(tiny22) -> muralist.Pipeline:
    return muralist.load(str(tiny22), recipe="cascade")


def painted(painter: muralist.Pipeline, *settings: str) -> torch.Tensor:
    with painter("a red ball", **SIZED, settings=(PROXIES["whole"], *settings, *FEW)) as video:
        return torch.cat([chunk.frames for chunk in video])


@pytest.fixture(scope="module")
def together(painter) -> torch.Tensor:
    return painted(painter, *TOGETHER.values())


@pytest.mark.parametrize("left_out", TOGETHER)
def test_each_part_is_at_work_among_the_others(left_out, painter, together):
    others = [setting for name, setting in TOGETHER.items() if name != left_out]
    assert not torch.equal(painted(painter, *others), together)


def test_windows_without_branches_stand_on_none(tiny22, tmp_path):
    model = shutil.copytree(tiny22, tmp_path / "model")
    asked = Asked(prompt="a ball", seed=1, recipe="direct", settings=(ATTENTIONS["BranchedWindows"],))

    def digest():
        info = inspect_base(str(model))
        return weights_of(make_request(asked, info, note=print).config, info)

    before = digest()
    shutil.rmtree(model / "parts")
    assert digest() == before


@pytest.mark.parametrize("attention", ['{"kind": "CloseRemote"}', '{"kind": "BranchedWindows", "windows": 2, "branches": ["coarse", "whole"]}'])
def test_windows_of_every_method_take_the_others_parts(attention, painter):
    parts = TOGETHER | {"attention": f"refine.attention={attention}"}
    without = {name: [setting for other, setting in parts.items() if other != name] for name in ("none left out", "experts", "steps", "anchor")}
    pictures = [painted(painter, *settings) for settings in without.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(pictures, 2))


def test_a_slow_proxy_takes_every_upsampler(painter):
    pictures = [painted(painter, SLOW, upsampler) for upsampler in UPSAMPLERS.values()]
    assert all(picture.isfinite().all() for picture in pictures)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(pictures, 2))


def refusal(proxy: str, upsampler: str, attention: str, anchor: str) -> str | None:
    """Why these cannot go together, in words of the line; None: they can."""
    used = upsampler != "none" or attention == "ProxyWindows" or anchor == "injected"
    if proxy == "none":
        return "there is no proxy to work from" if used else None
    if proxy == "slow" and anchor == "injected":
        return "an anchor has the target's frames"
    return None if used else "nothing uses the proxy"


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("upsampler", ["none", *UPSAMPLERS])
def test_whatever_is_put_together_is_taken_or_refused_in_a_line(proxy, upsampler, painter):
    given = [PROXIES[proxy], UPSAMPLERS.get(upsampler, "upsample=null"), f"refine.skip_steps={int(upsampler != 'none')}", *FEW[::2]]
    for attention, anchor in itertools.product(ATTENTIONS, ("none", "injected")):
        settings = (*given, ATTENTIONS[attention], f"refine.anchor={anchor}", TOGETHER["experts"], TOGETHER["steps"])
        reason = refusal(proxy, upsampler, attention, anchor)
        with pytest.raises(UserError, match=reason) if reason else nullcontext():
            painter.request("a red ball", **SIZED, settings=settings)
