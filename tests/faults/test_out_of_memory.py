"""Memory that runs out in spite of the plan: the same pixels in smaller chunks, or one clear line."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.nn import out_of_memory
from muralist.nn.attention import FullAttention, GuidedWindows, Near, WindowAttention
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.encoder import StreamingEncoder
from muralist.nn.kernels import Kernels
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.sampling import flow
from muralist.stages.decode import TILES, TileMajor, TimeMajor, decode
from muralist.stages.decode_in_less import decode_in_less, smaller
from muralist.stages.upsample import PixelInterpolation, upsample
from muralist.types import FrameChunk, Grid, LatentVideo, TextCond
from muralist.velocity import ProxyView, Sight, velocity_field
from tests.shell import muralist

CPU = torch.device("cpu")
GRAFTS = {"stock": Graft(), "chunks": Graft(token_chunk=64), "windows": Graft(attention=WindowAttention((3, 2, 2)), token_chunk=64)}
PLANS = {"time": TimeMajor(tile=64), "tile": TileMajor(tile=64), "whole frames": TimeMajor(tile=1024)}
CALLS = (1, 2, 5)  # the ones that fail


class Failing:
    """In place of a method: the same, but the calls of these numbers (from 1) run out of memory; `sizes`: what a caller was asking for."""

    def __init__(self, original, calls, error=torch.OutOfMemoryError):
        self.original, self.calls, self.error, self.count = original, set(calls), error, 0

    def __get__(self, instance, owner):
        def call(*given, **named):
            self.count += 1
            if self.count in self.calls:
                raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            return self.original(instance, *given, **named)

        return call


@pytest.fixture(autouse=True)
def small_floor(monkeypatch):
    monkeypatch.setattr(out_of_memory, "FLOOR", 8)


@pytest.fixture(scope="module")
def base(tiny22):
    return Base(inspect_base(str(tiny22)), CPU, torch.float32)


def test_the_pass_over_the_proxy_is_computed_as_the_graft_says(base):
    """With its kernels and its chunks, on a transformer that was never configured before."""
    text = TextCond(torch.zeros(1, 4, 32), torch.zeros(1, 4, 32))
    near = Near((1, 1, 1), (16.0, 16.0, 24.0))
    graft = Graft(attention=GuidedWindows(WindowAttention((1, 3, 4)), near), token_chunk=6, kernels=Kernels(attention="reference"))
    z, seen = torch.zeros(1, 48, 1, 6, 8), []
    sight = Sight(ProxyView(torch.zeros(1, 48, 1, 6, 8), 1.0, None, "clean", 0), None, None)
    velocity = velocity_field(Base(base.info, CPU, torch.float32), text, guidance_scale=1.0, graft=graft, adapter="detail", sight=sight)
    with pytest.MonkeyPatch.context() as patch:
        configure = MuralTransformer.configure
        patch.setattr(MuralTransformer, "configure", lambda self, given: seen.append(given) or configure(self, given))
        velocity(z, 0.5)
    assert {(given.kernels, given.token_chunk) for given in seen} == {(graft.kernels, 6)} and sum(given.attention == FullAttention() for given in seen) == 1


def denoised(base: Base, graft: Graft) -> torch.Tensor:
    text = TextCond(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4, 32))
    velocity = velocity_field(base, text, guidance_scale=2.0, graft=graft, adapter="detail")
    z = torch.randn(1, 48, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    return flow.denoise(velocity, z, flow.sigmas(3, 5.0), after_step=lambda step, z: None)


@pytest.fixture(scope="module")
def undisturbed(base) -> Callable[[str], torch.Tensor]:
    """What denoising with a graft gives in memory enough."""
    return cache(lambda graft: denoised(base, GRAFTS[graft]))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("name", GRAFTS)
def test_a_step_goes_on_in_smaller_chunks(name, error, base, undisturbed, monkeypatch, caplog):
    expected, graft = undisturbed(name), GRAFTS[name]
    monkeypatch.setattr(MuralTransformer, "forward", Failing(MuralTransformer.forward, CALLS, error))
    assert (denoised(base, graft) - expected).abs().max() < 1e-5
    assert [record.args for record in caplog.records] == [(n, n // 2) for n in ((144, 72, 36) if graft == Graft() else (64, 32, 16))]


def test_in_the_middle_of_a_forward_nothing_is_lost(base, undisturbed, monkeypatch):
    """Blocks write into the residual stream; what they have written must not be read again."""
    from muralist.nn.block import MuralBlock

    expected = undisturbed("windows")
    monkeypatch.setattr(MuralBlock, "forward", Failing(MuralBlock.forward, (2, 5, 10)))
    assert (denoised(base, GRAFTS["windows"]) - expected).abs().max() < 1e-5


def test_other_errors_pass(base, monkeypatch):
    monkeypatch.setattr(MuralTransformer, "forward", Failing(MuralTransformer.forward, (1,), NotImplementedError))
    monkeypatch.setattr(out_of_memory, "ran_out", lambda error: False)
    with pytest.raises(NotImplementedError):
        denoised(base, GRAFTS["windows"])


def test_too_little_for_the_smallest_chunk_is_one_clear_line(tiny22, tmp_path, monkeypatch):
    monkeypatch.setattr(MuralTransformer, "forward", Failing(MuralTransformer.forward, range(100)))
    answer = muralist("generate", "a ball", "--model", tiny22, "-o", tmp_path / "a.mp4", "--size", "128x64")
    line = answer.err.splitlines()[-1]
    assert answer.code == 2 and line.startswith("muralist: error: ")
    assert "memory: too little for 8 tokens at a time" in line and "--memory low" in line


@pytest.fixture(scope="module")
def latent():
    z = torch.randn(1, 16, 3, 12, 20, generator=torch.Generator().manual_seed(3))
    return LatentVideo(z, Grid(num_frames=9, height=96, width=160))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]).eval()


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr("muralist.stages.decode_in_less.TILES", (*TILES, 64, 32, 16))


@pytest.fixture(scope="module")
def decoded(latent, vae) -> Callable[[str, int], list[FrameChunk]]:
    """What decoding by a plan from a frame on gives in memory enough."""
    return cache(lambda plan, first_frame: list(decode(latent, vae, PLANS[plan], first_frame=first_frame)))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("call", "first_frame"), [(1, 0), (4, 5), (9, 0)])
def test_decoding_goes_on_in_smaller_tiles(name, call, first_frame, latent, vae, decoded, monkeypatch, tmp_path, small_tiles):
    expected, plan = decoded(name, first_frame), PLANS[name]
    monkeypatch.setattr(StreamingDecoder, "second_part", Failing(StreamingDecoder.second_part, (call, call + 3)))
    found = list(decode_in_less(latent, vae, plan, first_frame=first_frame, scratch=tmp_path))
    assert [chunk.start for chunk in found] == [chunk.start for chunk in expected]
    assert max((a.frames - b.frames).abs().max() for a, b in zip(found, expected)) < 1e-5


def test_smaller_plans_end():
    plan, grid, seen = TimeMajor(tile=1024), Grid(num_frames=9, height=2160, width=3840), []
    with pytest.raises(UserError, match="128 pixels"):
        while True:
            plan = smaller(plan, grid)
            seen.append(plan.tile)
    assert seen == list(TILES)


@pytest.fixture(scope="module")
def proxy():
    z = torch.randn(1, 48, 3, 6, 8, generator=torch.Generator().manual_seed(4))
    return LatentVideo(z, Grid(num_frames=9, height=96, width=128))


def enlarged(proxy: LatentVideo, base: Base, told: list[tuple[int, int]] | None = None) -> torch.Tensor:
    on_piece = (lambda *count: told.append(count)) if told is not None else lambda done, total: None
    return upsample(proxy, Grid(num_frames=9, height=192, width=256), base, PixelInterpolation(), on_piece).z


@pytest.fixture(scope="module")
def encoded(proxy, base) -> torch.Tensor:
    """The enlarged proxy in memory enough."""
    return enlarged(proxy, base)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(("part", "calls"), [("first_part", (1,)), ("first_part", (2, 5)), ("second_part", (2, 3))])
def test_encoding_goes_on_in_smaller_tiles(part, calls, error, proxy, base, encoded, monkeypatch, caplog):
    told = []
    monkeypatch.setattr(StreamingEncoder, part, Failing(getattr(StreamingEncoder, part), calls, error))
    assert (enlarged(proxy, base, told) - encoded).abs().max() < 1e-5
    assert [record.args for record in caplog.records] == [(256 >> n,) for n in range(1, len(calls) + 1)]
    assert told[-1][0] == told[-1][1] == (4 if len(calls) == 1 else 12)


def test_too_little_for_the_smallest_tile_that_is_encoded_is_one_clear_line(proxy, base, monkeypatch):
    monkeypatch.setattr(StreamingEncoder, "first_part", Failing(StreamingEncoder.first_part, range(100)))
    with pytest.raises(UserError, match="memory, upsample: too little for tiles of 64 pixels"):
        enlarged(proxy, base)


def test_other_errors_of_encoding_pass(proxy, base, monkeypatch):
    monkeypatch.setattr(StreamingEncoder, "first_part", Failing(StreamingEncoder.first_part, (1,), NotImplementedError))
    monkeypatch.setattr(out_of_memory, "ran_out", lambda error: False)
    with pytest.raises(NotImplementedError):
        enlarged(proxy, base)
