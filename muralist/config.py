"""What a recipe returns and what a request asks: plain values, complete before anything starts.

A `Config` says which part serves each stage and with which numbers. A `Request` adds what the user typed. Both are frozen,
comparable and turn into JSON, so that a run directory can tell whether it is asked for the same thing again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from muralist.errors import UserError
from muralist.nn.kernels import Kernels
from muralist.stages.decode_options import DecodeOptions
from muralist.stages.proxy import LowFrameRateProxy, LowResolutionProxy
from muralist.stages.refine import ProxyWindows, Refine
from muralist.stages.upsample import Upsampling
from muralist.store.video_write import EncodeOptions
from muralist.types import Grid

MAX_PROMPT = 4096  # characters; Wan's text encoder reads 512 tokens
MAX_SIDE, MIN_SIDE = 16384, 64
MAX_FRAMES = 4097


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One part a stage, in the order of the data flow.

    No proxy: refinement starts from pure noise and nothing is upsampled. A proxy is enlarged and noised again, or refinement looks at it while
    it works (`ProxyWindows`), or it is added to the tokens (`Refine.anchor`), or several of these. `kernels`: how transformers are computed.
    """

    proxy: LowResolutionProxy | LowFrameRateProxy | None
    upsample: Upsampling | None
    refine: Refine
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    kernels: Kernels = field(default_factory=Kernels)

    def __post_init__(self):
        looks = isinstance(self.refine.attention, ProxyWindows) or self.refine.anchor != "none"
        if self.proxy is None and (self.upsample is not None or looks):
            raise UserError("there is no proxy to work from", where="recipe", fix="give one, or no upsampler, proxy windows and anchor")
        if self.proxy is not None and self.upsample is None and not looks:
            raise UserError("nothing uses the proxy", where="recipe", fix="give an upsampler, proxy windows or an anchor")
        if self.upsample is None and self.refine.skip_steps:
            raise UserError(f"{self.refine.skip_steps} skipped steps without a guide to start from", where="skip_steps", fix="use 0, or give an upsampler")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One video: what to paint, on which base, how large, by which configuration."""

    prompt: str
    negative_prompt: str
    grid: Grid
    seed: int
    model: str
    revision: str | None
    recipe: str
    config: Config

    def __post_init__(self):
        if self.config.refine.anchor != "none" and self.config.proxy.time_scale != 1:
            raise UserError("an anchor has the target's frames, this proxy has fewer", where="recipe", fix="use a proxy of every latent frame")
        if not self.prompt.strip():
            raise UserError("the prompt is empty", where="prompt", fix="say what the video shows")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if len(text) > MAX_PROMPT:
                raise UserError(f"{len(text)} characters", where=name, fix=f"use at most {MAX_PROMPT}")
        for name, side in (("height", self.grid.height), ("width", self.grid.width)):
            if not MIN_SIDE <= side <= MAX_SIDE or side % 2:
                raise UserError(f"{side} pixels", where=name, fix=f"use an even number from {MIN_SIDE} to {MAX_SIDE}")
        if not 1 <= self.grid.num_frames <= MAX_FRAMES:
            raise UserError(f"{self.grid.num_frames} frames", where="num_frames", fix=f"use 1 to {MAX_FRAMES}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}", where="seed", fix="use 0 to 9223372036854775807")

    def record(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values; dataclass variants carry their class name under `kind`."""
        return jsonable(self)


def jsonable(value: Any) -> Any:
    """A configuration, or a part of one, as JSON values; dataclass variants carry their class name under `kind`."""
    if hasattr(value, "__dataclass_fields__"):
        return {"kind": type(value).__name__} | {name: jsonable(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, tuple | list):
        return [jsonable(item) for item in value]
    return value
