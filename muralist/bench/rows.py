"""The figures of the field as formulas over measurements: each is a ratio of two things that were run in turn in one process.

Names, the papers' claims and our goals are those of the project's performance notes; goals hold for an H200 and real sizes. A step with
guidance is two forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from muralist.bench.lab import Kind, Lab

STEPS, FEW = 50, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. `value` and `goal` are in `unit`: `x` is how many times faster or smaller; `less`: the goal is an upper bound."""

    what: str
    value: float
    unit: str = "x"
    goal: float | None = None
    paper: float | None = None
    less: bool = False
    seconds: float | None = None
    baseline_seconds: float | None = None

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.less else self.value >= self.goal


def ratio(what: str, ours: float, theirs: float, goal: float | None = None, paper: float | None = None) -> Figure:
    return Figure(what=what, value=theirs / ours, goal=goal, paper=paper, seconds=ours, baseline_seconds=theirs)


def h1(lab: Lab) -> Iterator[Figure]:
    """Attention of one layer: full against windows with 64 tokens of a proxy, same kernel"""
    for grid, goal, paper in (("4K x81", 450.0, None), ("4K x161", 900.0, 1208.2)):
        yield ratio(f"1.3B {grid}", lab.attention("1.3B", grid, "windows"), lab.attention("1.3B", grid, "full"), goal, paper)


def h2(lab: Lab) -> Iterator[Figure]:
    """Proxy and guided windows against full attention, the same 50 steps with guidance, decoding included"""
    decoding = lab.decode("1.3B", "4K x81", "ours").seconds
    ours = 2 * STEPS * (_forward(lab, "1.3B", "4K x81", "guided") + _forward(lab, "1.3B", "480p x81", "windows")) + decoding
    yield ratio("1.3B 4K x81", ours, 2 * STEPS * _forward(lab, "1.3B", "4K x81", "full") + decoding, 65.0, 60.9)


def h3(lab: Lab) -> Iterator[Figure]:
    """Four steps in windows without guidance against 50 steps of full attention with it, decoding included"""
    decoding = lab.decode("1.3B", "4K x81", "ours").seconds
    ours, theirs = FEW * _forward(lab, "1.3B", "4K x81", "windows") + decoding, 2 * STEPS * _forward(lab, "1.3B", "4K x81", "full") + decoding
    yield ratio("1.3B 4K x81", ours, theirs, 400.0, 60.9)


def h4(lab: Lab) -> Iterator[Figure]:
    """A forward with compressed branches against one with full attention"""
    for grid, goals, paper in (("1080p x81", (6.0, 2.6), 2.69), ("4K x81", (10.0, 6.0), 4.78)):
        full = _forward(lab, "1.3B", grid, "full")
        for kind, goal in zip(("branched", "branched dense"), goals):
            yield ratio(f"1.3B {grid}, {kind}", _forward(lab, "1.3B", grid, kind), full, goal, paper)


def h5(lab: Lab) -> Iterator[Figure]:
    """Four steps without guidance against 50 steps of full attention with it, transformer alone"""
    for grid, goal, paper in (("2K x121", 120.0, 11.2), ("4K x121", 250.0, 12.1)):
        full = _forward(lab, "5B", grid, "full")
        yield ratio(f"5B {grid}, full attention", FEW * full, 2 * STEPS * full, 24.0, paper)
        yield ratio(f"5B {grid}, windows", FEW * _forward(lab, "5B", grid, "windows"), 2 * STEPS * full, goal, paper)


def h6(lab: Lab) -> Iterator[Figure]:
    """50 steps at 720p and 45 of 50 at 4K in windows against 50 steps of full attention at 4K"""
    small, large = _forward(lab, "1.3B", "720p x49", "full"), _forward(lab, "1.3B", "4K x49", "windows")
    yield ratio("1.3B 4K x49", 2 * (50 * small + 45 * large), 2 * STEPS * _forward(lab, "1.3B", "4K x49", "full"), 17.0, 1.08)


