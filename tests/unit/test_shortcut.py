"""Shortcut training and sampling: distributions, targets, where gradients go, and steps that know their size."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from muralist.errors import UserError
from muralist.nn.step_size import StepSizeEmbedding
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import WindowAttention
from muralist.sampling import flow
from muralist.sampling.shortcut import PlainSteps, ShortcutSteps, step_size
from muralist.train.objectives.flow import Batch, FlowConfig
from muralist.train.objectives.shortcut import ShortcutConfig, ShortcutMatching, chances, draw, sizes, span_weights

CPU = torch.device("cpu")


# --- what is drawn -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ShortcutConfig(), ShortcutConfig(beta=0.0, scales=3, anchors=(600, 900))], ids=["paper", "uniform"])
def test_timesteps_and_sizes_are_drawn_as_the_equations_say(config):
    timestep, size, _ = draw(np.random.default_rng(0), 100_000, config)
    seen = Counter(zip(timestep.tolist(), size.tolist()))
    expected = Counter()
    for t in config.anchors:
        for k in range(config.scales):  # equation 5 (even, so that a step has a middle) and 6, written out
            p = np.exp(-config.beta * k) / sum(np.exp(-config.beta * j) for j in range(config.scales))
            expected[t, max(int(t / 2**k) // 2 * 2, 2)] += 100_000 * p / len(config.anchors)
    assert set(seen) == set(expected)
    assert chisquare([seen[key] for key in expected], list(expected.values())).pvalue > 1e-3


def test_candidates_are_the_papers():
    assert sizes(800, ShortcutConfig()) == [800, 400, 200, 100, 50, 24] and sizes(500, ShortcutConfig()) == [500, 250, 124, 62, 30, 14]
    assert chances(ShortcutConfig())[0] == pytest.approx(0.5107, abs=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0, 0.0])
def test_weights_follow_the_span_and_have_mean_one_at_any_batch_size(power):
    config = ShortcutConfig(power=power)
    _, size, _ = draw(np.random.default_rng(1), 200_000, config)
    weights = span_weights(size, config)
    assert weights.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (span_weights(torch.tensor([800]), config) / span_weights(torch.tensor([200]), config)).item() == pytest.approx(4**power)


@pytest.mark.parametrize("wrong", [dict(rate=1.5), dict(anchors=(10,)), dict(anchors=()), dict(scales=0), dict(anchors=(1200,))])
def test_trainings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        ShortcutConfig(**wrong)


# --- the target --------------------------------------------------------------------------------------------------------------------


class Field(nn.Module):
    """A velocity that depends on everything: v = w (a z + b sigma + c size + d text)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))
        self.calls = []

    def configure(self, graft):
        return self

    def forward(self, z, timestep, text, return_dict, attention_kwargs):
        size = attention_kwargs["step_size"].view(-1, 1, 1, 1, 1) / 1000
        self.calls.append((timestep / 1000, size.flatten() * 1000))
        sigma = timestep.view(-1, 1, 1, 1, 1) / 1000
        return (self.w * (0.3 * z + 2 * sigma - size + text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)),)


