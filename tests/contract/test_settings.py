"""Settings and typed numbers: judged together, and refused by their own names in words of ours, by the command line as by the Python interface."""

import math

import numpy as np
import pytest

from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.recipes import RECIPES
from muralist.request import Asked, make_request, restore
from muralist.settings import changed
from muralist.stages.refine import Windows
from muralist.stages.upsample import PixelInterpolation
from tests.shell import muralist

PROXY = 'proxy={"kind": "LowResolutionProxy", "height": 64, "width": 96'
NUMBERS = ', "num_inference_steps": 4, "guidance_scale": 4, "flow_shift": 3}'
REFINE = 'refine={"kind": "Refine", "num_inference_steps": 8, "guidance_scale": 2, "flow_shift": 5'


def plan(base, *more):
    return muralist("plan", "--model", base, "--size", "192x96", *more)


@pytest.fixture
def luve(tiny22):
    return RECIPES["luve"](inspect_base(str(tiny22)))


def test_settings_that_need_each_other_go_together(luve):
    alone = changed(luve, ["proxy=null", "refine.skip_steps=0", "upsample=null"])
    assert alone.proxy is None and alone.upsample is None and alone.refine.experts == luve.refine.experts


def test_typed_numbers_and_settings_are_judged_together(tiny22):
    more = ("--set", PROXY + NUMBERS, "--set", 'upsample={"kind": "LatentInterpolation"}')
    alone = plan(tiny22, "--recipe", "ultragen", "--skip-steps", 2)
    assert alone.code == 2 and "without a guide" in alone.err
    answer = plan(tiny22, "--recipe", "ultragen", "--skip-steps", 2, *more)
    assert answer.code == 0, answer.err
    for no_part in ("proxy=5", "refine=steps", "kernels=[]"):
        assert no_part in plan(tiny22, "--num-inference-steps", 3, "--attention", "sdpa", "--set", no_part).error


def test_typed_numbers_reach_a_part_that_a_setting_brings(luve):
    typed = {"refine.skip_steps": 2, "proxy.num_inference_steps": 3, "kernels.attention": "sdpa", "proxy.flow_shift": 2.0, "proxy.guidance_scale": 1.0}
    made = changed(luve, [REFINE + "}", 'kernels={"kind": "Kernels"}', PROXY + "}"], typed)
    assert (made.refine.skip_steps, made.refine.num_inference_steps) == (2, 8)
    assert (made.proxy.num_inference_steps, made.proxy.flow_shift, made.kernels.attention) == (3, 2.0, "sdpa")
    assert changed(luve, [REFINE + ', "skip_steps": 1}'], typed).refine.skip_steps == 1
    # what the part replaced had been told before
    assert changed(luve, ["refine.skip_steps=1", REFINE + "}"], typed).refine.skip_steps == 2


def test_typed_numbers_are_those_of_few_steps_and_not_of_their_anchor(tiny22):
    own = RECIPES["pixelwizard"](inspect_base(str(tiny22)))
    made = changed(own, [], {f"{stage}.{name}": value for stage in ("proxy", "refine") for name, value in (("num_inference_steps", 8), ("flow_shift", 2.0))})
    assert made.proxy == own.proxy and (made.refine.num_inference_steps, made.refine.flow_shift) == (8, 2.0)
    typed = {"proxy.num_inference_steps": 8, "refine.num_inference_steps": 8}
    plain = changed(own, ['refine.steps={"kind": "PlainSteps"}'], typed)
    assert (plain.proxy.num_inference_steps, plain.refine.num_inference_steps) == (8, 8)
    # where a setting has the few steps' number, the typed one is for what is left; and in other recipes it is every stage's
    assert changed(own, ["refine.num_inference_steps=3"], typed).proxy.num_inference_steps == 8
    few = changed(RECIPES["cascade"](inspect_base(str(tiny22))), ['refine.steps={"kind": "ShortcutSteps"}', "refine.skip_steps=0"], typed)
    assert (few.proxy.num_inference_steps, few.refine.num_inference_steps) == (8, 8)


@pytest.mark.parametrize(
    "settings, said",
    [
        (("refine.attention.windows=3",), "3 windows along a side, its branches were trained beside"),
        (("refine.attention.windows=40", "refine.attention.branches=[]"), "41 windows along"),
    ],
)
def test_windows_that_branches_or_the_grid_do_not_fit_are_refused_before_anything_is_planned(settings, said, tiny22):
    asked = Asked(prompt="a red ball", recipe="ultragen", width=512, height=512, settings=settings)
    with pytest.raises(UserError, match=said):
        make_request(asked, inspect_base(str(tiny22)), note=lambda text: None)


