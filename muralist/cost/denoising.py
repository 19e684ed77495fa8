"""What denoising costs: the proxy and the refinement, with all that a recipe may put beside them.

A step takes one forward or two (`flow.passes`): guidance may work on an interval of noise levels only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from muralist.base_info import UPSAMPLER
from muralist.cost import transformer
from muralist.cost.setting import PROCESS_BYTES, Setting, StagePlan, size_text
from muralist.nn.attention import BranchedWindows, CloseRemote, FullAttention, GuidedWindows
from muralist.nn.attention.guided import pooled_shape
from muralist.nn.block_cache import STRIDE
from muralist.nn.kernels import Kernels
from muralist.nn.kinds import INJECTOR, STEP_SIZE
from muralist.nn.rope import RopeScale
from muralist.nn.streaming import SLOTS
from muralist.nn.transformer import Graft
from muralist.sampling import flow
from muralist.stages.proxy import LowResolutionProxy
from muralist.stages.refine import ProxyWindows, Refine
from muralist.types import Grid

SNAPSHOTS = 3  # two kept, one being published
HOST_BYTES_PER_S = 20e9  # page-locked main memory to the device: PCIe 4.0 x16 carries 25e9 at best
LATENTS = 4  # float32 latents alive in a guided step: the sample, both velocities, the next sample


@dataclass(frozen=True, slots=True)
class Steps:
    """Noise levels at which steps start, and the forwards of each."""

    levels: Sequence[float]
    passes: Sequence[int]

    @classmethod
    def of(cls, part: LowResolutionProxy | Refine, skipped: int = 0) -> Steps:
        levels = flow.sigmas(part.num_inference_steps, part.flow_shift)[skipped:-1]
        return cls(levels, [flow.passes(sigma, part.guidance_scale, part.guidance_interval) for sigma in levels])

    @property
    def forwards(self) -> int:
        return sum(self.passes)

    @property
    def prompts(self) -> int:
        """2 where the negative prompt is ever looked at."""
        return max(self.passes)

    @property
    def work(self) -> str:
        steps, guided = len(self.levels), self.passes.count(2)
        if guided in (0, steps):
            return f"{steps} steps x 2 passes" if guided else f"{steps} steps"
        return f"{steps} steps, {guided} of them x 2 passes"


def held_bytes(setting: Setting) -> tuple[int, int]:
    """(on the device, in main memory beside it) of the transformer with its adapters and parts, which are loaded with it, whoever uses them.

    Streamed blocks are loaded whole into main memory, with all that moves to the device later, before any of them becomes 8 bits or is page-locked.
    """
    info, size = setting.info, setting.dimensions
    apart = {f"part {name}" for name in (UPSAMPLER, INJECTOR, STEP_SIZE)}
    files = info.component_bytes
    added = {name: max(count, files.get(f"second {name}", 0)) for name, count in files.items() if name.startswith(("adapter ", "part "))}
    added.pop(f"part {UPSAMPLER}", None)
    # adapters and parts are stored in 16 bits
    in_blocks = size.layers * transformer.block_parameters(size) + sum(count for name, count in added.items() if name not in apart) // 2
    beside = transformer.parameters(size) - size.layers * transformer.block_parameters(size) + sum(added.get(name, 0) for name in apart) // 2
    itemsize = setting.machine.itemsize
    saved = size.layers * transformer.fp8_saving(size, itemsize) if setting.linears == "fp8" else 0
    if not setting.streamed:
        return (in_blocks + beside) * itemsize - saved, 0
    block = (in_blocks * itemsize - saved) // size.layers
    return beside * itemsize + SLOTS * block, beside * itemsize + max(in_blocks * itemsize, size.layers * pinned(block))


def pinned(count: int) -> int:
    """Bytes of page-locked memory that PyTorch takes for so many: the next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def proxy(part: LowResolutionProxy, setting: Setting) -> StagePlan:
    grid = setting.proxy_grid
    graft = Graft(rope=RopeScale(t=part.time_scale), token_chunk=part.token_chunk)
    action = f"{size_text(grid)}, {_attention(graft)}" + (f", one latent frame in {part.time_scale:g}" if part.time_scale > 1 else "")
    return _denoising(setting, "proxy", part, grid, [graft], Steps.of(part), action + _chunks(graft, grid, setting))


