"""Ablations: variants of one configuration, trained with the same budget and seed, judged on the same held-out scenes, beside a paper's numbers.

    study = Study(name="experts", base=Config(...), variants=(Variant("both"), Variant("no low", {"experts.low": None}, paper={"musiq": 61.2})),
                  measures=(Measured("effective_resolution", "higher", paper="musiq"),), train=train, evaluate=evaluate, budget=Budget(minutes=10))
    result = run(study, Path("runs/ablation"))

Numbers of a small base are not a paper's. What can be compared is the order of the variants: which of two is better, and whether the
difference is more than the scenes' noise. Each variant is trained and judged once, in a directory of its own; a start after a kill goes on
with the first one that is missing, and a variant that fails is told and tried again by the next start.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats

from muralist.data.world import Scene, sample_scene
from muralist.errors import UserError
from muralist.eval.registry import Better
from muralist.store import atomic
from muralist.train.loop import Length

Verdict = Literal["agrees", "disagrees", "undecided"]
CHANCE = 0.05  # below which a pair is decided
Values = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(Length):
    """What every variant may spend: the length of its training, from one seed."""

    seed: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    """A change to the base configuration: values by field, dotted for fields of parts (`refine.attention`); none is the base itself.

    `paper`: what the paper reports for it, by the paper's metric.
    """

    name: str
    override: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """A value that `evaluate` gives, its direction, and the paper's metric that it stands for (of the same name if none is given)."""

    name: str
    better: Literal["higher", "lower"]
    paper: str | None = None
    paper_better: Better | None = None

    @property
    def theirs(self) -> tuple[str, str]:
        """(name, direction) of the paper's metric."""
        return self.paper or self.name, self.paper_better or self.better


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """An ablation.

    Args:
        base: the configuration that variants change, a dataclass.
        train: (configuration, budget, directory) -> whatever `evaluate` wants. What it leaves in the directory is there again after a kill.
        evaluate: (what was trained, scenes) -> values by name: one number for all scenes, or a list with one for each, which gives an error.
        scenes: what is judged; by default `held_out(8)`.
        facts: what else the results stand on, by name (a base, a size): results of other facts are refused.
    """

    name: str
    base: Any
    variants: Sequence[Variant]
    measures: Sequence[Measured]
    train: Callable[[Any, Budget, Path], Any]
    evaluate: Callable[[Any, Sequence[Scene]], Values]
    budget: Budget
    scenes: Sequence[Scene] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names) or not all(name and name.isprintable() and "/" not in name and not name.startswith(".") for name in names):
            raise UserError(f"variants {', '.join(names)}", where="variants", fix="give each a plain name of its own")
        for variant in self.variants:
            changed(self.base, variant.override)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Values of a variant by name (a list: one for each scene), seconds of its training, or why there are none."""

    variant: Variant
    values: Values = field(default_factory=dict)
    seconds: float = 0.0
    failure: str | None = None

    def mean(self, name: str) -> float | None:
        value = self.values.get(name)
        return value if value is None or isinstance(value, int | float) else statistics.fmean(value)

    def error(self, name: str) -> float | None:
        """The standard error over scenes."""
        value = self.values.get(name)
        several = isinstance(value, Sequence) and len(value) > 1
        return statistics.stdev(value) / math.sqrt(len(value)) if several else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two variants of which the paper says that `better` beats `worse` by one measure, and what we find."""

    measure: str
    better: str
    worse: str
    verdict: Verdict


def held_out(count: int = 8, seed: int = 0) -> tuple[Scene, ...]:
    """Scenes of the world that no training has seen, always the same for a seed."""
    rng = np.random.default_rng(seed)
    return tuple(sample_scene(rng, held_out=True) for _ in range(count))


def changed(config: Any, override: Mapping[str, Any]) -> Any:
    """The configuration with other values in the named fields; UserError on a field that it does not have."""
    for path, value in override.items():
        name, _, rest = path.partition(".")
        if not dataclasses.is_dataclass(config) or name not in {f.name for f in dataclasses.fields(config)}:
            raise UserError(f"{type(config).__name__} has no field {name!r}", where=f"override {path}", fix="name a field of the configuration")
        config = dataclasses.replace(config, **{name: changed(getattr(config, name), {rest: value}) if rest else value})
    return config


# --- training and judging ---------------------------------------------------------------------------------------------------------


