"""Duplicated subjects: things that the file shows more often than its proxy does.

With a proxy: what differs from the proxy at its own place, stands out from its surroundings, and yet is found again at another place of the
proxy, is a copy of that. This needs no idea of what a subject is. Without a proxy nothing general can be said of how often a subject should be
there; only in videos of the world (`data.world`) are the objects known, and one is expected.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from muralist.data.score import measure
from muralist.eval.diagnose.finding import Finding, Result, untold

NAME, UNIT = "duplicated subjects", "copies"
LOOKS = 9  # moments looked at
HALF = 0.5  # of the moments must agree
ROWS = 64  # at which pictures are compared
DIFFERS = 0.10  # RGB distance (root mean square over channels) between file and proxy
AREA = 0.004  # of the frame; smaller things are not subjects
STANDS_OUT = 0.06  # RGB distance between a thing and its surroundings, in file and proxy
ALIKE = 0.5  # the copy's distance from its original, as a share of its distance from what the proxy has at its place
AT_MOST = 0.12  # and that distance itself


def looks(num_frames: int) -> list[int]:
    """The frames at which subjects are counted."""
    return sorted(set(np.linspace(0, num_frames - 1, min(LOOKS, num_frames)).round().astype(int).tolist()))


def subjects(frames: list[torch.Tensor], proxy: list[torch.Tensor] | None) -> Result:
    """Compare pictures [3, h, w] of the file with those of the proxy at the same moments, in values of 0 to 1."""
    if proxy is None:
        return _against_one(frames)
    counts = [len(copies(frame, proxy[round(i * (len(proxy) - 1) / max(len(frames) - 1, 1))])) for i, frame in enumerate(frames)]
    return _result(counts, "than the proxy", "Every subject is there as often as in the proxy.")


def _against_one(frames: list[torch.Tensor]) -> Result:
    seen = measure(torch.stack(frames).movedim(1, -1))
    if seen.ground is None or seen.shape is None or seen.num_objects < 1:
        return untold(NAME, UNIT, 1, "how many subjects there should be only a proxy says; give one with --proxy")
    return _result([seen.num_objects - 1], "than the one expected (a scene of the world)", "One object, as expected (a scene of the world).")


def _result(counts: list[int], than: str, fine: str) -> Result:
    """The finding from copies counted at each moment."""
    value = float(np.mean(counts))
    share = float(np.mean([count > 0 for count in counts]))
    found = share >= HALF
    more = max(1, round(float(np.median([count for count in counts if count])))) if found else 0
    sentence = f"{more} more subject{'s' * (more > 1)} {than}." if found else fine
    return Result(Finding(name=NAME, value=value, unit=UNIT, threshold=HALF, found=found, sentence=sentence))


def copies(frame: torch.Tensor, proxy: torch.Tensor) -> list[tuple[float, float]]:
    """Centres (x, y; 0 to 1) of things in `frame` [3, h, w] that are copies of a thing in `proxy` [3, h', w']."""
    rows, columns = ROWS, max(2 * round(ROWS * frame.shape[2] / frame.shape[1] / 2), 2)
    frame, proxy = (F.interpolate(image[None], (rows, columns), mode="area")[0] for image in (frame, proxy))
    proxy = proxy + (frame - proxy).flatten(1).median(1).values[:, None, None]  # a cast of colour is another finding
    differs = ndimage.binary_opening(_distance(frame - proxy) > DIFFERS)
    labels, count = ndimage.label(ndimage.binary_closing(differs, iterations=2))
    things = (torch.from_numpy(labels == k) for k in range(1, count + 1))
    found = [thing for thing in things if float(thing.float().mean()) >= AREA and _is_copy(frame, proxy, thing)]
    return [tuple(((thing.nonzero().float().mean(0) + 0.5) / torch.tensor([rows, columns])).flip(0).tolist()) for thing in found]


def _distance(difference: torch.Tensor) -> np.ndarray:
    """Root mean square over channels of a difference [3, h, w]."""
    return difference.square().mean(0).sqrt().numpy()


def _is_copy(frame: torch.Tensor, proxy: torch.Tensor, thing: torch.Tensor) -> bool:
    """Whether `thing` [h, w] (bool) of the frame stands out, and so does something like it elsewhere in the proxy, still there in the frame."""
    if _contrast(frame, thing) < STANDS_OUT:
        return False
    distance = _matches(frame, proxy, thing)
    here = float(distance[0, 0])
    rows, columns = thing.nonzero().T
    height, width = distance.shape
    down, right = torch.arange(height), torch.arange(width)
    down, right = torch.where(down > height // 2, down - height, down), torch.where(right > width // 2, right - width, right)
    inside = ((down + rows.min() >= 0) & (down + rows.max() < frame.shape[1]))[:, None] & (
        (right + columns.min() >= 0) & (right + columns.max() < frame.shape[2])
    )
    distance = torch.where(inside, distance, torch.inf)
    best = int(distance.argmin())
    value, shift = float(distance.flatten()[best]), (int(down[best // width]), int(right[best % width]))
    original = torch.roll(thing, shift, (0, 1))
    still_there = float((frame - proxy).square().mean(0).sqrt()[original].mean()) < DIFFERS
    return value < min(ALIKE * here, AT_MOST) and _contrast(proxy, original) >= STANDS_OUT and still_there


def _contrast(image: torch.Tensor, thing: torch.Tensor) -> float:
    """Distance between the mean colour of a thing and that of a ring about it."""
    ring = torch.from_numpy(ndimage.binary_dilation(thing.numpy(), iterations=4) & ~ndimage.binary_dilation(thing.numpy(), iterations=1))
    if not ring.any():
        return 0.0
    return float((image[:, thing].mean(1) - image[:, ring].mean(1)).square().mean().sqrt())


def _matches(frame: torch.Tensor, proxy: torch.Tensor, thing: torch.Tensor) -> torch.Tensor:
    """Root mean square distance [2h, 2w] between the thing and the proxy, for every shift (wrapped around), by three correlations."""
    size = (2 * thing.shape[0], 2 * thing.shape[1])
    mask = thing.float()
    spectrum = lambda image: torch.fft.rfft2(image, s=size)  # noqa: E731
    square = spectrum(proxy.square().sum(0)) * spectrum(mask).conj()
    cross = (spectrum(proxy) * spectrum(frame * mask).conj()).sum(0)
    total = torch.fft.irfft2(square - 2 * cross, s=size) + (frame * mask).square().sum()
    return (total.clamp(min=0) / (3 * mask.sum())).sqrt()
