"""Artifacts of stated size, put into clean renders of the world: what the checks are tested with.

A planter takes a `Case` and a size and returns frames [T, H, W, 3]; `as_file` then rounds to 8 bits, as a file would. What a planter leaves to
chance depends on the case alone: a smaller artifact is the same one, smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from muralist.data.world import ASPECT, CAMERAS, PAN, ZOOM, Scene, layout, render_clip, sample_scene
from muralist.eval.diagnose.checks import Content, Light, Resolution, Seams, all_checks
from muralist.eval.diagnose.examine import examine
from muralist.eval.diagnose.finding import Finding
from muralist.eval.diagnose.track import luma
from muralist.eval.diagnose.view import Album, Check, Clip, album
from muralist.types import Grid

GRID = Grid(num_frames=29, height=512, width=896)
PROXY = Grid(num_frames=29, height=256, width=448)
TILES = (128, 160, 192, 256)  # pixels
PERIODS = (4, 8)  # frames


@dataclass(frozen=True)
class Case:
    """A scene on a grid."""

    seed: int
    scene: Scene
    grid: Grid = GRID

    @property
    def rng(self) -> np.random.Generator:
        """A new generator, always the same."""
        return np.random.default_rng([self.seed, 1])

    @cached_property
    def frames(self) -> torch.Tensor:
        """The clean render [T, H, W, 3] in [0, 1]."""
        return render_clip(self.scene, self.grid)

    @cached_property
    def proxy(self) -> torch.Tensor:
        """The same, smaller."""
        return render_clip(self.scene, PROXY)

    @cached_property
    def mask(self) -> torch.Tensor:
        """Where the object is, [T, H, W] bool: there the same scene with an object of another colour looks different."""
        other = "red" if self.scene.colour != "red" else "blue"
        return (render_clip(replace(self.scene, colour=other), self.grid) - self.frames).abs().sum(-1) > 0.02


def make_case(seed: int, *, moving: bool = False) -> Case:
    """Case number `seed`; `moving`: of a scene in which object or camera moves."""
    rng = np.random.default_rng([seed, 0])
    scene = sample_scene(rng)
    while moving and scene.camera is None and scene.motion == "stays still":
        scene = sample_scene(rng)
    return Case(seed, scene)


def as_file(frames: torch.Tensor) -> torch.Tensor:
    """What an 8-bit file holds of `frames`."""
    return (frames.clamp(0, 1) * 255).round() / 255


def tile_of(case: Case) -> int:
    """Side of the tiles that `seams` plants, in pixels."""
    return int(case.rng.choice(TILES))


def seams(case: Case, step: float) -> torch.Tensor:
    """Square tiles, alternately lighter and darker by half of `step` (of 255)."""
    tile = tile_of(case)
    rows, columns = torch.arange(case.grid.height) // tile, torch.arange(case.grid.width) // tile
    sign = (rows[:, None] + columns[None, :]) % 2 - 0.5
    return case.frames + (sign * step / 255)[None, :, :, None]


def pulse(case: Case, percent: float) -> torch.Tensor:
    """Brightness that pulses by `percent`, peak to peak: a lighter first frame, a ramp or a wave in each period."""
    rng = case.rng
    period = int(rng.choice(PERIODS))
    phase = (torch.arange(len(case.frames)) + int(rng.integers(period))) % period
    shapes = ((phase == 0).float(), phase / (period - 1), 0.5 + 0.5 * torch.cos(2 * torch.pi * phase / period))
    shape = shapes[int(rng.integers(3))]
    return case.frames * (1 + percent / 100 * (shape - 0.5))[:, None, None, None]


def drift(case: Case, percent: float) -> torch.Tensor:
    """One channel, or all of them, that slides by `percent` of the mean luma a second, away from saturation."""
    level = float(luma(case.frames[0]).mean())
    channel = torch.eye(4, 3)[int(case.rng.integers(4))]
    channel = channel if channel.any() else torch.ones(3)
    seconds = torch.arange(len(case.frames)) / case.grid.fps
    sign = 1 if level < 0.5 else -1
    return case.frames + sign * percent / 100 * level * seconds[:, None, None, None] * channel


def repeat(case: Case, count: float) -> torch.Tensor:
    """The last `count` frames are earlier ones once more, in order."""
    count, frames = int(count), case.frames.clone()
    start = int(case.rng.integers(0, len(frames) - 2 * count - 3))
    frames[-count:] = case.frames[start : start + count]
    return frames


def loop(case: Case, rounds: float) -> torch.Tensor:
    """The video begins again so that it is seen `rounds` times."""
    period = round(len(case.frames) / rounds)
    return case.frames[torch.arange(len(case.frames)) % period]


def copy(case: Case, scale: float) -> torch.Tensor:
    """The object once more, `scale` times as large, somewhere else: staying there or moving along, wherever it is most in the clear. 0: none."""
    if not scale:
        return case.frames
    centres, radii = _path(case)
    place = _free_place(case, centres, radii)
    return torch.stack([_paste(*parts, scale) for parts in zip(case.frames, case.mask, centres, place, radii)])


def slow(case: Case, speed: float) -> torch.Tensor:
    """The scene at `speed` times its pace."""
    return render_clip(replace(case.scene, duration=case.scene.duration / speed), case.grid)


def enlarged(case: Case, factor: float) -> torch.Tensor:
    """Rendered `factor` times smaller and enlarged by bicubic or bilinear interpolation."""
    small = render_clip(case.scene, case.grid.resized(height=round(case.grid.height / factor), width=round(case.grid.width / factor)))
    mode = str(case.rng.choice(["bicubic", "bilinear"]))
    return F.interpolate(small.permute(0, 3, 1, 2), (case.grid.height, case.grid.width), mode=mode).permute(0, 2, 3, 1)


def _path(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Centres [T, 2] (x, y) and reach [T] of the object in the picture, in pixels."""
    plan, size = layout(case.scene), case.grid.height
    pan, zoom = CAMERAS.get(case.scene.camera, (0, 0))
    moment = (np.arange(len(case.frames)) / case.grid.fps / case.scene.duration)[:, None]
    scale = ZOOM ** (zoom * moment)
    centre = np.array(plan.start) + (np.array(plan.end) - np.array(plan.start)) * moment - np.concatenate([pan * PAN * (moment - 0.5), 0 * moment], 1)
    return (centre * scale + [ASPECT / 2, 0.5]) * size, (1.15 * plan.radius * scale * size)[:, 0]


