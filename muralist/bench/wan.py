"""The shapes of published Wan models, and small ones of the same kind: speed and memory need no trained weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muralist.base_info import BaseInfo, Defaults
from muralist.types import Geometry, Grid

_TRANSFORMER = {"patch_size": (1, 2, 2), "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "num_layers": 30}
_VAE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
TEXT_ENCODER_BYTES = 11_361_920_000  # UMT5-xxl's encoder in 16 bits
_SAMPLING = {"num_inference_steps": 50, "refine_steps": 50, "guidance_scale": 5.0, "flow_shift": 5.0}


@dataclass(frozen=True)
class Size:
    """A model's shapes, the grid it was made for, and its number of weights (0: of no interest); of two transformers, each, and where they change places."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    grid: Grid
    parameters: int
    boundary: float | None = None
    sampling: dict[str, Any] = field(default_factory=lambda: _SAMPLING)

    def info(self, name: str) -> BaseInfo:
        """As `inspect_base` would report the published folder."""
        channels = self.vae["z_dim"]
        defaults = Defaults(grid=self.grid, negative_prompt="", max_sequence_length=512, **self.sampling)
        transformers = ("transformer",) if self.boundary is None else ("transformer", "transformer_2")
        geometry = Geometry(spatial_factor=self.vae["scale_factor_spatial"], temporal_factor=4, channels=channels, patch=(1, 2, 2))
        return BaseInfo(
            name=name, folder=Path(name), geometry=geometry, defaults=defaults, transformer_config=self.transformer, vae_config=self.vae,
            boundary=self.boundary, prediction="flow", adapters=(), parts=(),
            component_bytes={"text_encoder": TEXT_ENCODER_BYTES, "vae": 500_000_000} | dict.fromkeys(transformers, 2 * self.parameters),
        )  # fmt: skip


SIZES = {
    "1.3B": Size(
        _TRANSFORMER | {"num_attention_heads": 12, "ffn_dim": 8960, "in_channels": 16, "out_channels": 16},
        _VAE | {"base_dim": 96, "z_dim": 16, "scale_factor_spatial": 8},
        Grid(num_frames=81, height=480, width=832),
        1_418_996_800,
    ),
    "5B": Size(
        _TRANSFORMER | {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        _VAE
        | {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
        | {"scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
        Grid(num_frames=121, height=704, width=1280, fps=24),
        4_999_787_712,
    ),
}

_LARGE = _TRANSFORMER | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 16, "out_channels": 16}
LARGER = {
    "Wan2.1 14B": Size(_LARGE, SIZES["1.3B"].vae, SIZES["1.3B"].grid, 14_288_491_584),
    "Wan2.2 A14B": Size(
        _LARGE,
        SIZES["1.3B"].vae,
        Grid(num_frames=81, height=720, width=1280),
        14_288_491_584,
        boundary=0.875,
        sampling={"num_inference_steps": 40, "refine_steps": 40, "guidance_scale": 3.5, "flow_shift": 12.0},
    ),
}

# Two layers, narrow, for a run of minutes on a CPU; only the machinery is exercised.
SMALL = {
    "1.3B": Size(
        _TRANSFORMER
        | {"num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 2, "ffn_dim": 128, "text_dim": 32, "in_channels": 16, "out_channels": 16},
        SIZES["1.3B"].vae | {"base_dim": 8},
        Grid(num_frames=9, height=64, width=96),
        0,
    ),
    "5B": Size(
        _TRANSFORMER
        | {"num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 2, "ffn_dim": 128, "text_dim": 32, "in_channels": 48, "out_channels": 48},
        SIZES["5B"].vae | {"base_dim": 8, "decoder_base_dim": 16},
        Grid(num_frames=9, height=64, width=96, fps=24),
        0,
    ),
}


def uhd(frames: int, fps: int = 16) -> Grid:
    """4K."""
    return Grid(num_frames=frames, height=2160, width=3840, fps=fps)


GRIDS = {
    "480p x81": Grid(num_frames=81, height=480, width=832),
    "720p x49": Grid(num_frames=49, height=720, width=1280),
    "1080p x81": Grid(num_frames=81, height=1080, width=1920),
    "2K x121": Grid(num_frames=121, height=1440, width=2560, fps=24),
    "4K x17": uhd(17),
    "4K x49": uhd(49),
    "4K x81": uhd(81),
    "4K x121": uhd(121, 24),
    "4K x161": uhd(161),
}
SMALL_GRIDS = {
    "480p x81": Grid(num_frames=5, height=64, width=96),
    "720p x49": Grid(num_frames=5, height=96, width=128),
    "1080p x81": Grid(num_frames=5, height=192, width=256),
    "2K x121": Grid(num_frames=5, height=256, width=384, fps=24),
    "4K x17": Grid(num_frames=5, height=256, width=384),
    "4K x49": Grid(num_frames=5, height=256, width=384),
    "4K x81": Grid(num_frames=9, height=256, width=384),
    "4K x121": Grid(num_frames=9, height=320, width=512, fps=24),
    "4K x161": Grid(num_frames=17, height=256, width=384),
}
