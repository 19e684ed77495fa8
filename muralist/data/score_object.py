"""Finding the objects of a frame for `score`: matched templates on log-likelihood ratios, object against ground.

Every pixel votes, for each colour of the list, on "body of such an object" and "dark rim of such an object" against
"ground"; a template adds the votes under its body and rim. The sum is the likelihood ratio of "this shape is here"
against "there is nothing", so larger, smaller and differently shaped templates compare fairly, a weak or missing rim
costs a little and does not decide, and an object of the ground's own colour is found by its rim. Both sides allow for
colours that nothing explains, which bounds the votes: blotches cannot shout. The templates are drawn here from what the words mean; the renderer is not asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from muralist.data.score_ground import STRANGE, GroundModel, along_and_off
from muralist.data.world import COLOURS, SHAPES

NAMES = tuple(COLOURS)
RADII = tuple(0.105 * 1.085**k for k in range(16))  # frame heights: 0.105 to 0.357
RIM, RIM_SHADE = 0.13, 0.25  # of the radius, of the colour
SHADES = torch.tensor([0.8, 0.85, 0.9, 0.95, 1.0])  # that the body of an object shows
SHARPEN = 1.0  # unsharp mask under which the rim of a camouflaged object is sought
GAP = 200.0  # votes a gap in such a rim costs, times the square of the ideal vote
NEUTRAL = 0.5  # body votes of a camouflaged object
OFF = 0.08  # how far (RGB, standard deviation) an object's colours may lie off its nominal hue
RECOGNISED = 0.42  # share of the ideal object's votes below which something is not called an object
FURTHER = 0.5  # the same for one more object beside another
MOST = 4  # objects counted per frame
FINALISTS = 2  # colours for which all shapes and sizes are tried


@dataclass(frozen=True, slots=True)
class Found:
    """One object in one frame: per shape the votes [5], the centre x, y [5, 2] and the radius [5], in frame heights from the middle."""

    colour: str
    shape: str
    quality: float  # share of an ideal object's votes, about 1 for a clean render
    votes: torch.Tensor
    centres: torch.Tensor
    radii: torch.Tensor


def outline(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Inside (bool) of a shape of radius 1 about the origin, y down."""
    if shape == "ball":
        return np.hypot(x, y) < 1
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.71) < 0.33
    if shape == "cube":  # a square front and two receding faces: a square that lacks two opposite corners
        return (abs(x) < 0.85) & (abs(y) < 0.85) & (abs(x + y) < 1.35)
    angle = np.arctan2(x, -y)
    if shape == "triangle":
        turn = angle % (2 * math.pi / 3) - math.pi / 3  # 0 in the middle of a side
        return np.hypot(x, y) * np.cos(turn) < 0.57
    turn = abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)  # 0 at a point of the star, pi / 5 between two
    tip, notch = 1.1, 0.5
    # the straight edge from (tip, 0) to (notch, pi / 5), as a bound on the radius at each angle
    edge = tip * notch * math.sin(math.pi / 5) / (notch * np.sin(math.pi / 5 - turn) + tip * np.sin(turn))
    return np.hypot(x, y) < edge


@dataclass(frozen=True, slots=True)
class _Bank:
    """All templates for one frame size: `spectra` [2, k, H, W / 2 + 1] (body, rim), their areas [2, k] in pixels, shape and radius of each."""

    padded: tuple[int, int]
    spectra: torch.Tensor
    areas: torch.Tensor
    shape: torch.Tensor  # [k], index into SHAPES
    radius: torch.Tensor  # [k], frame heights

    def subset(self, chosen: torch.Tensor) -> _Bank:
        return _Bank(self.padded, self.spectra[:, chosen], self.areas[:, chosen], self.shape[chosen], self.radius[chosen])


@lru_cache(maxsize=4)
def _bank(height: int, width: int) -> _Bank:
    margin = math.ceil(1.15 * RADII[-1] * height) + 1  # what a template may overhang without meeting the opposite side
    padded = tuple(_fast_size(size + margin) for size in (height, width))
    shape, radius, drawn = [], [], []
    for index, name in enumerate(SHAPES):
        for r in RADII:
            shape.append(index)
            radius.append(r)
            drawn.append(_template(name, r * height, padded))
    drawn = torch.stack(drawn, 1)
    return _Bank(padded, torch.fft.rfft2(drawn).conj(), drawn.sum((2, 3)), torch.tensor(shape), torch.tensor(radius))


def _fast_size(size: int) -> int:
    """The next multiple of 8: short transforms without large prime factors."""
    return math.ceil(size / 8) * 8


