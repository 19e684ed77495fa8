"""Low- and high-pass filters over the height and width of the token grid.

LUVE (section 3.3) filters what its frequency experts see; the public model card says that it is done by FFT of the activations and nothing
about the mask, so cutoff and edge are named values of ours. Frequencies are given as shares of the Nyquist limit of the token grid (half a
cycle a token), so that a filter means the same for any grid; time is not filtered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from muralist.errors import UserError
from muralist.nn.windows import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class RadialFilter:
    """A filter of real, even, radial transfer function: it moves nothing and keeps (low) or removes (high) the mean.

    `cutoff`: radius at which the low band passes one half, as a share of Nyquist (above 0, up to 1.5; the corner of the spectrum lies at
    1.41). `edge`: width of the raised-cosine transition around it; 0 is a sharp mask. The high band is one minus the low one.
    """

    band: Literal["low", "high"]
    cutoff: float = 0.25
    edge: float = 0.1

    def __post_init__(self) -> None:
        if self.band not in ("low", "high"):
            raise UserError(f"band {self.band!r}", where="filter.band", fix="use low or high")
        if not 0 < self.cutoff <= 1.5 or not 0 <= self.edge <= 1.5:
            raise UserError(f"cutoff {self.cutoff}, edge {self.edge}", where="filter", fix="use shares of Nyquist: cutoff above 0, edge from 0, both up to 1.5")

    def transfer(self, height: int, width: int) -> torch.Tensor:
        """Gain [height, width // 2 + 1], float32 in [0, 1], in the layout of `torch.fft.rfft2`."""
        radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)) * 2
        # an edge far below the spacing of frequencies is a sharp mask
        low = 0.5 - 0.5 * torch.sin(torch.pi * ((radius - self.cutoff) / max(self.edge, 1e-9)).clamp(-0.5, 0.5))
        return low if self.band == "low" else 1 - low

    def __call__(self, x: torch.Tensor, token_shape: Shape) -> torch.Tensor:
        """x [B, N, C] in raster order of the grid `token_shape` (f, y, x) -> the same shape and dtype; computed in float32."""
        frames, height, width = token_shape
        video = x.float().unflatten(1, (frames, height, width))
        spectrum = torch.fft.rfft2(video, dim=(2, 3)) * self.transfer(height, width).to(x.device)[:, :, None]
        return torch.fft.irfft2(spectrum, s=(height, width), dim=(2, 3)).flatten(1, 3).to(x.dtype)
