"""Guidance on an interval of noise levels: what it computes, what it leaves out, and what the plan says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from muralist.errors import UserError
from muralist.plan import plan
from muralist.recipes.baselines import cascade, direct
from muralist.sampling import flow
from muralist.stages.proxy import LowResolutionProxy
from muralist.stages.refine import Refine
from muralist.types import Grid
from tests.unit.test_plan import ROOMY, base, request, stage

Z = torch.linspace(-1, 1, 8)


def fields(scale: float, interval: tuple[float, float]):
    """(the guided field, noise levels at which the unconditional one was asked)"""
    asked = []

    def unconditional(z, sigma):
        asked.append(sigma)
        return 0.25 * z

    return flow.guided(lambda z, sigma: 2 * z, unconditional, scale, interval), asked


def test_the_whole_range_is_plain_guidance():
    plain, _ = fields(5.0, flow.WHOLE)
    assert all(torch.equal(plain(Z, sigma), torch.lerp(0.25 * Z, 2 * Z, 5.0)) for sigma in flow.sigmas(10, 5.0))


def test_outside_its_interval_the_unconditional_pass_is_not_computed():
    velocity, asked = fields(5.0, (0.4, 0.9))
    found = {sigma: velocity(Z, sigma) for sigma in (1.0, 0.9, 0.6, 0.4, 0.39)}
    assert asked == [0.9, 0.6, 0.4]
    assert all(torch.equal(found[sigma], 2 * Z) for sigma in (1.0, 0.39))


def test_a_scale_of_one_has_no_second_pass():
    velocity, asked = fields(1.0, flow.WHOLE)
    assert torch.equal(velocity(Z, 0.5), 2 * Z) and asked == []


def test_outside_its_interval_the_mean_of_a_channel_is_not_guided():
    torch.manual_seed(0)
    z, positive, negative = torch.randn(3, 2, 4, 3, 5, 6).unbind()
    plain, guided = (flow.guided(lambda z, s: positive, lambda z, s: negative, 4.0, flow.WHOLE, means) for means in (flow.WHOLE, (0.0, 0.9)))
    high, low = guided(z, 0.95), guided(z, 0.9)
    assert torch.equal(low, plain(z, 0.9)) and not torch.allclose(high, low, atol=1e-3)
    assert (high.mean(dim=(2, 3, 4)) - positive.mean(dim=(2, 3, 4))).abs().max() < 1e-6
    deviations = [v - v.mean(dim=(2, 3, 4), keepdim=True) for v in (high, plain(z, 0.95))]
    assert (deviations[0] - deviations[1]).abs().max() < 1e-5


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.01), (float("nan"), 1.0)])
def test_bad_intervals_are_refused(interval):
    numbers = {"num_inference_steps": 4, "guidance_scale": 2.0, "flow_shift": 5.0, "guidance_interval": interval}
    with pytest.raises(UserError, match="guidance_interval"):
        Refine(**numbers)
    with pytest.raises(UserError, match="guidance_interval"):
        LowResolutionProxy(height=64, width=64, **numbers)


def test_the_plan_counts_the_steps_that_are_guided():
    grid = Grid(num_frames=5, height=80, width=112)
    whole, part, none = (stage(plan(request(grid, guidance_interval=interval), base(), ROOMY), "refine") for interval in (flow.WHOLE, (0.8, 0.95), (0.0, 0.01)))
    assert flow.sigmas(4, 5.0)[:-1] == pytest.approx([1, 0.9375, 0.8333, 0.625], abs=1e-4)
    assert (whole.flops * 6 == part.flops * 8, none.flops * 2 == whole.flops) == (True, True)
    assert (whole.work, part.work, none.work) == ("4 steps x 2 passes", "4 steps, 2 of them x 2 passes", "4 steps")


@pytest.mark.parametrize("recipe", [direct, cascade])
def test_recipes_guide_where_the_base_says(recipe):
    narrow = replace(base(), defaults=replace(base().defaults, guidance_interval=(0.1, 0.9)))
    config = recipe(narrow)
    assert {part.guidance_interval for part in (config.proxy, config.refine) if part} == {(0.1, 0.9)}