def _template(shape: str, radius: float, padded: tuple[int, int], fine: int = 4) -> torch.Tensor:
    """Shares of body and rim [2, H, W] per pixel for a shape of `radius` pixels, its centre at pixel (0, 0), wrapped around."""
    half = math.ceil(1.15 * radius) + 1
    at = (np.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5
    inside = outline(shape, at[None, :] / radius, at[:, None] / radius)
    body = ndimage.distance_transform_edt(inside) > RIM * radius * fine
    parts = torch.from_numpy(np.stack([body, inside & ~body]).astype(np.float32))
    parts = F.avg_pool2d(parts, fine)
    parts = F.pad(parts, (0, padded[1] - 2 * half - 1, 0, padded[0] - 2 * half - 1))
    return parts.roll((-half, -half), (1, 2))


@dataclass(frozen=True, slots=True)
class Ballot:
    """How pixels vote on one colour over one ground.

    `camouflage` is what body votes are raised by where the colour is one of the ground's own: they then say little either way
    and the rim decides, which therefore has to be dark. `ideal` [2] are the votes of a perfect body and rim.
    """

    colour: str
    ground: GroundModel
    camouflage: float = 0.0
    ideal: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, colour: str, ground: GroundModel) -> Ballot:
        axis = torch.tensor(COLOURS[colour])
        plain = cls(colour, ground)
        weakest = float(plain.votes(SHADES[:, None] * axis)[0].min())
        raised = cls(colour, ground, max(NEUTRAL - weakest, 0.0))
        body, rim = raised.votes(SHADES[:, None] * axis)[0].mean(), raised.votes(RIM_SHADE * axis)[1]
        return cls(colour, ground, raised.camouflage, (float(body), max(float(rim), 0.0)))

    def votes(self, frames: torch.Tensor) -> torch.Tensor:
        """Log-likelihood ratios [2, ...] (body, rim), this colour against the ground, for pixels `frames` [..., 3]; about -8 to 8."""
        axis, strange = torch.tensor(COLOURS[self.colour]), torch.tensor(STRANGE)
        shade, off = along_and_off(frames, axis)
        across = -off / (2 * OFF**2) - 2 * math.log(OFF) - math.log(float(axis.norm()))
        body = across - ((shade - 0.86).abs() - 0.16).clamp(min=0).square() / (2 * 0.07**2) - math.log(0.5)
        rim = across - (shade - RIM_SHADE).square() / (2 * 0.12**2) - math.log(0.3)
        if not self.camouflage:  # blur mixes the rim with what is beside it and may wash it out
            any_shade = across - ((shade - 0.55).abs() - 0.4).clamp(min=0).square() / (2 * 0.1**2) - math.log(1.2)
            rim = torch.logaddexp(rim + math.log(0.6), any_shade + math.log(0.4))
        sides = torch.stack([body + self.camouflage, rim])
        return torch.logaddexp(sides, strange) - torch.logaddexp(self.ground.log_density(frames), strange)


def find_objects(frames: torch.Tensor, ground: GroundModel) -> list[list[Found]]:
    """The objects of each of `frames` [n, h, w, 3] (h even, about 128), the clearest first; [] where there is none."""
    polls = [_poll(frames, Ballot.of(name, ground)) for name in NAMES]
    ballots, ideal = (torch.stack(t) for t in zip(*polls))  # [8, 2, n, h / 2, w / 2] and [8, 2]
    bank = _bank(*ballots.shape[-2:])
    found: list[list[Found]] = [[] for _ in frames]
    open_frames = list(range(len(frames)))
    for turn in range(MOST):
        hits = _search(ballots[:, :, open_frames], ideal, bank, further=turn > 0) if open_frames else []
        hits = {i: hit for i, hit in zip(open_frames, hits) if hit is not None}
        for i, hit in hits.items():
            found[i].append(hit)
            ballots[:, :, i] = torch.where(_covered(hit, ballots.shape[-2:]), -1.0, ballots[:, :, i])
        open_frames = list(hits)
    return found


def _poll(frames: torch.Tensor, ballot: Ballot) -> tuple[torch.Tensor, torch.Tensor]:
    """Votes [2, n, h / 2, w / 2] of `frames` [n, h, w, 3] on one colour, and the votes [2] of an ideal object."""
    votes, ideal = ballot.votes(frames), torch.tensor(ballot.ideal)
    if ballot.camouflage:
        # rim lines are thin: a template one pixel off must not lose more than it gains; but the more the ground looks like a rim,
        # the more a gap in the line has to count
        votes[1] = ballot.votes(_sharpened(frames))[1].clamp(min=-GAP / max(ballot.ideal[1], 1.0) ** 2)
        votes[0] -= 0.5 * votes[1].clamp(min=0)  # a line inside the body speaks against it
        # bare ground must not vote for an object, or the largest template would always win
        excess = max(float(votes[0].median()) + NEUTRAL, 0.0)
        votes[0] -= excess
        ideal[0] = min(max(float(ideal[0]) - excess, NEUTRAL), 1.0)  # its body is not what an object is recognised by
    return half_size(votes), ideal


