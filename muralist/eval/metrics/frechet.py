"""Fréchet distances between the patches of two sets of videos: `fid_patch`, `hd_fvd`, and both with our own network.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))                     (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule ...", eq. 6)

with means m and covariances S (divided by n - 1) of the features of either set. In [0, infinity), lower is closer; its expected value
falls with the number of samples, so only sets of equal size compare. With no more samples than features a covariance is singular and the
distance mostly tells how many samples there were: it is then not measured (`Unavailable`), rather than shrunk to a number of another meaning.

`fid_patch` (LUVE, arXiv 2602.11564, appendix F): 8 frames a video, patches of 256x256 at native size, Inception's pool3 (2048 features).
`hd_fvd` (UltraGen, arXiv 2510.18775, appendix D): clips of 16 frames, patches of 224x224 at native size, I3D's logits (400 features).
`fid_patch[mural]`, `hd_fvd[mural]`: the same patches through our network. For a clip these are the means over time of its frames' 64
features and of their absolute changes from frame to frame, 128 numbers: the network itself knows nothing of time.

Patches are those of a centred grid. Where it has more than `MAX_PATCHES` (a 4K frame), evenly spread ones are taken, others in the next
frame or clip: a video costs the same time and memory at any size (16 frames of 32 patches are 310 MB).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

from muralist.eval.features import i3d, inception
from muralist.eval.features.mural import Mural, load_mural
from muralist.eval.features.patches import cut, patch_boxes, spread
from muralist.eval.registry import Metric, Setup, Unavailable, register
from muralist.eval.source import Source

MAX_PATCHES = 32
FID_SIDE, FID_FRAMES = 256, 8
CLIP = 16  # frames
BATCH = 8  # patches that a network sees at once

Embed = Callable[[torch.Tensor], torch.Tensor]


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Squared Fréchet distance of normal distributions fitted to samples x [n, D] and y [m, D]; double precision, at least 0.

    With S = L L^T the trace of (S1 S2)^(1/2) is the sum of the singular values of L1^T L2: no square root of a product that is not
    symmetric, nothing complex, and exact where a covariance is singular. Raises Unavailable where n or m is not above D.
    """
    for samples in (x, y):
        if len(samples) <= samples.shape[1]:
            raise Unavailable(f"{len(samples)} samples of {samples.shape[1]} features: more samples than features are needed, give more or larger videos")
    (m1, l1), (m2, l2) = _moments(x), _moments(y)
    cross = scipy.linalg.svdvals(l1.T @ l2).sum()
    return max(float(((m1 - m2) ** 2).sum() + (l1**2).sum() + (l2**2).sum() - 2 * cross), 0.0)


def _moments(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and a root L [D, D] of the covariance, S = L L^T."""
    samples = x.detach().cpu().double().numpy()
    mean = samples.mean(axis=0)
    centred = (samples - mean) / np.sqrt(len(samples) - 1)
    return mean, scipy.linalg.qr(centred, mode="economic")[1].T


class Patches:
    """Features of the patches of single frames, evenly spread over each video."""

    def __init__(self, name: str, embed: Embed):
        self._name, self._embed = name, embed

    def start(self, source: Source) -> None:
        _check_size(source, FID_SIDE, 1)
        self._wanted, self._index, self._found = spread(source.info.num_frames, FID_FRAMES), 0, []

    def add(self, frame: torch.Tensor) -> None:
        if self._index in self._wanted:
            boxes = patch_boxes(*frame.shape[:2], FID_SIDE, MAX_PATCHES, turn=self._wanted.index(self._index))
            self._found.append(_in_batches(self._embed, cut(frame, boxes)))
        self._index += 1

    def features(self) -> torch.Tensor:
        return torch.cat(self._found)

    def distance(self, features: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        return _result(self._name, features, reference)


class Clips:
    """Features of patches through time: of every full clip of `CLIP` frames the patches [n, 3, T, side, side]."""

    def __init__(self, name: str, embed: Embed):
        self._name, self._embed = name, embed

    def start(self, source: Source) -> None:
        _check_size(source, i3d.SIDE, CLIP)
        self._held, self._found = [], []

    def add(self, frame: torch.Tensor) -> None:
        self._held.append(cut(frame, patch_boxes(*frame.shape[:2], i3d.SIDE, MAX_PATCHES, turn=len(self._found))))
        if len(self._held) == CLIP:
            # patch by patch into the network: stacking the whole clip would hold it twice
            count = len(self._held[0])
            self._found.append(torch.cat([_in_batches(self._embed, torch.stack([f[i] for f in self._held], dim=1)[None]) for i in range(count)]))
            self._held = []

    def features(self) -> torch.Tensor:
        return torch.cat(self._found)

    def distance(self, features: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        return _result(self._name, features, reference)


def _check_size(source: Source, side: int, frames: int) -> None:
    info = source.info
    if min(info.height, info.width) < side or info.num_frames < frames:
        size = f"{info.width}x{info.height}, {info.num_frames} frames"
        raise Unavailable(f"{source.path.name} ({size}) is smaller than a patch of {side}x{side}, {frames} frames")


@torch.inference_mode()
def _in_batches(embed: Embed, patches: torch.Tensor) -> torch.Tensor:
    return torch.cat([embed(part).float().cpu() for part in patches.split(BATCH)])


def _result(name: str, features: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    return {name: frechet_distance(features, reference), f"{name}.samples": len(features), f"{name}.reference_samples": len(reference)}


def embed_clip(network: Mural) -> Embed:
    """Patches [B, 3, T, side, side] to [B, 128]: over time the mean of the frames' features and the mean of their absolute changes."""

    def embed(clips: torch.Tensor) -> torch.Tensor:
        each = torch.stack([network(clip.transpose(0, 1)) for clip in clips])  # [B, T, 64]
        return torch.cat([each.mean(dim=1), each.diff(dim=1).abs().mean(dim=1)], dim=1)

    return embed


def _brought(setup: Setup, name: str, load: Callable) -> Embed:
    """The network whose weights the person brought; Unavailable where there are none."""
    if name not in setup.weights:
        raise Unavailable(f"no weights for {name}; give a safetensors file (docs/eval-weights.md), or use the [mural] form")
    return load(Path(setup.weights[name]), setup.device)


def _register(name: str, summary: str, origin: str, start: Callable[[Setup], Patches | Clips], needs: str = "") -> None:
    def begin(setup: Setup, source: Source | None) -> Patches | Clips:
        return start(setup)

    register(Metric(name=name, kind="set", summary=summary, unit="", better="lower", origin=origin, start=begin, needs=needs))


_register(
    "fid_patch",
    "Fréchet distance of 256x256 patches, Inception features",
    "LUVE (arXiv 2602.11564), appendix F",
    lambda setup: Patches("fid_patch", _brought(setup, "inception", inception.load_inception)),
    needs="--weights inception=FILE",
)
_register(
    "fid_patch[mural]",
    "the same patches through our own feature network",
    "LUVE's formula, this package's network",
    lambda setup: Patches("fid_patch[mural]", load_mural(setup.device)),
)
_register(
    "hd_fvd",
    "Fréchet distance of 224x224 patches of 16 frames, I3D features",
    "UltraGen (arXiv 2510.18775), appendix D",
    lambda setup: Clips("hd_fvd", _brought(setup, "i3d", i3d.load_i3d)),
    needs="--weights i3d=FILE",
)
_register(
    "hd_fvd[mural]",
    "the same patches through our own feature network, frame by frame, and its changes over time",
    "UltraGen's formula, this package's network",
    lambda setup: Clips("hd_fvd[mural]", embed_clip(load_mural(setup.device))),
)
