"""generate(): the data flow. prompt -> proxy -> upsample -> refine -> decode -> encode -> file.

Each stage's result stands in the run directory before the next one starts; what is already there is not made again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from muralist.base import Base
from muralist.base_info import UPSAMPLER
from muralist.config import Request
from muralist.cost.levels import in_small_chunks
from muralist.errors import Note, UserError
from muralist.nn import heap
from muralist.nn.block_cache import FirstBlockCache
from muralist.nn.kernels import Kernels
from muralist.plan import Plan
from muralist.progress import Observer, measured
from muralist.stages.ahead import Ahead
from muralist.stages.decode import plan_decode
from muralist.stages.decode_in_less import decode_in_less
from muralist.stages.encode import encode, next_frame
from muralist.stages.prompt import encode_prompt
from muralist.stages.proxy import make_proxy
from muralist.stages.refine import refine, sight
from muralist.stages.upsample import pieces, upsample
from muralist.store.run import RunDirectory
from muralist.types import FrameChunk, Grid, LatentVideo, TextCond

AHEAD = {"cpu": 0, "cuda": 8}  # frames that are decoded while others are compressed; on a CPU both want the same cores
DENOISED = ("proxy", "refine")  # stages
KERNELS = "kernels"  # that a stage was computed with, in what is stored of it
SAVE_EVERY = 1  # denoising steps between two snapshots


def generate(request: Request, base: Base, run: RunDirectory, output: Path, observer: Observer) -> Path:
    """Paint one video, or finish it where an earlier process was stopped; returns the file's path."""
    return paint(denoise(request, base, run, observer), request, base, run, output, observer)


def prepare_memory(base: Base, plan: Plan) -> None:
    """What a plan decided beyond its request, done before anything is loaded."""
    base.stream(plan.streamed)
    if base.device.type == "cpu" and in_small_chunks(plan.request.config):  # of the request: a run that has begun keeps its chunks at any level
        heap.return_large_blocks()
    else:
        heap.keep_large_blocks()


def denoise(request: Request, base: Base, run: RunDirectory, observer: Observer) -> LatentVideo:
    """The first four stages: from the prompt to the finished latent video."""
    text = _text(request, base, run, observer)
    proxy = _proxy(text, request, base, run, observer)
    guide = _guide(proxy, request, base, run, observer)
    return _refine(text, guide, proxy, request, base, run, observer)


def _text(request: Request, base: Base, run: RunDirectory, observer: Observer) -> TextCond:
    if not run.has("prompt"):
        with measured(observer, "prompt", 1):
            text = encode_prompt(base, request.prompt, request.negative_prompt)
            run.save("prompt", {"positive": text.positive, "negative": text.negative})
        base.release("text_encoder", "tokenizer")
    tensors, _ = run.load("prompt")
    return TextCond(tensors["positive"], tensors["negative"])


def _proxy(text: TextCond, request: Request, base: Base, run: RunDirectory, observer: Observer) -> LatentVideo | None:
    config = request.config.proxy
    if config is None:
        return None
    grid = config.grid(request.grid, base.info.geometry)
    if not run.has("proxy"):
        with measured(observer, "proxy", config.num_inference_steps):
            steps, computed = _steps(request, base, run, "proxy", grid, config.cache, observer)
            latent = make_proxy(base, text, config, request.grid, seed=request.seed, **steps)
            _finish(run, "proxy", latent, computed)
    return _stored("proxy", grid, base, run)


def _stored(stage: str, grid: Grid, base: Base, run: RunDirectory) -> LatentVideo:
    """A finished stage's result on its grid."""
    latent = run.load(stage)[0]["latent"]
    _require_fit(latent, stage, grid, base, run)
    return LatentVideo(latent.to(base.device), grid)


def _require_fit(stored: torch.Tensor, stage: str, grid: Grid, base: Base, run: RunDirectory) -> None:
    """UserError if a stored latent is not of the grid that the request asks for: the record was changed after the start."""
    wanted = (1, *base.info.geometry.latent_shape(grid))
    if stored.shape != wanted:
        found, needed = ("x".join(map(str, shape)) for shape in (stored.shape, wanted))
        what = f"the run directory is damaged: its {stage} is a latent of {found}, its request needs {needed}"
        raise UserError(what, where=str(run.root), fix="start anew: remove it, or choose another run directory")