def test_a_part_that_a_setting_brings_can_be_set_further(luve):
    made = changed(luve, ['upsample={"kind": "PixelInterpolation"}', "upsample.tile=64", 'refine.attention={"kind": "Windows"}', "refine.attention.tokens=64"])
    assert made.upsample == PixelInterpolation(tile=64) and made.refine.attention == Windows(tokens=64)
    deep = changed(luve, [REFINE + "}", 'refine.attention={"kind": "Windows"}', "refine.attention.max_frames=3", "refine.skip_steps=1"])
    assert deep.refine.attention.max_frames == 3 and deep.refine.skip_steps == 1
    assert changed(luve, ["refine.skip_steps=1", "refine.skip_steps=3"]).refine.skip_steps == 3


def test_a_setting_of_a_part_it_does_not_fit_names_what_there_is(luve):
    with pytest.raises(UserError, match=r"no 'upsample\.side'; use one of mode, tile"):
        changed(luve, ['upsample={"kind": "PixelInterpolation"}', "upsample.side=64"])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("refine=null", "None is no Refine"),
        ("refine={}", "its kind is None, not Refine"),
        ("refine=" + "[" * 2000, "is no Refine"),
        ('upsample={"kind": ["x"]}', "its kind ['x'] is none of"),
        ("upsample={}", "says no kind"),
        (f"refine.num_inference_steps=1{'0' * 400}", "num_inference_steps"),
        ("refine.flow_shift=1e-17", "a number from 0.01"),
        ("decode.tile=0", "a whole number from 1"),
        ("decode.tile=-64", "a whole number from 1"),
        ("decode.memory_bytes=-1", "decode.memory_bytes"),
        (f"decode.memory_bytes=1{'0' * 400}", "decode.memory_bytes"),
        (f'upsample={{"kind": "PixelInterpolation", "tile": 1{"0" * 400}}}', "use a multiple of"),
        (f'upsample={{"kind": "LearnedUpsampling", "tile": [1{"0" * 400}, 8, 8]}}', "both at most"),
        ("refine=" + "[" * 993 + "]" * 993, "is no Refine"),
        ("encode.pools=0", "use 1 to 256 threads"),
        ('encode.preset=""', "use one of ultrafast"),
        ('refine.attention={"kind": "ProxyWindows", "reach": [1e999, 1, 1]}', "three numbers above 0"),
        (f'refine.attention={{"kind": "ProxyWindows", "pool": [1{"0" * 30}, 1, 1]}}', "three whole numbers from 1"),
        (f'refine.attention={{"kind": "ProxyWindows", "near": [1{"0" * 30}, 1, 1]}}', "three whole numbers from 1"),
    ],
)
def test_values_that_cannot_be_are_told_in_one_line(setting, told, tiny22):
    answer = plan(tiny22, "--recipe", "luve", "--set", setting)
    assert answer.code == 2 and told in answer.error, answer.err


def test_a_number_of_steps_beyond_all_numbers_is_refused(tiny22):
    answer = plan(tiny22, "--num-inference-steps", "1" + "0" * 400)
    assert answer.code == 2 and "use 1 to 1000" in answer.error, answer.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", "ten"), ("num_inference_steps", True), ("guidance_scale", "x"), ("guidance_scale", "5"), ("guidance_scale", np.True_),
        ("flow_shift", 10**400), pytest.param("flow_shift", 10**5000, id="digits without end"), ("width", 192.0), ("height", "96"),
        ("seed", None), ("width", None), pytest.param("num_frames", 10**5000, id="frames without end"),
        ("seed", 1.5), ("seed", True), ("num_frames", "5"), ("num_frames", 5.5), ("fps", "24"), ("duration", "10s"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused_by_its_name(name, value, tiny22):
    with pytest.raises(UserError, match=f"^{name}: .* is no "):
        make_request(Asked(prompt="a red ball", **{name: value}), inspect_base(str(tiny22)), note=print)


@pytest.mark.parametrize(
    ("name", "value"),
    [("negative_prompt", 5), ("prompt", None), ("settings", [5]), ("settings", 5), ("settings", "refine.skip_steps=2"),
     ("duration", 1e308), ("duration", math.nan), ("duration", math.inf), ("duration", -1)],
)  # fmt: skip
def test_what_a_caller_cannot_mean_is_refused_by_its_name(name, value, tiny22):
    with pytest.raises(UserError, match=f"^{name}: "):
        make_request(Asked(**{"prompt": "a red ball", name: value}), inspect_base(str(tiny22)), note=print)


def test_numbers_of_numpy_are_numbers_and_a_record_comes_back(tiny22):
    asked = Asked(prompt="a red ball", width=np.int64(192), height=np.int32(96), fps=np.float32(8), seed=np.int64(3), settings=["refine.skip_steps=1"])
    request = make_request(asked, inspect_base(str(tiny22)), note=print)
    assert restore(request.record()) == request and type(request.grid.width) is int


def test_a_plan_says_how_many_keys_a_query_has_and_what_that_saves():
    answer = muralist("plan", "--size", "4k")
    assert answer.code == 0 and "481 keys a query" in answer.out
    (line,) = [line for line in answer.out.splitlines() if "keys a query" in line]
    assert "times fewer attention FLOPs than over all tokens" in line and "e+" not in line
