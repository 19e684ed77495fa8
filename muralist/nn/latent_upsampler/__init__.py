"""The video latent upsampler of LUVE: `model` is the whole, `vrt` and `tmsa` its transformer, `implicit` its continuous upsampling."""

from muralist.nn.latent_upsampler.model import LatentUpsampler, LatentUpsamplerConfig, OutdatedPart, miniature, paper
from muralist.nn.latent_upsampler.vrt import VrtConfig

__all__ = ["LatentUpsampler", "LatentUpsamplerConfig", "OutdatedPart", "VrtConfig", "miniature", "paper"]
