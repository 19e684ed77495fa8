"""Single frames through Wan's causal VAE, three times faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan


@contextmanager
def single_frame_convolutions() -> Iterator[None]:
    """On one frame a causal 3-D convolution sees two frames of zeros: its last 2-D slice alone gives the same, three times faster."""
    original = autoencoder_kl_wan.WanCausalConv3d.forward

    def forward(self, x, cache_x=None):
        depth = self.kernel_size[0]
        if x.shape[2] != 1 or cache_x is not None or self.stride[0] != 1:
            return original(self, x, cache_x)
        pad = self._padding
        y = F.pad(x[:, :, 0], pad[:4]) if pad[0] != pad[1] else x[:, :, 0]
        y = F.conv2d(y, self.weight[:, :, depth - 1], self.bias, self.stride[1:], padding=(pad[2], pad[0]) if pad[0] == pad[1] else 0)
        return y[:, :, None]

    autoencoder_kl_wan.WanCausalConv3d.forward = forward
    try:
        yield
    finally:
        autoencoder_kl_wan.WanCausalConv3d.forward = original
