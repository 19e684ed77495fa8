"""What each stage of a request costs on a machine: one function a part, looked up by the part's dataclass in `ESTIMATES`.

Live memory counts the stage's own weights, activations and latents where the models compute; the video encoder works in main memory.
Disk counts the most a stage ever has of its own files (a step is published before the oldest of two snapshots goes, so three exist).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from muralist.base_info import UPSAMPLER, BaseInfo
from muralist.config import Request
from muralist.cost import decoding, text, transformer, upsampling
from muralist.cost.decoding import DecodeNeed
from muralist.cost.machine import Machine
from muralist.errors import UserError
from muralist.nn.attention import BranchedWindows, CloseRemote, FullAttention, GuidedWindows
from muralist.nn.attention.guided import pooled_shape
from muralist.nn.transformer import Graft
from muralist.sampling import flow
from muralist.stages.decode_options import DecodeOptions
from muralist.stages.proxy import LowFrameRateProxy, LowResolutionProxy
from muralist.stages.refine import ProxyWindows, Refine
from muralist.stages.upsample import LatentInterpolation, LearnedUpsampling, PixelInterpolation
from muralist.store import weights
from muralist.store.video_write import EncodeOptions
from muralist.types import Grid

FLOAT = 4  # bytes of a stored latent's number
SNAPSHOTS = 3  # two kept, one being published
LATENTS = 4  # float32 latents alive in a guided step: the sample, both velocities, the next sample
# The interpreter with PyTorch, diffusers and transformers imported: 469 MB resident (CPU build, measured). On a GPU the driver's context takes its place.
PROCESS_BYTES = 500 * 10**6
TEXT_BYTES_FALLBACK = 2  # bytes of a number in a text encoder whose configuration is not there


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage: its work in words, its size, its cost, and what will be done about it.

    `tokens`: of one forward, 0 where there are none; `keys_per_query`: mean over queries and layers; `flops`: of
    the whole stage, of which `attention_flops` in self-attention; `attention_saving`: how many times fewer those are than with attention
    over all tokens; `memory_bytes`: peak, `disk_bytes`: peak of its own files.
    """

    stage: str
    work: str
    tokens: int = 0
    keys_per_query: float = 0.0
    flops: int = 0
    attention_flops: int = 0
    attention_saving: float = 1.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0
    action: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every estimate reads: the request, its base, the machine, and the legal grid that is computed on."""

    request: Request
    info: BaseInfo
    machine: Machine

    @property
    def grid(self) -> Grid:
        return self.info.geometry.legal(self.request.grid)

    @property
    def dimensions(self) -> transformer.Dimensions:
        return transformer.Dimensions.of(self.info.transformer_config)

    def latent_bytes(self, grid: Grid) -> int:
        """A latent video of the legal grid in float32."""
        return FLOAT * math.prod(self.info.geometry.latent_shape(grid))


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
    width = setting.dimensions.text
    return StagePlan(
        stage="prompt",
        work=f"2 prompts x {length} tokens",
        tokens=length,
        keys_per_query=length,
        flops=flops,
        memory_bytes=PROCESS_BYTES + count * machine.itemsize + 16 * length * width * FLOAT,
        disk_bytes=2 * length * width * machine.itemsize,
        seconds=machine.seconds(linear=flops, read=stored),
        action="the text encoder leaves memory afterwards",
    )


def _text_config(info: BaseInfo) -> dict[str, Any] | None:
    try:
        return weights.read_config(info.folder / "text_encoder" / "config.json")
    except UserError:
        return None


def _proxy(part: LowResolutionProxy, setting: Setting) -> StagePlan:
    grid = _proxy_grid(setting)
    action = f"{_size(grid)}, {_attention(Graft())}" + (f", one latent frame in {part.time_scale:g}" if part.time_scale > 1 else "")
    return _denoising(setting, "proxy", grid, Graft(), part.num_inference_steps, part.guidance_scale, adapter=part.adapter, action=action)


def _refine(part: Refine, setting: Setting) -> StagePlan:
    grid = setting.grid
    graft = _as_seen(part.graft(setting.info.geometry.token_shape(grid)), setting)
    action = f"{_size(grid)}, {_attention(graft)}"
    if graft.token_chunk and graft.token_chunk < math.prod(setting.info.geometry.token_shape(grid)):
        action += f", {graft.token_chunk} tokens at a time"
    levels = flow.sigmas(part.num_inference_steps, part.flow_shift)[part.skip_steps : -1]
    plan = _denoising(setting, "refine", grid, graft, len(levels), part.guidance_scale, adapter=part.adapter, action=action)
    plan = _with_proxy(plan, part.attention, part.guidance_scale, setting) if isinstance(part.attention, ProxyWindows) else plan
    plan = _with_injector(plan, part, setting) if part.anchor != "none" else plan
    return _with_experts(plan, part, levels, setting) if part.experts else plan


def _with_injector(plan: StagePlan, part: Refine, setting: Setting) -> StagePlan:
    """The same with the refining of the anchor, once, and a product for every token where it is added; z' stays for all steps."""
    injector = setting.info.injector
    passes = 1 if part.guidance_scale == 1 else 2
    refining = injector.channels * injector.inner + 27 * injector.inner * injector.dim if injector.refined else injector.channels * injector.dim
    adding = passes * (part.num_inference_steps - part.skip_steps) * len(injector.blocks) * injector.dim**2
    flops = 2 * plan.tokens * (passes * refining + adding)
    return replace(
        plan,
        flops=plan.flops + flops,
        memory_bytes=plan.memory_bytes + (passes + 2) * plan.tokens * injector.dim * setting.machine.itemsize,
        seconds=plan.seconds + setting.machine.seconds(linear=flops),
        action=f"{plan.action}, the proxy injected",
    )


