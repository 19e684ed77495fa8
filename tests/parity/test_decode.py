"""Our streaming decode equals diffusers' untiled decode: both VAE flavours, both orders, any tile, any restart."""

import errno
import itertools
import time
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan

from muralist.errors import UserError
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.decoder_conv import time_mix
from muralist.stages.decode import DecodeOptions, TileMajor, TimeMajor, decode, decode_bytes, plan_decode
from muralist.tiling import Box, tile_boxes
from muralist.types import Grid, LatentVideo

TOLERANCE = 1e-5  # of the range [0, 1], fp32
H, W, F = 6, 8, 4  # latent size
TEMPORAL = [False, True, True]
WAN21 = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=TEMPORAL)
WAN22 = dict(
    base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=TEMPORAL, is_residual=True,
    in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[1.3] * 48,
)  # fmt: skip
EMBEDDED = {**WAN22, "base_dim": 16, "decoder_base_dim": 16, "dim_mult": [1, 1, 4, 4]}
CONFIGS = {"wan21": WAN21, "wan22": WAN22, "embedded": EMBEDDED}
flavours = pytest.mark.parametrize("flavour", CONFIGS)
PLANS = [TimeMajor(tile=64), TimeMajor(tile=4096), TimeMajor(tile=48, whole_blocks=2), TileMajor(tile=64), TileMajor(tile=4096)]


@cache
def model(flavour: str) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIGS[flavour]).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    return vae


@cache
def latent(flavour: str) -> LatentVideo:
    config = model(flavour).config
    z = torch.randn(1, config.z_dim, F, H, W, generator=torch.Generator().manual_seed(1))
    s = config.scale_factor_spatial
    return LatentVideo(z, Grid(num_frames=4 * F - 3, height=H * s, width=W * s))


