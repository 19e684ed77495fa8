"""A base model: what its folder says, and its components when they are needed.

`inspect_base` reads JSON and file headers only, so that everything a user can get wrong is found before a weight is loaded.
`Base` loads one component at a time and lets it go again: at no moment do text encoder, transformer and VAE stand in memory
together unless they fit.
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from muralist.errors import UserError
from muralist.sampling import flow
from muralist.store import parts, weights
from muralist.types import Geometry, Grid, TextCond

if TYPE_CHECKING:  # diffusers takes seconds to import: only what computes pays for it, not what checks a request
    from muralist.nn.transformer import Graft, MuralTransformer

# Wan's own negative prompt, as released with Wan2.1 and Wan2.2
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_NUMBERS = ("num_inference_steps", "max_sequence_length", "refine_steps", "guidance_scale", "flow_shift")  # of `Defaults`; the first three are whole
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
TIED = ("shared.weight", "encoder.embed_tokens.weight")  # the text encoder's two names of one tensor; its file holds either
UPSAMPLER = "latent_upsampler"  # a kind of part
CLASSES = {"transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The numbers a base was made for: its own grid, sampling, and text length. `refine_steps`: of the schedule on a guide's target grid."""

    grid: Grid
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    negative_prompt: str
    max_sequence_length: int
    refine_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseInfo:
    """A checked model folder.

    `boundary`: sigma from which the first of two transformers serves (Wan2.2-A14B), None where there is one.
    `fingerprint`: a digest of all weights, so that a run is not gone on with on others.
    `parts`: the networks of ours that stand beside it in `parts/`, by kind.
    `prediction`: what the transformer's output is, `flow` (velocity; every Wan model) or `sample` (clean latent; the embedded base).
    """

    name: str
    folder: Path
    geometry: Geometry
    defaults: Defaults
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]
    boundary: float | None
    prediction: str
    adapters: tuple[str, ...]
    parts: tuple[str, ...]
    component_bytes: dict[str, int]
    fingerprint: str = ""

    def require_part(self, kind: str) -> None:
        """UserError with what to do if the base has no such part (`store/parts.py`)."""
        if kind not in self.parts:
            raise UserError(
                f"the base {self.name} has no part {kind!r}",
                where="recipe",
                fix=f"train it (muralist train {kind.replace('_', '-')}) and copy it into its parts/",
            )


def inspect_base(model: str, revision: str | None = None) -> BaseInfo:
    """Find and check a model without loading it; raises UserError with the first thing that is wrong."""
    folder = weights.locate(model, revision)
    index = weights.read_config(folder / "model_index.json")
    if index.get("_class_name") != "WanPipeline":
        raise UserError(f"{folder} holds a {index.get('_class_name')}", where="model", fix="give a Wan2.1 or Wan2.2 text-to-video folder (WanPipeline)")
    two = _has_second(index)
    configs = {name: _component_config(folder, name) for name in ("transformer", "vae", *(("transformer_2",) if two else ()))}
    components = {name: folder / name for name in (*configs, "text_encoder")}
    sizes = {name: weights.check_component(path) for name, path in components.items()}
    _check_tokenizer(folder / "tokenizer")
    geometry = _geometry(configs["transformer"], configs["vae"])
    adapters, kinds = (_folders_in(folder / place) for place in ("adapters", "parts"))
    for kind in kinds:
        parts.read_part(folder / "parts" / kind, kind)
    beside = {f"adapter {name}": folder / "adapters" / name for name in adapters} | {f"part {kind}": folder / "parts" / kind for kind in kinds}
    return BaseInfo(
        name=model,
        folder=folder,
        geometry=geometry,
        defaults=_defaults(folder, geometry, two),
        transformer_config=configs["transformer"],
        vae_config=configs["vae"],
        boundary=_boundary(index) if two else None,
        prediction=_prediction(folder),
        adapters=adapters,
        parts=kinds,
        component_bytes=sizes | {name: weights.check_component(path) for name, path in beside.items()},
        fingerprint=_fingerprint([*components.values(), *beside.values()]),
    )