def _sharpened(frames: torch.Tensor) -> torch.Tensor:
    """`frames` [n, h, w, 3] with a blurred rim made as dark again as it was."""
    image = frames.movedim(-1, 1)
    soft = F.avg_pool2d(F.avg_pool2d(image, (1, 7), 1, (0, 3), count_include_pad=False), (7, 1), 1, (3, 0), count_include_pad=False)
    return (image + SHARPEN * (image - soft)).clamp(0, 1).movedim(1, -1)


def half_size(image: torch.Tensor) -> torch.Tensor:
    """Means of 2 x 2 pixels over the last two axes."""
    return 0.25 * (image[..., ::2, ::2] + image[..., 1::2, ::2] + image[..., ::2, 1::2] + image[..., 1::2, 1::2])


def _search(ballots: torch.Tensor, ideal: torch.Tensor, bank: _Bank, *, further: bool) -> list[Found | None]:
    """The likeliest object of each frame in `ballots` [8, 2, n, h, w], None where nothing is recognised.

    A `further` object, beside one already found, has to be clearer, and is sought only where a rough look leaves a chance.
    """
    h, w = ballots.shape[-2:]
    spectra = torch.fft.rfft2(ballots, s=bank.padded)
    rough = bank.subset(((bank.shape == 0) | (bank.shape == 3)) & (torch.arange(len(bank.shape)) % len(RADII) % 5 == 2))
    peaks = torch.stack([torch.stack([_scores(frame, rough, h, w).max() for frame in colour.unbind(1)]) for colour in spectra])  # [8, n]
    finalists = peaks.sum(1).topk(FINALISTS).indices
    return [
        None if further and peaks[:, i].max() <= 0 else _clearest(spectra[:, :, i], finalists, ideal, bank, (h, w), FURTHER if further else RECOGNISED)
        for i in range(peaks.shape[1])
    ]


def _clearest(spectra: torch.Tensor, finalists: torch.Tensor, ideal: torch.Tensor, bank: _Bank, size: tuple[int, int], least: float) -> Found | None:
    """The likeliest object of the `finalists` colours in one frame, `spectra` [8, 2, H, W / 2 + 1]; None if its quality is below `least`."""
    pairs = [_scores(spectra[c], bank, *size).flatten(1).max(-1) for c in finalists]  # one at a time stays in the cache
    top, where = (torch.stack(t) for t in zip(*pairs))  # [c, k]
    c, k = divmod(int(top.argmax()), top.shape[1])
    quality = float(top[c, k] / (ideal[finalists[c]] * bank.areas[:, k]).sum())
    return _found(NAMES[finalists[c]], quality, top[c], where[c], bank, *size) if quality > least else None


def _scores(spectra: torch.Tensor, bank: _Bank, h: int, w: int) -> torch.Tensor:
    """Votes [k, h, w] under every template at every position, from the `spectra` [2, H, W / 2 + 1] of one frame's votes."""
    product = torch.addcmul(spectra[0] * bank.spectra[0], spectra[1], bank.spectra[1])
    return torch.fft.irfft2(product, s=bank.padded)[:, :h, :w]


def _found(colour: str, quality: float, top, where, bank: _Bank, h: int, w: int) -> Found:
    """The best template of each shape, from votes `top` [k] at flat positions `where` [k]."""
    best = [int(torch.where(bank.shape == s, top, -math.inf).argmax()) for s in range(len(SHAPES))]
    y, x = where[best] // w, where[best] % w
    centres = torch.stack([(x + 0.5 - w / 2) / h, (y + 0.5 - h / 2) / h], 1)
    return Found(colour, SHAPES[int(top[best].argmax())], quality, top[best], centres, bank.radius[best])


def _covered(hit: Found, size: tuple[int, int], grown: float = 1.25) -> torch.Tensor:
    """Pixels [h, w] (bool) on or next to an object, its holes included."""
    h, w = size
    s = SHAPES.index(hit.shape)
    x = ((torch.arange(w) + 0.5 - w / 2) / h - hit.centres[s, 0])[None, :]
    y = ((torch.arange(h) + 0.5 - h / 2) / h - hit.centres[s, 1])[:, None]
    return torch.hypot(x, y) < grown * hit.radii[s]


def visible_ground(found: list[list[Found]], size: tuple[int, int]) -> torch.Tensor:
    """1 where no object was found, else 0: [n, h, w]."""
    seen = torch.ones(len(found), *size)
    for i, hits in enumerate(found):
        for hit in hits:
            seen[i][_covered(hit, size)] = 0
    return seen
