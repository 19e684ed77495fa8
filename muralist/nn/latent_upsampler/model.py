"""The video latent upsampler (VLUer; LUVE, section 3.2 and appendix C): a small latent video in, the latent of the same video at a larger size out.

    z_up = decode(coarse) + coarse,    coarse = implicit(encode(z)) + bilinear(z)  [+ polynomials(z), ours]

In pixels this would cost decoding, resizing and encoding; interpolating the latent alone costs detail. Latents are the base's normalised ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from muralist.errors import UserError
from muralist.nn.enlarge import enlarged
from muralist.nn.latent_upsampler.implicit import ImplicitUpsampler
from muralist.nn.latent_upsampler.polynomial import LocalPolynomial
from muralist.nn.latent_upsampler.vrt import Vrt, VrtConfig

MULTIPLE = 8  # VRT halves three times


class OutdatedPart(UserError):
    """Weights that meant something else when they were made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentUpsamplerConfig:
    """Encoder, hidden widths of the implicit function, decoder (None: the coarse latent is the result, an ablation of LUVE's Table 12).

    `polynomials`: the linear part is a module of its own (`polynomial.py`), and what the networks add to it starts at zero.
    """

    encoder: VrtConfig
    hidden: tuple[int, ...]
    decoder: VrtConfig | None
    polynomials: bool = False

    @property
    def channels(self) -> int:
        return self.encoder.in_channels

    @classmethod
    def of(cls, record: dict[str, Any]) -> LatentUpsamplerConfig:
        """Back from `dataclasses.asdict`, also after a trip through JSON. Raises OutdatedPart for one whose weights mean something else by now."""
        if record.get("polynomial"):
            what = "its polynomial is that of the nearest position alone, as earlier versions fitted it"
            raise OutdatedPart(what, where="part latent_upsampler", fix="train it again (muralist train latent-upsampler)")
        networks = {name: record[name] and VrtConfig(**record[name] | {"window": tuple(record[name]["window"])}) for name in ("encoder", "decoder")}
        return cls(hidden=tuple(record["hidden"]), polynomials=bool(record.get("polynomials", False)), **networks)


def paper(channels: int = 16) -> LatentUpsamplerConfig:
    """LUVE's own (appendix C.2). That all of the decoder's groups see whole windows is from the released code alone: it lets VRT's eleventh
    and twelfth layers see single frames, and the decoder has ten."""
    return LatentUpsamplerConfig(
        encoder=VrtConfig(in_channels=channels, dim=120, depth=8, refine_dim=180, refine_depth=4, groups=6),
        hidden=(512, 512, 256, 256),
        decoder=VrtConfig(in_channels=channels, dim=24, depth=1, refine_dim=48, refine_depth=1, groups=3, still_groups=0),
    )


def miniature(channels: int = 48) -> LatentUpsamplerConfig:
    """For the embedded base: the same parts, smaller, and a polynomial, within 2 M parameters.

    The decoder works at the target's size, where windows are what takes the time: with LUVE's 384 keys and several narrow heads it took nine
    tenths of all, with one head and two frames a window a seventh of that.
    """
    return LatentUpsamplerConfig(
        encoder=VrtConfig(in_channels=channels, dim=48, depth=2, mutual_share=0.5, refine_dim=72, refine_depth=2, groups=2, heads=3, still_groups=1),
        hidden=(160, 96),
        decoder=VrtConfig(in_channels=channels, dim=32, depth=1, refine_dim=32, refine_depth=1, groups=1, heads=1, window=(2, 8, 8), still_groups=0),
        polynomials=True,
    )


class LatentUpsampler(nn.Module):
    """[B, C, F, h, w] -> [B, C, F, H, W] for any H >= h, W >= w."""

    def __init__(self, config: LatentUpsamplerConfig):
        super().__init__()
        self.config = config
        self.encoder = Vrt(config.encoder)
        self.implicit = ImplicitUpsampler(config.encoder.dim, config.channels, config.hidden)
        self.decoder = None if config.decoder is None else Vrt(config.decoder)
        self.conv = None if config.decoder is None else nn.Conv2d(config.decoder.dim, config.channels, 1)
        self.polynomial = LocalPolynomial(config.channels) if config.polynomials else None
        for last in (self.implicit.imnet.layers[-1], self.conv) if config.polynomials else ():
            if last is not None:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """`size` (H, W) in latent positions. Raises UserError if it is smaller than the input."""
        return self.detailed(z, self.linear(z, size))

    def linear(self, z: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """What the networks start from: bilinear(z) and the polynomial, which see a position or two around each."""
        if size[0] < z.shape[-2] or size[1] < z.shape[-1]:
            raise UserError(f"{z.shape[-1]}x{z.shape[-2]} to {size[1]}x{size[0]}", where="latent upsampling", fix="ask for a factor of at least 1")
        plain = enlarged(z, size, "bilinear")
        return plain if self.polynomial is None else plain + self.polynomial(z, size)

    def detailed(self, z: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        """`linear` [B, C, F, H, W] of z, with what the networks add."""
        coarse = self.implicit(_fully(self.encoder, z.permute(0, 2, 3, 4, 1)), tuple(linear.shape[-2:])) + linear.permute(0, 2, 3, 4, 1)
        if self.decoder is not None:
            coarse = coarse + F.linear(_fully(self.decoder, coarse), self.conv.weight.flatten(1), self.conv.bias)
        return coarse.permute(0, 4, 1, 2, 3)


def _fully(network: Vrt, video: torch.Tensor) -> torch.Tensor:
    """`network` on a video of any size: continued by its border to multiples of 8, and cut again."""
    height, width = video.shape[2:4]
    down, right = (-side % MULTIPLE for side in (height, width))
    grown = F.pad(video.permute(0, 4, 1, 2, 3), (0, right, 0, down, 0, 0), mode="replicate") if down or right else video.permute(0, 4, 1, 2, 3)
    return network(grown.permute(0, 2, 3, 4, 1))[:, :, :height, :width]