@cache
def untiled(flavour: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """diffusers' own frames [T, H, W, 3] in [0, 1]."""
    vae, config = model(flavour), model(flavour).config
    vae = vae if dtype == torch.float32 else AutoencoderKLWan.from_config(config).eval().to(dtype)
    vae.load_state_dict(model(flavour).state_dict())
    shape = (1, -1, 1, 1, 1)
    z = latent(flavour).z * torch.tensor(config.latents_std).view(shape) + torch.tensor(config.latents_mean).view(shape)
    with torch.no_grad():
        return vae.decode(z.to(dtype)).sample[0].permute(1, 2, 3, 0).float() / 2 + 0.5


def frames(chunks) -> torch.Tensor:
    chunks = list(chunks)
    starts = [chunk.start for chunk in chunks]
    assert starts == list(itertools.accumulate((len(c.frames) for c in chunks[:-1]), initial=starts[0]))
    return torch.cat([chunk.frames for chunk in chunks])


@flavours
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_equals_diffusers_untiled(flavour, plan):
    ours = frames(decode(latent(flavour), model(flavour), plan))
    assert ours.shape == untiled(flavour).shape and ours.std() > 0.05
    assert (ours - untiled(flavour)).abs().max() <= TOLERANCE / 2


def test_an_attention_that_adds_nothing_is_left_out_and_the_answer_stays():
    vae = AutoencoderKLWan(**WAN22).eval().requires_grad_(False)
    vae.load_state_dict(model("wan22").state_dict())
    layers, attentions = len(StreamingDecoder(vae).whole), vae.decoder.mid_block.attentions
    for attention in attentions:
        attention.proj.weight.zero_()
    assert len(StreamingDecoder(vae).whole) == layers, "a bias alone is still added"
    for attention in attentions:
        attention.proj.bias.zero_()
    assert len(StreamingDecoder(vae).whole) == layers - len(attentions)
    z, config = latent("wan22"), vae.config
    scaled = z.z * torch.tensor(config.latents_std).view(1, -1, 1, 1, 1) + torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    expected = vae.decode(scaled).sample[0].permute(1, 2, 3, 0) / 2 + 0.5
    assert (frames(decode(z, vae, TimeMajor(tile=64))) - expected).abs().max() <= TOLERANCE / 2


@flavours
def test_a_tile_without_its_halo_would_be_wrong(flavour):
    """The other tests could pass if a halo did not matter: it does, by far more than the tolerance."""
    vae, video = model(flavour), latent(flavour)
    decoder, half = StreamingDecoder(vae), W * vae.config.scale_factor_spatial // 2
    patch = decoder.first_part(video.z[:, :, :1], first=True, caches={})
    tile = Box.whole(video.grid.height, half)
    cut = type(patch)(patch.data[:, :, : W // 2], Box.whole(H, W // 2), (H, W // 2))
    right, wrong = (decoder.second_part(source, tile, first=True, caches={}) for source in (patch, cut))
    assert (right - wrong).abs().max() > 100 * TOLERANCE
    assert (right[0] - untiled(flavour)[0, :, :half]).abs().max() <= TOLERANCE


@flavours
def test_tile_order_is_irrelevant_bit_for_bit(flavour):
    vae, video = model(flavour), latent(flavour)
    decoder = StreamingDecoder(vae)
    patch = decoder.first_part(video.z[:, :, :1], first=True, caches={})
    boxes = tile_boxes(video.grid.height, video.grid.width, 48, 16)
    forward = [decoder.second_part(patch, box, first=True, caches={}) for box in boxes]
    backward = [decoder.second_part(patch, box, first=True, caches={}) for box in reversed(boxes)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward))


@pytest.mark.parametrize("flavour", ["wan21", "wan22"])
def test_low_precision_takes_diffusers_steps(flavour):
    """bf16 uses the direct path; it is as far from fp32 as diffusers' bf16 is."""
    vae = AutoencoderKLWan.from_config(model(flavour).config).eval().to(torch.bfloat16)
    vae.load_state_dict(model(flavour).state_dict())
    ours = frames(decode(latent(flavour), vae, TimeMajor(tile=64)))
    theirs = untiled(flavour, torch.bfloat16)
    error = (theirs - untiled(flavour)).abs().mean()
    assert (ours - untiled(flavour)).abs().mean() <= 1.2 * error and (ours - theirs).abs().mean() <= 1.2 * error


@cache
def model16(flavour: str) -> AutoencoderKLWan:
    vae = AutoencoderKLWan.from_config(model(flavour).config).eval().requires_grad_(False).to(torch.bfloat16)
    vae.load_state_dict(model(flavour).state_dict())
    return vae


@pytest.mark.parametrize("flavour", ["wan21", "wan22"])
def test_a_bright_gradient_of_a_low_precision_model_has_more_than_8_bits(flavour):
    """bf16 knows 128 values between 0.5 and 1: a sky would show bands."""
    vae, video = model16(flavour), latent(flavour)
    ramp = video.z[..., :1, :1] + torch.linspace(0, 1, W) * (video.z[..., 1:2, 1:2] - video.z[..., :1, :1])
    pixels = frames(decode(LatentVideo(ramp.expand_as(video.z), video.grid), vae, TimeMajor(tile=4096)))
    assert pixels.dtype == torch.float32
    assert len(pixels[(pixels >= 0.5) & (pixels <= 1)].unique()) > 2000


def test_the_bands_of_a_widened_head_join_without_a_trace(monkeypatch):
    vae, video = model16("wan22"), latent("wan22")
    whole = frames(decode(video, vae, TimeMajor(tile=4096)))
    monkeypatch.setattr("muralist.nn.decoder_blocks.HEAD_BYTES", 0)
    assert len(StreamingDecoder(vae).head.bands(Box.whole(40, 64))) == 3
    assert (frames(decode(video, vae, TimeMajor(tile=4096))) - whole).abs().max() <= 1e-6


@pytest.mark.parametrize("flavour", ["wan21", "wan22"])
def test_float64_direct_path_is_exact(flavour):
    vae = AutoencoderKLWan.from_config(model(flavour).config).eval().double()
    vae.load_state_dict(model(flavour).state_dict())
    assert (frames(decode(latent(flavour), vae, TimeMajor(tile=64))) - untiled(flavour, torch.float64)).abs().max() <= 1e-6


@pytest.mark.parametrize("plan", [TimeMajor(tile=64), TileMajor(tile=64)], ids=str)
def test_crop_cuts_before_converting(plan):
    video = latent("wan22")
    crop = Grid(num_frames=video.grid.num_frames, height=video.grid.height - 21, width=video.grid.width - 70)
    ours = frames(decode(video, model("wan22"), plan, crop=crop))
    assert (ours - untiled("wan22")[:, : crop.height, : crop.width]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("plan", [TimeMajor(tile=64), TileMajor(tile=64)], ids=str)
@pytest.mark.parametrize("first_frame", [1, 4, 5, 12])
def test_any_first_frame(plan, first_frame):
    chunks = list(decode(latent("wan21"), model("wan21"), plan, first_frame=first_frame))
    everything = frames(decode(latent("wan21"), model("wan21"), plan))
    assert chunks[0].start <= first_frame < chunks[0].start + len(chunks[0].frames)
    assert torch.equal(frames(chunks), everything[chunks[0].start :])
    assert list(decode(latent("wan21"), model("wan21"), plan, first_frame=13)) == []


class Killed(BaseException):
    """Stands for a process that dies."""


def killed_after(count: int):
    seen = set()

    def on_tile(done: int, total: int) -> None:
        seen.add(done)
        if len(seen) == count:
            raise Killed

    return on_tile


@pytest.mark.parametrize("flavour", ["wan21", "wan22"])
@pytest.mark.parametrize("plan", [TimeMajor(tile=32, save_every=1), TileMajor(tile=32)], ids=str)
def test_killed_at_every_tile_and_resumed_is_bit_identical(flavour, plan, tmp_path):
    """Killed again and again, each time one tile (tile-major) or one latent frame and a half (time-major) further: the frames are the same bits."""
    video, vae = latent(flavour), model(flavour)
    whole, seen, restarts = frames(decode(video, vae, plan)), {}, 0
    columns, rows = -(-video.grid.width // 32), -(-video.grid.height // 32)
    allowed = 3 if isinstance(plan, TileMajor) else 1 + columns * rows * 3 // 2
    while True:
        try:
            # The reader has all frames before `start`, as an encoder with closed groups would.
            for chunk in decode(video, vae, plan, scratch=tmp_path, on_tile=killed_after(allowed), first_frame=next_missing(seen)):
                seen[chunk.start] = chunk.frames
            break
        except Killed:
            restarts += 1
            assert restarts < 40
    assert restarts >= 1 and torch.equal(torch.cat([seen[start] for start in sorted(seen)]), whole)


def next_missing(seen: dict[int, torch.Tensor]) -> int:
    return max((start + len(chunk) for start, chunk in seen.items()), default=0)


def test_finished_tiles_are_not_done_again(tmp_path, monkeypatch):
    video, vae = latent("wan21"), model("wan21")
    first = frames(decode(video, vae, TileMajor(tile=64), scratch=tmp_path))
    monkeypatch.setattr(StreamingDecoder, "second_part", lambda *a, **k: pytest.fail("decoded again"))
    counts = []
    again = frames(decode(video, vae, TileMajor(tile=64), scratch=tmp_path, on_tile=lambda *c: counts.append(c)))
    assert torch.equal(first, again) and counts == [(1, 1)]


def test_tiles_can_be_stopped_at_every_latent_frame(monkeypatch):
    """A tile of all frames takes long, and Ctrl-C is heard in `on_tile`."""
    events = []
    for name in ("first_part", "second_part"):
        work = getattr(StreamingDecoder, name)
        monkeypatch.setattr(StreamingDecoder, name, lambda *a, _work=work, **k: events.append("work") or _work(*a, **k))
    told = []
    frames(decode(latent("wan21"), model("wan21"), TileMajor(tile=64), on_tile=lambda *c: told.append(c) or events.append("told")))
    assert events == ["told", *["work", "told"] * 2 * F, "told"]
    assert told == [(0, 1)] * (1 + 2 * F) + [(1, 1)]


def test_other_latents_do_not_pick_up_stale_work(tmp_path):
    video, vae = latent("wan21"), model("wan21")
    for plan in (TileMajor(tile=64), TimeMajor(tile=64, save_every=1)):
        frames(decode(video, vae, plan, scratch=tmp_path))
        other = LatentVideo(-video.z, video.grid)
        assert torch.equal(frames(decode(other, vae, plan, scratch=tmp_path)), frames(decode(other, vae, plan)))


@pytest.mark.parametrize("save_every", [1, 2, 3, 5])
@pytest.mark.parametrize("group", [1, 12, 30])
def test_kept_are_the_caches_that_a_reader_may_ask_for_and_their_disk_is_planned(save_every, group, tmp_path):
    z = torch.randn(1, 16, 13, 2, 2)
    video, plan = LatentVideo(z, Grid(num_frames=49, height=16, width=16)), TimeMajor(tile=64, save_every=save_every)
    most = 0
    for chunk in decode(video, model("wan21"), plan, scratch=tmp_path, group=group):
        # the group that the reader had open before this chunk, and the latent frame in which it begins
        begins = -(-(chunk.start // group * group) // 4)
        saved = {int(path.stem[7:]): path.stat().st_size for path in tmp_path.rglob("caches-*")}
        assert begins - max([0, *(frame for frame in saved if frame <= begins)]) < save_every
        most = max(most, sum(saved.values()))
    planned = decode_bytes(model("wan21"), tuple(z.shape[1:]), plan, group=group).disk
    assert 0.95 * most <= planned <= most


def test_of_the_default_plan_two_states_lie_on_disk():
    vae, shape = model("wan21"), (16, 41, 2, 2)
    need = decode_bytes(vae, shape, TimeMajor(tile=64))
    assert need.disk == 2 * need.caches and need.traffic == 13 * need.caches
    assert decode_bytes(vae, (16, 3, 2, 2), TimeMajor(tile=64)).disk == 0  # done before anything is saved


def test_the_disk_of_tiles_is_planned(tmp_path):
    video, plan = latent("wan22"), TileMajor(tile=64)
    most = 0
    for _ in decode(video, model("wan22"), plan, scratch=tmp_path):
        most = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.8 * most <= decode_bytes(model("wan22"), tuple(video.z.shape[1:]), plan).disk <= 1.3 * most


@pytest.mark.parametrize("plan", [TimeMajor(tile=64, save_every=1), TileMajor(tile=64)], ids=str)
def test_a_full_disk_says_how_much_is_needed(plan, tmp_path, monkeypatch):
    def write(handle, data):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("muralist.store.atomic.write", write)
    with pytest.raises(UserError, match=r"[\d,]{4,} bytes needed, [\d,]+ bytes free"):
        frames(decode(latent("wan21"), model("wan21"), plan, scratch=tmp_path))


@flavours
@pytest.mark.parametrize("tile", [16, 32, 48, 64])
def test_tiles_of_a_kind_are_counted_once_and_right(flavour, tile):
    decoder, size = StreamingDecoder(model(flavour)), (60, 100)
    side = decoder.spatial_factor
    boxes = tile_boxes(size[0] * side, size[1] * side, tile, side)
    kinds = decoder.kinds(boxes, size)
    assert sum(kinds.values()) == len(boxes) and len(kinds) < len(boxes)

    def shapes(box: Box) -> list[tuple[int, int]]:
        return [inner.shape for inner in decoder.boxes(box, size)]

    assert sorted(map(shapes, boxes)) == sorted(shapes(box) for box, count in kinds.items() for _ in range(count))


def test_a_huge_decode_is_planned_at_once():
    config, grid = WAN22, Grid(num_frames=29, height=16384, width=16384)
    started = time.process_time()
    with pytest.raises(UserError, match="allowed are"):
        plan_decode(config, grid, DecodeOptions(memory_bytes=1 << 20))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("plan", [TimeMajor(tile=64), TileMajor(tile=64)], ids=str)
def test_a_value_that_is_not_finite_names_stage_and_tile(bad, plan):
    video = latent("wan22")
    z = video.z.clone()
    z[0, 3, 2, 5, 7] = bad
    with pytest.raises(FloatingPointError, match=r"decode: tile \d of \d .*latent frame 2"):
        frames(decode(LatentVideo(z, video.grid), model("wan22"), plan))


def test_wrong_shapes_are_the_users_to_mend():
    video, vae = latent("wan21"), model("wan21")
    small = Grid(num_frames=13, height=48, width=72)
    with pytest.raises(UserError, match="the grid that the latents were made on"):
        decode(LatentVideo(video.z, small), vae, TimeMajor(tile=64))
    with pytest.raises(UserError, match="crop"):
        decode(video, vae, TimeMajor(tile=64), crop=Grid(num_frames=13, height=4800, width=72))
    with pytest.raises(UserError, match="first_frame"):
        decode(video, vae, TimeMajor(tile=64), first_frame=14)


def test_plan_follows_memory():
    grid = Grid(num_frames=29, height=2176, width=3840)
    plans = {gb: plan_decode(EMBEDDED, grid, DecodeOptions(memory_bytes=gb << 30)) for gb in (2, 4, 16)}
    assert isinstance(plans[16], TimeMajor) and isinstance(plans[2], TileMajor)
    with torch.device("meta"):
        vae = AutoencoderKLWan(**EMBEDDED)
    for gb, plan in plans.items():
        assert decode_bytes(vae, (48, 8, 136, 240), plan).peak <= gb << 30
    with pytest.raises(UserError, match=r"needs .* GB, allowed are 0\.0 GB"):
        plan_decode(EMBEDDED, grid, DecodeOptions(memory_bytes=1 << 20))


@pytest.mark.parametrize("config", [dict(), {**WAN22, "decoder_base_dim": 256, "base_dim": 160, "num_res_blocks": 2}], ids=["Wan2.1", "Wan2.2-5B"])
def test_no_tensor_of_a_planned_decode_reaches_2_to_the_31(config):
    with torch.device("meta"):
        vae = AutoencoderKLWan(**config)
    grid = Grid(num_frames=81, height=4352, width=7680)
    plan = plan_decode(vae.config, grid, DecodeOptions(memory_bytes=1 << 40))
    s = vae.config.scale_factor_spatial
    assert decode_bytes(vae, (vae.config.z_dim, 21, grid.height // s, grid.width // s), plan).largest_tensor < 2**31


@pytest.mark.parametrize("model", [model, model16])
@pytest.mark.parametrize("flavour", ["wan21", "wan22"])
def test_estimated_caches_are_the_caches(flavour, model):
    vae, video = model(flavour), latent(flavour)
    decoder, plan = StreamingDecoder(vae), TimeMajor(tile=64)
    whole, tiles = {}, [(box, {}) for box in tile_boxes(video.grid.height, video.grid.width, 64, vae.config.scale_factor_spatial)]
    for k in range(2):
        patch = decoder.first_part(video.z[:, :, k : k + 1], first=k == 0, caches=whole)
        for box, caches in tiles:
            decoder.second_part(patch, box, first=k == 0, caches=caches)
    counted = sum(value.nbytes for caches in [whole, *(caches for _, caches in tiles)] for value in caches.values())
    assert decode_bytes(vae, tuple(video.z.shape[1:]), plan).caches == counted


@pytest.mark.parametrize("frames", [2, 4])
def test_time_mix_is_a_convolution(frames):
    mix, x, taps = time_mix(frames), torch.randn(frames + 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    direct = torch.stack([(x[t : t + 3] * taps).sum() for t in range(frames)])
    assert torch.allclose(mix.after @ ((mix.taps @ taps) * (mix.before @ x)), direct, atol=1e-12)
    assert torch.equal(mix.after[:, 1], torch.ones(frames, dtype=torch.float64))  # the bias rides on this column


def test_private_names_of_diffusers():
    """Every attribute of diffusers' decoder that `nn/decoder*.py` reads."""
    for flavour, upsampler in (("wan21", lambda b: b.upsamplers[0]), ("wan22", lambda b: b.upsampler)):
        vae = model(flavour)
        decoder, block = vae.decoder, vae.decoder.up_blocks[0]
        assert decoder.conv_in._padding[4] == 2 and decoder.conv_in.kernel_size == (3, 3, 3)  # causal: two frames before, none after
        assert isinstance(block.resnets[0].nonlinearity, torch.nn.SiLU) and block.resnets[0].norm1.bias == 0.0
        assert upsampler(block).mode == "upsample3d" and upsampler(block).time_conv.kernel_size == (3, 1, 1)
        assert isinstance(upsampler(block).resample[1], torch.nn.Conv2d) and upsampler(block).resample[0].mode == "nearest-exact"
        assert len(decoder.mid_block.attentions) == 1 and decoder.mid_block.attentions[0].to_qkv.out_channels == 3 * decoder.conv_in.out_channels
        assert decoder.norm_out.scale == decoder.norm_out.gamma.numel() ** 0.5
    shortcut = model("wan22").decoder.up_blocks[0].avg_shortcut
    assert (shortcut.factor_t, shortcut.factor_s, shortcut.factor) == (2, 2, 8) and shortcut.repeats >= 1
    assert model("wan22").decoder.up_blocks[-1].avg_shortcut is None and model("wan22").decoder.up_blocks[-1].upsampler is None


def test_an_unknown_layer_is_refused():
    vae = AutoencoderKLWan(**WAN21)
    vae.decoder.up_blocks[0].resnets[0].nonlinearity = torch.nn.GELU()
    with pytest.raises(ValueError, match="knows SiLU"):
        StreamingDecoder(vae)
    with pytest.raises(ValueError, match="whole_blocks = 4"):
        StreamingDecoder(model("wan21"), whole_blocks=4)
