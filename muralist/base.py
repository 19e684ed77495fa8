"""A base model at work: its components on one device, loaded when they are needed and let go again.

At no moment do text encoder, transformer and VAE stand in memory together unless they fit. What a folder says of its model: `base_info.py`.
"""

from __future__ import annotations

import gc
import logging
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from muralist.base_info import UPSAMPLER, BaseInfo
from muralist.errors import UserError
from muralist.nn.block_cache import FirstBlockCache, Pass
from muralist.nn.experts import EXPERTS, ExpertsConfig, attach
from muralist.nn.fp8 import quantise
from muralist.nn.kinds import BRANCHES, INJECTOR, STEP_SIZE, BranchesConfig, InjectorConfig
from muralist.nn.out_of_memory import Chunks
from muralist.nn.streaming import rest_to, streamed_by_hooks
from muralist.sampling import flow
from muralist.store import parts
from muralist.types import TextCond

if TYPE_CHECKING:  # diffusers takes seconds to import: only what computes pays for it, not what checks a request
    from muralist.nn.attention import ProxyMemory
    from muralist.nn.latent_upsampler import LatentUpsampler
    from muralist.nn.transformer import Graft, MuralTransformer

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU where there is one; else what was asked for, if this machine has it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"unknown device {name!r}", where="device", fix="use auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine offers no CUDA device", where="device", fix="use --device cpu")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"no device {name}, there are {torch.cuda.device_count()}", where="device", fix="use a lower number")
    if device.index is not None:
        torch.cuda.set_device(device)  # streams, events and counts of memory are of the current device unless told
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (CUDA from 8.0 on; a CPU with AMX or AVX512_BF16), else float32.

    Older GPUs, which would emulate it, have no attention kernel for it but the one that holds all scores.
    """
    on_gpu = device.type == "cuda"
    multiplied = torch.cuda.get_device_capability(device) >= (8, 0) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if multiplied else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class ProxyView:
    """A coarse video [1, C, F, h, w] that a finer one of the same scene is painted in sight of.

    `time_scale`: fine latent frames from one of its own to the next; `adapter`: the one it was painted with, and is looked at with;
    `noise`: it is seen clean, or at the noise level of each step (then with noise of its own, drawn once by `seed`).
    """

    z: torch.Tensor
    time_scale: float
    adapter: str | None
    noise: Literal["clean", "same"]
    seed: int

    def at(self, sigma: float) -> tuple[torch.Tensor, float]:
        """(latent, its noise level) for a step at sigma."""
        if self.noise == "clean":
            return self.z, 0.0
        return flow.renoise(self.z, flow.keyed_noise(tuple(self.z.shape), seed=self.seed, stage="proxy view").to(self.z), sigma), sigma


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What a velocity field is told beside text and noise; nothing by default.

    `proxy`: for guided windows. `anchor` [1, C, F, h, w]: for the injector. `step_sizes`: how far the step goes that starts at a noise level, on
    the scale of timesteps, for a base that was given step sizes.
    """

    proxy: ProxyView | None = None
    anchor: torch.Tensor | None = None
    step_sizes: Mapping[float, float] | None = None


NOTHING = Sight()


