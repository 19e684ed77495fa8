"""A base model at work: its components on one device, loaded when they are needed and let go again.

At no moment do text encoder, transformer and VAE stand in memory together unless they fit. What a folder says of its model: `base_info.py`.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from muralist.base_info import UPSAMPLER, BaseInfo
from muralist.errors import UserError
from muralist.nn.experts import EXPERTS, ExpertsConfig, attach
from muralist.nn.fp8 import quantise
from muralist.nn.kinds import BRANCHES, INJECTOR, STEP_SIZE, BranchesConfig, InjectorConfig
from muralist.nn.out_of_memory import enough_for
from muralist.nn.streaming import rest_to, streamed_by_hooks
from muralist.store import parts

if TYPE_CHECKING:  # diffusers takes seconds to import: only what computes pays for it, not what checks a request
    from muralist.nn.latent_upsampler import LatentUpsampler
    from muralist.nn.transformer import MuralTransformer

FIRST, SECOND = "transformer", "transformer_2"  # the components of a base; most have one


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


def mixed_precision(device: torch.device) -> torch.autocast:
    """Where weights stay in float32, as in training: products in the type of `pick_dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(device) is torch.bfloat16)


class Base:
    """The components of a checked model on one device, loaded when first asked for; `components`: those that are there already, by name."""

    def __init__(self, info: BaseInfo, device: torch.device, dtype: torch.dtype | None = None, components: Mapping[str, Any] | None = None):
        self.info, self.device, self.dtype = info, device, dtype or pick_dtype(device)
        self._loaded: dict[str, Any] = dict(components or {})
        self._streamed = False
        self._linears = "plain"
        self._merged: str | None = None

    def stream(self, streamed: bool) -> None:
        """Whether the weights of transformer and text encoder wait in main memory and visit the device (`nn/streaming.py`), from now on."""
        if streamed != self._streamed:
            self.release(FIRST, SECOND, "text_encoder")
        self._streamed = streamed

    def multiply_in(self, linears: Literal["plain", "fp8"]) -> None:
        """How linear layers in the transformer's blocks multiply (`nn/fp8.py`), from now on. What 8 bits have lost is not found again without loading anew."""
        if linears != self._linears:
            self.release(FIRST, SECOND)
        self._linears = linears

    def merge(self, adapter: str | None) -> None:
        """Which adapter is a part of the transformer's weights (`nn/adapters.py`), from now on; another one, or none, takes loading anew."""
        self._merged = adapter

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
        """The transformer that serves noise level sigma, its weights as `merge` says; of two, the other one is let go.

        Raises UserError if memory does not hold the weights.
        """
        name = self.serving(sigma)
        self.release(*{FIRST, SECOND} - {name})
        with enough_for(f"the weights of the {name}"):
            if name in self._loaded and not self._merge_into(self._loaded[name]):
                self.release(name)
            return self._component(name, lambda: self._load_transformer(name))

    def serving(self, sigma: float) -> str:
        """The name of the transformer for noise level sigma."""
        return SECOND if self.info.boundary is not None and sigma < self.info.boundary else FIRST

    def _merge_into(self, transformer: MuralTransformer) -> bool:
        """Make the adapter that is to be a part of the weights one, where they are plain. False: they have to be loaded anew."""
        from muralist.nn.adapters import can_merge, merge_adapter, merged_adapter

        now, wanted = merged_adapter(transformer), self._merged
        if now is not None or wanted is None:
            return now == wanted
        if self._streamed or self._linears != "plain":
            return not can_merge(transformer, wanted)
        merge_adapter(transformer, wanted, self.device)
        return True

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
        from muralist.nn.adapters import load_adapter, merge_adapter
        from muralist.nn.transformer import MuralTransformer

        transformer = MuralTransformer.from_pretrained(self.info.folder / name, torch_dtype=self.dtype)
        for adapter in self.info.adapters:
            load_adapter(transformer, adapter, self.info.adapter_folder(adapter, name))
        if self._merged is not None:
            merge_adapter(transformer, self._merged, self.device)
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
