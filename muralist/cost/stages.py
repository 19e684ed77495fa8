"""What each stage of a request costs on a machine: one function a part, looked up by the part's dataclass in `ESTIMATES`.

Live memory counts the stage's own weights, activations and latents where the models compute; the video encoder works in main memory.
Disk counts the most a stage ever has of its own files (a step is published before the oldest of two snapshots goes, so three exist).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from muralist.base_info import UPSAMPLER, BaseInfo
from muralist.cost import decoding, denoising, encoding, text, upsampling
from muralist.cost.decoding import DecodeNeed
from muralist.cost.encoding import EncodeNeed
from muralist.cost.machine import Machine
from muralist.cost.setting import FLOAT, PROCESS_BYTES, Setting, StagePlan, size_text
from muralist.errors import UserError
from muralist.nn.enlarge import EnlargedPixels
from muralist.nn.latent_upsampler import LatentUpsamplerConfig
from muralist.nn.latent_upsampler.tiles import Tile
from muralist.nn.streaming import SLOTS
from muralist.stages.proxy import LowFrameRateProxy, LowResolutionProxy
from muralist.stages.refine import Refine
from muralist.stages.upsample import PROXY_DECODE, LatentInterpolation, LearnedUpsampling, PixelInterpolation
from muralist.store import weights
from muralist.store.parts import read_part
from muralist.store.video_write import EncodeOptions
from muralist.types import Grid

TEXT_BYTES_FALLBACK = 2  # bytes of a number in a text encoder whose configuration is not there


def estimates(setting: Setting) -> Iterator[StagePlan]:
    """All stages of the request in the order of the data flow, each computed when it is asked for."""
    config = setting.request.config
    yield _prompt(setting)
    for part in (config.proxy, config.upsample, config.refine):
        if part is not None:
            yield ESTIMATES[type(part)](part, setting)
    yield _decode(setting)
    yield _encode(config.encode, setting)


def _prompt(setting: Setting) -> StagePlan:
    info, machine, length = setting.info, setting.machine, setting.info.defaults.max_sequence_length
    stored = info.component_bytes.get("text_encoder", 0)
    config = _text_config(info)
    count = text.parameters(config) if config else stored // TEXT_BYTES_FALLBACK
    flops = 2 * (text.forward(config, length) if config else 2 * count * length)
    width, (held, host) = setting.dimensions.text, _held_text(setting, config, count)
    return StagePlan(
        stage="prompt",
        work=f"2 prompts x {length} tokens",
        tokens=length,
        keys_per_query=length,
        flops=flops,
        memory_bytes=PROCESS_BYTES + held + 16 * length * width * FLOAT,
        host_bytes=host,
        disk_bytes=2 * length * width * machine.itemsize,
        seconds=machine.seconds(linear=flops, read=stored),
        action="the text encoder leaves memory afterwards",
    )


def _held_text(setting: Setting, config: dict[str, Any] | None, count: int) -> tuple[int, int]:
    """(on the device, in main memory beside it) of the text encoder's `count` weights. Without a configuration its layers are unknown: all stay."""
    itemsize = setting.machine.itemsize
    if not setting.streamed or config is None:
        return count * itemsize, 0
    layers, embedding = config["num_layers"], config["vocab_size"] * config["d_model"]
    block = (count - embedding) * itemsize // layers
    return embedding * itemsize + SLOTS * block, layers * denoising.pinned(block)


def _text_config(info: BaseInfo) -> dict[str, Any] | None:
    try:
        return weights.read_config(info.folder / "text_encoder" / "config.json")
    except UserError:
        return None


def _latent_upsampling(part: LatentInterpolation | LearnedUpsampling, setting: Setting) -> StagePlan:
    return _by_latents(part, setting.info.geometry.latent_shape(_proxy_in_time(setting))[1:], setting)