def refine(part: Refine, setting: Setting) -> StagePlan:
    grid = setting.grid
    shape, steps = setting.info.geometry.token_shape(grid), Steps.of(part, part.skip_steps)
    grafts = [_as_seen(part.graft(shape, part.skip_steps + number), setting) for number in range(len(steps.levels))]
    graft = grafts[0]
    plan = _denoising(setting, "refine", part, grid, grafts, steps, f"{size_text(grid)}, {_attention(graft)}" + _chunks(graft, grid, setting))
    plan = _with_proxy(plan, graft, part, steps, setting) if isinstance(part.attention, ProxyWindows) else plan
    plan = _with_injector(plan, steps, setting) if part.anchor != "none" else plan
    return _with_experts(plan, part, steps, setting) if part.experts else plan


def _chunks(graft: Graft, grid: Grid, setting: Setting) -> str:
    """What is done to keep memory low, in words."""
    some = graft.token_chunk and graft.token_chunk < math.prod(setting.info.geometry.token_shape(grid))
    done = [f", {graft.token_chunk} tokens at a time"] if some else []
    done += [", linear layers in 8 bits"] if setting.linears == "fp8" else []
    return "".join(done) + (", blocks streamed from main memory" if setting.streamed else "")


def _with_injector(plan: StagePlan, steps: Steps, setting: Setting) -> StagePlan:
    """The same with the refining of the anchor, once, and a product for every token where it is added; z' stays for all steps."""
    injector = setting.info.injector
    refining = injector.channels * injector.inner + 27 * injector.inner * injector.dim if injector.refined else injector.channels * injector.dim
    adding = steps.forwards * len(injector.blocks) * injector.dim**2
    flops = 2 * plan.tokens * (refining + adding)
    return replace(
        plan,
        flops=plan.flops + flops,
        memory_bytes=plan.memory_bytes + (1 + 2) * plan.tokens * injector.dim * setting.machine.itemsize,
        seconds=plan.seconds + setting.machine.seconds(linear=flops),
        action=f"{plan.action}, the proxy injected",
    )


def _as_seen(graft: Graft, setting: Setting) -> Graft:
    """The same with no more proxy and pooled tokens for a window than there are."""
    attention, geometry = graft.attention, setting.info.geometry
    if not isinstance(attention, GuidedWindows):
        return graft
    near = attention.near.within(geometry.token_shape(setting.proxy_grid))
    middle = attention.middle and replace(
        attention.middle, near=attention.middle.near.within(pooled_shape(geometry.token_shape(setting.grid), attention.middle.pool))
    )
    return replace(graft, attention=replace(attention, near=near, middle=middle))


def _with_proxy(plan: StagePlan, graft: Graft, part: Refine, steps: Steps, setting: Setting) -> StagePlan:
    """The same with the passes over the proxy, one for each prompt or for each step and prompt, and the keys and values that they leave.

    Where it is looked at with an adapter of its own, and that is a part of the weights, these are read once more.
    """
    passing = _live_bytes(Graft(token_chunk=graft.token_chunk), setting.proxy_grid, setting)  # its tokens all see each other
    longer = max(passing - _live_bytes(graft, setting.grid, setting), 0)
    size, shape = setting.dimensions, setting.info.geometry.token_shape(setting.proxy_grid)
    one = transformer.forward(size, Graft(), shape, setting.info.defaults.max_sequence_length)
    times = steps.prompts if part.attention.proxy_noise == "clean" else steps.forwards
    again = _read_bytes(setting) if _merged(part, setting) and setting.request.config.proxy.adapter != part.adapter else 0
    return replace(
        plan,
        flops=plan.flops + times * one.flops,
        attention_flops=plan.attention_flops + times * one.attention,
        memory_bytes=plan.memory_bytes + longer + steps.prompts * 2 * size.layers * size.width * one.tokens * setting.machine.itemsize,
        seconds=plan.seconds + setting.machine.seconds(linear=times * one.linear, attention=times * one.attention, read=again),
        action=f"{plan.action}, in sight of a proxy of {one.tokens:,} tokens",
    )


def _with_experts(plan: StagePlan, part: Refine, steps: Steps, setting: Setting) -> StagePlan:
    """The same with the two small products an expert adds to every token, block and step at whose noise level it works."""
    setting.info.require_experts(part.experts)
    there = setting.info.experts
    at_work = zip(steps.levels, steps.passes)
    ranks = sum(passes * there.experts[name].rank for sigma, passes in at_work for name in part.experts if there.experts[name].works_at(sigma))
    flops = plan.tokens * 4 * there.dim * there.layers * ranks
    return replace(
        plan,
        flops=plan.flops + flops,
        seconds=plan.seconds + setting.machine.seconds(linear=flops),
        action=f"{plan.action}, experts {' and '.join(part.experts)}",
    )