class Base:
    """The components of a checked model on one device, loaded when first asked for; `components`: those that are there already, by name."""

    def __init__(self, info: BaseInfo, device: torch.device, dtype: torch.dtype | None = None, components: Mapping[str, Any] | None = None):
        self.info, self.device, self.dtype = info, device, dtype or pick_dtype(device)
        self._loaded: dict[str, Any] = dict(components or {})
        self._streamed = False
        self._linears = "plain"

    def stream(self, streamed: bool) -> None:
        """Whether the weights of transformer and text encoder wait in main memory and visit the device (`nn/streaming.py`), from now on."""
        if streamed != self._streamed:
            self.release("transformer", "transformer_2", "text_encoder")
        self._streamed = streamed

    def multiply_in(self, linears: Literal["plain", "fp8"]) -> None:
        """How linear layers in the transformer's blocks multiply (`nn/fp8.py`), from now on. What 8 bits have lost is not found again without loading anew."""
        if linears != self._linears:
            self.release("transformer", "transformer_2")
        self._linears = linears

    def tokenizer(self):
        return self._component("tokenizer", lambda: _auto_tokenizer(self.info.folder / "tokenizer"))

    def text_encoder(self):
        return self._component("text_encoder", self._load_text_encoder)

    def vae(self):
        """The VAE, in float32 on a CPU without bfloat16 units, else in the base's type."""
        from diffusers import AutoencoderKLWan

        return self._component("vae", lambda: AutoencoderKLWan.from_pretrained(self.info.folder / "vae", torch_dtype=self.dtype).to(self.device).eval())

    def latent_upsampler(self):
        """The network that enlarges latents, in float32."""
        return self._component(UPSAMPLER, lambda: load_latent_upsampler(self.info.folder / "parts" / UPSAMPLER).to(self.device).eval())

    def transformer(self, sigma: float = 1.0) -> MuralTransformer:
        """The transformer that serves noise level sigma; of two, the other one is let go."""
        name, other = "transformer", "transformer_2"
        if self.info.boundary is not None and sigma < self.info.boundary:
            name, other = other, name
        self.release(other)
        return self._component(name, lambda: self._load_transformer(name))

    def velocity(
        self,
        text: TextCond,
        *,
        guidance_scale: float,
        guidance_interval: flow.Interval = flow.WHOLE,
        guidance_mean_interval: flow.Interval = flow.WHOLE,
        graft: Graft,
        grafts: Mapping[float, Graft] = MappingProxyType({}),
        adapter: str | None,
        sight: Sight = NOTHING,
        cache: FirstBlockCache | None = None,
    ) -> flow.Velocity:
        """The guided velocity field under a graft, with a named adapter switched on or all of them off; runs without gradients.

        `grafts`: those of single noise levels, in place of `graft`; they differ from it in their windows alone. Of a graft's experts those work that are
        there for the noise level. With a `cache` it depends on the steps before: for one run of them.
        """
        positive, negative = (e.to(self.device, self.dtype) for e in (text.positive, text.negative))
        chunks = Chunks()
        passes = (None, None) if cache is None else (cache.conditional, cache.unconditional)
        conditional, unconditional = (
            self._field(embeds, graft, grafts, adapter, sight, chunks, cached) for embeds, cached in zip((positive, negative), passes)
        )  # fmt: skip
        return flow.guided(conditional, unconditional, guidance_scale, guidance_interval, guidance_mean_interval)

    def _field(
        self, embeds: torch.Tensor, graft: Graft, grafts: Mapping[float, Graft], adapter: str | None, sight: Sight, chunks: Chunks, cached: Pass | None
    ) -> flow.Velocity:
        given = self._given(embeds, sight)

        @torch.inference_mode()
        def velocity(z: torch.Tensor, sigma: float) -> torch.Tensor:
            self.multiply_in(graft.kernels.linears)
            transformer, at_work = self.transformer(sigma), tuple(name for name in graft.experts if self.info.experts.experts[name].works_at(sigma))

            def forward(token_chunk: int | None) -> torch.Tensor:
                # its kernels and chunks are those of the proxy's pass too
                transformer.configure(replace(grafts.get(sigma, graft), experts=at_work, token_chunk=token_chunk))
                seen = given(z, sigma) | {"cache": cached}
                select_adapter(transformer, adapter)
                return transformer(z.to(self.dtype), self._timestep(sigma), embeds, return_dict=False, attention_kwargs=seen)[0].float()

            output = chunks.attempt(forward, graft.token_chunk, math.prod(transformer.token_shape(z)))
            return output if self.info.prediction == "flow" else flow.velocity_of_sample(z, output, sigma)

        return velocity

    def _given(self, embeds: torch.Tensor, sight: Sight) -> Callable[[torch.Tensor, float], dict[str, Any]]:
        """(z, sigma) -> what the transformer is given of `sight` for that step; what does not change between steps is computed once."""
        remember = None if sight.proxy is None else self._memory(embeds, sight.proxy)
        features = None if sight.anchor is None else self._features(sight.anchor)

        def given(z: torch.Tensor, sigma: float) -> dict[str, Any]:
            seen = {} if remember is None else {"proxy": remember(sigma)}
            if features is not None:
                seen["anchor"] = features(z, sigma)
            if sight.step_sizes is not None:
                seen["step_size"] = torch.tensor([sight.step_sizes[sigma]], device=self.device)
            return seen

        return given

    def _features(self, anchor: torch.Tensor) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """What the injector makes of an anchor for the token grid of z."""
        last: tuple[MuralTransformer, torch.Tensor] | None = None

        @torch.inference_mode()
        def features(z: torch.Tensor, sigma: float) -> torch.Tensor:
            nonlocal last
            transformer = self.transformer(sigma)
            if last is None or last[0] is not transformer:
                last = (transformer, transformer.injector.refine(anchor.to(self.device, self.dtype), transformer.token_shape(z)))
            return last[1]

        return features

    def _memory(self, embeds: torch.Tensor, proxy: ProxyView) -> Callable[[float], ProxyMemory]:
        """The proxy's keys and values for a step at sigma; those of the last step again if nothing that they depend on has changed."""
        last: tuple[MuralTransformer, float, ProxyMemory] | None = None

        @torch.inference_mode()
        def remember(sigma: float) -> ProxyMemory:
            nonlocal last
            transformer, (z, level) = self.transformer(sigma), proxy.at(sigma)
            if last is None or last[0] is not transformer or last[1] != level:
                last = None  # two memories at a time would be one too many
                select_adapter(transformer, proxy.adapter)
                memory = transformer.remember(z.to(self.device, self.dtype), self._timestep(level), embeds, proxy.time_scale)
                last = (transformer, level, memory)
            return last[2]

        return remember

    def _timestep(self, sigma: float) -> torch.Tensor:
        return torch.tensor([1000 * sigma], device=self.device, dtype=torch.float32)

    def release(self, *names: str) -> None:
        """Let components go and give their memory back."""
        released = [module for name in names for module in _modules(self._loaded.pop(name, None))]
        if any(module() is not None for module in released):
            gc.collect()  # it takes a good part of a second: only for what refers to itself
        if released and self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.accelerator.empty_host_cache()  # page-locked memory in which weights waited: gigabytes that serve no block of another size

    def _component(self, name: str, load):
        if name not in self._loaded:
            with torch.inference_mode(False):  # the first step of a run asks inside one: its tensors could serve nowhere else
                self._loaded[name] = load()
        return self._loaded[name]

    def _load_text_encoder(self):
        encoder = _text_encoder(self.info.folder / "text_encoder", self.dtype)
        if not self._streamed:
            return encoder.to(self.device)
        rest_to(encoder, streamed_by_hooks(encoder.encoder.block, self.device), self.device)
        return encoder

    def _load_transformer(self, name: str) -> MuralTransformer:
        from muralist.nn.transformer import MuralTransformer

        transformer = MuralTransformer.from_pretrained(self.info.folder / name, torch_dtype=self.dtype)
        for adapter in self.info.adapters:
            _load_adapter(transformer, adapter, self.info.folder / "adapters" / adapter)
        if self.info.experts is not None:
            _attach_experts(transformer, self.info.experts, self.info.folder / "parts" / EXPERTS, self.dtype)
        if STEP_SIZE in self.info.parts:
            transformer.step_size = _step_size(self.info.folder / "parts" / STEP_SIZE).to(self.dtype)
        if self.info.injector is not None:
            transformer.injector = _injector(self.info.injector, self.info.folder / "parts" / INJECTOR).to(self.dtype)
        if self.info.branches is not None:
            _attach_branches(transformer, self.info.branches, self.info.folder / "parts" / BRANCHES, self.dtype)
        if self._linears == "fp8":  # after all that is added to their weights, before they are moved
            quantise(transformer.blocks, self.device)
        return transformer.eval().stream_blocks(self.device) if self._streamed else transformer.to(self.device).eval()


