"""What a run will cost, before anything is loaded: tokens, FLOPs, memory, disk and time of every stage, and what cannot fit.

`plan` reads the request, the base's configurations and the machine; it loads no weights and takes well below a second. FLOPs are exact
(a test compares them with PyTorch's counter); memory and disk are upper estimates to refuse by; times are estimates to plan by. The
costs themselves are in `muralist/cost`, dispatched by the class of each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from muralist.base_info import BaseInfo
from muralist.config import Request
from muralist.cost.budget import Budget
from muralist.cost.decoding import TILES, DecodeNeed, TileMajor
from muralist.cost.levels import LEVELS, Level, choose, fits, settle, stage_fits, with_weights
from muralist.cost.machine import Machine
from muralist.cost.setting import Setting, StagePlan
from muralist.cost.stages import FILES, decode_need, estimates
from muralist.errors import UserError
from muralist.nn.attention import FullAttention
from muralist.sampling import flow
from muralist.types import Grid

__all__ = ["Machine", "Plan", "Refusal", "StagePlan", "plan"]

UNLIMITED = Budget()
LARGER = 1.5  # times the trained number of pixels that a base is expected to bear
SIZES = ((3840, 2160), (2560, 1440), (1920, 1080), (1280, 720), (832, 480), (448, 256))  # smaller sizes to suggest, width and height


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a run cannot be: the parts of a `UserError`."""

    what: str
    where: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The stages in order, the machine they were planned for, remarks, and what cannot fit (empty: it fits).

    `request`: the one to run: what was asked, with what the plan decided about chunks and decoding filled in. `memory`: the level it is planned
    for (`cost/levels.py`); `streamed`: the blocks' weights wait in main memory (`Base.stream`).
    """

    request: Request
    stages: tuple[StagePlan, ...]
    machine: Machine
    memory: str = "high"
    streamed: bool = False
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """The most that is needed at a time where the models compute."""
        return max(stage.memory_bytes for stage in self.stages if stage.stage != "encode")

    @property
    def output_bytes(self) -> int:
        """An upper estimate of the finished file."""
        return next(stage.disk_bytes for stage in self.stages if stage.stage == "encode") // FILES

    @property
    def disk_bytes(self) -> int:
        """Enough for all stages' files together."""
        return sum(stage.disk_bytes for stage in self.stages)

    def check(self) -> None:
        """Raises UserError with the first thing that cannot fit."""
        for refusal in self.refusals:
            raise UserError(refusal.what, where=refusal.where, fix=refusal.fix)

    def record(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "machine": self.machine.record(),
            "memory": {"level": self.memory, "streamed": self.streamed},
            "stages": [stage.record() for stage in self.stages],
            "totals": {"flops": self.flops, "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes, "seconds": self.seconds},
            "notes": list(self.notes),
            "refusals": [{"what": r.what, "where": r.where, "fix": r.fix} for r in self.refusals],
        }


def plan(request: Request, info: BaseInfo, machine: Machine, *, budget: Budget = UNLIMITED, begun: bool = False) -> Plan:
    """Plan a request on a base for a machine; does not raise where it cannot fit (`Plan.check` does).

    `begun`: the request comes from a run that has begun; what an earlier plan decided in it stays, since it decides the last bits.

    Raises:
        UserError: a request that no machine could run, such as a frame count that is not 4n+1 or a codec that does not exist.
    """
    asked = Setting(request=request, info=info, machine=budget.cut(machine))
    level, setting = choose(asked, budget.mode, begun=begun)
    stages = tuple(estimates(setting))
    notes = (*_notes(setting), *_memory_notes(level, asked, setting, begun))
    refusals = tuple(_refusals(setting, stages, level, budget, begun))
    return Plan(request=setting.request, stages=stages, machine=setting.machine, memory=level, streamed=setting.streamed, notes=notes, refusals=refusals)


# -- What cannot fit --


def _refusals(setting: Setting, stages: tuple[StagePlan, ...], level: str, budget: Budget, begun: bool) -> Iterator[Refusal]:
    machine = setting.machine
    if error := decode_need(setting).error:
        fix = _elsewhere(setting, level, budget) if begun else _slower(setting, level) or _smaller(setting, level)
        yield Refusal(error.what, "memory, decode", fix)
    elif too_large := next((stage for stage in stages if not stage_fits(stage, machine)), None):
        fix = _elsewhere(setting, level, budget) if begun else _slower(setting, level) or _shorter(setting) or _smaller(setting, level)
        yield Refusal(_lacks(too_large, machine), f"memory, {too_large.stage}", fix)
    disk = sum(stage.disk_bytes for stage in stages)
    if disk > machine.disk_free:
        fix = f"free {_gb(disk - machine.disk_free)}, choose a run directory on another disk, a smaller size or fewer frames"
        yield Refusal(f"the run needs {_gb(disk)} of disk and {_gb(machine.disk_free)} are free", "disk", fix)


def _lacks(stage: StagePlan, machine: Machine) -> str:
    if stage.memory_bytes <= machine.limit and stage.host_bytes > machine.memory_bytes:
        return f"{stage.stage} needs {_gb(stage.host_bytes)} of main memory for weights, {_gb(machine.memory_bytes)} are free"
    return f"{stage.stage} needs {_gb(stage.memory_bytes)} of memory, {machine.name} has {_gb(machine.limit)} free"


def _slower(setting: Setting, level: str, decide: Callable[[Setting, Level], Setting] = settle) -> str | None:
    """The first level below that fits, if one does; `decide`: what a level may still fill in."""
    below = list(LEVELS)[list(LEVELS).index(level) + 1 :]
    found = next((name for name in below if fits(decide(setting, LEVELS[name]))), None)
    return found and f"use --memory {found}"


def _elsewhere(setting: Setting, level: str, budget: Budget) -> str:
    """For a run that has begun, of which only the place of the weights can change."""
    room = "free memory" if budget.gigabytes is None else "raise --vram-limit"
    return _slower(setting, level, with_weights) or f"{room}, go on on a larger machine, or start a new run"


def _shorter(setting: Setting) -> str | None:
    """How many frames fit, if some do. The decoder is asked once: it holds a few frames at a time, whatever their number."""
    grid, factor = setting.request.grid, setting.info.geometry.temporal_factor

    def shorter(groups: int) -> Setting:
        return _with(setting, replace(grid, num_frames=groups * factor + 1))

    def fits(groups: int) -> bool:
        return all(stage_fits(stage, setting.machine) for stage in takewhile(lambda stage: stage.stage != "decode", estimates(shorter(groups))))

    low, high = 1, (grid.num_frames - 1) // factor
    if high <= low or not fits(low) or fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not all(stage_fits(stage, setting.machine) for stage in estimates(shorter(low))):
        return None
    return f"use at most {low * factor + 1} frames, or a smaller size"


def _smaller(setting: Setting, level: str) -> str:
    """The largest of the usual sizes that fits."""
    grid = setting.request.grid
    for long, short in SIZES:
        width, height = (long, short) if grid.width >= grid.height else (short, long)
        if width * height < grid.width * grid.height and _would_fit(_with(setting, replace(grid, width=width, height=height)), level):
            return f"use a size of at most {width}x{height}"
    return "use a smaller base or a larger machine"


def _would_fit(setting: Setting, level: str) -> bool:
    """Not where the recipe cannot be run at all, such as one that enlarges its proxy to a size below it."""
    try:
        return fits(settle(setting, LEVELS[level]))
    except UserError:
        return False


def _with(setting: Setting, grid: Grid) -> Setting:
    """The same for another target, whose proxy may be another."""
    config = setting.request.config
    proxy = config.proxy and config.proxy.settled(grid)
    return replace(setting, request=replace(setting.request, grid=grid, config=replace(config, proxy=proxy)))


# -- What is worth saying --


def _notes(setting: Setting) -> Iterator[str]:
    asked, grid = setting.request.grid, setting.grid
    if (asked.height, asked.width) != (grid.height, grid.width):
        yield f"computed at {grid.width}x{grid.height} and cropped to {asked.width}x{asked.height}"
    yield from _beyond_training(setting)
    if setting.request.config.upsample is not None and setting.request.config.refine.skip_steps == 0:
        yield "no step is skipped, so refinement starts from noise: the enlarged proxy is made and not used"
    yield from _idle_experts(setting)
    yield from _decode_notes(setting, decode_need(setting))
    if setting.linears == "fp8":
        yield "linear layers in 8 bits: their time is counted as that of plain ones; what they gain on a machine says `muralist bench gpu --only H7`"
    if setting.machine.assumed:
        yield f"{setting.machine.name}: its rates are assumed, not measured"


def _beyond_training(setting: Setting) -> Iterator[str]:
    """Where the request leaves what the base was trained for."""
    trained, grid, config = setting.info.defaults.grid, setting.request.grid, setting.request.config
    made = grid if config.proxy is None else config.proxy.grid(grid, setting.info.geometry)
    if made.num_frames > trained.num_frames:
        yield f"{made.num_frames} frames: the base was trained for {trained.num_frames}; motion may repeat or stall"
    times = grid.height * grid.width / (trained.height * trained.width)
    if times <= LARGER:
        return
    size = f"{grid.width}x{grid.height} is {times:.0f} times the {trained.width}x{trained.height} that the base was trained for"
    if config.proxy is None:
        yield f"{size}: without a proxy, expect repeated objects and loose layout; a recipe with a proxy fixes the layout"
    elif isinstance(config.refine.attention, FullAttention) and config.refine.adapter is None:
        yield f"{size}: full attention without an adapter for that size may blur"


def _idle_experts(setting: Setting) -> Iterator[str]:
    """Experts that are asked for and work at no noise level of refinement."""
    refine, known = setting.request.config.refine, setting.info.experts
    levels = flow.sigmas(refine.num_inference_steps, refine.flow_shift)[refine.skip_steps : -1]
    for name in refine.experts if known else ():
        low, high = known.experts[name].sigmas
        if not any(known.experts[name].works_at(level) for level in levels):
            yield f"the expert {name} works at noise levels from {low:g} to {high:g}, refinement from {levels[-1]:.3g} to {levels[0]:.3g}: it has nothing to do"


def _memory_notes(level: str, asked: Setting, setting: Setting, begun: bool) -> Iterator[str]:
    """What a level below the highest costs its speed, and what the highest would have taken."""
    if level == "high":
        return
    chunks = [] if begun else [f"at most {LEVELS[level].token_chunk} tokens at a time"]
    doing = chunks + (["blocks streamed from main memory"] if setting.streamed else [])
    if not doing:
        yield f"memory {level}: nothing changes, since the run has begun and keeps its chunks of tokens"
        return
    high = with_weights(asked, LEVELS["high"])
    need = max(stage.memory_bytes for stage in estimates(settle(high, LEVELS["high"])) if stage.stage != "encode")
    yield f"memory {level}: {', '.join(doing)}; high would take {_gb(need)}, {_gb(setting.machine.limit)} are free"


def _decode_notes(setting: Setting, need: DecodeNeed) -> Iterator[str]:
    limit = _gb(setting.request.config.decode.memory_bytes)
    if isinstance(need.plan, TileMajor):
        through = f"tiles of {need.plan.tile} pixels go through {_gb(need.disk_bytes)} of disk"
        yield f"decode: streaming would take {_gb(need.streaming_bytes)} and its limit is {limit}, so {through}"
    elif need.plan.tile < min(TILES[0], max(setting.grid.height, setting.grid.width)):
        yield f"decode: tiles of {need.plan.tile} instead of {TILES[0]} pixels keep within its limit of {limit}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
