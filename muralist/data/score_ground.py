"""What `score` needs to know of the ground: which one it is, where its tones lie in colour space, how the camera moves.

A ground is noise between two tones, so its pixels lie on a line in RGB. Which of the six lines fits names the ground; the
distance from that line, corrected for a colour cast, is what makes an object stand out. The camera is read from the ground
alone: a few hundred hypotheses (so much pan, so much zoom over the clip) each warp one frame onto the next, and the best
correlation outside the objects wins. Hypotheses that no caption names (vertical pans, zooming out) compete too, so that an
unknown move is not mistaken for a known one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from muralist.data.world import GROUNDS

UNLIKE = 0.13  # median RGB distance beyond which no ground of the list explains the picture
STILL_PAN, STILL_ZOOM = 0.10, 0.09  # frame heights, log of the scale: less than this over the clip is a camera at rest
STRANGE = -1.5  # log density of colours that neither an object nor the ground explains
RELIABLE = 0.25  # correlation of one frame with the next below which nothing can be said about the camera


@dataclass(frozen=True, slots=True)
class GroundModel:
    """A line of tones in RGB: `start` + t * `along`, t about normal(`middle`, `spread`), off the line by `noise`.

    `name` is None where no known ground fits; the nearest one then still serves to tell objects from the rest.
    """

    name: str | None
    start: torch.Tensor
    along: torch.Tensor
    middle: float
    spread: float
    noise: float
    confidence: float

    def log_density(self, rgb: torch.Tensor) -> torch.Tensor:
        """Log density per unit RGB volume [...] that the ground shows colours `rgb` [..., 3]."""
        tone, off = along_and_off(rgb - self.start, self.along)
        length = float(self.along.norm())
        across = -off / (2 * self.noise**2) - 2 * math.log(self.noise)
        return across - (tone - self.middle) ** 2 / (2 * self.spread**2) - math.log(self.spread * length)


def along_and_off(rgb: torch.Tensor, axis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate of `rgb` [..., 3] along `axis` [3] (1 at its tip) and squared distance from its line; both [...]."""
    position = rgb @ axis / (axis @ axis)
    return position, ((rgb - position[..., None] * axis) ** 2).sum(-1)


def fit_ground(frames: torch.Tensor) -> GroundModel:
    """Name the ground of `frames` [n, h, w, 3] and fit its tones; right as long as objects cover less than half."""
    pixels = frames.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // 12000)]
    distances = {name: _distance(pixels, *tones) for name, tones in GROUNDS.items()}
    # clipping makes the object, wherever it is, a constant that all grounds pay alike
    cost = {name: float((d / UNLIKE).clamp(max=1).square().mean()) for name, d in distances.items()}
    best, second = sorted(cost, key=cost.get)[:2]
    known = float(distances[best].median()) < UNLIKE
    dark, light = (torch.tensor(tone) for tone in GROUNDS[best])
    axis = light - dark
    tone, _ = along_and_off(pixels - dark, axis)
    cast = (pixels - dark - tone[:, None] * axis).median(0).values  # generated colours are a little off as a whole
    tone, off = along_and_off(pixels - dark - cast, axis)
    middle, noise = float(tone.median()), 1.2 * float(off.sqrt().median())
    spread = 1.48 * float((tone - middle).abs().median())
    return GroundModel(
        name=best if known else None,
        start=dark + cast,
        along=axis,
        middle=middle,
        spread=min(max(spread, 0.12), 0.35),
        noise=min(max(noise, 0.03), 0.08),
        confidence=1 - cost[best] / max(cost[second], 1e-6) if known else 0.0,
    )


def _distance(pixels: torch.Tensor, dark: tuple, light: tuple) -> torch.Tensor:
    """Distance [n] of `pixels` [n, 3] from the segment between the two tones."""
    dark, light = torch.tensor(dark), torch.tensor(light)
    tone, _ = along_and_off(pixels - dark, light - dark)
    return (pixels - torch.lerp(dark, light, tone.clamp(0, 1)[:, None])).norm(dim=1)


def shows_ground(frames: torch.Tensor, ground: GroundModel) -> torch.Tensor:
    """1 where `frames` [n, h, w, 3] have the ground's colours, next to it too, else 0: [n, h / 2, w / 2].

    What reaches beyond an object's outline, a painted corner or a trail, moves with the object and would pass for a move of the camera.
    """
    foreign = (ground.log_density(frames) < STRANGE).float()
    return 1 - F.max_pool2d(foreign[:, None], kernel_size=4, stride=2, padding=1)[:, 0]