def _guide(proxy: LatentVideo | None, request: Request, base: Base, run: RunDirectory, observer: Observer) -> LatentVideo | None:
    config, grid = request.config.upsample, base.info.geometry.legal(request.grid)
    if proxy is None or config is None:
        return None
    if not run.has("upsample"):
        count = pieces(config, replace(proxy.grid, num_frames=grid.num_frames), grid, base.info.geometry)

        def on_piece(done: int, total: int) -> None:
            observer.advance("upsample", done * count // total)  # there are more of them after memory has run out

        with measured(observer, "upsample", count):
            latent = upsample(proxy, grid, base, config, on_piece, scratch=run.scratch("upsample"))
            _finish(run, "upsample", latent)
        base.release(UPSAMPLER, "vae")
    run.drop_scratch("upsample")
    return _stored("upsample", grid, base, run)


def _refine(
    text: TextCond, guide: LatentVideo | None, proxy: LatentVideo | None, request: Request, base: Base, run: RunDirectory, observer: Observer
) -> LatentVideo:
    config, grid = request.config.refine, base.info.geometry.legal(request.grid)
    if not run.has("refine"):
        with measured(observer, "refine", config.num_inference_steps):
            steps, computed = _steps(request, base, run, "refine", grid, config.cache, observer)
            seen = sight(config, request.config.proxy, proxy, seed=request.seed)
            latent = refine(base, text, guide, grid, config, sight=seen, seed=request.seed, **steps)
            _finish(run, "refine", latent, computed)
    base.release("transformer", "transformer_2")
    return _stored("refine", grid, base, run)


def _kernels(request: Request, base: Base) -> Kernels:
    """What the transformers are computed with on this machine; who typed the request has been told of what is not there (`tell_of_kernels`)."""
    return request.config.kernels.settled(base.device, base.dtype, base.info.head_dim, base.info.sides)[0]


def paint(latent: LatentVideo, request: Request, base: Base, run: RunDirectory, output: Path, observer: Observer) -> Path:
    """Decode and encode in one stream: frames go into the file as they come."""
    ahead = Ahead(AHEAD[base.device.type])

    announced = -1

    def on_tile(done: int, total: int) -> None:
        nonlocal announced
        ahead.check()
        if done != announced:  # else it is called in the midst of a tile
            observer.advance("decode", done * latent.grid.num_frames // total)
        announced = done

    with measured(observer, "decode", latent.grid.num_frames):
        chunks = frames(
            latent, request, base, first_frame=next_frame(run), scratch=run.scratch("decode"), group=request.config.encode.gop, on_tile=on_tile,
            lag=ahead.lag, where=base.device,
        )  # fmt: skip
        path = encode(chunks, request.grid, output, request.config.encode, run, metadata(request, base, run), ahead)
    run.drop_scratch("decode")
    return path


def frames(latent: LatentVideo, request: Request, base: Base, **options: Any) -> Iterator[FrameChunk]:
    """The decoded video in chunks, of exactly the size that was asked for; `options` are those of `stages.decode.decode`."""
    plan = plan_decode(base.info.vae_config, latent.grid, request.config.decode, dtype=base.dtype)
    return decode_in_less(latent, base.vae(), plan, crop=request.grid, **options)


def metadata(request: Request, base: Base, run: RunDirectory) -> dict[str, Any]:
    """What the file says of itself: enough to paint it again. `kernels`: all that denoised it, more than one if on other machines; `dtype`: the decoder's."""
    from muralist.store.atomic import versions

    used = [kernels for stage in DENOISED if run.has(stage) for kernels in run.info(stage).get(KERNELS, [])]
    computed = {"dtype": _name(base.dtype), KERNELS: [k for n, k in enumerate(used) if k not in used[:n]]}
    return {"generator": "muralist", "versions": versions(), **computed, "request": request.record()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _steps(
    request: Request, base: Base, run: RunDirectory, stage: str, grid: Grid, threshold: float | None, observer: Observer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(how a stage's steps are taken, as options: where they go on, with what, and what is done after each; what its result says of its computing)

    After a step its latent is saved. But who goes on has nothing in a first-block cache: with one, a latent is saved once the step that begins with it
    has turned out to need none.
    """
    newest, kernels, cache = run.latest_step(stage), _kernels(request, base), threshold and FirstBlockCache(threshold)
    earlier = newest[2].get(KERNELS, []) if newest else []
    computed = {KERNELS: _with(earlier, asdict(kernels) | {"dtype": _name(base.dtype)}, stage)}
    begun: tuple[int, torch.Tensor] | None = None  # what the next step begins with

    def after_step(step: int, z: torch.Tensor) -> None:
        nonlocal begun
        before, begun = begun, (step, z)
        safe = begun if cache is None else before if cache.whole else None
        if safe is not None and safe[0] % SAVE_EVERY == 0:
            run.save_step(stage, safe[0], {"latent": safe[1].cpu()}, computed)
        observer.advance(stage, step)

    saved = newest and (newest[0], newest[1]["latent"])
    if saved:
        _require_fit(saved[1], stage, grid, base, run)
    return {"saved": saved, "after_step": after_step, "kernels": kernels, "cache": cache}, computed


def _with(earlier: list[dict[str, Any]], now: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """The kernels of a stage's earlier steps and those of the steps to come, each once; a change is told."""
    if earlier and now not in earlier:
        warnings.warn(f"{stage}: its first steps were computed with {earlier[-1]}, the others are with {now}", Note, stacklevel=3)
    return earlier if now in earlier else [*earlier, now]


def _finish(run: RunDirectory, stage: str, latent: LatentVideo, computed: dict[str, Any] | None = None) -> None:
    run.save(stage, {"latent": latent.z.cpu()}, computed)
    run.drop_steps(stage)