def _denoising(setting: Setting, stage: str, part: LowResolutionProxy | Refine, grid: Grid, grafts: Sequence[Graft], steps: Steps, action: str) -> StagePlan:
    """`grafts`: those of the steps, or one for all."""
    info, size, shape = setting.info, setting.dimensions, setting.info.geometry.token_shape(grid)
    each = {graft: transformer.forward(size, graft, shape, info.defaults.max_sequence_length, info.branches) for graft in set(grafts)}
    one, forwards = each[grafts[0]], steps.forwards
    attention = sum(passes * each[graft].attention for passes, graft in zip(steps.passes, itertools.cycle(grafts)))
    # Beside the weights a low-rank layer multiplies each of its own once for every token; adapters are stored in 16 bits.
    linear = one.linear + (0 if _merged(part, setting) else 2 * one.tokens * info.component_bytes.get(f"adapter {part.adapter}", 0) // 2)
    latent, (held, host) = setting.latent_bytes(grid), held_bytes(setting)
    working = held + _live_bytes(grafts[0], grid, setting) + LATENTS * latent
    planned = StagePlan(
        stage=stage,
        work=steps.work,
        tokens=one.tokens,
        keys_per_query=attention / (4 * size.width * one.tokens * size.layers * forwards),
        flops=forwards * linear + attention,
        attention_flops=attention,
        attention_saving=forwards * one.full_attention / attention,
        memory_bytes=PROCESS_BYTES + max(working, _loading_bytes(setting)),
        host_bytes=host,
        disk_bytes=(SNAPSHOTS + 1) * latent,
        seconds=_seconds(setting, one.tokens, forwards, linear, attention / forwards),
        action=action,
    )
    return planned if part.cache is None else _with_cache(planned, part.cache, steps, setting)


def _merged(part: LowResolutionProxy | Refine, setting: Setting) -> bool:
    """Whether the stage's adapter is a part of the weights, as in `velocity.Fields`."""
    attention, proxy = getattr(part, "attention", None), setting.request.config.proxy
    return not (isinstance(attention, ProxyWindows) and attention.proxy_noise == "same" and proxy.adapter != part.adapter)


def _with_cache(plan: StagePlan, threshold: float, steps: Steps, setting: Setting) -> StagePlan:
    """The same with what a first-block cache keeps. What it saves depends on the video: work and time stay the most that they can be."""
    one = plan.tokens * setting.dimensions.width * setting.machine.itemsize
    kept = steps.prompts * one + 2 * one // STRIDE
    return replace(plan, memory_bytes=plan.memory_bytes + kept, action=f"{plan.action}, first-block cache below {threshold:g}: work and time at most")


def _loading_bytes(setting: Setting) -> int:
    """Of weights as they are stored, before those of linear layers become 8 bits, which is in main memory."""
    return held_bytes(_plain(setting))[0] if setting.machine.on_cpu else 0


def _plain(setting: Setting) -> Setting:
    """The same without linear layers in 8 bits."""
    return replace(setting, machine=replace(setting.machine, fp8=False))


def _live_bytes(graft: Graft, grid: Grid, setting: Setting) -> int:
    """Of one forward with the kernels of the request. Of attention's only the reference holds more; what `auto` will be is not known here."""
    info = setting.info
    attention = "reference" if setting.request.config.kernels.attention == "reference" else "sdpa"
    graft = replace(graft, kernels=Kernels(attention=attention, linears=setting.linears))
    shape, text = info.geometry.token_shape(grid), info.defaults.max_sequence_length
    return transformer.live_bytes(setting.dimensions, graft, shape, setting.machine.itemsize, info.branches, text_tokens=text)


def _seconds(setting: Setting, tokens: int, forwards: int, linear: float, attention: float) -> float:
    """Of so many forwards and of reading the weights; streamed blocks arrive while others compute, and the slower of the two counts.

    `linear`, `attention`: FLOPs of one forward, in the mean. Neither computing nor arriving is taken to be faster in 8 bits: that was not measured.
    """
    machine = setting.machine
    traffic = transformer.elementwise_bytes(setting.dimensions, tokens, machine.itemsize)
    computing = machine.seconds(linear=linear, attention=attention, traffic=traffic)
    arriving = held_bytes(replace(_plain(setting), streamed=False))[0] / HOST_BYTES_PER_S if setting.streamed else 0.0
    return forwards * max(computing, arriving) + machine.seconds(read=_read_bytes(setting))


def _read_bytes(setting: Setting) -> int:
    """Of all files that are read with the transformer."""
    files = setting.info.component_bytes
    return sum(count for name, count in files.items() if name.startswith(("transformer", "adapter ", "second ", "part ")) and name != f"part {UPSAMPLER}")


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
