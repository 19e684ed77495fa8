"""The result of a comparison as one plain table: what each video gave and cost, means by column, and which is best.

A column ("side") is a recipe, or a file. Means are taken over the scenes in which every side that was measured at all has a value, so that
nobody is better for having failed where it is hard.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from muralist.compare.journal import Costs, StageCost
from muralist.compare.media import Media
from muralist.eval.registry import Better, Metric
from muralist.store.video_read import VideoInfo

TIE = 5e-4  # relative; values that agree in the digits that are shown are equally good


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A row of the summary."""

    label: str
    group: str
    unit: str
    better: Better
    summary: str
    origin: str = ""


COSTS = {
    "seconds": Measure(label="time", group="Speed", unit="s", better="lower", summary="Wall seconds of all stages of a run, without starting Python"),
    "seconds_per_frame": Measure(label="time per frame", group="Speed", unit="s", better="lower", summary="Wall seconds of all stages, divided by frames"),
    "peak_rss": Measure(label="peak memory", group="Memory", unit="B", better="lower", summary="Highest resident memory of the process while a stage ran"),
    "peak_device": Measure(label="peak device memory", group="Memory", unit="B", better="lower", summary="Highest memory allocated on the device"),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """What all sides were asked for; prompt and seed are None where files were given."""

    prompt: str | None = None
    seed: int | None = None


@dataclass(slots=True, kw_only=True)
class Entry:
    """One video of the comparison, or the reason why there is none."""

    side: str
    scene: int
    command: str | None = None
    path: str | None = None
    failure: str | None = None
    info: VideoInfo | None = None
    media: Media | None = None
    borders: dict[str, list[int]] | None = None
    costs: Costs | None = None
    values: dict[str, float] = field(default_factory=dict)

    def add_costs(self) -> None:
        """What the run's own record says, among the values."""
        if self.costs and self.costs.stages and self.info and not self.failure:
            self.values |= {"seconds": self.costs.seconds, "seconds_per_frame": self.costs.seconds / self.info.num_frames}
            self.values |= {name: float(peak) for name in ("peak_rss", "peak_device") if (peak := getattr(self.costs, name))}

    def record(self) -> dict[str, Any]:
        """As JSON values, without the pictures."""
        video = None
        if self.info:
            video = {name: getattr(self.info, name) for name in ("width", "height", "num_frames", "fps", "codec", "bit_depth", "pixel_format")}
        stages = [{name: getattr(stage, name) for name in StageCost.__dataclass_fields__} for stage in (self.costs.stages if self.costs else ())]
        record = {name: getattr(self, name) for name in ("side", "scene", "command", "path", "failure", "borders")}
        values = {name: value for name, value in self.values.items() if math.isfinite(value)}
        spectrum = self.media.spectrum if self.media else None
        attempts = self.costs.attempts if self.costs else 0
        return record | {"video": video, "stages": stages, "attempts": attempts, "values": values, "spectrum": spectrum}


def measures(metrics: Iterable[Metric]) -> dict[str, Measure]:
    """Rows by name: each metric's own value, then costs. Further values of a metric stand with the single videos only."""
    quality = {m.name: Measure(label=m.name, group="Quality", unit=m.unit, better=m.better, summary=m.summary, origin=m.origin) for m in metrics}
    return quality | COSTS


def summarise(entries: Sequence[Entry], sides: Sequence[str], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{side: {name: {"mean", "error" (standard error, None for one scene), "n"}}} over the common scenes of each name."""
    found: dict[str, dict[str, Any]] = {side: {} for side in sides}
    for name in names:
        by_side = {side: {e.scene: e.values[name] for e in entries if e.side == side and math.isfinite(e.values.get(name, math.nan))} for side in sides}
        present = [set(values) for values in by_side.values() if values]
        common = set.intersection(*present) if present else set()
        for side, values in by_side.items():
            if common and values:
                found[side][name] = _mean([values[scene] for scene in sorted(common)])
    return found


def _mean(values: list[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error, "n": len(values)}


def best(entries: Sequence[Entry], summary: dict[str, dict[str, Any]], rows: dict[str, Measure]) -> dict[str, dict[str, Any]]:
    """{name: {"sides", "clear"}}: the best of each row that has a direction and at least two means that differ.

    `clear`: on the same scenes, the lead over every other side is more than two standard errors of the differences; one scene has no error.
    """
    winners = {}
    for name, row in rows.items():
        means = {side: values[name]["mean"] for side, values in summary.items() if name in values}
        if row.better == "neither" or len(means) < 2:
            continue
        top = (max if row.better == "higher" else min)(means.values())
        leaders = [side for side, mean in means.items() if math.isclose(mean, top, rel_tol=TIE, abs_tol=1e-12)]
        if len(leaders) < len(means):
            found = {side: {e.scene: e.values[name] for e in entries if e.side == side and name in e.values} for side in means}
            others = means.keys() - set(leaders)
            winners[name] = {"sides": leaders, "clear": all(_apart(found[leaders[0]], found[other]) for other in others)}
    return winners


def _apart(a: dict[int, float], b: dict[int, float]) -> bool:
    """Whether two sides differ by more than two standard errors over the scenes that they share."""
    differences = [a[scene] - b[scene] for scene in a.keys() & b.keys()]
    if len(differences) < 2:
        return True
    return abs(statistics.fmean(differences)) > 2 * statistics.stdev(differences) / math.sqrt(len(differences))


def mean_stages(entries: Sequence[Entry], sides: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Mean seconds of each stage by side, over the same scenes as the summary's time."""
    made = {side: {e.scene: e for e in entries if e.side == side and "seconds" in e.values} for side in sides}
    present = [set(scenes) for scenes in made.values() if scenes]
    common = set.intersection(*present) if present else set()
    result = {}
    for side, scenes in made.items():
        totals: dict[str, float] = {}
        for stage in (stage for scene in sorted(common & set(scenes)) for stage in scenes[scene].costs.stages):
            totals[stage.stage] = totals.get(stage.stage, 0.0) + stage.seconds
        result[side] = [{"stage": stage, "seconds": total / len(common)} for stage, total in totals.items()]
    return result


def csv_text(entries: Sequence[Entry], scenes: Sequence[Scene]) -> str:
    """One line a video; stages as columns `seconds.STAGE`."""
    rows = list(dict.fromkeys(name for e in entries for name in e.values))
    stages = list(dict.fromkeys(stage.stage for e in entries if e.costs for stage in e.costs.stages))
    header = ["side", "prompt", "seed", "failure", *rows, *(f"seconds.{stage}" for stage in stages), "command", "path"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for e in entries:
        scene, took = scenes[e.scene], {stage.stage: stage.seconds for stage in (e.costs.stages if e.costs else ())}
        numbers = [e.values.get(name, "") for name in rows] + [took.get(stage, "") for stage in stages]
        writer.writerow(
            [_cell(e.side), _cell(scene.prompt), "" if scene.seed is None else scene.seed, _cell(e.failure), *numbers, _cell(e.command), _cell(e.path)]
        )
    return buffer.getvalue()


def _cell(text: str | None) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text and text[0] in "=+-@\t\r" else text or ""