def objective(shortcut, prediction="flow"):
    field = Field()
    x = torch.randn(4, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    captions = {"": 0.0, "a": 1.0}

    def embed(texts):
        return torch.tensor([captions[t] for t in texts]).view(-1, 1, 1)

    made = ShortcutMatching(field, field, embed, lambda rng, progress: Batch(x, ["a"] * 4), FlowConfig(prediction=prediction), CPU, shortcut=shortcut)
    return made, field, x


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_target_is_two_steps_of_half_the_size(guidance):
    made, field, x = objective(ShortcutConfig(guidance=guidance))
    timestep, size = torch.tensor([800, 500, 800, 700]), torch.tensor([800, 250, 24, 20])
    smallest = torch.tensor([False, False, True, True])
    sigma = timestep / 1000
    noisy, text = torch.randn(4, 2, 1, 4, 4), made.embed(["a"] * 4)
    got = made._two_halves(Batch(x, ["a"] * 4), noisy, sigma, size, text, smallest)
    w = field.w.item()
    for i in range(4):

        def velocity(z, s, d, words):
            return w * (0.3 * z + 2 * s - d + words)

        def both(z, s, d, guided):
            if not guided:
                return velocity(z, s, d, 1.0)
            return velocity(z, s, 0.0, 0.0) + guidance * (velocity(z, s, 0.0, 1.0) - velocity(z, s, 0.0, 0.0))

        guided = smallest[i].item() and guidance != 1
        s, half = sigma[i].item(), size[i].item() / 2000
        z = noisy[i].double()
        v1 = both(z, s, half, guided)
        z = z - half * v1
        v2 = both(z, s - half, half, guided)
        two_steps = z - half * v2
        one_step = noisy[i].double() - 2 * half * got[i].double()
        assert (one_step - two_steps).abs().max() < 1e-6


@pytest.mark.parametrize("prediction", ["flow", "sample"])
def test_no_gradient_flows_into_the_target(prediction):
    made, field, _x = objective(ShortcutConfig(rate=1.0), prediction)
    loss, metrics = made.loss(0, 0.0)
    assert set(metrics) == {"shortcut"} and len(field.calls) == 3
    loss.backward()
    whole, free = field.w.grad.clone(), []
    # with the target held fixed by hand the gradient is the same
    field.w.grad = None
    frozen = made._two_halves
    made._two_halves = lambda *given: free.append(frozen(*given).detach()) or free[-1]
    made.loss(0, 0.0)[0].backward()
    assert torch.allclose(field.w.grad, whole) and not free[0].requires_grad and whole.abs() > 0


def test_batches_alternate_and_flow_matching_is_a_step_of_size_zero():
    made, field, _x = objective(ShortcutConfig(rate=0.3))
    kinds = []
    for step in range(300):
        field.calls.clear()
        _, metrics = made.loss(step, 0.0)
        kinds.append("shortcut" in metrics)
        if not kinds[-1]:
            assert len(field.calls) == 1 and not field.calls[0][1].any()
    assert 0.2 < np.mean(kinds) < 0.4
    assert torch.equal(made.loss(7, 0.0)[0], made.loss(7, 0.0)[0]), "a step's randomness is its own"


# --- the network and its sampler ---------------------------------------------------------------------------------------------------


def transformer():
    torch.manual_seed(0)
    return MuralTransformer(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=32, num_layers=2
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("graft", [Graft(), Graft(attention=WindowAttention((1, 2, 2)))], ids=["stock", "windows"])
def test_a_fresh_embedding_changes_nothing_and_a_learned_one_does(graft):
    model = transformer().configure(graft)
    model.step_size = StepSizeEmbedding(24)
    z, text = torch.randn(2, 4, 2, 8, 8), torch.randn(2, 5, 8)

    def run(size):
        given = None if size is None else {"step_size": torch.tensor(size)}
        return model(z, torch.full((2,), 500.0), text, return_dict=False, attention_kwargs=given)[0]

    plain = run(None)
    assert torch.equal(run([100.0, 400.0]), plain)
    nn.init.normal_(model.step_size.linear_2.weight)
    assert (run([100.0, 400.0]) - plain).abs().max() > 1e-2
    assert torch.allclose(run([100.0, 400.0])[0], run([100.0, 7.0])[0], atol=1e-6) and not torch.allclose(run([100.0, 400.0])[0], run([7.0, 400.0])[0])
    with pytest.raises(ValueError, match="one timestep a sample"):
        run([100.0])


def test_a_schedule_says_how_far_each_step_goes():
    levels = flow.sigmas(4, 5.5)
    assert list(ShortcutSteps().sizes(levels).values()) == [step_size(a, b) for a, b in itertools.pairwise(levels)] and PlainSteps().sizes(levels) is None
    assert [step_size(*pair) for pair in ((1.0, 0.5), (0.5004, 0.5), (0.3, 0.2), (0.1234, 0.0))] == [500, 2, 100, 124]
    with pytest.raises(UserError, match="40 shortcut steps"):
        ShortcutSteps().sizes(flow.sigmas(40, 5.0))


def test_an_average_velocity_lands_where_many_small_steps_do():
    """dz/dsigma = z has the average velocity z (1 - e^-d) / d over a step of size d downwards: four steps are then exact."""
    levels = flow.sigmas(4, 3.0)
    sizes = {a: a - b for a, b in itertools.pairwise(levels)}
    z = torch.ones(1, dtype=torch.float64)
    end = flow.denoise(lambda z, sigma: z * (1 - np.exp(-sizes[sigma])) / sizes[sigma], z, levels, after_step=lambda *_: None)
    assert end.item() == pytest.approx(np.exp(-1), rel=1e-12)
