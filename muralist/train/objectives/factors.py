"""What a feature network is trained on: world crops at all scales, unharmed and damaged, each to be told apart.

One render gives several views, each with damage of its own, so that what tells them apart is the damage. All answers are linear in the
features: a difference that was learned is a difference of positions, which is what a Fréchet distance sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from muralist.data import degrade, shapes
from muralist.data.world import ASPECT, COLOURS, GROUNDS, SHAPES, Crop, Scene, layout, render, sample_scene
from muralist.types import Grid

HEIGHTS = (128, 256, 544, 1088, 2176)
UNKNOWN = -100  # cross_entropy's word for "no answer asked"


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorsConfig:
    """Crop side in pixels, crops and views of each in a batch, how often a view suffers each kind of damage, and of which scenes."""

    side: int = 96
    crops: int = 16
    views: int = 4
    rate: float = 0.35
    seed: int = 0
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Factors:
    """Words of a crop by index; `colour` is one past the last where there is no object, `UNKNOWN` where it cannot be said."""

    colour: int
    shape: int
    ground: int
    scale: int


class Reader(nn.Module):
    """A feature network and linear readings of its features."""

    def __init__(self, network: nn.Module, width: int):
        super().__init__()
        self.network = network
        sizes = {"colour": len(COLOURS) + 1, "shape": len(SHAPES), "ground": len(GROUNDS), "scale": len(HEIGHTS)}
        self.words = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.grades = nn.Linear(width, len(degrade.RANGES))


class TellApart:
    """Objective of `features`; `module` is a Reader."""

    def __init__(self, module: Reader, config: FactorsConfig, device: torch.device):
        self.module, self.config, self.device = module, config, device

    def loss(self, step: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        x, factors, grades = batch(self.config, step)
        features = self.module.network(x.to(self.device))
        told = self.module.grades(features)
        errors = {"grades": 8 * F.mse_loss(told, grades.to(self.device))}
        for name, read in self.module.words.items():
            target = torch.tensor([getattr(f, name) for f in factors], device=self.device)
            # a sum over what can be said: the mean of cross_entropy is not a number where nothing can
            errors[name] = 0.25 * F.cross_entropy(read(features), target, ignore_index=UNKNOWN, reduction="sum") / len(x)
        return sum(errors.values()), {name: error.item() for name, error in errors.items()}


@torch.inference_mode()
def judge(reader: Reader, config: FactorsConfig, device: torch.device, batches: int = 16) -> dict[str, float]:
    """Share of right answers for every word where one is asked for, and the mean absolute error of the grades of damage, undamaged ones included."""
    right: dict[str, list[bool]] = {name: [] for name in reader.words}
    errors = []
    for step in range(batches):
        x, factors, grades = batch(config, step)
        features = reader.network(x.to(device))
        errors.append((reader.grades(features).cpu() - grades).abs().mean().item())
        for name, read in reader.words.items():
            told = read(features).argmax(dim=1).tolist()
            right[name] += [t == getattr(f, name) for t, f in zip(told, factors) if getattr(f, name) != UNKNOWN]
    return {name: sum(answers) / max(len(answers), 1) for name, answers in right.items()} | {"grade_error": sum(errors) / batches}


def batch(config: FactorsConfig, step: int) -> tuple[torch.Tensor, list[Factors], torch.Tensor]:
    """Views [B, 3, side, side] in [0, 1], their factors, and their grades of damage [B, kinds], 0 for none."""
    rng = np.random.Generator(np.random.Philox(key=[config.seed, step]))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    views, factors, grades = [], [], []
    for _ in range(config.crops):
        image, known = world_crop(rng, config.side, held_out=config.held_out)
        for _ in range(config.views):
            view, grade = _damaged(rng, image[None], config.rate, generator)
            views.append(view)
            grades.append(grade)
            factors.append(known)
    return torch.cat(views), factors, torch.tensor(grades)


def _damaged(rng: np.random.Generator, x: torch.Tensor, rate: float, generator: torch.Generator) -> tuple[torch.Tensor, list[float]]:
    """Each kind of damage at `rate`, in the order in which a picture suffers them; a grade of g counts as 0.1 + 0.9 g, none as 0."""
    grades = dict.fromkeys(degrade.RANGES, 0.0)
    for kind in ("enlargement", "blur", "noise", "compression"):
        if rng.random() < rate:
            u = float(rng.random())
            x, grades[kind] = degrade.degrade(x, kind, degrade.of_grade(kind, u), generator), 0.1 + 0.9 * u
    return x, list(grades.values())


def world_crop(rng: np.random.Generator, side: int, *, held_out: bool = False) -> tuple[torch.Tensor, Factors]:
    """[3, side, side] of a random scene at a random scale and moment, half of them at the object, and what is to be seen there."""
    scale = int(rng.integers(len(HEIGHTS)))
    grid = Grid(num_frames=29, height=HEIGHTS[scale], width=HEIGHTS[scale] * 7 // 4)
    scene, moment = sample_scene(rng, held_out=held_out, camera_share=0.0), int(rng.integers(grid.num_frames))
    where = layout(scene)
    centre = [a + (b - a) * moment / grid.fps / scene.duration for a, b in zip(where.start, where.end)]
    if rng.random() < 0.5:
        x, y = (c + where.radius * rng.uniform(-1, 1) for c in centre)
    else:
        x, y = rng.uniform(-ASPECT / 2, ASPECT / 2), rng.uniform(-0.5, 0.5)
    left = int(np.clip((x / ASPECT + 0.5) * grid.width - side / 2, 0, grid.width - side))
    top = int(np.clip((y + 0.5) * grid.height - side / 2, 0, grid.height - side))
    crop = Crop(top, left, side, side)
    (frame,) = render(scene, grid, crop=crop, frames=range(moment, moment + 1))
    return frame.permute(2, 0, 1), _factors(scene, scale, _object_share(scene, grid, crop, centre, where.radius))


def _object_share(scene: Scene, grid: Grid, crop: Crop, centre: list[float], radius: float) -> float:
    """Share of the crop that the object covers."""
    x = (torch.arange(crop.left, crop.left + crop.width) + 0.5) / grid.width * ASPECT - ASPECT / 2
    y = (torch.arange(crop.top, crop.top + crop.height) + 0.5) / grid.height - 0.5
    distance, _ = shapes.distance_and_shade(scene.shape, ((x - centre[0]) / radius)[None, :], ((y - centre[1]) / radius)[:, None])
    return float((distance < 0).float().mean())


def _factors(scene: Scene, scale: int, share: float) -> Factors:
    """The shape is asked for where most of an object can be in the crop, the colour where some of it is, the ground where there is some."""
    colour = list(COLOURS).index(scene.colour) if share > 0.04 else len(COLOURS) if share == 0 else UNKNOWN
    shape = SHAPES.index(scene.shape) if share > 0.15 and HEIGHTS[scale] <= 256 else UNKNOWN
    ground = list(GROUNDS).index(scene.ground) if share < 0.9 else UNKNOWN
    return Factors(colour, shape, ground, scale)
