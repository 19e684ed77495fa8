"""What goes wrong with pictures, at a known strength: blur, noise, enlargement, compression.

All take and give [B, 3, H, W] in [0, 1]. A feature network learns to tell them apart and how strong they are; tests plant them.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# strength from barely visible to gross: standard deviation in pixels, standard deviation of the values, factor, 100 - JPEG quality
RANGES = {"blur": (0.35, 6.0), "noise": (0.004, 0.16), "enlargement": (1.15, 6.0), "compression": (8.0, 92.0)}


def degrade(x: torch.Tensor, kind: str, strength: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """One kind of damage at a strength within `RANGES`; `generator` is for noise."""
    if kind == "noise":
        return (x + strength * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return {"blur": blur, "enlargement": enlarge, "compression": compress}[kind](x, strength)


def blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur, borders mirrored."""
    radius = min(math.ceil(3 * sigma), min(x.shape[-2:]) - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=x.shape[1]), kernel.transpose(2, 3), groups=x.shape[1])


def enlarge(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Shrunk by `factor` with an antialiased bicubic filter and enlarged again to its size by bicubic interpolation."""
    size = x.shape[-2:]
    small = F.interpolate(x, [max(round(side / factor), 1) for side in size], mode="bicubic", antialias=True)
    return F.interpolate(small, size, mode="bicubic").clamp(0, 1)


def compress(x: torch.Tensor, loss: float) -> torch.Tensor:
    """Through JPEG at quality 100 - `loss`, one image at a time."""
    return torch.stack([_jpeg(image, round(100 - loss)) for image in x])


def _jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255


def grade(kind: str, strength: float) -> float:
    """Strength on a scale from 0 (the weakest of `RANGES`) to 1 (the strongest): logarithmic, but for compression."""
    low, high = RANGES[kind]
    return (strength - low) / (high - low) if kind == "compression" else math.log(strength / low) / math.log(high / low)


def of_grade(kind: str, u: float) -> float:
    """The inverse of `grade`."""
    low, high = RANGES[kind]
    return low + u * (high - low) if kind == "compression" else low * (high / low) ** u


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorDamage:
    """What is done to a training video so that it can stand for a generated anchor (PixelWizard, section 3.3; ranges as released).

    Shrunk by a factor, enlarged again, blurred, and in half of the cases noised; factor and standard deviation of the blur in pixels of a frame `height`
    pixels high, that of the noise for values in [0, 1] (the release counts in [-1, 1]). The release blurs at 240 rows: it draws a deviation of 3 to 5
    pixels there and cuts it off by a kernel of 7 to 11, which leaves 1.8 to 2.9, six times that at 1440 rows.
    """

    factor: tuple[float, float] = (8.0, 32.0)
    blur: tuple[float, float] = (10.8, 17.4)
    noise: tuple[float, float] = (0.0, 0.05)
    height: int = 1440

    def __call__(self, video: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """[T, H, W, 3] in [0, 1] -> the same, one strength for all frames."""
        share = video.shape[1] / self.height
        frames = enlarge(video.permute(0, 3, 1, 2), max(rng.uniform(*self.factor) * share, 1.0))
        frames = blur(frames, max(rng.uniform(*self.blur) * share, 0.1))
        if rng.random() < 0.5:
            generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
            frames = degrade(frames, "noise", rng.uniform(*self.noise), generator)
        return frames.permute(0, 2, 3, 1)