def _as_seen(graft: Graft, setting: Setting) -> Graft:
    """The same with no more proxy and pooled tokens for a window than there are."""
    attention, geometry = graft.attention, setting.info.geometry
    if not isinstance(attention, GuidedWindows):
        return graft
    near = attention.near.within(geometry.token_shape(_proxy_grid(setting)))
    middle = attention.middle and replace(
        attention.middle, near=attention.middle.near.within(pooled_shape(geometry.token_shape(setting.grid), attention.middle.pool))
    )
    return replace(graft, attention=replace(attention, near=near, middle=middle))


def _with_proxy(plan: StagePlan, attention: ProxyWindows, guidance_scale: float, setting: Setting) -> StagePlan:
    """The same with the passes over the proxy, one for each prompt or for each step and prompt, and the keys and values that they leave."""
    size, shape, passes = setting.dimensions, setting.info.geometry.token_shape(_proxy_grid(setting)), 1 if guidance_scale == 1 else 2
    one = transformer.forward(size, Graft(), shape, setting.info.defaults.max_sequence_length)
    part = setting.request.config.refine
    times = passes * (1 if attention.proxy_noise == "clean" else part.num_inference_steps - part.skip_steps)
    return replace(
        plan,
        flops=plan.flops + times * one.flops,
        attention_flops=plan.attention_flops + times * one.attention,
        memory_bytes=plan.memory_bytes + passes * 2 * size.layers * size.width * one.tokens * setting.machine.itemsize,
        seconds=plan.seconds + setting.machine.seconds(linear=times * one.linear, attention=times * one.attention),
        action=f"{plan.action}, in sight of a proxy of {one.tokens:,} tokens",
    )


def _with_experts(plan: StagePlan, part: Refine, levels: list[float], setting: Setting) -> StagePlan:
    """The same with the two small products an expert adds to every token, block and step at whose noise level it works."""
    setting.info.require_experts(part.experts)
    there = setting.info.experts
    ranks = sum(there.experts[name].rank for name in part.experts for sigma in levels if there.experts[name].works_at(sigma))
    passes = 1 if part.guidance_scale == 1 else 2
    flops = passes * plan.tokens * 4 * there.dim * there.layers * ranks
    return replace(
        plan,
        flops=plan.flops + flops,
        seconds=plan.seconds + setting.machine.seconds(linear=flops),
        action=f"{plan.action}, experts {' and '.join(part.experts)}",
    )