def _by_latents(part: LatentInterpolation | LearnedUpsampling, source: Tile, setting: Setting) -> StagePlan:
    """From latents of `source` (F, h, w) to the target's."""
    latent, held = setting.latent_bytes(setting.grid), PROCESS_BYTES + denoising.held_bytes(setting)[0]
    plan = StagePlan(
        stage="upsample",
        work="",
        memory_bytes=held + 3 * latent,
        disk_bytes=latent,
        action=f"to {size_text(setting.grid)}",
    )
    match part:
        case LatentInterpolation():
            return replace(plan, work=f"latent {part.mode}", seconds=setting.machine.seconds(traffic=8 * latent))
        case LearnedUpsampling() if source == setting.info.geometry.latent_shape(setting.grid)[1:]:
            return replace(plan, work="nothing to enlarge")
        case LearnedUpsampling():
            info = setting.info
            info.require_part(UPSAMPLER)
            config = LatentUpsamplerConfig.of(read_part(info.folder / "parts" / UPSAMPLER, UPSAMPLER))
            need = upsampling.measure(config, part, source, info.geometry.latent_shape(setting.grid)[1:])
            stored = info.component_bytes[f"part {UPSAMPLER}"]
            seconds, memory = setting.machine.seconds(linear=need.flops, read=stored), held + 2 * stored + need.live_bytes
            return replace(plan, work=f"upsampler, {need.pieces} piece{'s' * (need.pieces > 1)}", flops=need.flops, memory_bytes=memory, seconds=seconds)


@dataclass(frozen=True, slots=True)
class ThroughPixels:
    """A proxy decoded and encoded again, larger. `memory_bytes`: the most that either takes where the models compute; `held_bytes`: of the decoded proxy,
    in main memory, which on a CPU is the same and counted in both."""

    decoded: DecodeNeed
    encoded: EncodeNeed
    memory_bytes: int
    held_bytes: int


def through_pixels(config: Mapping[str, Any], small: Grid, frames: int, size: tuple[int, int], part: PixelInterpolation, machine: Machine) -> ThroughPixels:
    """What `stages.upsample` needs for the proxy on the grid `small` and `frames` of `size` [H, W] pixels that are encoded."""
    decoded = decoding.decode_need(config, small, small, machine, PROXY_DECODE)
    quick = machine.on_cpu and machine.dtype == "float32"
    encoded = encoding.encode(config, frames, size, part.tile, quick=quick)
    encoded = encoded if quick else encoded.in_numbers_of(machine.itemsize)
    held = 3 * small.pixels * torch.half.itemsize
    # the decoder's count leaves out the weights of the encoder, which wait beside it
    most = max(decoded.memory_bytes + encoded.weight_bytes, encoded.live_bytes)
    return ThroughPixels(decoded, encoded, most + (held if machine.on_cpu else 0), held)


def _pixel_interpolation(part: PixelInterpolation, setting: Setting) -> StagePlan:
    info, machine, target = setting.info, setting.machine, setting.grid
    small, (resident, host) = setting.proxy_grid, denoising.held_bytes(setting)
    if not part.decodes(small, target, info.geometry):
        return _by_latents(part.rest, info.geometry.latent_shape(small)[1:], setting)
    latents = part.size(info.geometry.latent_shape(small)[2:], info.geometry.latent_shape(target)[2:])
    height, width = size = tuple(side * info.geometry.spatial_factor for side in latents)
    need = through_pixels(info.vae_config, small, target.num_frames, size, part, machine)
    decoded, encoded, latent = need.decoded, need.encoded, setting.latent_bytes(target)
    pixels = EnlargedPixels(torch.empty(0, small.height, small.width, 3), size, part.mode, torch.device("cpu"))
    interpolated = target.num_frames * sum(pixels.flops(box) * count for box, count in encoded.read)
    channels = info.vae_config.get("base_dim", 96)
    plan = StagePlan(
        stage="upsample",
        work=f"decode, {part.mode}, encode",
        flops=decoded.cost.flops + encoded.cost.flops + interpolated,
        attention_flops=decoded.cost.attention + encoded.cost.attention,
        memory_bytes=PROCESS_BYTES + resident + need.memory_bytes + 2 * latent,
        host_bytes=0 if machine.on_cpu else host + need.held_bytes,
        disk_bytes=latent + decoded.disk_bytes,
        seconds=decoded.seconds + machine.convolution_seconds(encoded.cost.flops + interpolated, channels=channels),
        action=f"to {width}x{height} through pixels in {encoded.tiles} tiles",
    )
    frames, *large = info.geometry.latent_shape(target)[1:]
    return plan if latents == tuple(large) else _with_rest(plan, _by_latents(part.rest, (frames, *latents), setting), info.component_bytes.get("vae", 0))