@dataclass(frozen=True, slots=True)
class CameraMove:
    """How the ground moved over the whole clip: the picture shifts by (-pan_x, -pan_y) frame heights and grows by exp(`zoom`)."""

    name: str | None
    pan_x: float
    pan_y: float
    zoom: float
    confidence: float

    def to_ground(self, x: torch.Tensor, y: torch.Tensor, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions seen at `moment` (0 first frame, 1 last), frame heights from the middle, in coordinates fixed to the ground."""
        shrink = torch.exp(-self.zoom * moment)
        return x * shrink + self.pan_x * moment, y * shrink + self.pan_y * moment


def fit_camera(grey: torch.Tensor, visible: torch.Tensor) -> CameraMove:
    """The camera's move from `grey` [n, h, w], evenly spaced frames, and `visible` [n, h, w], 1 where the ground is seen.

    n >= 2. The name is "static", one of CAMERAS, or None: an unknown move, or frames that do not resemble one another.
    """
    detail = _detail(grey, visible)
    moves = _hypotheses()
    fit = torch.stack([_correlations(detail[i], visible[i], detail[i + 1], visible[i + 1], moves / (len(grey) - 1)) for i in range(len(grey) - 1)])
    fit = fit.median(0).values  # one pair spoilt by a flicker has no say
    best = int(fit.argmax())
    pan_x, pan_y, zoom = moves[best].tolist()
    name = _camera_name(pan_x, pan_y, zoom) if fit[best] > RELIABLE else None
    rival = max(f for f, move in zip(fit.tolist(), moves.tolist()) if _camera_name(*move) != _camera_name(pan_x, pan_y, zoom))
    return CameraMove(name, pan_x, pan_y, zoom, confidence=max(float(fit[best]) - rival, 0.0))


def _detail(grey: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """`grey` [n, h, w] less its local mean over the visible ground, 0 elsewhere: large blotches would blur the correlation."""
    size = grey.shape[1] // 8 * 2 + 1

    def blur(image):  # along rows, then along columns: eight times faster than a square window
        image = F.avg_pool2d(image[:, None], (1, size), 1, (0, size // 2), count_include_pad=False)
        return F.avg_pool2d(image, (size, 1), 1, (size // 2, 0), count_include_pad=False)[:, 0]

    return (grey - blur(grey * visible) / blur(visible).clamp(min=1e-3)) * visible


def _hypotheses() -> torch.Tensor:
    """[m, 3]: pan to the right, pan down (frame heights) and log zoom over the clip."""
    pans = torch.arange(-12, 13) * 0.05
    sideways = torch.stack([pans, 0 * pans, 0 * pans], 1)
    upright = torch.stack([0 * pans, pans, 0 * pans], 1)[::2]
    zooms = torch.arange(-8, 13) * 0.045
    zooms = torch.stack([0 * zooms, 0 * zooms, zooms], 1)
    return torch.cat([sideways, upright[upright[:, 1] != 0], zooms[zooms[:, 2] != 0]])


def _correlations(first, first_visible, second, second_visible, moves) -> torch.Tensor:
    """Correlation [m] of `second` [h, w] with `first` [h, w] after each of `moves` [m, 3], over ground visible in both."""
    h, w = first.shape
    x, y = ((torch.arange(size) + 0.5 - size / 2) / h for size in (w, h))
    grow = torch.exp(moves[:, 2])[:, None]
    # a point of the second frame was, in the first, where the camera has not yet moved away from it
    from_x = (x / grow + moves[:, :1]) * (2 * h / w)
    from_y = (y / grow + moves[:, 1:2]) * 2
    grid = torch.stack([from_x[:, None, :].expand(-1, h, w), from_y[:, :, None].expand(-1, h, w)], -1)
    source = torch.stack([first, first_visible]).expand(len(moves), 2, h, w)
    warped, seen = F.grid_sample(source, grid, align_corners=False).unbind(1)
    weight = (seen > 0.9) * second_visible
    covariance = (weight * warped * second).sum((1, 2))
    return covariance / ((weight * warped**2).sum((1, 2)) * (weight * second**2).sum((1, 2))).sqrt().clamp(min=1e-6)


def _camera_name(pan_x: float, pan_y: float, zoom: float) -> str | None:
    if zoom > STILL_ZOOM:
        return "zooms in"
    if abs(pan_y) >= STILL_PAN or zoom < -STILL_ZOOM:
        return None
    if abs(pan_x) < STILL_PAN:
        return "static"
    return "pans right" if pan_x > 0 else "pans left"