def _denoising(setting: Setting, stage: str, grid: Grid, graft: Graft, steps: int, guidance_scale: float, *, adapter: str | None, action: str) -> StagePlan:
    info, machine, size = setting.info, setting.machine, setting.dimensions
    shape = info.geometry.token_shape(grid)
    passes = 1 if guidance_scale == 1 else 2
    one = transformer.forward(size, graft, shape, info.defaults.max_sequence_length, info.branches)
    adapters = {name: count for name, count in info.component_bytes.items() if name.startswith("adapter ")}
    # A low-rank layer multiplies each of its weights once for every token; adapters are stored in 16 bits.
    linear = one.linear + 2 * one.tokens * adapters.get(f"adapter {adapter}", 0) // 2
    forwards, latent = steps * passes, setting.latent_bytes(grid)
    traffic = transformer.elementwise_bytes(size, one.tokens, machine.itemsize)
    parts = sum(count for name, count in info.component_bytes.items() if name.startswith("part ") and name != f"part {UPSAMPLER}")
    # adapters and parts are loaded with the transformer, whoever uses them; stored in 16 bits
    added = sum(adapters.values()) + parts
    weight_bytes = transformer.parameters(size) * machine.itemsize + added // 2 * machine.itemsize
    read = sum(info.component_bytes.get(name, 0) for name in ("transformer", "transformer_2")) + added
    return StagePlan(
        stage=stage,
        work=f"{steps} steps x {passes} passes" if passes > 1 else f"{steps} steps",
        tokens=one.tokens,
        keys_per_query=one.keys_per_query,
        flops=forwards * (linear + one.attention),
        attention_flops=forwards * one.attention,
        attention_saving=one.attention_saving,
        memory_bytes=PROCESS_BYTES + weight_bytes + transformer.live_bytes(size, graft, shape, machine.itemsize, info.branches) + LATENTS * latent,
        disk_bytes=(SNAPSHOTS + 1) * latent,
        seconds=machine.seconds(linear=forwards * linear, attention=forwards * one.attention, traffic=forwards * traffic, read=read),
        action=action,
    )


def _interpolation(part: LatentInterpolation, setting: Setting) -> StagePlan:
    latent = setting.latent_bytes(setting.grid)
    return StagePlan(
        stage="upsample",
        work=f"latent {part.mode}",
        memory_bytes=PROCESS_BYTES + _held_transformer(setting) + 3 * latent,
        disk_bytes=latent,
        seconds=setting.machine.seconds(traffic=8 * latent),
        action=f"to {_size(setting.grid)}",
    )


def _learned_upsampling(part: LearnedUpsampling, setting: Setting) -> StagePlan:
    setting.info.require_part(UPSAMPLER)
    source = setting.info.geometry.latent_shape(_proxy_in_time(setting))[1:]
    need = upsampling.measure(setting.info.folder / "parts" / UPSAMPLER, part, source, setting.info.geometry.latent_shape(setting.grid)[1:])
    stored, latent = setting.info.component_bytes[f"part {UPSAMPLER}"], setting.latent_bytes(setting.grid)
    return StagePlan(
        stage="upsample",
        work=f"{need.pieces} pieces",
        flops=need.flops,
        memory_bytes=PROCESS_BYTES + _held_transformer(setting) + 2 * stored + need.live_bytes + 3 * latent,
        disk_bytes=latent,
        seconds=setting.machine.seconds(linear=need.flops, read=stored),
        action=f"to {_size(setting.grid)}",
    )