def run(study: Study, folder: Path, report: Callable[[str], object] = print) -> list[Outcome]:
    """Train and judge every variant that has no result yet, then write the tables and the plot into `folder`.

    Raises:
        UserError: `folder` holds results of the same variant under another configuration, budget, set of scenes, or of other facts.
    """
    scenes, outcomes = study.scenes or held_out(), []
    for number, variant in enumerate(study.variants):
        outcome = _one(study, variant, scenes, folder / variant.name)
        outcomes.append(outcome)
        means = (f"{m.name} {outcome.mean(m.name):.4g}" for m in study.measures if outcome.mean(m.name) is not None)
        report(f"[{number + 1}/{len(study.variants)}] {variant.name}: {outcome.failure or ', '.join(means)}")
    write(study, outcomes, folder)
    return outcomes


def _one(study: Study, variant: Variant, scenes: Sequence[Scene], folder: Path) -> Outcome:
    with atomic.reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
    config = changed(study.base, variant.override)
    asked = {"config": repr(config), "budget": dataclasses.asdict(study.budget), "scenes": [dataclasses.asdict(scene) for scene in scenes], **study.facts}
    if (folder / "asked.json").is_file() and (differs := _differing(atomic.read_json(folder / "asked.json"), asked)):
        raise UserError(f"{variant.name} was started with another {differs[0]}", where=str(folder), fix="choose another directory, or remove this one")
    atomic.write_json(folder / "asked.json", asked)
    if (folder / "values.json").is_file():
        kept = atomic.read_json(folder / "values.json")
        return Outcome(variant=variant, values=kept["values"], seconds=kept["seconds"])
    started = time.monotonic()
    try:
        torch.manual_seed(study.budget.seed)
        trained = study.train(config, study.budget, folder)
        seconds = time.monotonic() - started
        values = {name: _numbers(name, value) for name, value in study.evaluate(trained, scenes).items()}
    # The boundary to other people's code: whatever it raises costs this variant only.
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Outcome(variant=variant, failure=str(error) if isinstance(error, UserError) else line)
    atomic.write_json(folder / "values.json", {"values": values, "seconds": seconds})
    return Outcome(variant=variant, values=values, seconds=seconds)


