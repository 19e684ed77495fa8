"""The upsampling stage: interpolation and the learned network, pieces that blend to the whole, and what the plan says of it."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from muralist.base import Base
from muralist.base_info import UPSAMPLER, inspect_base
from muralist.bench.wan import SIZES
from muralist.cost.upsampling import measure
from muralist.data.latents import decode
from muralist.errors import UserError
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.empty import empty_vae
from muralist.nn.encoder import StreamingEncoder
from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, VrtConfig, tiles
from muralist.nn.latent_upsampler.polynomial import VALUES, values
from muralist.nn.latent_upsampler.tiles import upsample_in_tiles
from muralist.nn.packed import value_bytes
from muralist.plan import plan
from muralist.recipes import find
from muralist.request import Asked, make_request
from muralist.stages.upsample import LatentInterpolation, LearnedUpsampling, PixelInterpolation, pieces, upsample, upsampler_in
from muralist.store.parts import read_part
from muralist.types import Grid, LatentVideo
from tests.faults.test_out_of_memory import Failing
from tests.shell import muralist
from tests.tiny import save_pipeline
from tests.unit.test_plan import ROOMY, request, stage

SMALL, LARGE = Grid(num_frames=5, height=64, width=96), Grid(num_frames=5, height=128, width=224)


def config(channels):
    network = VrtConfig(in_channels=channels, dim=12, depth=1, refine_dim=12, refine_depth=1, groups=1, heads=3, window=(2, 4, 4), still_groups=0)
    return LatentUpsamplerConfig(encoder=network, hidden=(16,), decoder=network)


@pytest.fixture
def base(tiny_base):
    return Base(inspect_base(str(tiny_base)), torch.device("cpu"), torch.float32)


HALF = PixelInterpolation(tile=64, latent_scale=2.0, rest=LearnedUpsampling())


@pytest.mark.parametrize(
    "method", [LatentInterpolation(), LearnedUpsampling(), PixelInterpolation(tile=64), HALF], ids=["latent", "learned", "pixels", "pixels, then learned"]
)
def test_the_guide_has_the_targets_shape(base, method):
    geometry = base.info.geometry
    proxy = LatentVideo(torch.randn(1, *geometry.latent_shape(SMALL)), SMALL)
    guide = upsample(proxy, LARGE, base, method)
    assert guide.z.shape == (1, *geometry.latent_shape(LARGE)) and guide.grid == LARGE


class Ones:
    """An upsampler that makes ones of everything."""

    def linear(self, z, size):
        return torch.ones(1, 4, z.shape[2], *size)

    def detailed(self, z, linear):
        return linear


@torch.no_grad()
def test_pieces_of_a_pointwise_network_are_the_whole():
    """With every window of one position and no decoder only the interpolation looks around; inside the overlap the blend of equals is equal."""
    torch.manual_seed(0)
    network = LatentUpsampler(config(4)).eval()
    z = torch.randn(1, 4, 3, 8, 8)
    whole = network(z, (16, 16))
    assert torch.equal(upsample_in_tiles(network, z, (16, 16), (3, 8, 8), (0, 0, 0)), whole)
    told = []
    cut = upsample_in_tiles(network, z.repeat(1, 1, 1, 2, 3), (32, 48), (2, 8, 8), (1, 4, 4), lambda *n: told.append(n))
    assert cut.shape == (1, 4, 3, 32, 48) and torch.isfinite(cut).all()
    assert told[-1][0] == told[-1][1] == len(told) == 2 * 3 * 5
    constant = torch.ones(1, 4, 3, 16, 24)
    flat = upsample_in_tiles(Ones(), constant, (37, 55), (2, 8, 8), (1, 4, 4))
    assert (flat - 1).abs().max() < 1e-6


def test_the_plan_counts_the_network_itself(base):
    shape, geometry = LatentUpsamplerConfig.of(read_part(base.info.folder / "parts" / UPSAMPLER, UPSAMPLER)), base.info.geometry
    part = LearnedUpsampling(tile=(2, 4, 4), overlap=(0, 0, 0))
    source, target = geometry.latent_shape(SMALL)[1:], geometry.latent_shape(LARGE)[1:]
    assert measure(shape, part, source, target).pieces == pieces(part, SMALL, LARGE, geometry)
    assert measure(shape, LearnedUpsampling(), source, target).flops > 0


def test_the_plan_counts_the_linear_part_where_pieces_are_small():
    """It is computed of the whole: some frames at a time, and at least one."""
    shape, part = replace(config(4), polynomials=True), LearnedUpsampling(tile=(1, 8, 8), overlap=(0, 0, 0))
    for source, target in ((2, 512, 512), (2, 1024, 1024)), ((9, 1024, 1024), (9, 1100, 1100)):
        frame = values(4, source[1:], target[1:])
        counted = measure(shape, part, source, target).live_bytes - measure(replace(shape, polynomials=False), part, source, target).live_bytes
        assert 0.9 < counted / (4 * max(frame, min(source[0] * frame, VALUES))) < 1


def test_the_upsampler_takes_over_where_pixels_end(base):
    geometry, told = base.info.geometry, []
    proxy = LatentVideo(torch.randn(1, *geometry.latent_shape(SMALL)), SMALL)
    guide = upsample(proxy, LARGE, base, HALF, lambda *n: told.append(n))
    half = tuple(max(math.ceil(large / 2), small) for small, large in zip(geometry.latent_shape(SMALL)[2:], geometry.latent_shape(LARGE)[2:]))
    between = replace(LARGE, height=half[0] * geometry.spatial_factor, width=half[1] * geometry.spatial_factor)
    by_pixels = upsample(proxy, between, base, PixelInterpolation(tile=64)).z
    size = geometry.latent_shape(LARGE)[2:]
    assert torch.equal(guide.z, upsample_in_tiles(base.latent_upsampler(), by_pixels, size, HALF.rest.tile, HALF.rest.overlap))
    assert not torch.equal(guide.z, upsample(proxy, LARGE, base, replace(HALF, rest=LatentInterpolation())).z)
    count = pieces(HALF, SMALL, LARGE, geometry)
    assert told[-1] == (count, count) and [done for done, _ in told] == list(range(1, count + 1))
    whole = replace(HALF, latent_scale=1.0)
    assert torch.equal(upsample(proxy, LARGE, base, whole).z, upsample(proxy, LARGE, base, PixelInterpolation(tile=64)).z)
    assert upsampler_in(HALF) == HALF.rest and upsampler_in(whole) is None, "a base without one will do"


def test_what_has_its_size_already_stays_as_it_is(base):
    geometry, told, part = base.info.geometry, [], LearnedUpsampling()
    proxy = LatentVideo(torch.randn(1, *geometry.latent_shape(LARGE)), LARGE)
    assert torch.equal(upsample(proxy, LARGE, base, part, lambda *n: told.append(n)).z, proxy.z)
    assert told == [(1, 1)] and pieces(part, LARGE, LARGE, geometry) == 1
    asked = Asked(prompt="a ball", recipe="luve", width=LARGE.width, height=LARGE.height, num_frames=5, seed=0)
    sized = (f"proxy.height={LARGE.height}", f"proxy.width={LARGE.width}")
    planned = stage(plan(make_request(replace(asked, settings=sized), base.info, note=print), base.info, ROOMY), "upsample")
    assert planned.work == "nothing to enlarge" and not planned.flops
    with pytest.raises(UserError, match=r"the proxy of \d+x\d+ is larger than 224x128"):
        alone = 'upsample={"kind": "LearnedUpsampling"}'
        make_request(replace(asked, settings=(sized[0], "proxy.width=256", alone)), base.info, note=print)


def test_a_proxy_that_is_large_enough_is_not_decoded(base, monkeypatch):
    """Half of the target: the rest of the way is all of it, unless frames are to be made."""
    geometry, told = base.info.geometry, []
    large = Grid(num_frames=5, height=128, width=192)
    proxy = LatentVideo(torch.randn(1, *geometry.latent_shape(SMALL)), SMALL)
    assert not HALF.decodes(SMALL, large, geometry) and HALF.decodes(SMALL, LARGE, geometry)
    assert HALF.decodes(SMALL, replace(large, fps=2 * large.fps), geometry) and PixelInterpolation().decodes(SMALL, large, geometry)
    assert PixelInterpolation(latent_scale=2).decodes(SMALL, large, geometry)  # as its adapter was trained
    monkeypatch.setattr(Base, "vae", lambda _: pytest.fail("the VAE was asked for"))
    made = upsample(proxy, large, base, HALF, lambda *n: told.append(n)).z
    assert torch.equal(made, upsample(proxy, large, base, HALF.rest).z)
    assert told[-1] == (len(told), pieces(HALF, SMALL, large, geometry)) and pieces(HALF, SMALL, large, geometry) == pieces(HALF.rest, SMALL, large, geometry)
    sized = (f"proxy.height={SMALL.height}", f"proxy.width={SMALL.width}")
    asked = Asked(prompt="a ball", recipe="luve", width=large.width, height=large.height, num_frames=5, seed=0, settings=sized)
    planned = stage(plan(make_request(asked, base.info, note=print), base.info, ROOMY), "upsample")
    alone = replace(asked, settings=(*sized, 'upsample={"kind": "LearnedUpsampling"}'))
    assert planned == stage(plan(make_request(alone, base.info, note=print), base.info, ROOMY), "upsample")
    assert "through pixels" in stage(plan(make_request(replace(asked, width=576, height=384), base.info, note=print), base.info, ROOMY), "upsample").action


def test_a_base_without_the_part_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match="muralist train latent-upsampler"):
        inspect_base(str(save_pipeline(tmp_path / "m", "2.1"))).require_part(UPSAMPLER)


def test_a_damaged_part_is_found_before_any_weight_is_loaded(base, tmp_path):
    import shutil

    folder = shutil.copytree(base.info.folder, tmp_path / "copy")
    weights = folder / "parts" / UPSAMPLER / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="bytes instead of"):
        inspect_base(str(folder))


@pytest.fixture
def no_temporary_folder(monkeypatch):
    def refuse(*given, **named):
        raise AssertionError("a temporary folder is neither planned nor cleaned up after a kill")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)


def test_the_proxy_is_decoded_in_the_folder_that_is_given(base, tmp_path, no_temporary_folder, monkeypatch):
    geometry, method = base.info.geometry, PixelInterpolation(tile=64)
    proxy = LatentVideo(torch.randn(1, *geometry.latent_shape(SMALL)), SMALL)
    guide = upsample(proxy, LARGE, base, method, scratch=tmp_path)
    assert list(tmp_path.glob("decode-*/tile-*.pixels"))
    monkeypatch.setattr(StreamingDecoder, "second_part", None)  # what is decoded already is not decoded again
    assert torch.equal(upsample(proxy, LARGE, base, method, scratch=tmp_path).z, guide.z)


def test_the_decoded_proxy_is_held_once_in_half_precision(base, tmp_path):
    from muralist.stages import upsample as stage

    proxy = LatentVideo(torch.randn(1, *base.info.geometry.latent_shape(SMALL)), SMALL)
    video = stage._decoded(base.vae(), proxy, tmp_path)
    expected = decode(base.vae(), proxy.z)
    assert video.dtype == torch.half and video.shape == expected.shape == (5, 64, 96, 3)
    assert (video - expected).abs().max() < 1e-3


def test_a_run_that_is_stopped_keeps_what_is_decoded_and_one_that_is_done_keeps_nothing(tiny22, tmp_path, no_temporary_folder, monkeypatch):
    output, run = tmp_path / "a.mp4", tmp_path / "a.mp4.run"
    words = ("generate", "a ball", "--model", tiny22, "--recipe", "cascade", "--size", "128x128", "--num-frames", 5, "-o", output, "--keep-run")
    with monkeypatch.context() as patch:
        patch.setattr(StreamingEncoder, "encode", Failing(StreamingEncoder.encode, (1,), KeyboardInterrupt))
        assert muralist(*words).code != 0
    assert list(run.glob("scratch/upsample/decode-*/tile-*.pixels"))
    assert muralist("resume", run, "--keep-run").code == 0 and output.exists()
    assert run.exists() and not (run / "scratch" / "upsample").exists()


@pytest.mark.parametrize("machine", [ROOMY, replace(ROOMY, device_bytes=None), replace(ROOMY, dtype="bfloat16")], ids=["cuda", "cpu", "half"])
def test_the_plan_counts_the_vae_the_decoded_proxy_and_its_files(machine):
    info, grid = SIZES["1.3B"].info("1.3B"), Grid(num_frames=9, height=1024, width=1920)
    asked = replace(request(grid), recipe="cascade", config=find("cascade")(info))
    found = stage(plan(asked, info, machine), "upsample")
    small = asked.config.proxy.grid(grid, info.geometry)
    vae = machine.itemsize * sum(p.numel() for p in empty_vae(info.vae_config, torch.bfloat16).parameters())
    held, latent = 2 * 3 * small.pixels, 4 * math.prod(info.geometry.latent_shape(grid))
    assert found.memory_bytes > vae + machine.itemsize * 1_400_000_000
    assert found.disk_bytes >= latent + value_bytes(getattr(torch, machine.dtype)) * 3 * small.pixels
    assert found.host_bytes == (0 if machine.on_cpu else held)


@pytest.mark.parametrize(
    ("length", "full", "tile", "overlap"), [(160, 512, 96, 16), (28, 240, 20, 4), (90, 270, 40, 8), (97, 131, 40, 8), (14, 21, 9, 2), (8, 12, 7, 2)]
)
def test_pieces_begin_and_end_on_whole_target_positions(length, full, tile, overlap):
    (spans,) = tiles.pieces((length,), (full,), (tile,), (overlap,))
    assert spans[0].start == 0 and spans[-1].stop == length and all(len(span) <= tile for span in spans)
    assert all(a.stop - b.start >= overlap for a, b in pairwise(spans))
    if 2 * (length // math.gcd(length, full)) <= tile:
        assert all(place * full % length == 0 for span in spans for place in (span.start, span.stop))


@torch.no_grad()
def test_the_linear_part_is_that_of_the_whole_in_any_pieces():
    torch.manual_seed(0)
    network = LatentUpsampler(replace(config(4), polynomials=True)).eval()
    network.polynomial.conv.reset_parameters()
    z = torch.randn(1, 4, 5, 8, 14)
    cut = upsample_in_tiles(network, z, (12, 21), (3, 7, 9), (1, 2, 2))
    assert (cut - network(z, (12, 21))).abs().max() < 1e-5  # its networks start at nothing
