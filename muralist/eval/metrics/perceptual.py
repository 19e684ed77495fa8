"""Detail and likeness by deep features: `hd_lpips`, `mhd_lpips`, `lpips`, and all three with our own network.

    HD-LPIPS  = sum over k = 3, 4, 5 of the mean over frames of LPIPS(v_t, R_k(v)_t)     (UltraGen, arXiv 2510.18775, appendix D, eq. 15)
    mHD-LPIPS = the mean over k instead of the sum, a third of it                         (PixelWizard, arXiv 2605.25801, eq. 9.10)

R_k shrinks a frame by 2^k and enlarges it again, so the distance is what is lost at a coarser scale. In [0, infinity), higher means more
fine detail (noise counts as detail too). `lpips` is the mean over frames of LPIPS to the reference, in [0, infinity), lower is closer.

LPIPS is the published network (`muralist.eval.features.lpips`) with weights that a person brings; the `[mural]` forms put our network's
five stages into the same formula with all channels weighted alike. Frames are seen at native size, tile by tile with halos: exactly the
value of the whole frame, in bounded memory. A network costs seconds a 4K frame, so at most `FRAMES` evenly spread frames are looked at
(all of a shorter video); the value `NAME.frames` says how many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch

from muralist.eval.features.lpips import MIN_SIDE, Network, distances, load_lpips
from muralist.eval.features.mural import load_mural
from muralist.eval.features.patches import spread
from muralist.eval.metrics._linear import area, linear
from muralist.eval.metrics._shared import mean, once_a_frame
from muralist.eval.registry import Metric, Setup, Unavailable, register
from muralist.eval.source import Source

SCALES = (3, 4, 5)
FRAMES = 16


def rebuilt(x: torch.Tensor, k: int) -> torch.Tensor:
    """R_k: x [3, H, W] as area means, round(side / 2^k) of them, enlarged again to its size by linear interpolation; the R_k of HD-MSE."""
    (down, up), (down_x, up_x) = (_resampling(side, k, x.device) for side in x.shape[1:])
    return up @ (down @ x @ down_x.T) @ up_x.T


@lru_cache(maxsize=12)
def _resampling(side: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices that reduce and enlarge one dimension."""
    smaller = max(round(side / 2**k), 1)
    return area(side, smaller).float().to(device), linear(smaller, side).float().to(device)


def detail(network: Network, frame: torch.Tensor) -> torch.Tensor:
    """LPIPS of a frame [H, W, 3] to itself at each of the coarser scales, [3]."""
    x = frame.permute(2, 0, 1).contiguous()
    return torch.tensor(distances(network, x, [rebuilt(x, k) for k in SCALES]), dtype=torch.float64)


@lru_cache(maxsize=4)
def _shared_detail(network: Network) -> Callable[[torch.Tensor], torch.Tensor]:
    """`detail`, remembered for the frame at hand: the sum and the mean over scales ask for the same three numbers."""
    return once_a_frame(partial(detail, network))


class Detail:
    """Sum or mean over scales of the distance to the frame at a coarser scale."""

    def __init__(self, name: str, network: Network, source: Source, *, share: float):
        self._name, self._measure, self._share = name, _shared_detail(network), share
        self._wanted, self._index, self._found = frozenset(spread(source.info.num_frames, FRAMES)), 0, []

    def add(self, frame: torch.Tensor) -> None:
        if self._index in self._wanted:
            self._found.append(self._measure(frame))
        self._index += 1

    def result(self) -> dict[str, float]:
        each = torch.stack(self._found).mean(dim=0)
        scales = {f"{self._name}.k{k}": value for k, value in zip(SCALES, each.tolist())}
        return {self._name: self._share * each.sum().item(), **scales, f"{self._name}.frames": len(self._found)}


class Likeness:
    """Mean distance of a video's frames to the reference's."""

    def __init__(self, name: str, network: Network, source: Source):
        self._name, self._network = name, network
        self._wanted, self._index, self._found = frozenset(spread(source.info.num_frames, FRAMES)), 0, []

    def add(self, frame: torch.Tensor, reference: torch.Tensor) -> None:
        if self._index in self._wanted:
            a, b = (image.permute(2, 0, 1).contiguous() for image in (frame, reference))
            self._found += distances(self._network, a, [b])
        self._index += 1

    def result(self) -> dict[str, float]:
        return {self._name: mean(self._found), f"{self._name}.frames": len(self._found)}


def _published(setup: Setup) -> Network:
    if "lpips" not in setup.weights:
        raise Unavailable("no weights for lpips; give a safetensors file (docs/eval-weights.md), or use the [mural] form")
    return load_lpips(Path(setup.weights["lpips"]), setup.device)


def _ours(setup: Setup) -> Network:
    return load_mural(setup.device)


def _checked(source: Source) -> Source:
    if min(source.info.height, source.info.width) < MIN_SIDE:
        raise Unavailable(f"{source.path.name} is smaller than {MIN_SIDE} pixels")
    return source


def _register_detail(name: str, choose: Callable[[Setup], Network], share: float, origin: str, needs: str = "") -> None:
    register(
        Metric(
            name=name,
            kind="video",
            summary=f"detail lost at 1/8, 1/16 and 1/32 of the size, {'sum' if share == 1 else 'mean'} of perceptual distances",
            unit="",
            better="higher",
            origin=origin,
            start=lambda setup, source: Detail(name, choose(setup), _checked(source), share=share),
            needs=needs,
        )
    )


def _register_likeness(name: str, choose: Callable[[Setup], Network], origin: str, needs: str = "") -> None:
    register(
        Metric(
            name=name,
            kind="pair",
            summary="perceptual distance to the reference",
            unit="",
            better="lower",
            origin=origin,
            start=lambda setup, source: Likeness(name, choose(setup), _checked(source)),
            needs=needs,
        )
    )


_NEEDS = "--weights lpips=FILE"
_HD, _MHD, _LPIPS = "UltraGen (arXiv 2510.18775), eq. 15", "PixelWizard (arXiv 2605.25801), eq. 9.10", "Zhang et al., CVPR 2018"
_register_detail("hd_lpips", _published, 1.0, _HD, _NEEDS)
_register_detail("mhd_lpips", _published, 1 / len(SCALES), _MHD, _NEEDS)
_register_likeness("lpips", _published, _LPIPS, _NEEDS)
_register_detail("hd_lpips[mural]", _ours, 1.0, f"formula of {_HD}, this package's network")
_register_detail("mhd_lpips[mural]", _ours, 1 / len(SCALES), f"formula of {_MHD}, this package's network")
_register_likeness("lpips[mural]", _ours, f"formula of {_LPIPS}, this package's network")