def _pixel_interpolation(part: PixelInterpolation, setting: Setting) -> StagePlan:
    info, machine, target = setting.info, setting.machine, setting.grid
    small = _proxy_in_time(setting)
    decoded = decoding.decode_need(info.vae_config, small, small, machine, DecodeOptions())
    encoded = upsampling.encode(info.vae_config, target, part.tile)
    video = 3 * target.pixels * machine.itemsize
    channels = info.vae_config.get("base_dim", 96)
    return StagePlan(
        stage="upsample",
        work=f"decode, {part.mode}, encode",
        flops=decoded.cost.flops + encoded.flops,
        attention_flops=decoded.cost.attention,
        memory_bytes=PROCESS_BYTES + _held_transformer(setting) + max(decoded.memory_bytes, 3 * video + encoded.live_bytes) + 2 * setting.latent_bytes(target),
        disk_bytes=setting.latent_bytes(target),
        seconds=decoded.seconds + machine.convolution_seconds(encoded.flops, channels=channels),
        action=f"to {_size(target)} through pixels, {encoded.pieces} tiles to encode",
    )


def _proxy_grid(setting: Setting) -> Grid:
    return setting.request.config.proxy.grid(setting.request.grid, setting.info.geometry)


def _proxy_in_time(setting: Setting) -> Grid:
    """The proxy at the target's rate, as it is enlarged."""
    return replace(_proxy_grid(setting), num_frames=setting.grid.num_frames, fps=setting.grid.fps)


def _held_transformer(setting: Setting) -> int:
    """The transformer of the proxy stage stays for the refinement."""
    return transformer.parameters(setting.dimensions) * setting.machine.itemsize


def settle(setting: Setting) -> Setting:
    """The same setting with what the machine decides filled into its request."""
    request, machine = setting.request, setting.machine
    room = machine.limit - _beside_decoder(setting)
    options = decoding.settled(setting.info.vae_config, setting.grid, machine.dtype, request.config.decode, room)
    return replace(setting, request=replace(request, config=replace(request.config, decode=options)))


def _beside_decoder(setting: Setting) -> int:
    """Bytes that others take while the decoder works: the process, the latent, and on a CPU the video encoder that takes its frames."""
    encoder = _encode(setting.request.config.encode, setting).memory_bytes if setting.machine.on_cpu else 0
    return PROCESS_BYTES + setting.latent_bytes(setting.grid) + encoder


def decode_need(setting: Setting) -> DecodeNeed:
    """How the decode of this setting goes."""
    request = setting.request
    return decoding.decode_need(setting.info.vae_config, setting.grid, request.grid, setting.machine, request.config.decode)


def _decode(setting: Setting) -> StagePlan:
    info, need = setting.info, decode_need(setting)
    return StagePlan(
        stage="decode",
        work=f"{info.geometry.latent_shape(setting.grid)[1]} latent frames",
        flops=need.cost.flops,
        attention_flops=need.cost.attention,
        memory_bytes=need.memory_bytes + _beside_decoder(setting),
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


def _size(grid: Grid) -> str:
    return f"{grid.width}x{grid.height} x{grid.num_frames}"


def _attention(graft: Graft) -> str:
    if isinstance(graft.attention, FullAttention):
        return "full attention"
    if isinstance(graft.attention, CloseRemote):
        return f"close and remote windows of about {graft.attention.tokens} tokens"
    if isinstance(graft.attention, BranchedWindows):
        count = graft.attention.windows
        more = {"more": f", {count + 1}x{count + 1} in every other layer", "shifted": ", shifted every other layer", "same": ""}[graft.attention.odd]
        return f"{count}x{count} windows{more}" + "".join(f", branch {name}" for name in graft.attention.branches)
    windows = graft.attention.windows if isinstance(graft.attention, GuidedWindows) else graft.attention
    frames, rows, columns = windows.size
    return f"windows of {frames}x{rows}x{columns} tokens" + (", shifted every other layer" if windows.shift else "")


ESTIMATES: dict[type, Callable[[Any, Setting], StagePlan]] = {
    LowResolutionProxy: _proxy,
    LowFrameRateProxy: _proxy,
    LatentInterpolation: _interpolation,
    LearnedUpsampling: _learned_upsampling,
    PixelInterpolation: _pixel_interpolation,
    Refine: _refine,
}
