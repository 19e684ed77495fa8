"""The Wan encoder as a stream: some pixel frames in, their latent frame out, whole or tile by tile, equal to `AutoencoderKLWan.encode`.

The mirror of `decoder`: the first layers, which see the pixels, run on tiles with the halo that they need; the middle, with its attention over the
whole frame, runs on the small map that they leave. diffusers blends tiles that differ, or holds whole frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan

from muralist.nn.decoder import frames_of, middle
from muralist.nn.decoder_blocks import Caches, ConvIn, Operator, Patch, ResidualBlock
from muralist.nn.decoder_conv import Pool
from muralist.nn.encoder_blocks import DownBlock, Resample, Tail, patchify
from muralist.tiling import Box, latent_boxes

Pixels = Callable[[range, Box], torch.Tensor]  # frames, a box in pixels -> [t, rows, columns, 3] in [0, 1]


class StreamingEncoder:
    """Encodes pixels to normalised latents (the posterior's mean) of one `AutoencoderKLWan`, of either flavour; one thread at a time.

    Args:
        vae: the model; its weights as they are now, shared, except where a layout serves speed.

    Raises:
        ValueError: the model has a layer that this encoder does not know.
    """

    def __init__(self, vae: AutoencoderKLWan):
        encoder, config, pool = vae.encoder, vae.config, Pool()
        self.patch = config.patch_size or 1
        self.tiled: list[Operator] = [ConvIn("conv_in", encoder.conv_in, pool), *_down(encoder.down_blocks, pool)]
        tail = Tail("conv_out", encoder.norm_out, encoder.conv_out, vae.quant_conv, pool)
        self.whole: list[Operator] = [*middle(encoder.mid_block, pool), tail]
        self.spatial_factor, self.temporal_factor = config.scale_factor_spatial, config.scale_factor_temporal
        self.dtype, self.device = vae.dtype, vae.device
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32, device=self.device)
        self.std = torch.tensor(config.latents_std, dtype=torch.float32, device=self.device)
        self._check_scales()

    def _check_scales(self) -> None:
        space, time = self.patch, 1
        for operator in self.tiled:
            space, time = space * operator.scale, time * getattr(operator, "frame_scale", 1)
        if (space, time) != (self.spatial_factor, self.temporal_factor):
            raise ValueError(f"the encoder shrinks {space} in space and {time} in time, its configuration says {self.spatial_factor}, {self.temporal_factor}")

    def boxes(self, tile: Box, size: tuple[int, int]) -> list[Box]:
        """The box before each tiled operator, and last `tile`, in positions of the latents, of a video of `size` pixels."""
        sizes = [(size[0] // self.patch, size[1] // self.patch)]
        for operator in self.tiled[:-1]:
            sizes.append((sizes[-1][0] // operator.scale, sizes[-1][1] // operator.scale))
        boxes = [tile]
        for operator, before in zip(reversed(self.tiled), reversed(sizes)):
            boxes.append(operator.needs(boxes[-1], before))
        return boxes[::-1]

    @torch.no_grad()
    def first_part(self, pixels: torch.Tensor, boxes: list[Box], size: tuple[int, int], *, first: bool, caches: Caches) -> torch.Tensor:
        """Pixels [t, rows, columns, 3] of `boxes[0]`, in patches, -> [1, h, w, C] of the tile `boxes[-1]`; `caches` is this tile's history."""
        x = patchify(pixels.to(self.device, self.dtype), self.patch, boxes[0], (size[0] // self.patch, size[1] // self.patch))
        for operator, out in zip(self.tiled, boxes[1:]):
            x = operator.run(x, out, first=first, caches=caches)
        return x.data

    @torch.no_grad()
    def second_part(self, data: torch.Tensor, *, first: bool, caches: Caches) -> torch.Tensor:
        """[1, h, w, C] of the whole frame -> the normalised latent frame [1, C', 1, h, w] in fp32."""
        box = Box.whole(*data.shape[1:3])
        patch = Patch(data, box, box.shape)
        for operator in self.whole:
            patch = operator.run(patch, box, first=first, caches=caches)
        return ((patch.data.float() - self.mean) / self.std).permute(3, 0, 1, 2)[None]

    @torch.no_grad()
    def encode(self, read: Pixels, num_frames: int, size: tuple[int, int], tile: int, on_tile: Callable[[int, int], object] = lambda *_: None) -> torch.Tensor:
        """A video of `num_frames` (4n+1) frames of `size` [H, W], in tiles of at most `tile` pixels, one after another -> [1, C, F, h, w].

        A tile is read through all of time before the next one, so that its history alone is held.
        """
        latent_frames = 1 + (num_frames - 1) // self.temporal_factor
        height, width = (side // self.spatial_factor for side in size)
        tiles = latent_boxes(height, width, tile, self.spatial_factor)
        features: torch.Tensor | None = None
        for number, box in enumerate(tiles):
            boxes, caches = self.boxes(box, size), {}
            for f in range(latent_frames):
                pixels = read(frames_of(f, self.temporal_factor), boxes[0].times(self.patch))
                data = self.first_part(pixels, boxes, size, first=f == 0, caches=caches)
                if features is None:
                    features = data.new_empty((latent_frames, height, width, data.shape[-1]))
                features[f : f + 1, box.y.start : box.y.stop, box.x.start : box.x.stop] = data
            on_tile(number + 1, len(tiles))
        caches = {}
        return torch.cat([self.second_part(features[f : f + 1], first=f == 0, caches=caches) for f in range(latent_frames)], dim=2)


def _down(blocks: torch.nn.ModuleList, pool: Pool) -> list[Operator]:
    """The encoder's blocks of either flavour, in order: residual ones hold their downsampling, plain ones stand in one list with it."""
    operators: list[Operator] = []
    for i, block in enumerate(blocks):
        name = f"down_blocks.{i}"
        match block:
            case wan.WanResidualDownBlock():
                operators.append(DownBlock(name, block, pool))
            case wan.WanResidualBlock():
                operators.append(ResidualBlock(name, block, pool, f"result{i % 2}"))
            case wan.WanResample():
                operators.append(Resample(name, block))
            case _:
                raise ValueError(f"{name} is a {type(block).__name__}, which the streaming encoder does not know")
    return operators