def _free_place(case: Case, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Where the copy is, [T, 2]: of some random places that of which most frames show it whole and apart from the object."""
    rng, size, best, most = case.rng, np.array([case.grid.width, case.grid.height]), centres, -1.0
    for attempt in range(200):
        spot = rng.uniform(0.15, 0.85, 2) * size
        place = np.broadcast_to(spot, centres.shape) if attempt % 2 else centres + (spot - size / 2)
        whole = ((place - radii[:, None] >= 0) & (place + radii[:, None] <= size)).all(1)
        apart = np.linalg.norm(place - centres, axis=1) > 2.1 * radii
        if (whole & apart).mean() > most:
            best, most = place, (whole & apart).mean()
    return best


def _paste(frame: torch.Tensor, mask: torch.Tensor, source: np.ndarray, target: np.ndarray, radius: float, scale: float) -> torch.Tensor:
    """`frame` [H, W, 3] with the masked disc about `source` drawn about `target`, `scale` times as large."""
    (height, width), half = mask.shape, round(float(radius) * scale) + 1
    x, y = (torch.arange(-half, half + 1) + round(float(v)) for v in target)
    inside_x, inside_y = (x >= 0) & (x < width), (y >= 0) & (y < height)
    x, y = x[inside_x], y[inside_y]
    from_x, from_y = (float(v) + (axis - float(t)) / scale for v, t, axis in zip(source, target, (x, y)))
    grid = torch.stack(torch.meshgrid((from_y + 0.5) / height * 2 - 1, (from_x + 0.5) / width * 2 - 1, indexing="ij")[::-1], -1).float()
    layers = torch.cat([frame.permute(2, 0, 1), mask[None].float()])[None]
    drawn = F.grid_sample(layers, grid[None], align_corners=False)[0].permute(1, 2, 0)
    result = frame.clone()
    result[y[:, None], x] = torch.lerp(result[y[:, None], x], drawn[..., :3], drawn[..., 3:])
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Planting:
    """One kind: what plants it, the findings that should name it, its stated size, and weaker sizes in order."""

    plant: Callable[[Case, float], torch.Tensor]
    findings: tuple[str, ...]
    size: float
    weaker: tuple[float, ...]
    unit: str
    moving: bool = False  # in a scene that stands still, it cannot be seen
    proxy: bool = False


PLANTINGS = {
    "seams": Planting(plant=seams, findings=("seams", "seams at known borders"), size=1.5, weaker=(1.0, 0.75, 0.5, 0.25), unit="of 255, step"),
    "luma pulse": Planting(plant=pulse, findings=("luma pulse",), size=0.5, weaker=(0.4, 0.3), unit="%, peak to peak"),
    "colour drift": Planting(plant=drift, findings=("colour drift",), size=1.0, weaker=(0.8, 0.6), unit="%/s"),
    "repeat": Planting(plant=repeat, findings=("loops and repeats",), size=8, weaker=(7, 6, 5), unit="frames", moving=True),
    "loop": Planting(plant=loop, findings=("loops and repeats",), size=2.0, weaker=(1.5, 1.25), unit="rounds", moving=True),
    "copy": Planting(plant=copy, findings=("duplicated subjects",), size=1.0, weaker=(0.8, 0.6), unit="of the object's size", proxy=True),
    "copy, no proxy": Planting(plant=copy, findings=("duplicated subjects",), size=1.0, weaker=(0.8, 0.6), unit="of the object's size"),
    "slow motion": Planting(plant=slow, findings=("slow motion",), size=0.7, weaker=(0.75,), unit="of the speed", moving=True, proxy=True),
    "fake resolution": Planting(plant=enlarged, findings=("fake resolution",), size=1.5, weaker=(1.33, 1.25), unit="times enlarged"),
}


def find(kind: str, case: Case, size: float) -> list[Finding]:
    """Plant one artifact, and what the check says that should find it."""
    planting = PLANTINGS[kind]
    clip = _clip(planting.plant(case, size))
    check = _check(kind, case, clip, album(_clip(case.proxy)) if planting.proxy else None)
    return [finding for finding in examine(clip, [check]).findings if finding.name in planting.findings]


def clean(case: Case) -> dict[str, list[Finding]]:
    """What the checks say of the clean render, by the kind that `find` would plant."""
    clip = _clip(case.frames)
    findings = examine(clip, all_checks(clip, album(_clip(case.proxy)), _borders(case))).findings
    alone = find("copy, no proxy", case, 0)
    return {
        kind: alone if kind == "copy, no proxy" else [finding for finding in findings if finding.name in planting.findings]
        for kind, planting in PLANTINGS.items()
    }


def _check(kind: str, case: Case, clip: Clip, proxy: Album | None) -> Check:
    if kind == "seams":
        return Seams(_borders(case))
    if kind in ("luma pulse", "colour drift"):
        return Light(clip.fps)
    return Resolution(clip.num_frames) if kind == "fake resolution" else Content(clip, proxy)


def _borders(case: Case) -> dict[str, list[int]]:
    """The tile borders that `seams` plants."""
    tile = tile_of(case)
    return {"x": list(range(tile, case.grid.width, tile)), "y": list(range(tile, case.grid.height, tile))}


def _clip(frames: torch.Tensor) -> Clip:
    """Frames [T, H, W, 3] as a file would hold them."""
    return Clip((as_file(frame) for frame in frames), len(frames), GRID.fps)