def _with_rest(pixels: StagePlan, rest: StagePlan, vae_bytes: int) -> StagePlan:
    """What both take one after the other; the VAE waits beside the second."""
    return replace(
        pixels,
        flops=pixels.flops + rest.flops,
        memory_bytes=max(pixels.memory_bytes, rest.memory_bytes + vae_bytes),
        seconds=pixels.seconds + rest.seconds,
        action=f"{pixels.action}, its latent {rest.action} ({rest.work})",
    )


def _proxy_in_time(setting: Setting) -> Grid:
    """The proxy at the target's rate, as it is enlarged."""
    return replace(setting.proxy_grid, num_frames=setting.grid.num_frames, fps=setting.grid.fps)


def beside_decoder(setting: Setting) -> int:
    """Bytes that others take while the decoder works: the process, the latent, and on a CPU the video encoder that takes its frames."""
    encoder = _encode(setting.request.config.encode, setting).memory_bytes if setting.machine.on_cpu else 0
    return PROCESS_BYTES + setting.latent_bytes(setting.grid) + encoder


def decode_need(setting: Setting) -> DecodeNeed:
    """How the decode of this setting goes."""
    request, config = setting.request, setting.request.config
    return decoding.decode_need(setting.info.vae_config, setting.grid, request.grid, setting.machine, config.decode, group=config.encode.gop)


def _decode(setting: Setting) -> StagePlan:
    info, need = setting.info, decode_need(setting)
    return StagePlan(
        stage="decode",
        work=f"{info.geometry.latent_shape(setting.grid)[1]} latent frames",
        flops=need.cost.flops,
        attention_flops=need.cost.attention,
        memory_bytes=need.memory_bytes + beside_decoder(setting),
        disk_bytes=need.disk_bytes,
        seconds=need.seconds,
        action=need.action,
    )


# Pictures a software encoder holds: lookahead (10 to 40 at our presets), references, frame threads; each in 4:2:0 with its half-size copy.
ENCODER_PICTURES = 60
# Procedural scenes (`data/world.py`) at crf 16, the encode options' presets, a group of 8 frames, one Xeon core: H.264 1080p 0.13 to 0.34 bits a
# pixel at 13 to 17 Mpixel/s, H.265 4K 0.03 to 0.05 bits at 10 to 13 Mpixel/s. Camera footage holds more noise: three times the bits of H.265.
BITS_PER_PIXEL = {"h264": 0.5, "h265": 0.15}
PIXELS_PER_SECOND = {"h264": 13e6, "h265": 10e6}
FILES = 3  # the groups in the run directory, the file that plays while it grows, the finished one


def _encode(part: EncodeOptions, setting: Setting) -> StagePlan:
    grid = setting.request.grid
    settings = part.resolve(grid)
    sample = 2 if settings.bit_depth > 8 else 1
    frame = grid.height * grid.width
    size = int(grid.pixels * BITS_PER_PIXEL[settings.codec] / 8)
    return StagePlan(
        stage="encode",
        work=f"{grid.num_frames} frames",
        memory_bytes=int(ENCODER_PICTURES * frame * 1.5 * sample + 4 * 3 * frame * FLOAT),
        disk_bytes=FILES * size,
        seconds=grid.pixels / (PIXELS_PER_SECOND[settings.codec] * setting.machine.cores),
        action=f"{settings.codec}, {settings.bit_depth} bit, crf {settings.crf:g}, groups of {settings.gop} frames, while decoding",
    )


ESTIMATES: dict[type, Callable[[Any, Setting], StagePlan]] = {
    LowResolutionProxy: denoising.proxy,
    LowFrameRateProxy: denoising.proxy,
    LatentInterpolation: _latent_upsampling,
    LearnedUpsampling: _latent_upsampling,
    PixelInterpolation: _pixel_interpolation,
    Refine: denoising.refine,
}
