"""The training of the feature network: what its batches say is true, and it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from muralist.data import degrade
from muralist.data.world import COLOURS, GROUNDS
from muralist.eval.features.mural import WIDTH, Mural
from muralist.store.tensors import load_tensors
from muralist.train import features
from muralist.train.loop import Length, Schedule, fit
from muralist.train.objectives.factors import UNKNOWN, FactorsConfig, Reader, TellApart, batch, judge, world_crop

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", degrade.RANGES)
def test_grades_and_strengths_are_inverse(kind):
    low, high = degrade.RANGES[kind]
    assert [degrade.grade(kind, s) for s in (low, high)] == pytest.approx([0, 1])
    assert degrade.grade(kind, degrade.of_grade(kind, 0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("kind", degrade.RANGES)
def test_damage_grows_with_its_strength(kind):
    x = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    damaged = [degrade.degrade(x, kind, degrade.of_grade(kind, u), torch.Generator().manual_seed(1)) for u in (0.0, 0.5, 1.0)]
    errors = [(d - x).square().mean().item() for d in damaged]
    assert errors == sorted(errors) and errors[0] > 0
    assert all(d.shape == x.shape and d.min() >= 0 and d.max() <= 1 for d in damaged)


def test_a_blur_is_a_gaussian():
    x = torch.zeros(1, 3, 33, 33)
    x[..., 16, 16] = 1
    spread = degrade.blur(x, 2.0)[0, 0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    assert spread[16, 18].item() / spread[16, 16].item() == pytest.approx(np.exp(-0.5), rel=1e-4)


def test_what_is_said_of_a_crop_is_to_be_seen():
    rng = np.random.default_rng(0)
    colours, grounds = torch.tensor(list(COLOURS.values())), list(GROUNDS.values())
    for _ in range(60):
        image, factors = world_crop(rng, 64)
        if factors.ground == UNKNOWN:
            continue
        pixels = image.flatten(1).T
        dark, light = (torch.tensor(c) for c in grounds[factors.ground])
        along = ((pixels - dark) @ (light - dark) / (light - dark).square().sum()).clamp(0, 1)
        ground = ((pixels - dark - along[:, None] * (light - dark)).abs().amax(dim=1) < 0.02).float().mean()
        if factors.colour == len(COLOURS):
            assert ground > 0.99
        elif factors.colour != UNKNOWN:
            assert ground < 0.97
            shares = pixels / pixels.amax(dim=1, keepdim=True).clamp(min=1e-6)
            wanted = colours[factors.colour] / colours[factors.colour].max()
            assert ((shares - wanted).abs().amax(dim=1) < 0.03).any()


def test_batches_are_keyed_by_the_step():
    config = FactorsConfig(side=32, crops=2, views=2)
    a, b, c = batch(config, 3), batch(config, 3), batch(config, 4)
    assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not torch.equal(a[0], c[0])
    assert a[0].shape == (4, 3, 32, 32) and a[2].shape == (4, 4)


def test_it_learns(tmp_path):
    torch.manual_seed(0)
    objective = TellApart(Reader(Mural(), WIDTH), FactorsConfig(side=32, crops=2, views=2), CPU)
    before = [objective.loss(step, 0)[0].item() for step in range(3)]
    fit(objective, Schedule(length=Length(steps=25), learning_rate=1e-3, warmup=5, ema=0.9), tmp_path, resume=False, report=lambda line: None)
    assert sum(objective.loss(step, 0)[0].item() for step in range(3)) < 0.9 * sum(before)
    assert set(judge(objective.module, FactorsConfig(side=32, crops=2, held_out=True), CPU, batches=1)) == {"colour", "shape", "ground", "scale", "grade_error"}


def test_the_command_writes_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "FactorsConfig", lambda **changes: FactorsConfig(side=32, crops=1, views=1, **changes))
    path = features.train_features(tmp_path, length=Length(steps=1), device=CPU, resume=False, report=lambda line: None)
    Mural().load_state_dict(load_tensors(path))
