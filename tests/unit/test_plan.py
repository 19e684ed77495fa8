"""What `plan` says against what happens: FLOPs by PyTorch's counter, live memory tensor by tensor, refusals and remarks."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import UMT5Config, UMT5EncoderModel

from muralist.base_info import BaseInfo, Defaults
from muralist.config import Config, Request
from muralist.cost import text as text_cost
from muralist.cost import transformer, vae
from muralist.cost.budget import Budget
from muralist.cost.decoding import GOOD_TILE
from muralist.errors import UserError
from muralist.nn.attention import FullAttention, WindowAttention
from muralist.nn.attention.reference import window_mask
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.kernels import Kernels
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.plan import Machine, Plan, plan
from muralist.sampling import flow
from muralist.stages.decode import TileMajor, plan_decode
from muralist.stages.decode_options import DecodeOptions
from muralist.stages.proxy import LowResolutionProxy
from muralist.stages.refine import Refine, Windows
from muralist.stages.upsample import LatentInterpolation
from muralist.tiling import tile_boxes
from muralist.types import Geometry, Grid

TINY = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=32, freq_dim=16, ffn_dim=48, num_layers=3
)
WAN_1_3B = TINY | dict(num_attention_heads=12, attention_head_dim=128, text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30)
SMALL_21 = dict(base_dim=8, z_dim=16, scale_factor_spatial=8)
WAN_21 = SMALL_21 | dict(base_dim=96)
SMALL_22 = dict(
    base_dim=8, decoder_base_dim=8, z_dim=16, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
    latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
)  # fmt: skip
ROOMY = replace(Machine.of("140GB"), dtype="float32")
GRAFTS = {
    "stock": Graft(),
    "full in chunks": Graft(token_chunk=16),
    "windows": Graft(attention=WindowAttention((2, 2, 3)), token_chunk=16),
    "windows that stay": Graft(attention=WindowAttention((2, 3, 3), shift=False)),
}


def cpu_attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def counter() -> FlopCounterMode:
    """PyTorch's counter does not know the CPU's attention kernel."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention})


def base(transformer_config: dict = TINY, vae_config: dict = SMALL_21, *, trained: Grid | None = None, **sizes: int) -> BaseInfo:
    trained = trained or Grid(num_frames=17, height=480, width=832)
    defaults = Defaults(grid=trained, num_inference_steps=4, guidance_scale=5.0, flow_shift=5.0, negative_prompt="", max_sequence_length=6, refine_steps=4)
    geometry = Geometry(spatial_factor=vae_config["scale_factor_spatial"], temporal_factor=4, channels=16, patch=(1, 2, 2))
    return BaseInfo(
        name="test", folder=Path("nowhere"), geometry=geometry, defaults=defaults, transformer_config=transformer_config, vae_config=vae_config,
        boundary=None, prediction="flow", adapters=(), parts=(), component_bytes={"transformer": 1000, "text_encoder": 1000, "vae": 1000, **sizes},
    )  # fmt: skip


def request(grid: Grid, *, cascade: bool = False, guidance_scale: float = 5.0, decode: DecodeOptions | None = None, **refining) -> Request:
    sampling = dict(num_inference_steps=4, guidance_scale=guidance_scale, flow_shift=5.0)
    proxy = LowResolutionProxy(height=480, width=832, **sampling) if cascade else None
    refining = {"attention": Windows(), "skip_steps": 1, **refining} if cascade else refining
    config = Config(proxy=proxy, upsample=LatentInterpolation() if cascade else None, refine=Refine(**sampling, **refining), decode=decode or DecodeOptions())
    return Request(prompt="a ball", negative_prompt="", grid=grid, seed=0, model="test", revision=None, recipe="test", config=config)


def stage(made: Plan, name: str):
    return next(stage for stage in made.stages if stage.stage == name)


# -- FLOPs --


@pytest.fixture(scope="module")
def tiny() -> MuralTransformer:
    return MuralTransformer(**TINY).eval()