def _differing(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same in both, or is in one alone."""
    return [name for name in (*stored, *(asked.keys() - stored.keys())) if stored.get(name) != asked.get(name)]


def _numbers(name: str, value: float | Sequence[float]) -> float | list[float]:
    numbers = [float(number) for number in (value if isinstance(value, Sequence) else [value])]
    if not all(map(math.isfinite, numbers)):
        raise FloatingPointError(f"{name} is not finite")
    return numbers if isinstance(value, Sequence) else numbers[0]


# --- the order of the variants ----------------------------------------------------------------------------------------------------


def pairs(study: Study, outcomes: Sequence[Outcome]) -> list[Pair]:
    """Every two variants that the paper tells apart and we have both measured.

    Where there are values by scene, a pair is decided if fewer than one in twenty ways to give the paired differences signs takes their mean as far from
    zero (so never by fewer than six scenes). That is of the scenes alone: each variant is trained once, and many pairs decide some by chance.
    """
    found = []
    for measure in study.measures:
        name, direction = measure.theirs
        sign = 1 if direction == "higher" else -1
        told = [o for o in outcomes if name in o.variant.paper and measure.name in o.values]
        for a, b in itertools.combinations(told, 2):
            lead = sign * (a.variant.paper[name] - b.variant.paper[name])
            if lead:
                better, worse = (a, b) if lead > 0 else (b, a)
                verdict = _verdict(better.values[measure.name], worse.values[measure.name], measure.better)
                found.append(Pair(measure=measure.name, better=better.variant.name, worse=worse.variant.name, verdict=verdict))
    return found


def _verdict(better: float | Sequence[float], worse: float | Sequence[float], direction: str) -> Verdict:
    each = [(better, worse)] if isinstance(better, int | float) else list(zip(better, worse))
    leads = np.array([(b - w) * (1 if direction == "higher" else -1) for b, w in each])
    if not leads.any() or (len(leads) > 1 and _chance(leads) >= CHANCE):
        return "undecided"
    return "agrees" if leads.mean() > 0 else "disagrees"


def _chance(leads: np.ndarray) -> float:
    """Of differences that are as likely to have the other sign, how often their mean lies as far from zero; exact for up to 13."""
    found = stats.permutation_test((leads,), np.mean, permutation_type="samples", n_resamples=9999, rng=0)
    return float(found.pvalue)


def correlation(study: Study, outcomes: Sequence[Outcome], measure: Measured) -> dict[str, float | int | None]:
    """Kendall's tau and Spearman's rho between the paper's order of the variants and ours (1: the same), over `n` of them.

    None where there are fewer than two variants, or one side finds no difference at all.
    """
    name, direction = measure.theirs
    both = [(o.variant.paper[name], o.mean(measure.name)) for o in outcomes if name in o.variant.paper and measure.name in o.values]
    theirs, ours = ([pair[i] for pair in both] for i in (0, 1))
    if len(set(theirs)) < 2 or len(set(ours)) < 2:
        return {"n": len(both), "kendall": None, "spearman": None}
    sign = 1 if direction == measure.better else -1
    tau, rho = stats.kendalltau(theirs, ours).statistic, stats.spearmanr(theirs, ours).statistic
    return {"n": len(both), "kendall": sign * float(tau), "spearman": sign * float(rho)}


# --- tables and plot --------------------------------------------------------------------------------------------------------------


def write(study: Study, outcomes: Sequence[Outcome], folder: Path) -> dict[str, Any]:
    """`ablation.json`, `ablation.csv` and `ablation.png` in `folder`; returns the content of the first."""
    result = {
        "name": study.name,
        "budget": dataclasses.asdict(study.budget),
        "variants": [_record(study, outcome) for outcome in outcomes],
        "order": {measure.name: correlation(study, outcomes, measure) for measure in study.measures},
        "pairs": [dataclasses.asdict(pair) for pair in pairs(study, outcomes)],
        "versions": atomic.versions(),
    }
    atomic.write_json(folder / "ablation.json", result)
    atomic.write_file(folder / "ablation.csv", _csv(study, outcomes).encode())
    if any(outcome.values for outcome in outcomes):
        atomic.write_file(folder / "ablation.png", _plot(study, outcomes))
    return result


def _record(study: Study, outcome: Outcome) -> dict[str, Any]:
    ours = {m.name: {"mean": outcome.mean(m.name), "error": outcome.error(m.name)} for m in study.measures if m.name in outcome.values}
    changes = {name: repr(value) for name, value in outcome.variant.override.items()}
    others = {"failure": outcome.failure, "seconds": outcome.seconds, "values": dict(outcome.values)}
    return {"name": outcome.variant.name, "override": changes, "ours": ours, "paper": dict(outcome.variant.paper), **others}


def _csv(study: Study, outcomes: Sequence[Outcome]) -> str:
    """A line a variant: ours, its standard error and the paper's value for each measure."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = [(m.name, f"{m.name} error", f"paper {m.theirs[0]}") for m in study.measures]
    writer.writerow(["variant", *itertools.chain(*columns), "seconds", "failure"])
    for o in outcomes:
        numbers = ((o.mean(m.name), o.error(m.name), o.variant.paper.get(m.theirs[0])) for m in study.measures)
        writer.writerow([o.variant.name, *("" if n is None else n for n in itertools.chain(*numbers)), round(o.seconds, 1), o.failure or ""])
    return buffer.getvalue()


def _plot(study: Study, outcomes: Sequence[Outcome]) -> bytes:
    """A row a measure: ours on the left, the paper's on the right, variants in the same order; the better end is named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [outcome.variant.name for outcome in outcomes]
    size = (9, 0.9 + len(study.measures) * (0.9 + 0.28 * len(names)))
    figure, grid = pyplot.subplots(len(study.measures), 2, figsize=size, squeeze=False, layout="constrained")
    for axes, measure in zip(grid, study.measures):
        theirs, direction = measure.theirs
        ours = [(outcome.mean(measure.name), outcome.error(measure.name)) for outcome in outcomes]
        _bars(axes[0], names, ours, f"ours: {measure.name} ({measure.better} is better)")
        _bars(axes[1], names, [(outcome.variant.paper.get(theirs), None) for outcome in outcomes], f"paper: {theirs} ({direction} is better)")
    figure.suptitle(study.name, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


def _bars(axes: Any, names: Sequence[str], values: Sequence[tuple[float | None, float | None]], title: str) -> None:
    if all(value is None for value, _ in values):
        axes.set_axis_off()
        return
    for place, (value, error) in enumerate(values):
        if value is not None:
            axes.barh(place, value, xerr=error, color=f"C{place}", height=0.7)
            axes.annotate(f" {value:.4g}", (value, place), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title, fontsize=9, loc="left")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