def _has_second(index: dict[str, Any]) -> bool:
    entry = index.get("transformer_2") or [None]
    if not isinstance(entry, list):
        raise UserError(f"transformer_2 is {entry!r:.40}", where="model", fix="restore model_index.json")
    return bool(entry[0])


def _boundary(index: dict[str, Any]) -> float:
    value = index.get("boundary_ratio") or 0.875
    if not isinstance(value, float | int) or not 0 < value < 1:
        raise UserError(f"boundary_ratio is {value!r:.40}", where="model", fix="restore model_index.json: a share between 0 and 1")
    return float(value)


def _check_tokenizer(folder: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        weights.read_config(folder / "tokenizer.json")
    elif not (folder / "spiece.model").is_file():
        raise UserError(f"no tokenizer in {folder}", where="model", fix="give a complete diffusers folder")


def _fingerprint(folders: list[Path]) -> str:
    return hashlib.sha256("".join(f"{folder.name} {weights.fingerprint(folder)}\n" for folder in folders).encode()).hexdigest()


def check_structure(info: BaseInfo) -> None:
    """Compare names and shapes in the headers of all weights with what the configurations build; no weight is read. Takes a second or two.

    Raises UserError for a configuration that builds nothing and for the first tensor that is missing or of another shape: diffusers would
    fail with a traceback there, or start with random numbers in its place.
    """
    for name, build in _builders(info).items():
        try:
            with torch.device("meta"):
                expected = build().state_dict()
        except UserError:
            raise
        except Exception as error:  # whatever a constructor makes of a number it did not expect
            raise UserError(f"{name}/config.json cannot be built ({type(error).__name__}: {error})", where="model", fix="download it again") from None
        found = weights.tensor_shapes(info.folder / name)
        for key, tensor in expected.items():
            if key not in found and key not in TIED:
                raise UserError(f"{name} lacks the tensor {key}", where="model", fix="download its weights again")
            if key in found and found[key] != tuple(tensor.shape):
                raise UserError(f"{name}: {key} is {found[key]}, its config.json says {tuple(tensor.shape)}", where="model", fix="download both again")


def _builders(info: BaseInfo) -> dict[str, Callable[[], torch.nn.Module]]:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    text = weights.read_config(info.folder / "text_encoder" / "config.json")
    if text.get("model_type") != "umt5":
        raise UserError(f"text_encoder is a {text.get('model_type')!r:.40}", where="model", fix="give a folder whose text_encoder is a UMT5 encoder")
    builders = {"transformer": lambda: WanTransformer3DModel.from_config(info.transformer_config)}
    if info.boundary is not None:
        second = weights.read_config(info.folder / "transformer_2" / "config.json")
        builders["transformer_2"] = lambda: WanTransformer3DModel.from_config(second)
    return builders | {"vae": lambda: AutoencoderKLWan.from_config(info.vae_config), "text_encoder": lambda: UMT5EncoderModel(UMT5Config(**text))}


def _folders_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()


def _component_config(folder: Path, name: str) -> dict[str, Any]:
    config = weights.read_config(folder / name / "config.json")
    if config.get("_class_name") != CLASSES[name]:
        raise UserError(f"{name} is a {config.get('_class_name')}", where="model", fix=f"give a folder whose {name} is a {CLASSES[name]}")
    return config


def _prediction(folder: Path) -> str:
    kind = weights.read_config(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "flow_prediction")
    known = {"flow_prediction": "flow", "sample": "sample"}
    if kind not in known:
        raise UserError(f"the scheduler's prediction_type is {kind!r}", where="model", fix=f"give a model with {' or '.join(known)}")
    return known[kind]


def _geometry(transformer: dict[str, Any], vae: dict[str, Any]) -> Geometry:
    for name, value in (("z_dim", vae.get("z_dim", 16)), *((f"scale_factor_{axis}", vae.get(f"scale_factor_{axis}") or 8) for axis in ("spatial", "temporal"))):
        if not isinstance(value, int) or not 1 <= value <= 1024:
            raise UserError(f"the VAE's {name} is {value!r:.40}", where="model", fix="restore its config.json")
    channels = vae.get("z_dim", 16)
    for name in ("latents_mean", "latents_std"):
        if name in vae and (not isinstance(vae[name], list) or len(vae[name]) != channels):
            raise UserError(f"the VAE's {name} does not hold {channels} numbers", where="model", fix="restore its config.json")
    if transformer.get("in_channels") != channels or transformer.get("out_channels") != channels:
        raise UserError(
            f"the transformer reads {transformer.get('in_channels')} channels, the VAE has {channels}", where="model", fix="give a text-to-video model"
        )
    patch = transformer.get("patch_size", [1, 2, 2])
    if not isinstance(patch, list) or len(patch) != 3 or any(not isinstance(side, int) or not 1 <= side <= 16 for side in patch):
        raise UserError(f"the transformer's patch_size is {patch!r:.40}", where="model", fix="restore its config.json")
    factors = {name: vae.get(f"scale_factor_{axis}") or usual for name, axis, usual in (("spatial_factor", "spatial", 8), ("temporal_factor", "temporal", 4))}
    return Geometry(**factors, channels=channels, patch=tuple(patch))


def _defaults(folder: Path, geometry: Geometry, two: bool) -> Defaults:
    """`muralist.json` in the folder where there is one, else Wan's published numbers for the flavour; `two`: Wan2.2-A14B."""
    if (folder / "muralist.json").is_file():
        values = weights.read_config(folder / "muralist.json")
        try:
            values = {"refine_steps": values["num_inference_steps"]} | values
            defaults = Defaults(grid=Grid(**values["grid"]), **{k: values[k] for k in Defaults.__dataclass_fields__ if k != "grid"})
            if not isinstance(defaults.negative_prompt, str):
                raise TypeError("negative_prompt")
            numbers = (*(getattr(defaults, k) for k in _NUMBERS), *(getattr(defaults.grid, k) for k in Grid.__dataclass_fields__))
            if any(type(n) not in (int, float) or n <= 0 for n in numbers) or any(type(getattr(defaults, k)) is not int for k in _NUMBERS[:3]):
                raise TypeError("a number")
            return defaults
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / 'muralist.json'} lacks or misnames {error}", where="model", fix="restore the file") from None
    if two:  # its guidance is 4 above the boundary and 3 below; one scale serves both here
        grid = Grid(num_frames=81, height=720, width=1280, fps=16)
        numbers = {"num_inference_steps": 40, "refine_steps": 40, "guidance_scale": 3.5, "flow_shift": 12.0}
        return Defaults(grid=grid, negative_prompt=WAN_NEGATIVE, max_sequence_length=512, **numbers)
    small = geometry.channels == 16
    grid = Grid(num_frames=81, height=480, width=832, fps=16) if small else Grid(num_frames=121, height=704, width=1280, fps=24)
    return Defaults(
        grid=grid, num_inference_steps=50, guidance_scale=5.0, flow_shift=5.0, negative_prompt=WAN_NEGATIVE, max_sequence_length=512, refine_steps=50
    )


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
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it in matrix units (CUDA; a CPU with AMX), else float32, which is then the faster of the two."""
    if device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


class Base:
    """The components of a checked model on one device, loaded when first asked for."""

    def __init__(self, info: BaseInfo, device: torch.device, dtype: torch.dtype | None = None):
        self.info, self.device, self.dtype = info, device, dtype or pick_dtype(device)
        self._loaded: dict[str, Any] = {}

    def tokenizer(self):
        return self._component("tokenizer", lambda: _auto_tokenizer(self.info.folder / "tokenizer"))

    def text_encoder(self):
        return self._component("text_encoder", lambda: _text_encoder(self.info.folder / "text_encoder", self.dtype).to(self.device))

    def vae(self):
        """The VAE, in float32 on a CPU without bfloat16 units, else in the base's type."""
        from diffusers import AutoencoderKLWan

        return self._component("vae", lambda: AutoencoderKLWan.from_pretrained(self.info.folder / "vae", torch_dtype=self.dtype).to(self.device).eval())

    def latent_upsampler(self):
        """The network that enlarges latents, in float32."""
        return self._component(UPSAMPLER, lambda: _latent_upsampler(self.info.folder / "parts" / UPSAMPLER).to(self.device).eval())

    def transformer(self, sigma: float = 1.0) -> MuralTransformer:
        """The transformer that serves noise level sigma; of two, the other one is let go."""
        name, other = "transformer", "transformer_2"
        if self.info.boundary is not None and sigma < self.info.boundary:
            name, other = other, name
        self.release(other)
        return self._component(name, lambda: self._load_transformer(name))

    def velocity(self, text: TextCond, *, guidance_scale: float, graft: Graft, adapter: str | None) -> flow.Velocity:
        """The guided velocity field under a graft, with a named adapter switched on or all of them off; runs without gradients."""
        positive, negative = (e.to(self.device, self.dtype) for e in (text.positive, text.negative))
        return flow.guided(self._field(positive, graft, adapter), self._field(negative, graft, adapter), guidance_scale)

    def _field(self, embeds: torch.Tensor, graft: Graft, adapter: str | None) -> flow.Velocity:
        @torch.inference_mode()
        def velocity(z: torch.Tensor, sigma: float) -> torch.Tensor:
            transformer = self.transformer(sigma)
            select_adapter(transformer, adapter)
            transformer.configure(graft)
            timestep = torch.tensor([1000 * sigma], device=self.device, dtype=torch.float32)
            output = transformer(z.to(self.dtype), timestep, embeds, return_dict=False)[0].float()
            return output if self.info.prediction == "flow" else flow.velocity_of_sample(z, output, sigma)

        return velocity

    def release(self, *names: str) -> None:
        """Let components go and give their memory back."""
        if any([self._loaded.pop(name, None) is not None for name in names]):
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _component(self, name: str, load):
        if name not in self._loaded:
            self._loaded[name] = load()
        return self._loaded[name]

    def _load_transformer(self, name: str) -> MuralTransformer:
        from muralist.nn.transformer import MuralTransformer

        transformer = MuralTransformer.from_pretrained(self.info.folder / name, torch_dtype=self.dtype)
        for adapter in self.info.adapters:
            folder = self.info.folder / "adapters" / adapter
            # without both names diffusers falls back to a pickle
            transformer.load_lora_adapter(str(folder), prefix=None, adapter_name=adapter, weight_name=ADAPTER_FILE, use_safetensors=True)
        return transformer.to(self.device).eval()


def select_adapter(transformer: MuralTransformer, adapter: str | None) -> None:
    """Switch one loaded adapter on, or all of them off."""
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        if adapter is not None:
            raise UserError(f"the base has no adapter {adapter!r}", where="adapter", fix="choose a base or a recipe that has it")
        return
    if adapter is None:
        transformer.disable_adapters()
    else:
        transformer.enable_adapters()
        transformer.set_adapters([adapter])


def _latent_upsampler(folder: Path):
    from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig

    record, tensors = parts.load_part(folder, UPSAMPLER)
    network = LatentUpsampler(LatentUpsamplerConfig.of(record))
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return network


def _auto_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _text_encoder(folder: Path, dtype: torch.dtype):
    from transformers import UMT5EncoderModel

    return UMT5EncoderModel.from_pretrained(folder, dtype=dtype).eval()