def velocity(model: MuralTransformer):
    def field(z: torch.Tensor, sigma: float) -> torch.Tensor:
        return model(z, torch.ones(1), torch.zeros(1, 6, 32), return_dict=False)[0]

    return field


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 8, 12)], ids=["ragged", "even"])
@pytest.mark.parametrize("graft", GRAFTS.values(), ids=GRAFTS)
def test_transformer_flops_are_those_counted(tiny, shape, graft):
    f, y, x = shape
    field = velocity(tiny.configure(graft))
    with torch.no_grad(), counter() as counted:
        field(torch.zeros(1, 16, f, 2 * y, 2 * x), 1.0)
    said = transformer.forward(transformer.Dimensions.of(TINY), graft, shape, 6).flops
    assert 0.98 <= counted.get_total_flops() / said <= 1.02


@pytest.mark.parametrize(("guidance_scale", "interval"), [(1.0, (0.0, 1.0)), (5.0, (0.0, 1.0)), (5.0, (0.8, 0.95)), (5.0, (0.0, 0.1))])
@pytest.mark.parametrize("attention", [FullAttention(), Windows(tokens=40)], ids=["full", "windows"])
def test_denoising_flops_include_guidance_and_steps(tiny, attention, guidance_scale, interval):
    asked = request(Grid(num_frames=5, height=80, width=112), guidance_scale=guidance_scale, attention=attention, guidance_interval=interval)
    info = base()
    graft = asked.config.refine.graft(info.geometry.token_shape(asked.grid))
    field = velocity(tiny.configure(graft))
    z = torch.zeros(1, *info.geometry.latent_shape(asked.grid))
    guided, levels = flow.guided(field, field, guidance_scale, interval), flow.sigmas(4, 5.0)
    with torch.no_grad(), counter() as counted:
        for level in levels[:-1]:
            guided(z, level)
    assert 0.98 <= counted.get_total_flops() / stage(plan(asked, info, ROOMY), "refine").flops <= 1.02


def test_what_a_plan_says_of_windows_that_travel_is_the_mean_of_the_steps():
    info, asked = base(), request(Grid(num_frames=17, height=192, width=320), attention=Windows(tokens=32), guidance_interval=(0.8, 0.95))
    shape, size = info.geometry.token_shape(asked.grid), transformer.Dimensions.of(TINY)
    steps = [transformer.forward(size, asked.config.refine.graft(shape, step), shape, 6) for step in range(4)]
    passes = [flow.passes(level, 5.0, (0.8, 0.95)) for level in flow.sigmas(4, 5.0)[:-1]]
    ran = [step for step, times in zip(steps, passes) for _ in range(times)]
    said = stage(plan(asked, info, ROOMY), "refine")
    assert len({step.attention for step in steps}) > 1 and len(ran) > 4
    assert said.attention_flops == sum(step.attention for step in ran)
    assert said.keys_per_query == pytest.approx(sum(step.keys_per_query for step in ran) / len(ran))
    assert said.attention_saving == pytest.approx(said.tokens / said.keys_per_query)
    still = stage(plan(replace(asked, config=replace(asked.config, refine=replace(asked.config.refine, cache=0.1))), info, ROOMY), "refine")
    assert still.keys_per_query == pytest.approx(steps[0].keys_per_query)
    assert said.seconds - still.seconds == pytest.approx(ROOMY.seconds(attention=said.attention_flops - still.attention_flops))


