"""Our streaming encode equals diffusers' untiled encode: both VAE flavours, any tile, any reader of the pixels."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from muralist.cost import encoding
from muralist.cost.vae import Cost, steps
from muralist.data.latents import encode
from muralist.nn.decoder_blocks import SCORES
from muralist.nn.empty import empty_vae
from muralist.nn.encoder import StreamingEncoder
from muralist.nn.encoder_blocks import Average
from muralist.nn.enlarge import EnlargedPixels
from muralist.tiling import Box, Span, latent_boxes
from tests.parity.test_decode import flavours, model

TOLERANCE = 1e-5  # of latents of about unit size, fp32
FRAMES, HEIGHT, WIDTH = 9, 96, 160


def pixels(frames: int = FRAMES) -> torch.Tensor:
    return torch.rand(frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(2))


def reader(video: torch.Tensor):
    return lambda frames, box: video[frames.start : frames.stop, box.y.start : box.y.stop, box.x.start : box.x.stop]


@torch.no_grad()
def diffusers_latents(vae, video: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.encode(video.permute(3, 0, 1, 2)[None].to(vae.dtype) * 2 - 1).latent_dist.mean.float() - mean) / std


@flavours
@pytest.mark.parametrize("tile", [32, 64, 96, 4096])
def test_equals_diffusers_untiled(flavour, tile):
    vae, told = model(flavour), []
    ours = StreamingEncoder(vae).encode(reader(pixels()), FRAMES, (HEIGHT, WIDTH), tile, lambda *n: told.append(n))
    theirs = diffusers_latents(vae, pixels())
    assert ours.shape == theirs.shape and theirs.std() > 0.05
    assert (ours - theirs).abs().max() <= TOLERANCE
    assert told[-1][0] == told[-1][1] == len(told)


@flavours
def test_a_single_frame_and_a_batch_equal_diffusers_too(flavour):
    vae = model(flavour)
    assert (encode(vae, pixels(1)[None]) - diffusers_latents(vae, pixels(1))).abs().max() <= TOLERANCE
    both = encode(vae, torch.stack([pixels(5), pixels(5).flip(1)]))
    assert (both[1:] - diffusers_latents(vae, pixels(5).flip(1))).abs().max() <= TOLERANCE


def test_low_precision_is_as_near_as_diffusers_own():
    exact = diffusers_latents(model("wan22"), pixels())
    low = type(model("wan22")).from_config(model("wan22").config).eval()
    low.load_state_dict(model("wan22").state_dict())
    low.to(torch.bfloat16)
    theirs = (diffusers_latents(low, pixels()) - exact).abs().mean()
    ours = (encode(low, pixels()[None]) - exact).abs().mean()
    assert 0 < ours <= 1.2 * theirs


@pytest.mark.parametrize("channels, out, time", [(8, 8, 1), (8, 16, 1), (8, 16, 2), (8, 8, 2), (16, 8, 2), (32, 4, 1)])
@pytest.mark.parametrize("frames", [1, 4])
def test_the_averaging_shortcut_is_diffusers(channels, out, time, frames):
    from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D

    theirs, x = AvgDown3D(channels, out, factor_t=time, factor_s=2), torch.randn(frames, 4, 6, channels)
    expected = theirs(x.permute(3, 0, 1, 2)[None])[0].permute(1, 2, 3, 0)
    assert torch.allclose(Average(theirs).run(x), expected, atol=1e-6)


def test_a_tile_is_read_with_no_more_around_it_than_its_layers_need():
    vae = model("wan22")
    encoder, size = StreamingEncoder(vae), (HEIGHT, WIDTH)
    boxes = encoder.boxes(Box(Span(2, 3), Span(4, 5)), size)
    read = boxes[0].times(encoder.patch)
    y, x = read.inside(Box.whole(*size))

    def first(video):
        return encoder.first_part(reader(video)(range(1), read), boxes, size, first=True, caches={})

    edges = {"top": (slice(y.start, y.start + encoder.patch), x), "bottom": (slice(y.stop - encoder.patch, y.stop), x)}
    edges |= {"left": (y, slice(x.start, x.start + encoder.patch)), "right": (y, slice(x.stop - encoder.patch, x.stop))}
    inner = {"top": y.start > 0, "bottom": y.stop < HEIGHT, "left": x.start > 0, "right": x.stop < WIDTH}
    assert any(inner.values()), "the tile reads everything: nothing is tested"
    expected = first(pixels())
    for name in (name for name, true in inner.items() if true):
        other = pixels().clone()
        other[:, edges[name][0], edges[name][1]] += 10
        assert not torch.equal(first(other), expected), f"nothing depends on the {name} of what is read"


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_boxes_of_an_enlarged_video_are_parts_of_the_whole(mode):
    small = torch.rand(3, 12, 20, 3)
    whole = F.interpolate(small.permute(0, 3, 1, 2), size=(70, 133), mode=mode, align_corners=False).clamp(0, 1).permute(0, 2, 3, 1)
    enlarged = EnlargedPixels(small, (70, 133), mode, torch.device("cpu"))
    for box in (Box.whole(70, 133), Box(Span(0, 9), Span(120, 133)), Box(Span(31, 32), Span(5, 90))):
        y, x = box.inside(Box.whole(70, 133))
        with FlopCounterMode(display=False) as counter:
            part = enlarged(range(1, 3), box)
        assert (part - whole[1:, y, x]).abs().max() < 1e-5
        assert counter.get_total_flops() == 2 * enlarged.flops(box)


def test_an_enlarged_video_of_few_frames_is_linear_in_time_and_holds_its_last():
    small = 0.3 + 0.4 * torch.rand(3, 12, 20, 3)  # nothing to be clamped
    cpu, box = torch.device("cpu"), Box(Span(3, 9), Span(20, 33))
    keys = EnlargedPixels(small, (24, 40), "bicubic", cpu)(range(3), box)
    found = EnlargedPixels(small, (24, 40), "bicubic", cpu, rate=0.25)(range(2, 13), box)
    assert found.shape == (11, 6, 13, 3)
    wanted = [torch.lerp(keys[min(t // 4, 2)], keys[min(t // 4 + 1, 2)], t / 4 % 1) for t in range(2, 13)]
    assert (found - torch.stack(wanted)).abs().max() < 1e-5


@flavours
@pytest.mark.parametrize("tile", [64, 4096])
def test_the_plan_counts_what_runs(flavour, tile):
    config = dict(model(flavour).config)
    with torch.device("meta"):
        encoder, video = StreamingEncoder(empty_vae(config, torch.float32)), torch.empty(FRAMES, HEIGHT, WIDTH, 3)
        with FlopCounterMode(display=False) as counter:
            encoder.encode(reader(video), FRAMES, (HEIGHT, WIDTH), tile)
    need = encoding.encode(config, FRAMES, (HEIGHT, WIDTH), tile, quick=True)
    assert 0.98 <= need.cost.flops / counter.get_total_flops() <= 1.02
    assert len(need.read) == (6 if tile == 64 else 1)


@flavours
@pytest.mark.parametrize("tile", [64, 128])
def test_alike_tiles_are_counted_once_and_cost_the_same(flavour, tile):
    config, size = dict(model(flavour).config), (736, 1056)
    need = encoding.encode(config, FRAMES, size, tile, quick=True)
    encoder = StreamingEncoder(empty_vae(config, torch.float32))
    height, width = (side // encoder.spatial_factor for side in size)
    boxes, frames = latent_boxes(height, width, tile, encoder.spatial_factor), (FRAMES - 1) // 4 + 1
    one_by_one = Cost()
    for step, times in steps(frames):
        tiles = (encoding._tile(encoder, encoder.boxes(box, size), size, step) for box in boxes)
        one_by_one = one_by_one + sum(tiles, encoding._middle(encoder, (height, width), step)) * times
    assert need.cost == one_by_one
    assert len(need.read) < need.tiles == len(boxes)


@flavours
def test_a_frame_of_thousands_of_tiles_is_planned_from_a_few(flavour):
    need = encoding.encode(dict(model(flavour).config), 161, (8192, 8192), 64, quick=False)
    assert need.tiles == 128**2 and len(need.read) <= 49


@flavours
def test_planned_memory_holds_weights_their_copies_and_the_middle(flavour):
    config = dict(model(flavour).config)
    vae = empty_vae(config, torch.float32)
    encoder = StreamingEncoder(vae)
    weights = sum(p.nbytes for p in vae.parameters())
    convs = [operator.conv1 for operator in encoder.whole if hasattr(operator, "conv1")]
    copies = sum(plane.nbytes for conv in convs for planes in (*conv.mixed.values(), [conv.weight]) for plane in planes)
    small = encoding.encode(config, 5, (64, 64), 64, quick=True)
    assert small.live_bytes > weights + copies and 0 < small.weight_bytes < weights
    tokens, width = (2048 // vae.config.scale_factor_spatial) ** 2, encoder.whole[-1].conv.in_channels
    for quick, held in ((True, 4 * 5 * width * tokens), (False, 2 * (5 * width * tokens + SCORES))):  # what goes in, comes out, is compared; scores on a GPU
        small, large = (encoding.encode(config, 1, (side, side), 64, quick=quick) for side in (64, 2048))
        assert large.live_bytes - small.live_bytes > held
