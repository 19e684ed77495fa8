"""Distance in the latent space of a VAE: MAE_lat and MSE_lat of LUVE (arXiv 2602.11564), Table 12.

    MAE = mean |E(v) - E(r)|,  MSE = mean (E(v) - E(r))^2

E the posterior's mean, normalised by the VAE's own statistics (about unit variance), over all latent values; lower is closer, 0 is equal.
As in the paper's losses E sees crops: up to `TILES` squares of `SIDE` pixels, evenly spread over the frame, each through the whole
clip (the encoder is causal and is fed 1, then 4 frames at a time, so memory does not grow with length). Frames after the last full
group of four are left out, as the VAE leaves them out.

`latent_mse` uses the VAE given as `--weights vae=FOLDER` (Wan2.1's for the paper's numbers); `latent_mse[miniature]` that of the
embedded base.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from muralist.eval.metrics._shared import mean
from muralist.eval.registry import Metric, Setup, Unavailable, register
from muralist.eval.source import Source
from muralist.store.weights import locate
from muralist.tiling import Box

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

SIDE, TILES = 256, 4


class LatentDistance:
    """See the module."""

    def __init__(self, vae: AutoencoderKLWan, name: str):
        self._name, self._vae, self._group = name, vae, []
        self._ours, self._theirs = CropEncoder(vae), CropEncoder(vae)
        self._absolute: list[float] = []
        self._squared: list[float] = []

    def add(self, frame: torch.Tensor, reference: torch.Tensor) -> None:
        self._group.append((crops(frame, self._vae), crops(reference, self._vae)))
        if len(self._group) == (4 if self._ours.started else 1):
            ours, theirs = (torch.stack(part, dim=1) for part in zip(*self._group))
            difference = self._ours.encode(ours) - self._theirs.encode(theirs)
            self._absolute.append(difference.abs().mean().item())
            self._squared.append(difference.square().mean().item())
            self._group = []

    def result(self) -> dict[str, float]:
        return {self._name: mean(self._squared), f"{self._name}.mae": mean(self._absolute)}


class CropEncoder:
    """Crops of one video through the streaming encoder, each with a history of its own."""

    def __init__(self, vae: AutoencoderKLWan):
        from muralist.nn.encoder import StreamingEncoder

        self._encoder, self._caches = StreamingEncoder(vae), defaultdict(dict)

    @property
    def started(self) -> bool:
        return bool(self._caches)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """[n, t, H, W, 3] in [0, 1], t = 1 the first time and 4 after -> normalised latents [n, C, 1, h, w]."""
        first, size = not self.started, tuple(frames.shape[2:4])
        boxes = self._encoder.boxes(Box.whole(*(side // self._encoder.spatial_factor for side in size)), size)
        found = []
        for number, crop in enumerate(frames):
            about = {"first": first, "caches": self._caches[number]}
            found.append(self._encoder.second_part(self._encoder.first_part(crop, boxes, size, **about), **about))
        return torch.cat(found)


def crops(frame: torch.Tensor, vae: AutoencoderKLWan) -> torch.Tensor:
    """Up to TILES squares of a frame [H, W, 3], evenly spread: [n, side, side, 3]; smaller frames are one crop of whole latents."""
    factor = vae.config.scale_factor_spatial
    height, width = (min(side // factor * factor, SIDE) for side in frame.shape[:2])
    if not height or not width:
        raise Unavailable(f"a frame of {frame.shape[1]}x{frame.shape[0]} pixels is smaller than a latent of {factor}x{factor}")
    places = tile_places(frame.shape[0], frame.shape[1], height, width)
    return torch.stack([frame[y : y + height, x : x + width] for y, x in places])


def tile_places(frame_height: int, frame_width: int, height: int, width: int) -> list[tuple[int, int]]:
    """(top, left) of at most TILES tiles: as many rows and columns as fit without overlap, thinned out evenly."""
    rows, columns = frame_height // height, frame_width // width
    count = min(rows * columns, TILES)
    chosen = [round((i + 0.5) * rows * columns / count - 0.5) for i in range(count)]
    place = lambda index, number, full, side: round((index + 0.5) * full / number - side / 2)  # noqa: E731
    return [(place(i // columns, rows, frame_height, height), place(i % columns, columns, frame_width, width)) for i in chosen]


def _start(name: str, folder: Path | None, setup: Setup, source: Source | None) -> LatentDistance:
    if folder is None:
        raise Unavailable("no VAE given: --weights vae=FOLDER")
    vae = _load(folder, setup.device)
    try:
        return LatentDistance(vae, name)
    except ValueError as error:
        raise Unavailable(f"{folder}: {error}") from None


def _load(folder: Path, device: torch.device) -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    if not (folder / "config.json").is_file():
        raise Unavailable(f"{folder} holds no diffusers VAE (config.json and safetensors)")
    try:
        vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise Unavailable(f"{folder} cannot be loaded as a Wan VAE ({str(error).splitlines()[0][:100]})") from error
    return vae.to(device).eval()


ABOUT = {"kind": "pair", "unit": "", "better": "lower"}
register(
    Metric(
        name="latent_mse",
        summary="squared and absolute distance in the latents of a VAE that is given",
        origin="LUVE (arXiv 2602.11564), Table 12",
        needs="--weights vae=FOLDER",
        start=lambda setup, source: _start("latent_mse", setup.weights.get("vae"), setup, source),
        **ABOUT,
    )
)
register(
    Metric(
        name="latent_mse[miniature]",
        summary="squared and absolute distance in the latents of the embedded VAE",
        origin="LUVE (arXiv 2602.11564), Table 12, in another latent space",
        start=lambda setup, source: _start("latent_mse[miniature]", locate("miniature") / "vae", setup, source),
        **ABOUT,
    )
)