@pytest.mark.parametrize("config", [SMALL_21, SMALL_22], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize("tile", [None, 96])
def test_flops_of_diffusers_decode(config, tile):
    model = AutoencoderKLWan(**config).eval()
    if tile:
        model.enable_tiling(tile, tile, 64, 64)
    with torch.no_grad(), counter() as counted:
        model.decode(torch.zeros(1, 16, 2, 10, 13))
    assert 0.98 <= counted.get_total_flops() / vae.diffusers_decode(config, (2, 10, 13), tile=tile, stride=64).flops <= 1.02


@pytest.mark.parametrize("config", [SMALL_21, SMALL_22], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole_blocks", [0, 1])
def test_flops_of_streaming_decode(config, dtype, whole_blocks):
    decoder = StreamingDecoder(AutoencoderKLWan(**config).to(dtype), whole_blocks)
    tiles = tile_boxes(5 * decoder.spatial_factor, 3 * decoder.spatial_factor, 2 * decoder.spatial_factor, decoder.spatial_factor)
    z, whole, caches = torch.randn(1, 16, 2, 5, 3), {}, [{} for _ in tiles]
    with counter() as counted:
        for k in range(2):
            patch = decoder.first_part(z[:, :, k : k + 1], first=k == 0, caches=whole)
            for tile, cache in zip(tiles, caches):
                decoder.second_part(patch, tile, first=k == 0, caches=cache)
    planned = vae.decoder(config, quick=dtype == torch.float32, whole_blocks=whole_blocks)
    assert 0.98 <= counted.get_total_flops() / vae.decode(planned, (2, 5, 3), tiles).flops <= 1.02


def test_alike_tiles_are_counted_once_and_no_others():
    """Grouping must not change the sum over single tiles."""
    planned = vae.decoder(SMALL_21, quick=False)
    tiles = tile_boxes(40 * 8, 90 * 8, 64, 8)
    together = vae.decode(planned, (2, 40, 90), tiles)
    alone = vae.decode(planned, (2, 40, 90), [])
    parts = sum(vae.decode(planned, (2, 40, 90), [tile]).flops - alone.flops for tile in tiles)
    assert together.flops == parts + alone.flops
    assert len(planned.kinds(tiles, (40, 90))) < len(tiles)


def test_weights_are_counted():
    with torch.device("meta"):
        model, codec = WanTransformer3DModel(**TINY), AutoencoderKLWan(**SMALL_22)
    assert transformer.parameters(transformer.Dimensions.of(TINY)) == sum(p.numel() for p in model.parameters())
    assert vae.parameters(SMALL_22) == sum(p.numel() for p in codec.parameters())


def test_text_encoder_flops_and_weights():
    config = dict(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2, relative_attention_num_buckets=32)
    encoder = UMT5EncoderModel(UMT5Config(**config)).eval()
    with torch.no_grad(), counter() as counted:
        encoder(torch.zeros(1, 12, dtype=torch.long))
    assert 0.98 <= counted.get_total_flops() / text_cost.forward(config, 12) <= 1.02
    assert text_cost.parameters(config) == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("shift", [False, True])
def test_keys_per_query_are_those_of_the_masks(shift):
    shape, size, layers = (4, 5, 7), (2, 2, 3), 3  # cutting 4 by 2 in the middle of pieces gives other pairs than cutting it evenly
    said = transformer.forward(transformer.Dimensions.of(TINY), Graft(attention=WindowAttention(size, shift=shift)), shape, 6)
    masks = [window_mask(shape, size, shifted=shift and layer % 2 == 1) for layer in range(layers)]
    assert said.keys_per_query == pytest.approx(sum(mask.sum().item() for mask in masks) / (layers * said.tokens))
    assert said.attention_saving == pytest.approx(said.tokens / said.keys_per_query)


# -- Memory --


class Alive(TorchDispatchMode):
    """The most bytes of tensors that were alive together, weights excepted."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.weights:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(count for _, count in self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "graft", [Graft(), Graft(token_chunk=256), Graft(attention=WindowAttention((5, 5, 5)), token_chunk=256)], ids=["stock", "full", "windows"]
)
@pytest.mark.parametrize("ffn", [384, 1024])
def test_live_memory_of_a_forward(dtype, graft, ffn):
    config = TINY | dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=ffn, num_layers=2)
    model = MuralTransformer(**config).to(dtype).configure(graft)
    z, text = torch.randn(1, 16, 5, 36, 40, dtype=dtype), torch.randn(1, 6, 32, dtype=dtype)
    with torch.no_grad(), Alive(model) as seen:
        model(z, torch.ones(1), text)
    said = transformer.live_bytes(transformer.Dimensions.of(config), graft, (5, 18, 20), dtype.itemsize)
    assert 0.9 <= said / seen.peak <= 1.2


@pytest.mark.parametrize("attention", [FullAttention(), WindowAttention((5, 9, 10))], ids=["full", "windows"])
@pytest.mark.parametrize("token_chunk", [None, 450])
def test_live_memory_of_the_reference(attention, token_chunk):
    """It holds the scores of all pairs, in float64, which are most of it."""
    config = TINY | dict(num_attention_heads=4, num_layers=2)
    graft = Graft(attention=attention, token_chunk=token_chunk, kernels=Kernels(attention="reference"))
    model = MuralTransformer(**config).configure(graft)
    z, text = torch.randn(1, 16, 5, 36, 40), torch.randn(1, 512, 32)
    with torch.no_grad(), Alive(model) as seen:
        model(z, torch.ones(1), text)
    said = transformer.live_bytes(transformer.Dimensions.of(config), graft, (5, 18, 20), 4, text_tokens=512)
    assert 0.95 <= said / seen.peak <= 1.1


def test_the_reference_is_refused_where_its_scores_do_not_fit():
    info, grid = base(WAN_1_3B, WAN_21), Grid(num_frames=81, height=480, width=832)
    asked = request(grid)
    card = replace(ROOMY, dtype="bfloat16", device_bytes=24 * 10**9)
    plan(asked, info, card).check()
    slow = replace(asked, config=replace(asked.config, kernels=Kernels(attention="reference")))
    with pytest.raises(UserError, match="refine needs") as error:
        plan(slow, info, card, budget=Budget("high")).check()
    assert error.value.fix == "use --memory balanced"
    assert stage(plan(slow, info, card), "refine").memory_bytes > 2 * 8 * 12 * 2048 * 32760


def test_what_does_not_fit_is_refused_with_a_size_that_does():
    info, grid = base(WAN_1_3B, WAN_21), Grid(num_frames=81, height=2160, width=3840)
    small = replace(ROOMY, dtype="bfloat16", device_bytes=9 * 10**9)
    made = plan(request(grid), info, small)
    with pytest.raises(UserError, match=r"refine needs .* of memory") as error:
        made.check()
    frames = int(error.value.fix.split("at most ")[1].split()[0])
    assert (frames - 1) % 4 == 0 and frames < 81
    plan(request(replace(grid, num_frames=frames)), info, small).check()
    with pytest.raises(UserError):
        plan(request(replace(grid, num_frames=frames + 4)), info, small).check()


def test_a_full_disk_is_refused():
    made = plan(request(Grid(num_frames=9, height=320, width=480)), base(), replace(ROOMY, disk_free=1000))
    assert stage(made, "refine").disk_bytes >= 3 * 4 * 16 * 3 * 40 * 60  # two snapshots and one being published, float32
    with pytest.raises(UserError, match="disk"):
        made.check()


def test_long_groups_of_pictures_keep_more_states_on_the_disk():
    asked = request(Grid(num_frames=161, height=320, width=480))
    usual, long = (replace(asked, config=replace(asked.config, encode=replace(asked.config.encode, gop=gop))) for gop in (12, 96))
    made, longer = (plan(one, base(), ROOMY) for one in (usual, long))
    assert stage(longer, "decode").disk_bytes > 2 * stage(made, "decode").disk_bytes > 0


def test_a_decoder_without_room_is_refused_before_hours_of_denoising():
    made = plan(request(Grid(num_frames=9, height=1088, width=1920), decode=DecodeOptions(memory_bytes=1000)), base(), ROOMY)
    with pytest.raises(UserError, match="decode"):
        made.check()


def test_the_plan_settles_on_tiles_that_are_worth_it_and_the_pipeline_finds_the_same():
    info, grid = base(WAN_1_3B, WAN_21), Grid(num_frames=17, height=2160, width=3840)
    machine = replace(ROOMY, dtype="bfloat16")
    made = plan(request(grid, cascade=True), info, machine)
    chosen = plan_decode(WAN_21, grid, made.request.config.decode, dtype=torch.bfloat16)
    assert isinstance(chosen, TileMajor) and chosen.tile == GOOD_TILE
    assert plan(request(grid, cascade=True), info, replace(machine, device_bytes=24 * 10**9)).request == made.request
    assert any("disk" in note for note in made.notes)
    assert stage(made, "decode").disk_bytes > 17 * 2160 * 3840 * 3 * 2


def test_choices_of_the_user_stay():
    options = DecodeOptions(order="tile", tile=256)
    assert plan(request(Grid(num_frames=9, height=1088, width=1920), decode=options), base(), ROOMY).request.config.decode == options


# -- The whole plan --


def test_stages_come_in_order_and_leaving_training_is_said():
    made = plan(request(Grid(num_frames=33, height=1072, width=1928), cascade=True), base(vae_config=SMALL_22), ROOMY)
    assert [stage.stage for stage in made.stages] == ["prompt", "proxy", "upsample", "refine", "decode", "encode"]
    text = " ".join(made.notes)
    assert "computed at 1952x1088 and cropped to 1928x1072" in text and "trained for 17" in text and "without a proxy" not in text
    direct = plan(request(Grid(num_frames=9, height=1072, width=1928)), base(), ROOMY)
    assert [stage.stage for stage in direct.stages] == ["prompt", "refine", "decode", "encode"]
    assert any("without a proxy" in note for note in direct.notes)


def test_a_small_request_needs_no_remark():
    made = plan(request(Grid(num_frames=9, height=320, width=480)), base(), replace(ROOMY, assumed=False))
    assert made.notes == () and made.refusals == ()


def test_record_is_json_and_sums_up():
    made = plan(request(Grid(num_frames=9, height=320, width=480), cascade=True), base(), ROOMY)
    record = json.loads(json.dumps(made.record()))
    assert record["totals"]["flops"] == sum(stage["flops"] for stage in record["stages"])
    assert record["totals"]["seconds"] == pytest.approx(sum(stage.seconds for stage in made.stages)) and record["totals"]["seconds"] > 0


def test_a_plan_for_4k_takes_less_than_a_second():
    info, asked = base(WAN_1_3B, WAN_21), request(Grid(num_frames=81, height=2160, width=3840), cascade=True)
    start = time.process_time()
    plan(asked, info, replace(ROOMY, dtype="bfloat16"))
    assert time.process_time() - start < 1


def test_machines():
    assert Machine.of("24 gb").device_bytes == 24 * 10**9 and Machine.of("24GB").assumed
    with pytest.raises(UserError, match="24GB"):
        Machine.of("7GB")
    here = Machine.measure("cpu", Path("not/there/yet"))
    assert here.on_cpu and not here.assumed and here.limit == here.memory_bytes > 0 and here.disk_free > 0
    assert here.matmul_flops > 1e8 and here.copy_bytes_per_s > 1e7


def test_matrix_units_wait_for_everything_else_and_vectors_do_not():
    """What a plan counts on is a share of the rate of products, which matrix units alone lift far above all other work."""
    vectors, units = (replace(ROOMY, device_bytes=None, dtype="bfloat16", matmul_flops=1e12, amx=amx) for amx in (False, True))
    exact = replace(vectors, dtype="float32")
    for work in ("linear", "attention"):
        assert units.seconds(**{work: 1e12}) > 2 * vectors.seconds(**{work: 1e12}) == 2 * exact.seconds(**{work: 1e12})
    for channels in (16, 256):
        assert units.convolution_seconds(1e12, channels=channels) > 2 * vectors.convolution_seconds(1e12, channels=channels)
        assert vectors.convolution_seconds(1e12, channels=channels) == exact.convolution_seconds(1e12, channels=channels)


@pytest.mark.parametrize(("units", "bfloat16", "used"), [(True, True, True), (False, True, False), (True, False, False)])
def test_matrix_units_are_seen_where_the_cpu_has_them(units, bfloat16, used, monkeypatch):
    monkeypatch.setattr("muralist.cost.machine._matmul_rate", lambda *about: 1e12)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: units)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bfloat16)
    assert Machine.measure("cpu").amx is used
