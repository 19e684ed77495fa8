"""Random models of real shapes on one device, and what they cost. Everything is measured when it is first asked for, and once.

Full attention over a large grid is timed in one block and multiplied: a forward of L blocks takes t_0 + L t, where t_0, what is done once, is
what a forward in windows takes beyond L times one of its blocks.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from muralist.base import Base
from muralist.base_info import BaseInfo
from muralist.bench import wan
from muralist.bench.clock import Cost, cost, once
from muralist.config import Config, Request
from muralist.cost import transformer as costs
from muralist.cost.machine import Machine
from muralist.errors import UserError
from muralist.nn import fp8
from muralist.nn.attention import BranchedWindows, FullAttention, GuidedWindows, Near, attend_full, attend_windows
from muralist.nn.branches import attach_branches
from muralist.nn.kernels import Kernels
from muralist.nn.kinds import hierarchical
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import Run, WindowAttention
from muralist.pipeline import generate
from muralist.progress import Silent
from muralist.sampling.shortcut import PlainSteps
from muralist.stages.decode import decode, plan_decode
from muralist.stages.decode_options import DecodeOptions
from muralist.stages.refine import Refine, Windows, window_size
from muralist.store.run import RunDirectory
from muralist.types import Grid, LatentVideo

Kind = Literal["full", "windows", "guided", "branched", "branched dense"]
Found = TypeVar("Found")
NEAR = Near()  # 64 tokens of the proxy
WINDOW_TOKENS = {"real": 1024, "small": 32}
CHUNK = {"cuda": 65536, "cpu": 8192}
TEXT = 512
COMPILED = {"cuda": ("off", "blocks"), "cpu": ("off",)}  # unfused, rounding to 8 bits reads and writes tokens several times; a CPU compiles for half a minute
DECODE_BYTES = {"cuda": 12 << 30, "cpu": 4 << 30}


@dataclass(slots=True)
class Lab:
    """`width`: real or small. Measurements keep their names in `known`, for the report."""

    device: torch.device
    dtype: torch.dtype
    width: Literal["real", "small"]
    known: dict[str, Any] = field(default_factory=dict)
    _model: tuple[str, MuralTransformer] | None = None

    def size(self, name: str) -> wan.Size:
        return (wan.SIZES if self.width == "real" else wan.SMALL)[name]

    def info(self, name: str) -> BaseInfo:
        return self.size(name).info(name)

    def grid(self, name: str, of: str) -> Grid:
        """A grid by its name, made legal for a model."""
        return self.info(of).geometry.legal((wan.GRIDS if self.width == "real" else wan.SMALL_GRIDS)[name])

    def tokens(self, name: str, grid: str) -> tuple[int, int, int]:
        return self.info(name).geometry.token_shape(self.grid(grid, name))

    # -- Ceilings --

    def ceilings(self) -> Machine:
        return self._once("ceilings", lambda: Machine.measure(self.device))

    # -- The transformer --

    def attention(self, name: str, grid: str, kind: Literal["full", "windows"]) -> float:
        """Seconds of one layer's attention; windows also see 64 tokens of a proxy."""
        return self._once(f"attention {name} {grid} {kind}", lambda: self._attention(name, grid, kind))

    def _attention(self, name: str, grid: str, kind: str) -> float:
        shape, config = self.tokens(name, grid), self.size(name).transformer
        heads, dim = config["num_attention_heads"], config["attention_head_dim"]
        q, k, v = (torch.randn(1, shape[0] * shape[1] * shape[2], heads, dim, device=self.device, dtype=self.dtype) for _ in range(3))
        if kind == "full":
            return cost(lambda: attend_full(q, k, v), self.device, repeats=1).seconds
        groups, near = self._windows(shape).partitions(shape)[0].groups, NEAR.count[0] * NEAR.count[1] * NEAR.count[2]
        proxy = torch.randn(1, 1, near, heads, dim, device=self.device, dtype=self.dtype)

        def extra(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
            part = proxy.expand(1, run.num_windows, near, heads, dim)
            return part, part

        return cost(lambda: attend_windows(q, k, v, groups, extra), self.device).seconds

    def forward(self, name: str, grid: str, kind: Kind) -> Cost:
        """One forward of the whole transformer, without guidance; that of full attention over a large grid from one block."""
        return self._once(f"forward {name} {grid} {kind}", lambda: self._forward(name, grid, kind))

    def _forward(self, name: str, grid: str, kind: Kind) -> Cost:
        layers = self.size(name).transformer["num_layers"]
        if kind != "full":
            return self._blocks(name, grid, kind, layers)
        whole, one = self.forward(name, grid, "windows"), self._blocks(name, grid, "windows", 1)
        full = self._blocks(name, grid, "full", 1)
        # what is outside of blocks can neither be less than nothing nor more than all, as noise would have it where both are short
        outside = min(max((layers * one.seconds - whole.seconds) / (layers - 1), 0.0), full.seconds)
        return Cost(layers * full.seconds - (layers - 1) * outside, full.peak_bytes)

    def _blocks(self, name: str, grid: str, kind: Kind, layers: int) -> Cost:
        model, shape = self._transformer(name, dense=kind == "branched dense"), self.tokens(name, grid)
        z, level, text = self._inputs(name, shape)
        with torch.inference_mode(), _first_blocks(model, layers):
            seen = {"proxy": self._remembered(model, name, text, level)} if kind == "guided" else {}
            model.configure(Graft(attention=self._attention_of(kind, shape), token_chunk=CHUNK[self.device.type]))
            return cost(lambda: model(z, level, text, return_dict=False, attention_kwargs=seen), self.device, repeats=1 if kind == "full" else 3)

    def _inputs(self, name: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(latent of a token grid, its timestep, text)"""
        config = self.size(name).transformer
        sides = (count * side for count, side in zip(shape, config["patch_size"]))
        z = torch.randn(1, config["in_channels"], *sides, device=self.device, dtype=self.dtype)
        text = torch.randn(1, TEXT, config["text_dim"], device=self.device, dtype=self.dtype)
        return z, torch.tensor([500.0], device=self.device), text

    def linears(self, name: str, grid: str) -> dict[str, Linears]:
        """A forward in windows with plain linear layers and with the same in 8 bits, by how blocks are compiled; UserError where 8 bits do not run."""
        if reason := fp8.why_not(self.device, self.dtype):
            raise UserError(f"8-bit linear layers: {reason}", where="H7", fix="measure them on another device")
        return self._once(f"linears {name} {grid}", lambda: self._linears(name, grid))

    def _linears(self, name: str, grid: str) -> dict[str, Linears]:
        model, inputs = self._transformer(name), self._inputs(name, self.tokens(name, grid))
        ways = COMPILED[self.device.type]
        plain = [self._with_weights(model, grid, name, way, inputs) for way in ways]
        try:
            fp8.quantise(model.blocks)
            coarse = [self._with_weights(model, grid, name, way, inputs) for way in ways]
        finally:
            self._clear()  # whoever asks for this model next wants plain weights
        return {way: Linears(p, c, _apart(exact, rounded)) for way, (p, exact), (c, rounded) in zip(ways, plain, coarse)}

    def _with_weights(self, model: MuralTransformer, grid: str, name: str, way: str, inputs: tuple[torch.Tensor, ...]) -> tuple[Cost, torch.Tensor]:
        """(what a forward takes, the weights' bytes with its peak; its output)"""
        graft = Graft(attention=self._windows(self.tokens(name, grid)), token_chunk=CHUNK[self.device.type], kernels=Kernels(attention="sdpa", compile=way))
        with torch.inference_mode():
            model.configure(graft)
            taken = cost(lambda: model(*inputs, return_dict=False), self.device)
            return replace(taken, peak_bytes=taken.peak_bytes + _weight_bytes(model)), model(*inputs, return_dict=False)[0]

    def _remembered(self, model: MuralTransformer, name: str, text: torch.Tensor, level: torch.Tensor) -> Any:
        geometry = self.info(name).geometry
        z = torch.randn(1, *geometry.latent_shape(self.grid("480p x81", name)), device=self.device, dtype=self.dtype)
        return model.remember(z, level, text, 1.0)

    def _attention_of(self, kind: Kind, shape: tuple[int, int, int]) -> Any:
        match kind:
            case "full":
                return FullAttention()
            case "windows":
                return self._windows(shape)
            case "guided":
                return GuidedWindows(self._windows(shape), NEAR)
            case _:
                return BranchedWindows(min(4, min(shape[1:]) - 1), branches=("coarse", "whole"))

    def _windows(self, shape: tuple[int, int, int]) -> WindowAttention:
        return WindowAttention(window_size(self.windows(), shape))

    def windows(self) -> Windows:
        return Windows(tokens=WINDOW_TOKENS[self.width], max_frames=8)

    def flops(self, name: str, grid: str) -> int:
        """Of one forward in windows."""
        shape = self.tokens(name, grid)
        return costs.forward(costs.Dimensions.of(self.size(name).transformer), Graft(attention=self._windows(shape)), shape, TEXT).flops

    def _transformer(self, name: str, *, dense: bool = False) -> MuralTransformer:
        """Made on the device itself; the last one is kept, since two would not fit everywhere."""
        wanted = f"{name} dense" if dense else name
        if self._model is None or self._model[0] != wanted:
            self._clear()
            config = self.size(name).transformer
            model = random(partial(MuralTransformer, **config), self.device, self.dtype)
            branches = hierarchical(
                config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"], restoring="dense" if dense else "separable"
            )
            attach_branches(model.blocks, branches).to(self.device, self.dtype)
            self._model = (wanted, model)
        return self._model[1]

    # -- The decoder --

    def decode(self, name: str, grid: str, how: Literal["ours", "diffusers"]) -> Cost:
        """A whole decode to pixels on the CPU, by our exact tiles or by diffusers' blended ones."""
        return self._once(f"decode {name} {grid} {how}", lambda: self._decode(name, self.grid(grid, name), how))

    def _decode(self, name: str, grid: Grid, how: str) -> Cost:
        self._clear()
        vae, shape = self.vae(name), self.info(name).geometry.latent_shape(grid)
        z = torch.randn(1, *shape, device=self.device, dtype=self.dtype)
        if how == "diffusers":
            vae.enable_tiling()
            with torch.inference_mode():
                return once(lambda: vae.decode(z).sample.float().cpu(), self.device)
        plan = plan_decode(self.size(name).vae, grid, self.decode_options(), dtype=self.dtype)

        def ours() -> None:
            for _ in decode(LatentVideo(z, grid), vae, plan):
                pass

        return once(ours, self.device)

    def vae(self, name: str) -> AutoencoderKLWan:
        return random(lambda: AutoencoderKLWan.from_config(dict(self.size(name).vae)), self.device, self.dtype)

    def decode_options(self) -> DecodeOptions:
        return DecodeOptions(memory_bytes=DECODE_BYTES[self.device.type])

    # -- Everything --

    def pipeline(self, name: str, grid: str) -> Pipeline:
        """Four steps in windows without guidance from noise to a file; the text's embedding is given."""
        return self._once(f"pipeline {name} {grid}", lambda: self._pipeline(name, grid))

    def _pipeline(self, name: str, grid: str) -> Pipeline:
        self._clear()
        info, config = self.info(name), self.size(name).transformer
        models = {"transformer": random(partial(MuralTransformer, **config), self.device, self.dtype), "vae": self.vae(name)}
        base = Base(info, self.device, self.dtype, components=models)
        del models
        refine = Refine(
            num_inference_steps=4, guidance_scale=1.0, flow_shift=5.0, attention=self.windows(), steps=PlainSteps(), token_chunk=CHUNK[self.device.type]
        )
        asked = (wan.GRIDS if self.width == "real" else wan.SMALL_GRIDS)[grid]
        request = Request(
            prompt="random weights", negative_prompt="", grid=asked, seed=0, model=name, revision=None, recipe="bench",
            config=Config(proxy=None, upsample=None, refine=refine, decode=self.decode_options()),
        )  # fmt: skip
        told = Silent()
        with tempfile.TemporaryDirectory() as folder, RunDirectory.create(Path(folder) / "run", {"bench": True}) as run:
            text = torch.randn(1, TEXT, config["text_dim"])
            run.save("prompt", {"positive": text, "negative": text})
            whole = once(lambda: generate(request, base, run, Path(folder) / "out.mp4", told), self.device)
        seconds = {report.stage: report.seconds for report in told.reports}
        return Pipeline(whole.seconds, seconds["refine"], seconds["decode"], max(report.peak_device or report.peak_rss for report in told.reports))

    def _clear(self) -> None:
        """Let the last transformer go and give its memory back."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _once(self, name: str, measure: Callable[[], Found]) -> Found:
        if name not in self.known:
            self.known[name] = measure()
        return self.known[name]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Seconds from the embedded prompt to the finished file, of them in the transformer's stage and in decoding (the file is written meanwhile).

    `peak_bytes`: of the device, on a CPU of the process.
    """

    wall: float
    transformer: float
    decode: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Linears:
    """A forward with plain linear layers and with 8-bit ones, peaks with weights, and the root mean square between their outputs over that of the first."""

    plain: Cost
    fp8: Cost
    error: float


def _apart(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    return ((rounded.float() - exact.float()).norm() / exact.float().norm()).item()


def _weight_bytes(model: nn.Module) -> int:
    """Without the branches, which are there for other rows."""
    return sum(tensor.nbytes for name, tensor in chain(model.named_parameters(), model.named_buffers()) if ".branches." not in name)


def random(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A module with small random weights, made in its type where it will stand: its float32 form never exists."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made = make()
    finally:
        torch.set_default_dtype(before)
    made = made.to(dtype).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=0.02)
    return made


@contextmanager
def _first_blocks(model: MuralTransformer, count: int) -> Iterator[None]:
    """The model with its first blocks alone."""
    whole = model.blocks
    model.blocks = whole[:count]
    try:
        yield
    finally:
        model.blocks = whole
