"""Ablations: a toy training whose order is known, its resumption, and a variant that fails."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image

from muralist.compare import ablation
from muralist.compare.ablation import Budget, Measured, Outcome, Study, Variant
from muralist.data.world import is_held_out
from muralist.errors import UserError


@dataclass(frozen=True)
class Basis:
    """How many sines the toy may use, and how it is fitted."""

    sines: int = 6


@dataclass(frozen=True)
class Toy:
    basis: Basis = field(default_factory=Basis)
    rate: float = 0.05


def train(config, budget, folder):
    """Fit a step function of x in [0, 1] with sines; more of them can only fit better."""
    x = torch.linspace(0, 1, 200)
    features = torch.stack([torch.sin((k + 1) * torch.pi * x) for k in range(config.basis.sines)], dim=1)
    weights = torch.zeros(config.basis.sines, requires_grad=True)
    start = torch.rand(1).item()  # the same for every variant: the seed is set before each
    for _ in range(budget.steps):
        loss = ((features @ weights - (x > 0.4).float()) ** 2).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss is not finite\nat step 3")
        (gradient,) = torch.autograd.grad(loss, weights)
        weights = (weights - config.rate * 20 * gradient).detach().requires_grad_()
    with open(folder.parent / "trained.txt", "a") as log:
        log.write(folder.name + "\n")
    return loss.item(), start


def evaluate(trained, scenes):
    assert len(scenes) == 8 and all(is_held_out(scene) for scene in scenes)
    loss, start = trained
    return {"error": [loss + 1e-3 * (i % 2) for i in range(len(scenes))], "start": start}


PAPER = {"two": 20.0, "four": 24.0, "six": 23.0}  # decibels of some paper, which finds four better than six


def study(*more, budget=None):
    variants = [Variant(name, {"basis.sines": n}, {"psnr": PAPER[name]}) for name, n in (("two", 2), ("four", 4), ("six", 6))]
    measures = (Measured("error", "lower", paper="psnr", paper_better="higher"), Measured("start", "higher"))
    return Study(name="toy", base=Toy(), variants=(*variants, *more), measures=measures, train=train, evaluate=evaluate, budget=budget or Budget(steps=150))


def test_the_order_is_compared_with_the_papers(tmp_path):
    outcomes = ablation.run(study(), tmp_path, lambda line: None)
    errors = [outcome.mean("error") for outcome in outcomes]
    assert errors[0] > errors[1] > errors[2] and len({outcome.values["start"] for outcome in outcomes}) == 1
    result = json.loads((tmp_path / "ablation.json").read_text())
    verdicts = {(pair["better"], pair["worse"]): pair["verdict"] for pair in result["pairs"]}
    assert verdicts == {("four", "two"): "agrees", ("six", "two"): "agrees", ("four", "six"): "disagrees"}
    assert result["order"]["error"]["n"] == 3 and result["order"]["error"]["spearman"] == pytest.approx(0.5)
    assert result["order"]["error"]["kendall"] == pytest.approx(1 / 3)
    assert result["order"]["start"] == {"n": 0, "kendall": None, "spearman": None}


def test_tables_and_plot(tmp_path):
    ablation.run(study(), tmp_path, lambda line: None)
    with open(tmp_path / "ablation.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["variant"] for row in rows] == ["two", "four", "six"] and rows[1]["paper psnr"] == "24.0" and float(rows[0]["error error"]) > 0
    with Image.open(tmp_path / "ablation.png") as image:
        assert image.width > 500


def test_a_second_start_trains_only_what_is_missing(tmp_path):
    class Killed(BaseException):
        pass

    def stop(line):
        if line.startswith("[2/3]"):
            raise Killed

    with pytest.raises(Killed):
        ablation.run(study(), tmp_path, stop)
    lines: list[str] = []
    ablation.run(study(), tmp_path, lines.append)
    ablation.run(study(), tmp_path, lines.append)
    assert (tmp_path / "trained.txt").read_text().split() == ["two", "four", "six"] and lines[:3] == lines[3:]


def test_a_failing_variant_costs_only_itself_and_is_tried_again(tmp_path):
    wild = Variant("wild", {"rate": 1e9})
    lines: list[str] = []
    for _ in range(2):
        outcomes = ablation.run(study(wild), tmp_path, lines.append)
    assert [outcome.failure for outcome in outcomes] == [None] * 3 + ["FloatingPointError: the loss is not finite at step 3"]
    assert "not finite" in lines[3] and (tmp_path / "trained.txt").read_text().split() == ["two", "four", "six"]
    assert json.loads((tmp_path / "ablation.json").read_text())["variants"][3]["failure"]


def test_results_of_another_budget_are_not_taken_for_these(tmp_path):
    ablation.run(study(), tmp_path, lambda line: None)
    with pytest.raises(UserError, match="another budget"):
        ablation.run(study(budget=Budget(steps=151)), tmp_path)
    with pytest.raises(UserError, match="another --size"):
        for size in ("64x64", "96x64"):
            ablation.run(dataclasses.replace(study(), facts={"--size": size}), tmp_path / "sized", lambda line: None)


@pytest.mark.parametrize("override", [{"sines": 3}, {"basis.cosines": 3}, {"rate.x": 1}, {"": 1}])
def test_a_field_that_is_not_there_is_refused_before_any_training(override):
    with pytest.raises(UserError, match="has no field"):
        study(Variant("other", override))


@pytest.mark.parametrize("name", ["two", "", "a/b", "..", "a\nb"])
def test_variants_have_plain_names_of_their_own(name):
    with pytest.raises(UserError, match="plain name"):
        study(Variant(name))


def test_a_budget_is_one_of_two():
    for wrong in ({}, {"minutes": 1, "steps": 1}):
        with pytest.raises(UserError, match="exactly one"):
            Budget(**wrong)


SIX = [2.0, 3.0, 1.0, 5.0, 4.0, 2.5]
PAIRS = [
    (SIX, [v - 1 for v in SIX], "agrees"),
    (SIX, [v + i / 9 for i, v in enumerate(SIX, 1)], "disagrees"),
    (SIX, [*(v - 1 for v in SIX[:5]), 3.0], "undecided"),
    ([1.0] * 3 + SIX, [0.0] * 3 + SIX, "undecided"),  # three scenes of nine tell them apart, all in one direction
    (SIX[:5], [v - 1 for v in SIX[:5]], "undecided"),
    (2.0, 1.0, "agrees"),
]


@pytest.mark.parametrize(("a", "b", "verdict"), [*PAIRS, (1.0, 1.0, "undecided")])
def test_a_pair_within_the_noise_is_undecided(a, b, verdict):
    variants = [Variant("a", paper={"q": 2.0}), Variant("b", paper={"q": 1.0})]
    one = Study(name="x", base=Toy(), variants=variants, measures=[Measured("q", "higher")], train=train, evaluate=evaluate, budget=Budget(steps=1))
    (pair,) = ablation.pairs(one, [Outcome(variant=variant, values={"q": value}) for variant, value in zip(variants, (a, b))])
    assert (pair.better, pair.worse, pair.verdict) == ("a", "b", verdict)
