"""The Wan decoder as a stream: one latent frame in, its pixel frames out, whole or tile by tile, equal to `AutoencoderKLWan.decode`.

diffusers decodes whole frames (80 GB at 4K) or blends tiles that differ (no attention across tiles, twice the work). Here the first layers
(to the middle attention, optionally more) run on the whole frame and the rest on tiles with the halo that its layers need. The causal
caches are explicit dictionaries, one a tile, so the caller chooses the order of the loops and can save and restore a decode at any latent
frame. The weights are diffusers' own modules; the arithmetic is in `decoder_blocks` and `decoder_conv`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from diffusers import AutoencoderKLWan

from muralist.nn.decoder_blocks import Attention, Caches, ConvIn, Head, Operator, Patch, ResidualBlock, UpBlock
from muralist.nn.decoder_conv import Pool
from muralist.tiling import Box, Span, kinds


class StreamingDecoder:
    """Decodes normalised latents of one `AutoencoderKLWan`, of either flavour. Its work tensors are its own: one thread at a time.

    Args:
        vae: the model; its weights are shared, not copied, except where a layout or a merged kernel serves speed.
        whole_blocks: how many of the upsampling blocks run on the whole frame. More saves halo work and costs memory.

    Raises:
        ValueError: the model has a layer that this decoder does not know.
    """

    def __init__(self, vae: AutoencoderKLWan, whole_blocks: int = 0):
        decoder, config = vae.decoder, vae.config
        if not 0 <= whole_blocks < len(decoder.up_blocks):
            raise ValueError(f"whole_blocks = {whole_blocks}, but the decoder has {len(decoder.up_blocks)} blocks and the last is always tiled")
        pool = Pool()
        blocks = [UpBlock(f"up_blocks.{i}", block, pool) for i, block in enumerate(decoder.up_blocks)]
        self.whole: list[Operator] = [ConvIn("conv_in", decoder.conv_in, pool), *middle(decoder.mid_block, pool), *blocks[:whole_blocks]]
        self.tiled: list[Operator] = list(blocks[whole_blocks:])
        self.head = Head("conv_out", decoder.norm_out, decoder.conv_out, config.patch_size or 1, pool)
        self.spatial_factor, self.temporal_factor = config.scale_factor_spatial, config.scale_factor_temporal
        self.dtype, self.device = vae.dtype, vae.device
        shape = (1, 1, 1, -1)
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32, device=self.device).view(shape)
        self.std = torch.tensor(config.latents_std, dtype=torch.float32, device=self.device).view(shape)
        self.post_quant = (vae.post_quant_conv.weight.detach().flatten(1), vae.post_quant_conv.bias.detach())
        self._check_scales()

    def _check_scales(self) -> None:
        space, time = self.head.scale, 1
        for block in self.whole + self.tiled:
            space, time = space * block.scale, time * getattr(block, "frame_scale", 1)
        if (space, time) != (self.spatial_factor, self.temporal_factor):
            raise ValueError(
                f"the decoder magnifies {space} in space and {time} in time, its configuration says {self.spatial_factor} and {self.temporal_factor}"
            )

    def frames_of(self, latent_frame: int) -> range:
        """The pixel frames that latent frame number `latent_frame` yields."""
        return frames_of(latent_frame, self.temporal_factor)

    @torch.no_grad()
    def first_part(self, z: torch.Tensor, *, first: bool, caches: Caches) -> Patch:
        """One normalised latent frame [1, C, 1, h, w] through the layers that need the whole frame.

        `first` marks latent frame 0. `caches` holds their history: an empty dictionary at the start, updated in place.
        """
        size = (z.shape[-2], z.shape[-1])
        x = z[0].permute(1, 2, 3, 0).to(device=self.device, dtype=torch.float32) * self.std + self.mean
        patch = Patch(torch.nn.functional.linear(x.to(self.dtype), *self.post_quant), Box.whole(*size), size)
        for operator in self.whole:
            height, width = patch.size
            patch = operator.run(patch, Box.whole(height * operator.scale, width * operator.scale), first=first, caches=caches)
        return Patch(patch.data.contiguous(), patch.box, patch.size)

    @torch.no_grad()
    def second_part(self, patch: Patch, tile: Box, *, first: bool, caches: Caches) -> torch.Tensor:
        """The pixel box `tile` of one latent frame: [t, rows, columns, 3] in [0, 1], t = 1 for latent frame 0, 4 after.

        `patch` is what `first_part` returned, or any part of it that holds `input_box(tile)`.
        `caches` is the history of this tile: empty at the start, updated in place.

        Raises:
            FloatingPointError: a value is NaN or infinite.
        """
        boxes = self.boxes(tile, patch.size)
        patch = patch.crop(boxes[0])
        for operator, out in zip(self.tiled, boxes[1:]):
            patch = operator.run(patch, out, first=first, caches=caches)
        return self.head.run(patch, tile, caches=caches)

    def boxes(self, tile: Box, size: tuple[int, int]) -> list[Box]:
        """The box before each tiled operator, and last the one before the head, for a pixel box; `size` is that of `first_part`'s result."""
        sizes = [size]
        for operator in self.tiled:
            sizes.append((sizes[-1][0] * operator.scale, sizes[-1][1] * operator.scale))
        boxes = [self.head.needs(tile, sizes[-1])]
        for operator, before in zip(reversed(self.tiled), reversed(sizes[:-1])):
            boxes.append(operator.needs(boxes[-1], before))
        return boxes[::-1]

    def kinds(self, tiles: Iterable[Box], size: tuple[int, int]) -> dict[Box, int]:
        """One of each kind of the pixel boxes `tiles` of latents of `size` [h, w], and how many there are: their boxes in every layer are alike too."""
        return kinds(tiles, tuple(side * self.spatial_factor for side in size), self._reach(), self.spatial_factor)

    def _reach(self) -> int:
        """Pixels that the halo of a tile reaches at most, in whole latent positions."""
        far = 1 << 12
        inner = self.first_part_size(far, far)
        unit = far * self.spatial_factor // inner[0]
        start = far * self.spatial_factor // 2
        tile = Box(Span(start, start + self.spatial_factor), Span(start, start + self.spatial_factor))
        return start - self.boxes(tile, inner)[0].y.start * unit + 2 * self.spatial_factor

    def first_part_size(self, height: int, width: int) -> tuple[int, int]:
        """[H, W] of `first_part`'s result for latents of `height` x `width`."""
        scale = 1
        for operator in self.whole:
            scale *= operator.scale
        return height * scale, width * scale


def _adds(attention: torch.nn.Module) -> bool:
    """False for a projection of zeros (the embedded base's): at 4K its scores alone would be 2 TFLOP. Without weights (meta) nobody knows."""
    proj = attention.proj
    return proj.weight.is_meta or bool(proj.weight.any() or proj.bias.any())


def frames_of(latent_frame: int, factor: int) -> range:
    """The pixel frames that stand in latent frame number `latent_frame`, for a VAE of this temporal factor: 0, then 1 to 4, 5 to 8, ..."""
    start = (latent_frame - 1) * factor + 1
    return range(start, start + factor) if latent_frame else range(1)


def middle(block: torch.nn.Module, pool: Pool) -> Sequence[Operator]:
    """`mid_block` of a decoder or an encoder, in the order in which it runs."""
    layers: list[Operator] = [ResidualBlock("mid_block.resnets.0", block.resnets[0], pool)]
    for i, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:]), start=1):
        layers += [Attention(attention)] if attention is not None and _adds(attention) else []
        layers.append(ResidualBlock(f"mid_block.resnets.{i}", resnet, pool))
    return layers