def h7(lab: Lab) -> Iterator[Figure]:
    """The rate of a forward in windows as a share of a large matrix product's; the same forward with linear layers in 8 bits"""
    forward = _forward(lab, "1.3B", "4K x81", "windows")
    yield Figure(what="1.3B 4K x81", value=lab.flops("1.3B", "4K x81") / forward / lab.ceilings().matmul_flops, unit="of matmul", goal=0.7, seconds=forward)
    yield Figure(what="1.3B 4K x81, one forward", value=forward, unit="s", goal=3.4, less=True)
    yield from _in_8_bits(lab, "1.3B", "4K x81")


def _in_8_bits(lab: Lab, name: str, grid: str) -> Iterator[Figure]:
    """A forward against the same with plain linear layers, as PyTorch runs both and, on a GPU, with compiled blocks."""
    for way, found in lab.linears(name, grid).items():
        what = f"{name} {grid}, linear layers in 8 bits" + (", compiled" if way == "blocks" else "")
        yield ratio(what, found.fp8.seconds, found.plain.seconds)
        yield Figure(what=f"{what}, one forward", value=found.fp8.seconds, unit="s", goal=2.3, less=True)
        for kind, cost in (("8 bits", found.fp8), ("plain", found.plain)):
            yield Figure(what=f"{what}, weights and peak, {kind}", value=cost.peak_bytes / 1e9, unit="GB")
        yield Figure(what=f"{what}, error of the output", value=found.error, unit="of its root mean square")


def h8(lab: Lab) -> Iterator[Figure]:
    """Decoding: our exact tiles against diffusers' blended ones"""
    for name, goal in (("1.3B", 20.0), ("5B", 22.0)):
        ours, theirs = (lab.decode(name, "4K x17", how).seconds for how in ("ours", "diffusers"))
        yield ratio(f"VAE of {name}, 4K x17", ours, theirs, 3.0)
        whole = lab.decode(name, "4K x81", "ours")
        yield Figure(what=f"VAE of {name}, 4K x81", value=whole.seconds, unit="s", goal=goal, less=True)
        yield Figure(what=f"VAE of {name}, 4K x81, peak", value=whole.peak_bytes / 1e9, unit="GB", goal=12.0, less=True)


def h9(lab: Lab) -> Iterator[Figure]:
    """Peak memory of a whole run"""
    for name, goal, paper in (("1.3B", 13.0, 44.5), ("5B", 17.0, 101.8)):
        yield Figure(what=f"{name} 4K x81", value=lab.pipeline(name, "4K x81").peak_bytes / 1e9, unit="GB", goal=goal, paper=paper, less=True)


def h10(lab: Lab) -> Iterator[Figure]:
    """Wall time of a whole run over transformer and decoder alone"""
    for name in ("1.3B", "5B"):
        run, alone = lab.pipeline(name, "4K x81"), FEW * _forward(lab, name, "4K x81", "windows") + lab.decode(name, "4K x81", "ours").seconds
        yield Figure(what=f"{name} 4K x81", value=run.wall / alone, unit="of both", goal=1.10, less=True, seconds=run.wall, baseline_seconds=alone)


def h11(lab: Lab) -> Iterator[Figure]:
    """Wall time from embedded prompt to finished file, four steps, exact decoder"""
    for name in ("1.3B", "5B"):
        yield Figure(what=f"{name} 4K x81", value=lab.pipeline(name, "4K x81").wall, unit="s", goal=40.0, less=True)


def _forward(lab: Lab, name: str, grid: str, kind: Kind) -> float:
    return lab.forward(name, grid, kind).seconds


# Small measurements first; a model is kept until another is asked for, so rows of one stand together.
ROWS: dict[str, Callable[[Lab], Iterator[Figure]]] = {
    "H7": h7, "H1": h1, "H6": h6, "H4": h4, "H8": h8, "H3": h3, "H2": h2, "H9": h9, "H11": h11, "H10": h10, "H5": h5
}  # fmt: skip