def _modules(component: Any) -> list[weakref.ref]:
    """The modules of a component, none of them kept alive; what is no module holds no memory to speak of."""
    return [weakref.ref(module) for module in component.modules()] if isinstance(component, torch.nn.Module) else []


def select_adapter(transformer: MuralTransformer, adapter: str | None) -> None:
    """Switch one loaded adapter on, or all of them off."""
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        if adapter is not None:
            raise UserError(f"the base has no adapter {adapter!r}", where="adapter", fix="choose a base or a recipe that has it")
        return
    if adapter is not None and adapter not in transformer.peft_config:
        raise UserError(f"the base has no adapter {adapter!r}", where="adapter", fix=f"use one of {', '.join(transformer.peft_config)}")
    if _is_selected(transformer, adapter):
        return
    if adapter is None:
        transformer.disable_adapters()
    else:
        transformer.enable_adapters()
        transformer.set_adapters([adapter])


def _is_selected(transformer: MuralTransformer, adapter: str | None) -> bool:
    """Whether every layer that has adapters stands so already: to ask is much faster than to switch them all."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (module for module in transformer.modules() if isinstance(module, BaseTunerLayer))
    return all(layer.disable_adapters if adapter is None else not layer.disable_adapters and layer.active_adapters == [adapter] for layer in layers)


@contextmanager
def several_adapters() -> Iterator[None]:
    """peft warns of a second adapter in a model; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield


@contextmanager
def _without_others(name: str) -> Iterator[None]:
    """diffusers counts the weights of adapters that are loaded already, and whose names contain this one's, as missing ones of it."""

    def of_this_one(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "missing keys" not in text or f".{name}." in text

    logger = logging.getLogger("diffusers.utils.peft_utils")
    logger.addFilter(of_this_one)
    try:
        yield
    finally:
        logger.removeFilter(of_this_one)


def _load_adapter(transformer: MuralTransformer, name: str, folder: Path) -> None:
    with several_adapters(), _without_others(name):
        # without both names diffusers falls back to a pickle
        transformer.load_lora_adapter(str(folder), prefix=None, adapter_name=name, weight_name=ADAPTER_FILE, use_safetensors=True)


def _attach_experts(transformer: MuralTransformer, config: ExpertsConfig, folder: Path, dtype: torch.dtype) -> None:
    _, tensors = parts.load_part(folder, EXPERTS)
    attached = attach(transformer.blocks, config.dim, config.experts)
    attached.to(dtype).load_state_dict({name.removeprefix("blocks."): tensor for name, tensor in tensors.items()})


def _attach_branches(transformer: MuralTransformer, config: BranchesConfig, folder: Path, dtype: torch.dtype) -> None:
    from muralist.nn.branches import attach_branches

    _loaded(attach_branches(transformer.blocks, config), parts.load_part(folder, BRANCHES)[1], folder).to(dtype)


def _step_size(folder: Path):
    from muralist.nn.step_size import StepSizeEmbedding

    record, tensors = parts.load_part(folder, STEP_SIZE)
    return _loaded(StepSizeEmbedding(record["dim"]), tensors, folder)


def _injector(config: InjectorConfig, folder: Path):
    from muralist.nn.injector import AnchorInjector

    return _loaded(AnchorInjector(config), parts.load_part(folder, INJECTOR)[1], folder)


def _loaded(network: torch.nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> torch.nn.Module:
    """The network with a part's weights, in float32. Raises UserError if they are another network's."""
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise UserError(f"{folder}: {str(error).splitlines()[-1].strip():.120}", where="part", fix="fetch the part again, config.json and weights") from None
    return network


def load_latent_upsampler(folder: Path) -> LatentUpsampler:
    """The network in a part's folder, in float32."""
    from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig

    record, tensors = parts.load_part(folder, UPSAMPLER)
    return _loaded(LatentUpsampler(LatentUpsamplerConfig.of(record)), tensors, folder)


def _auto_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _text_encoder(folder: Path, dtype: torch.dtype):
    from transformers import UMT5EncoderModel

    return UMT5EncoderModel.from_pretrained(folder, dtype=dtype).eval()
