"""The world: procedural scenes with exact captions, rendered at any size.

A scene is a function of continuous (x, y, t), so the same scene exists at 448x256 and at 3840x2160, each with
true detail up to its own pixel's Nyquist limit: the ground truth that filmed data never gives. World units: the
frame is 1 high and `ASPECT` wide, x to the right, y down, the origin in the middle of the frame.

Three layers make a frame: the ground (a sum of lattice-noise octaves between a dark and a light tone), one object
(an analytic signed distance, a dark rim, a faint surface texture of its own) and the camera (pan or zoom).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from muralist.data import shapes
from muralist.errors import UserError
from muralist.types import Grid

VERSION = 1  # raise it when the same scene would be painted otherwise: encoded videos of another version are refused
ASPECT = 1.75  # of 448x256, the size at which the embedded base thinks

COLOURS = {
    "red": (0.85, 0.12, 0.10), "green": (0.15, 0.65, 0.20), "blue": (0.12, 0.25, 0.85), "yellow": (0.95, 0.85, 0.15),
    "purple": (0.55, 0.20, 0.70), "orange": (0.95, 0.50, 0.10), "white": (0.95, 0.95, 0.95), "cyan": (0.10, 0.75, 0.80),
}  # fmt: skip
SHAPES = ("ball", "cube", "star", "ring", "triangle")
GROUNDS = {
    "grass": ((0.15, 0.40, 0.10), (0.45, 0.65, 0.20)), "sand": ((0.70, 0.55, 0.35), (0.95, 0.85, 0.60)),
    "water": ((0.05, 0.20, 0.40), (0.40, 0.65, 0.80)), "lava": ((0.30, 0.05, 0.02), (1.00, 0.60, 0.10)),
    "snow": ((0.75, 0.80, 0.90), (1.00, 1.00, 1.00)), "rock": ((0.20, 0.20, 0.22), (0.60, 0.58, 0.55)),
}  # fmt: skip
MOTIONS = {"moves right": (1, 0), "moves left": (-1, 0), "rises": (0, -1), "falls": (0, 1), "stays still": (0, 0)}
CAMERAS = {"pans right": (1, 0), "pans left": (-1, 0), "zooms in": (0, 1)}  # (pan direction, zoom direction)

PAN = 0.35  # world units the camera travels over the clip
ZOOM = 1.4  # how much larger things are at the end of a zoom

# (stretch along x, amplitude ratio of one octave to the one below it): grounds differ in texture, not only in tone
TEXTURES = {"grass": (0.7, 0.78), "sand": (1.5, 0.72), "water": (2.0, 0.72), "lava": (1.0, 0.68), "snow": (1.2, 0.72), "rock": (1.0, 0.78)}
COARSEST = 0.6  # lattice spacing of the first octave, world units
GROUND_CONTRAST = 0.23  # standard deviation of the tone, 0 = dark and 1 = light
SURFACE_CONTRAST = 0.05
RIM = 0.13  # of the object's radius
RIM_SHADE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a caption says, plus a seed for what it leaves open and the time over which the motion happens."""

    colour: str
    shape: str
    motion: str
    ground: str
    camera: str | None = None
    seed: int = 0
    duration: float = 29 / 16

    def __post_init__(self):
        for field, allowed in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS), ("ground", GROUNDS), ("camera", (None, *CAMERAS))):
            if getattr(self, field) not in allowed:
                raise UserError(f"unknown {field} {getattr(self, field)!r}", where="scene", fix=f"use one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True, slots=True)
class Crop:
    """A rectangle of pixels of the full frame: what is rendered keeps its true position in the scene."""

    top: int
    left: int
    height: int
    width: int


def caption(scene: Scene) -> str:
    """`a {colour} {shape} {motion} over {ground}` and, where there is one, `, camera {camera}`."""
    article = "an" if scene.colour[0] in "aeiou" else "a"
    text = f"{article} {scene.colour} {scene.shape} {scene.motion} over {scene.ground}"
    return text + (f", camera {scene.camera}" if scene.camera else "")


def parse(text: str, seed: int = 0) -> Scene:
    """The scene a caption describes; the inverse of `caption`. Raises UserError on words the world does not know."""
    words = text.lower().strip().rstrip(".")
    what, _, camera = words.partition(", camera ")
    head, over, ground = what.partition(" over ")
    article, _, rest = head.partition(" ")
    colour, _, rest = rest.partition(" ")
    shape, _, motion = rest.partition(" ")
    if not over or article not in ("a", "an"):
        raise UserError(f"{text!r} is not a caption of the world", where="caption", fix="write 'a red ball moves right over grass'")
    return Scene(colour=colour, shape=shape, motion=motion, ground=ground, camera=camera or None, seed=seed)


def combination(scene: Scene) -> int:
    """Index of (colour, shape, ground, motion) in the order in which the words are listed."""
    c, s, g, m = (list(words).index(word) for words, word in ((COLOURS, scene.colour), (SHAPES, scene.shape), (GROUNDS, scene.ground), (MOTIONS, scene.motion)))
    return ((c * 5 + s) * 6 + g) * 5 + m


def is_held_out(scene: Scene) -> bool:
    """One combination in seven is never trained on: quality is reported on these."""
    return combination(scene) % 7 == 3


def sample_scene(rng: np.random.Generator, *, held_out: bool = False, camera_share: float = 0.3, duration: float = 29 / 16) -> Scene:
    """A random scene of the training set (or of the held-out one), a camera move in `camera_share` of them."""
    while True:
        scene = Scene(
            colour=str(rng.choice(list(COLOURS))),
            shape=str(rng.choice(SHAPES)),
            motion=str(rng.choice(list(MOTIONS))),
            ground=str(rng.choice(list(GROUNDS))),
            camera=str(rng.choice(list(CAMERAS))) if rng.random() < camera_share else None,
            seed=int(rng.integers(2**31)),
            duration=duration,
        )
        if is_held_out(scene) == held_out:
            return scene


def all_scenes(*, held_out: bool) -> Iterator[Scene]:
    """Every combination without a camera move, in listing order, one seed each."""
    for index, (c, s, g, m) in enumerate(itertools.product(COLOURS, SHAPES, GROUNDS, MOTIONS)):
        scene = Scene(colour=c, shape=s, ground=g, motion=m, seed=index)
        if is_held_out(scene) == held_out:
            yield scene


def render(scene: Scene, grid: Grid, *, crop: Crop | None = None, frames: range | None = None) -> Iterator[torch.Tensor]:
    """Frames [H, W, 3] float32 in [0, 1], one after the other, each of the crop's size where a crop is given."""
    crop = crop or Crop(0, 0, grid.height, grid.width)
    if not (crop.top >= 0 and crop.left >= 0 and crop.top + crop.height <= grid.height and crop.left + crop.width <= grid.width):
        raise UserError(f"crop {crop} leaves the frame", where="render", fix=f"keep it within {grid.width}x{grid.height}")
    stage = _Stage(scene, grid)
    for index in frames if frames is not None else range(grid.num_frames):
        yield stage.frame(index / grid.fps / scene.duration, crop)


def render_clip(scene: Scene, grid: Grid, *, crop: Crop | None = None, frames: range | None = None) -> torch.Tensor:
    """All frames at once, [T, H, W, 3] float32 in [0, 1]."""
    return torch.stack(list(render(scene, grid, crop=crop, frames=frames)))


def near_object(scene: Scene, grid: Grid, *, cell: int, crop: Crop | None = None, frames: range | None = None) -> torch.Tensor:
    """Which cells of `cell` x `cell` pixels the object, its rim and a margin of a cell may touch: [T, H / cell, W / cell], bool."""
    crop = crop or Crop(0, 0, grid.height, grid.width)
    stage = _Stage(scene, grid)
    return torch.stack([stage.near_object(index / grid.fps / scene.duration, crop, cell) for index in frames or range(grid.num_frames)])


def object_on(scene: Scene, grid: Grid, frame: int) -> tuple[float, float, float]:
    """Where the object is on a frame: x and y of its centre and its reach from there along either axis, in pixels of the grid."""
    stage, moment = _Stage(scene, grid), frame / grid.fps / scene.duration
    x, y, pixel = stage._positions(moment, Crop(0, 0, grid.height, grid.width))
    middle = stage._object_at(moment)
    return float((middle[0] - x[0]) / pixel), float((middle[1] - y[0]) / pixel), shapes.REACH * stage.layout.radius / pixel


@dataclass(frozen=True, slots=True)
class Layout:
    """What the caption leaves open: the object's radius and its centre at the start and the end of the clip."""

    radius: float
    start: tuple[float, float]
    end: tuple[float, float]


def layout(scene: Scene) -> Layout:
    """Draw a path that keeps the whole object inside the frame, whatever the camera does."""
    rng = np.random.Generator(np.random.Philox(scene.seed))
    pan, zoom = CAMERAS.get(scene.camera, (0, 0))
    radius = rng.uniform(0.15, 0.25)
    direction = np.array(MOTIONS[scene.motion], dtype=float)
    extent = np.array([ASPECT / 2, 0.5])
    for attempt in range(1000):
        radius *= 0.97 if attempt and attempt % 50 == 0 else 1.0
        reach = shapes.REACH * radius
        room, last_room = extent - reach, extent - reach * (ZOOM if zoom else 1)
        length = rng.uniform(0.55, 0.75) if direction[0] else rng.uniform(0.85, 0.95) * (room + last_room / (ZOOM if zoom else 1))[1]
        middle = rng.uniform(-room, room)
        start, end = middle - direction * length / 2, middle + direction * length / 2
        camera = np.array([pan * PAN / 2, 0.0])  # the camera is at -camera at the start and at +camera at the end
        seen_start, seen_end = start + camera, (end - camera) * (ZOOM if zoom else 1)
        if (abs(seen_start) <= room).all() and (abs(seen_end) <= last_room).all():
            return Layout(float(radius), tuple(start), tuple(end))
    raise AssertionError(f"no path for {scene}")


class _Stage:
    """One scene set up for one grid; `frame` draws it at a moment."""

    def __init__(self, scene: Scene, grid: Grid):
        self.scene, self.grid, self.layout = scene, grid, layout(scene)
        aspect = grid.width / grid.height
        # a frame within 2 % of the world's shape shows exactly the world's frame, so that sizes can be compared pixel for pixel
        self.width = ASPECT if abs(aspect / ASPECT - 1) < 0.02 else aspect
        self._ground_key = self._ground = None

    @cached_property
    def textures(self) -> tuple[_Octaves, _Octaves]:
        stretch, persistence = TEXTURES[self.scene.ground]
        ground = _Octaves(self.scene.seed, COARSEST, stretch, persistence)
        surface = _Octaves(self.scene.seed + 1_000_003, self.layout.radius / 2, 1.0, 0.75)
        return ground, surface

    def frame(self, moment: float, crop: Crop) -> torch.Tensor:
        """[h, w, 3] in [0, 1] at `moment` (0 start, 1 end of the motion)."""
        x, y, pixel = self._positions(moment, crop)
        image = self._ground_image(x, y, pixel).clone()
        self._draw_object(image, x, y, pixel, moment)
        return image

    def near_object(self, moment: float, crop: Crop, cell: int) -> torch.Tensor:
        """[h / cell, w / cell], bool: whether the middle of a cell is within the object's reach and one cell more."""
        x, y, pixel = self._positions(moment, crop)
        x, y = (v.unflatten(0, (-1, cell)).mean(dim=1) - middle for v, middle in zip((x, y), self._object_at(moment)))
        return torch.hypot(x[None, :], y[:, None]) < shapes.REACH * self.layout.radius + cell * pixel

    def _object_at(self, moment: float) -> tuple[float, float]:
        return tuple(a + (b - a) * moment for a, b in zip(self.layout.start, self.layout.end))

    def _positions(self, moment: float, crop: Crop) -> tuple[torch.Tensor, torch.Tensor, float]:
        """World x of the crop's columns, y of its rows, and the side of a pixel, as the camera sees them at `moment`."""
        pan, zoom = CAMERAS.get(self.scene.camera, (0, 0))
        scale = ZOOM ** (zoom * moment)
        centre = pan * PAN * (moment - 0.5)
        x = (torch.arange(crop.left, crop.left + crop.width, dtype=torch.float64) + 0.5) / self.grid.width - 0.5
        y = (torch.arange(crop.top, crop.top + crop.height, dtype=torch.float64) + 0.5) / self.grid.height - 0.5
        return x * self.width / scale + centre, y / scale, 1 / self.grid.height / scale

    def _ground_image(self, x, y, pixel) -> torch.Tensor:
        key = (float(x[0]), float(y[0]), len(x), len(y), pixel)
        if key != self._ground_key:
            tone = (0.5 + GROUND_CONTRAST * self.textures[0](x, y, pixel)).clamp_(0, 1)
            dark, light = (torch.tensor(c) for c in GROUNDS[self.scene.ground])
            self._ground_key, self._ground = key, torch.lerp(dark, light, tone[..., None])
        return self._ground

    def _draw_object(self, image, x, y, pixel, moment) -> None:
        radius = self.layout.radius
        x, y = (v - middle for v, middle in zip((x, y), self._object_at(moment)))
        reach = 1.2 * radius + 2 * pixel
        cols, rows = (x.abs() < reach).nonzero().flatten(), (y.abs() < reach).nonzero().flatten()
        if not len(cols) or not len(rows):
            return
        cols, rows = slice(int(cols[0]), int(cols[-1]) + 1), slice(int(rows[0]), int(rows[-1]) + 1)
        x, y = x[cols], y[rows]
        distance, shade = shapes.distance_and_shade(self.scene.shape, (x / radius).float()[None, :], (y / radius).float()[:, None])
        distance = distance * (radius / pixel)  # in pixels, so that half a pixel of ramp is an area average
        texture = 1 + SURFACE_CONTRAST * self.textures[1](x, y, pixel)
        body = (distance + RIM * radius / pixel - 0.5).neg().clamp(0, 1)[..., None]
        colour = torch.tensor(COLOURS[self.scene.colour])
        paint = colour * (RIM_SHADE + body * ((shade * texture)[..., None] - RIM_SHADE))
        image[rows, cols] = torch.lerp(image[rows, cols], paint.clamp_(0, 1), (0.5 - distance).clamp(0, 1)[..., None])


class _Octaves:
    """Lattice noise: octave k is white noise on a lattice of spacing `coarsest` / 2^k under a cubic B-spline.

    The sum has zero mean and unit variance when all octaves are there; an octave finer than the pixel is left out
    smoothly, which is what an area average over the pixel would do.
    """

    def __init__(self, seed: int, coarsest: float, stretch: float, persistence: float):
        self.seed, self.coarsest, self.stretch, self.persistence = seed, coarsest, stretch, persistence

    def __call__(self, x: torch.Tensor, y: torch.Tensor, pixel: float) -> torch.Tensor:
        """Noise [len(y), len(x)] at world positions x and y, for pixels of size `pixel`."""
        total = torch.zeros(len(y), len(x))
        # one B-spline octave has variance (151/315)^2; the geometric sum of all octaves is scaled to one
        gain = (315 / 151) * (1 - self.persistence**2) ** 0.5
        for k in itertools.count():
            spacing = self.coarsest / 2**k
            weight = _smoothstep((spacing / pixel - 0.6) / 1.0)
            if weight == 0:
                return total
            rows, columns = _spline(y / spacing), _spline(x / (spacing * self.stretch))
            lattice = _lattice(self.seed, k, rows.first, rows.points, columns.first, columns.points)
            total.add_(columns.weigh(rows.weigh(lattice).T.contiguous()).T, alpha=gain * weight * self.persistence**k)


def _smoothstep(u: float) -> float:
    u = min(max(u, 0.0), 1.0)
    return u * u * (3 - 2 * u)


# taps of the uniform cubic B-spline as polynomials of the place u in [0, 1) between two lattice points: rows 1, u, u^2, u^3
SPLINE = torch.tensor([[1.0, 4.0, 1.0, 0.0], [-3.0, 0.0, 3.0, 0.0], [3.0, -6.0, 3.0, 0.0], [-1.0, 3.0, -3.0, 1.0]]) / 6


class _Taps(NamedTuple):
    """Which four of `points` lattice points from number `first` on each position lies on [n, 4], and how much each counts."""

    index: torch.Tensor
    weight: torch.Tensor
    first: int
    points: int

    def weigh(self, lattice: torch.Tensor) -> torch.Tensor:
        """[points, m] -> [n, m]."""
        return F.embedding_bag(self.index, lattice, mode="sum", per_sample_weights=self.weight)


def _spline(position: torch.Tensor) -> _Taps:
    """Of a cubic B-spline at ascending positions, counted in lattice points."""
    base = position.floor()
    u = (position - base).float()
    weight = torch.stack([torch.ones_like(u), u, u**2, u**3], dim=1) @ SPLINE
    first = int(base[0]) - 1
    return _Taps((base.long() - 1 - first)[:, None] + torch.arange(4), weight, first, int(base[-1]) + 3 - first)


def _lattice(seed: int, octave: int, first_y: int, num_y: int, first_x: int, num_x: int) -> torch.Tensor:
    """Uniform noise of unit variance, a pure function of (seed, octave, iy, ix): the same at any size, crop or order."""
    iy = np.arange(first_y, first_y + num_y, dtype=np.int64).astype(np.uint64)[:, None]
    ix = np.arange(first_x, first_x + num_x, dtype=np.int64).astype(np.uint64)[None, :]
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + octave * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF)
    h = _mix(_mix(key ^ (iy * np.uint64(0xA24BAED4963EE407))) ^ (ix * np.uint64(0x9FB21C651E98DF25)))
    h >>= np.uint64(40)
    noise = h.astype(np.float32)
    noise *= np.float32(2 * 3**0.5 / 2**24)
    noise -= np.float32(3**0.5)
    return torch.from_numpy(noise)


def _mix(h: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, in place on its first step's result: fresh memory costs more than the arithmetic."""
    h = h ^ (h >> np.uint64(30))
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(27)
    h *= np.uint64(0x94D049BB133111EB)
    h ^= h >> np.uint64(31)
    return h
