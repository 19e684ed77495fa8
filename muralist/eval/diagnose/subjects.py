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
SHARE = 0.3  # of the moments must agree; a copy may be hidden or leave the picture
ROWS = 64  # at which pictures are compared
DIFFERS = 0.10  # RGB distance (root mean square over channels) between file and proxy
AREA = 0.004  # of the frame; smaller things are not subjects
STANDS_OUT = 0.06  # RGB distance between a thing and its surroundings, in file and proxy
ALIKE = 0.5  # the copy's distance from its original, as a share of its distance from what the proxy has at its place
AT_MOST = 0.12  # and that distance itself
SCALES = (1.0, 0.8, 1.25, 0.65, 1.55)  # at which the original is sought: copies are rarely of its size


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
    found = share >= SHARE
    more = max(1, round(float(np.median([count for count in counts if count])))) if found else 0
    sentence = f"{more} more subject{'s' * (more > 1)} {than}." if found else fine
    return Result(Finding(name=NAME, value=value, unit=UNIT, threshold=SHARE, found=found, sentence=sentence))


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
    change = (frame - proxy).square().mean(0)
    worst = min(ALIKE * float(change[thing].mean().sqrt()), AT_MOST)
    for scale in SCALES:
        distance, original = _nearest(frame, proxy, thing, scale)
        if distance < worst and _contrast(proxy, original) >= STANDS_OUT and float(change.sqrt()[original].mean()) < DIFFERS:
            return True
    return False


def _nearest(frame: torch.Tensor, proxy: torch.Tensor, thing: torch.Tensor, scale: float) -> tuple[float, torch.Tensor]:
    """Where the proxy is most like the thing made `scale` times as large: root mean square distance, and the place [h, w] (bool)."""
    size = [round(scale * side) for side in thing.shape]
    mask = F.interpolate(thing[None, None].float(), size, mode="area")[0, 0] > 0.5
    if not mask.any():
        return torch.inf, thing
    distance = _matches(F.interpolate(frame[None], size, mode="bilinear")[0], proxy, mask)
    rows, columns = mask.nonzero().T
    down, right = (torch.arange(n) - (torch.arange(n) >= (n + 1) // 2) * n for n in distance.shape)  # shifts, wrapped around
    fits_down = (down + rows.min() >= 0) & (down + rows.max() < proxy.shape[1])
    fits_right = (right + columns.min() >= 0) & (right + columns.max() < proxy.shape[2])
    distance = torch.where(fits_down[:, None] & fits_right, distance, torch.inf)
    best = divmod(int(distance.argmin()), distance.shape[1])
    place = torch.zeros_like(thing)
    if torch.isfinite(distance[best]):
        place[rows + down[best[0]], columns + right[best[1]]] = True
    return float(distance[best]), place


def _contrast(image: torch.Tensor, thing: torch.Tensor) -> float:
    """Distance between the mean colour of a thing and that of a ring about it."""
    ring = torch.from_numpy(ndimage.binary_dilation(thing.numpy(), iterations=4) & ~ndimage.binary_dilation(thing.numpy(), iterations=1))
    if not ring.any():
        return 0.0
    return float((image[:, thing].mean(1) - image[:, ring].mean(1)).square().mean().sqrt())


def _matches(frame: torch.Tensor, proxy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Root mean square distance between what the mask holds of the frame and the proxy, for every shift (wrapped around), by correlations."""
    size = [a + b for a, b in zip(mask.shape, proxy.shape[1:])]
    spectrum = lambda image: torch.fft.rfft2(image, s=size)  # noqa: E731
    held = frame * mask
    square = spectrum(proxy.square().sum(0)) * spectrum(mask.float()).conj()
    cross = (spectrum(proxy) * spectrum(held).conj()).sum(0)
    total = torch.fft.irfft2(square - 2 * cross, s=size) + held.square().sum()
    return (total.clamp(min=0) / (3 * mask.sum())).sqrt()
