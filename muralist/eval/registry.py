"""What can be measured of a video, by name.

A metric is one of three kinds. All of them see each frame once, in order, as [H, W, 3] float32 in [0, 1], so that any number of them
share one reading of the file and none holds a whole video:

* `video`: of one file alone (spectrum, flicker, HD-MSE);
* `pair`: of a file and the file of the same name in the reference folder, frame by frame (PSNR, SSIM);
* `set`: of all files against all reference files, by the distribution of features (Fréchet distances).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from muralist.eval.source import Source

Better = Literal["higher", "lower", "neither"]


class Unavailable(Exception):
    """A metric cannot be measured here and now; the text says why. It is then skipped, with this reason, and all others go on."""


class VideoMeter(Protocol):
    """Measures one video."""

    def add(self, frame: torch.Tensor) -> None:
        """The next frame [H, W, 3], float32 in [0, 1], on the device of `Setup`. Other meters see the same tensor: read only."""

    def result(self) -> dict[str, float]:
        """Named values, the first one the metric's own; after the last frame."""


class PairMeter(Protocol):
    """Measures one video against another of the same size and length."""

    def add(self, frame: torch.Tensor, reference: torch.Tensor) -> None: ...

    def result(self) -> dict[str, float]: ...


class SetMeter(Protocol):
    """Turns each video of a set into feature vectors; `distance` compares two sets."""

    def start(self, source: Source) -> None:
        """A new video begins."""

    def add(self, frame: torch.Tensor) -> None: ...

    def features(self) -> torch.Tensor:
        """[n, D] of the video that was added last."""

    def distance(self, features: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        """[n, D] of all videos against [m, D] of all reference videos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a metric may need besides frames: paths of weights by name (`lpips`, `inception`, `i3d`, `clip`, `vae`), the device, the prompt."""

    weights: dict[str, Path] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prompts: dict[Path, str] = field(default_factory=dict)  # by file, where none is in the file's metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """An entry of the registry.

    `name` as typed (`psnr`, `hd_mse`, `fid_patch[mural]`); `origin` names paper and equation; `start` makes a meter for a source (for
    `set` metrics: once for all sources, with None) and raises `Unavailable` if something that it needs is not there. `needs` says what
    must be given for it (`--weights lpips=FILE`); a metric that needs nothing is measured unless others are asked for.
    """

    name: str
    kind: Literal["video", "pair", "set"]
    summary: str
    unit: str
    better: Better
    origin: str
    start: Callable[[Setup, Source | None], VideoMeter | PairMeter | SetMeter]
    needs: str = ""


REGISTRY: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Add a metric; a second one of the same name is a mistake of ours."""
    if metric.name in REGISTRY:
        raise ValueError(f"two metrics are called {metric.name}")
    REGISTRY[metric.name] = metric
    return metric


def available() -> dict[str, Metric]:
    """Every metric of `muralist.eval.metrics`, by name: each module there registers its own."""
    from muralist.eval import metrics

    for module in pkgutil.iter_modules(metrics.__path__, metrics.__name__ + "."):
        importlib.import_module(module.name)
    return dict(sorted(REGISTRY.items()))
