"""What a plan decides about memory: one of three levels, each slower than the one before and content with less.

What a level changes in the request (chunks of tokens, the decoder's tiles) decides the last bits of the result and is recorded with it: a run that
has begun keeps it. Where the weights wait does not, and is decided anew for the machine that goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from muralist.config import Config
from muralist.cost import decoding
from muralist.cost.machine import Machine
from muralist.cost.setting import Setting, StagePlan
from muralist.cost.stages import beside_decoder, decode_need, estimates


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """`token_chunk`: tokens computed at a time at most; `decode_bytes`: the decoder's, unless it needs more; None: as the recipe says.

    `streamed`: on a device, blocks come one after another from main memory.
    """

    token_chunk: int | None = None
    decode_bytes: int | None = None
    streamed: bool = False


LEVELS = {
    "high": Level(),
    "balanced": Level(token_chunk=2048, decode_bytes=4 << 30),
    "low": Level(token_chunk=1024, decode_bytes=2 << 30, streamed=True),
}


def choose(setting: Setting, mode: str, *, begun: bool) -> tuple[str, Setting]:
    """The level of this name, or of `auto` the first that fits (else the last), and the setting with what it decides filled in.

    `begun`: the request is that of a run that has begun, and stays.
    """
    for name in LEVELS if mode == "auto" else (mode,):
        settled = with_weights(setting, LEVELS[name]) if begun else settle(setting, LEVELS[name])
        if fits(settled):
            break
    return name, settled


def settle(setting: Setting, level: Level) -> Setting:
    """The same setting with what level and machine decide filled into its request."""
    config = _in_chunks(setting.request.config, level.token_chunk)
    room = setting.machine.limit - beside_decoder(setting)
    vae, grid, dtype = setting.info.vae_config, setting.grid, setting.machine.dtype
    if level.decode_bytes is not None:
        room = min(room, max(level.decode_bytes, decoding.least_room(vae, grid, dtype)))
    config = replace(config, decode=decoding.settled(vae, grid, dtype, config.decode, room))
    return with_weights(replace(setting, request=replace(setting.request, config=config)), level)


def with_weights(setting: Setting, level: Level) -> Setting:
    """The same setting with the weights where the level wants them; where the models compute in main memory they are there already."""
    return replace(setting, streamed=level.streamed and not setting.machine.on_cpu)


def _in_chunks(config: Config, most: int | None) -> Config:
    if most is None:
        return config
    proxy = config.proxy and replace(config.proxy, token_chunk=min(config.proxy.token_chunk or most, most))
    return replace(config, proxy=proxy, refine=replace(config.refine, token_chunk=min(config.refine.token_chunk or most, most)))


def in_small_chunks(config: Config) -> bool:
    """Whether tokens are computed in chunks as small as those of a level below the highest."""
    return config.refine.token_chunk is not None and config.refine.token_chunk <= LEVELS["balanced"].token_chunk


def fits(setting: Setting) -> bool:
    """Whether every stage has the memory it needs."""
    return decode_need(setting).error is None and all(stage_fits(stage, setting.machine) for stage in estimates(setting))


def stage_fits(stage: StagePlan, machine: Machine) -> bool:
    """Each stage where it works: the video encoder in main memory, all others where the models are, weights that wait beside them."""
    if stage.stage == "encode":
        return stage.memory_bytes <= machine.memory_bytes
    return stage.memory_bytes <= machine.limit and stage.host_bytes <= machine.memory_bytes
