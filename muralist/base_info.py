"""What a model folder says of the base in it, read from JSON and file headers alone: everything a user can get wrong is found before a weight is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muralist.errors import UserError
from muralist.nn.experts import EXPERTS, ExpertsConfig
from muralist.nn.kinds import BRANCHES, INJECTOR, STEP_SIZE, BranchesConfig, InjectorConfig
from muralist.sampling import flow
from muralist.store import parts, weights
from muralist.types import Geometry, Grid

# Wan's own negative prompt, as released with Wan2.1 and Wan2.2
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_NUMBERS = (
    "num_inference_steps",
    "max_sequence_length",
    "refine_steps",
    "guidance_scale",
    "flow_shift",
)  # of `Defaults`; the first three are whole
SKIP_SHARE = 0.4
UPSAMPLER = "latent_upsampler"  # a kind of part
TRAINED_BY = {INJECTOR: "anchored", STEP_SIZE: "anchored", BRANCHES: "branched"}  # where a part's training has another name than its kind
# A transformer's configuration as it is read here, and what diffusers builds where a file is silent: whole numbers, a patch, a switch.
WHOLE = {
    "num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "rope_max_seq_len": 1024,
}  # fmt: skip
SILENT = WHOLE | {"patch_size": [1, 2, 2], "cross_attn_norm": True}
CLASSES = {"transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The numbers a base was made for: its own grid, sampling, and text length. `refine_steps`: of the schedule on a guide's target grid.

    `skip_share`: of those, what a guide replaces; a base that does not know large sizes keeps more of its guide. `guidance_interval`: noise
    levels (low, high) between which guidance works, `guidance_mean_interval`: also on the means of channels (`flow.guided`).
    `refine_guidance_interval`: the same on the target grid, where it differs; without it the last steps cost one pass instead of two.
    """

    grid: Grid
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    negative_prompt: str
    max_sequence_length: int
    refine_steps: int
    skip_share: float = SKIP_SHARE
    guidance_interval: flow.Interval = flow.WHOLE
    guidance_mean_interval: flow.Interval = flow.WHOLE
    refine_guidance_interval: flow.Interval | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """How the base denoises from pure noise, by the names of the fields of every part that does."""
        return {"num_inference_steps": self.num_inference_steps, "flow_shift": self.flow_shift, **flow.guidance_of(self)}

    @property
    def refining(self) -> dict[str, Any]:
        """The same on the target grid, from a guide."""
        return self.sampling | {"num_inference_steps": self.refine_steps, "guidance_interval": self.refine_guidance_interval or self.guidance_interval}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseInfo:
    """A checked model folder.

    `boundary`: sigma from which the first of two transformers serves (Wan2.2-A14B), None where there is one.
    `fingerprints`: digests of the weights of each component, `adapter NAME`, `second adapter NAME` and `part KIND`; `configured`: one of what is made
    of them (the components' configurations, the tokenizer, how a prompt is cut).
    `parts`: the networks of ours that stand beside it in `parts/`, by kind; `experts`, `injector`, `branches`: what those kinds say of
    themselves.
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
    experts: ExpertsConfig | None = None
    injector: InjectorConfig | None = None
    branches: BranchesConfig | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    configured: str = ""

    @property
    def fingerprint(self) -> str:
        """A digest of all weights in the folder and of what is made of them."""
        return _joined({**self.fingerprints, "configured": self.configured})

    def fingerprint_with(self, adapters: Iterable[str], kinds: Iterable[str]) -> str:
        """The same, of those adapters and parts alone: what does not serve does not count."""
        chosen = {f"{beside}adapter {name}" for name in adapters for beside in ("", "second ")} | {f"part {kind}" for kind in kinds}
        besides = ("adapter ", "second adapter ", "part ")
        serving = {name: value for name, value in self.fingerprints.items() if name in chosen or not name.startswith(besides)}
        return _joined({**serving, "configured": self.configured})

    @property
    def width(self) -> int:
        """The transformer's: channels of a token."""
        return _width(self.transformer_config)

    @property
    def sides(self) -> tuple[int, int]:
        """Of the matrices in the transformer's blocks: the width, and that of the FFN."""
        return self.width, self.transformer_config["ffn_dim"]

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.transformer_config["attention_head_dim"]

    def adapter_folder(self, adapter: str, transformer: str) -> Path:
        """Of an adapter's weights for one of the transformers: the second may have its own inside."""
        folder = self.folder / "adapters" / adapter
        return folder / transformer if transformer == "transformer_2" and f"second adapter {adapter}" in self.component_bytes else folder

    def require_adapter(self, name: str) -> None:
        """UserError with what to do if the base has no such adapter."""
        if name not in self.adapters:
            fix = f"train it (muralist train {name}) and copy it into its adapters/"
            raise UserError(f"the base {self.name} has no adapter {name!r:.60}", where="recipe", fix=fix)

    def require_part(self, kind: str) -> None:
        """UserError with what to do if the base has no such part (`store/parts.py`)."""
        if kind not in self.parts:
            fix = f"train it (muralist train {TRAINED_BY.get(kind, kind).replace('_', '-')}) and copy it into its parts/"
            raise UserError(f"the base {self.name} has no part {kind!r}", where="recipe", fix=fix)

    def require_experts(self, names: Sequence[str]) -> None:
        """UserError if one of them is not there."""
        if names:
            self.require_part(EXPERTS)
        if missing := [name for name in names if name not in self.experts.experts]:
            known = ", ".join(self.experts.experts)
            raise UserError(f"the base {self.name} has no expert {missing[0]!r}", where="experts", fix=f"use some of {known}")

    def require_branches(self, names: Sequence[str], plain: Sequence[int], windows: int) -> None:
        """UserError if a branch is not there, or not beside every block but those that are `plain`; one of those is no block; or for other `windows`."""
        layers = self.transformer_config["num_layers"]
        if outside := [number for number in plain if number >= layers]:
            raise UserError(f"block {outside[0]} of {layers}", where="attention.plain", fix=f"name blocks from 0 to {layers - 1}")
        if not names:
            return
        self.require_part(BRANCHES)
        if missing := [name for name in names if name not in self.branches.branches]:
            known = ", ".join(self.branches.branches)
            raise UserError(f"the base {self.name} has no branch {missing[0]!r:.40}", where="attention.branches", fix=f"use some of {known}")
        if windows != self.branches.windows:
            what = f"{windows} windows along a side, its branches were trained beside {self.branches.windows}"
            raise UserError(what, where="attention.windows", fix=f"use {self.branches.windows}, or no branches (refine.attention.branches=[])")
        if bare := set(range(layers)) - {*self.branches.blocks, *plain}:
            raise UserError(f"block {min(bare)} has no branches", where="attention.plain", fix="name the blocks without branches there")


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
    if STEP_SIZE in kinds:
        _require_width(parts.read_part(folder / "parts" / STEP_SIZE, STEP_SIZE).get("dim"), configs["transformer"], STEP_SIZE)
    for adapter in adapters:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", adapter):
            raise UserError(f"an adapter named {adapter!r:.60}", where="model", fix="use letters, digits, - and _ for folders in adapters/")
        parts.refuse_part(folder / "adapters" / adapter)
    beside = {f"adapter {name}": folder / "adapters" / name for name in adapters} | {f"part {kind}": folder / "parts" / kind for kind in kinds}
    beside |= {f"second adapter {name}": second for name in adapters if two and (second := folder / "adapters" / name / "transformer_2").is_dir()}
    defaults, boundary, prediction = _defaults(folder, geometry, two), _boundary(index) if two else None, _prediction(folder)
    return BaseInfo(
        name=model,
        folder=folder,
        geometry=geometry,
        defaults=defaults,
        transformer_config=configs["transformer"],
        vae_config=configs["vae"],
        boundary=boundary,
        prediction=prediction,
        adapters=adapters,
        parts=kinds,
        component_bytes=sizes | {name: weights.check_component(path) for name, path in beside.items()},
        experts=_experts(folder / "parts" / EXPERTS, configs["transformer"]) if EXPERTS in kinds else None,
        injector=_injector(folder / "parts" / INJECTOR, configs["transformer"], geometry) if INJECTOR in kinds else None,
        branches=_branches(folder / "parts" / BRANCHES, configs["transformer"]) if BRANCHES in kinds else None,
        fingerprints={name: weights.fingerprint(path) for name, path in (components | beside).items()},
        configured=_joined(
            {name: weights.digest_of_config(path) for name, path in components.items()}
            | {"tokenizer": weights.digest_of_tokenizer(folder / "tokenizer"), "rest": f"{prediction} {boundary} {defaults.max_sequence_length}"}
        ),
    )


def _has_second(index: dict[str, Any]) -> bool:
    entry = index.get("transformer_2") or [None]
    if not isinstance(entry, list):
        raise UserError(f"transformer_2 is {entry!r:.40}", where="model", fix="restore model_index.json")
    return bool(entry[0])


def _experts(folder: Path, transformer: dict[str, Any]) -> ExpertsConfig:
    """The configuration of a base's experts, after checking that they are whole and made for a transformer like this one."""
    experts = ExpertsConfig.of(parts.read_part(folder, EXPERTS))
    experts.require_fit(_width(transformer), transformer["num_layers"])
    require_tensors(folder, experts.tensors())
    return experts


def require_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """UserError unless a part holds exactly these."""
    if weights.tensor_shapes(folder) != expected:
        raise UserError(f"{folder}: the weights are not those that its config.json names", where="part", fix="fetch both files again")


def _injector(folder: Path, transformer: dict[str, Any], geometry: Geometry) -> InjectorConfig:
    config = InjectorConfig.of(parts.read_part(folder, INJECTOR))
    _require_width(config.dim, transformer, INJECTOR)
    if config.channels != geometry.channels or max(config.blocks) >= transformer["num_layers"]:
        what = f"the injector is for {config.channels} channels and stands before block {max(config.blocks)}"
        raise UserError(what, where="part", fix="use one that was trained for this base")
    require_tensors(folder, config.tensors())
    return config


def _branches(folder: Path, transformer: dict[str, Any]) -> BranchesConfig:
    config = BranchesConfig.of(parts.read_part(folder, BRANCHES))
    _require_width(config.dim, transformer, BRANCHES)
    if max(config.blocks) >= transformer["num_layers"]:
        what = f"the branches stand beside block {max(config.blocks)}, this base has {transformer['num_layers']}"
        raise UserError(what, where="part", fix="use branches that were trained for this base")
    require_tensors(folder, config.tensors())
    return config


def _require_width(width: object, transformer: dict[str, Any], kind: str) -> None:
    if width != _width(transformer):
        raise UserError(f"the {kind} is for a width of {width!r:.40}, this base has {_width(transformer)}", where="part", fix="use one trained for this base")


def _width(transformer: dict[str, Any]) -> int:
    return transformer["num_attention_heads"] * transformer["attention_head_dim"]


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


def _joined(fingerprints: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in fingerprints.items()).encode()).hexdigest()


def _folders_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()


def _component_config(folder: Path, name: str) -> dict[str, Any]:
    config = weights.read_config(folder / name / "config.json")
    if config.get("_class_name") != CLASSES[name]:
        raise UserError(f"{name} is a {config.get('_class_name')}", where="model", fix=f"give a folder whose {name} is a {CLASSES[name]}")
    return config if name == "vae" else _of_transformer(config, folder / name / "config.json")


def _of_transformer(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The same with what it is silent about; UserError for the first field that is not what `SILENT` has in its place."""
    config = SILENT | config
    patch, right = config["patch_size"], {name: _is_whole(config[name], 10**5) for name in WHOLE}
    right["patch_size"] = isinstance(patch, list) and len(patch) == 3 and all(_is_whole(side, 16) for side in patch)
    right["cross_attn_norm"] = isinstance(config["cross_attn_norm"], bool)
    if wrong := next((name for name, good in right.items() if not good), None):
        raise UserError(f"{file}: {wrong} is {config[wrong]!r:.40}", where="model", fix="restore the file")
    return config


def _is_whole(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _prediction(folder: Path) -> str:
    kind = weights.read_config(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "flow_prediction")
    known = {"flow_prediction": "flow", "sample": "sample"}
    if kind not in known:
        raise UserError(f"the scheduler's prediction_type is {kind!r}", where="model", fix=f"give a model with {' or '.join(known)}")
    return known[kind]


def _geometry(transformer: dict[str, Any], vae: dict[str, Any]) -> Geometry:
    for name, value in (("z_dim", vae.get("z_dim", 16)), *((f"scale_factor_{axis}", vae.get(f"scale_factor_{axis}") or 8) for axis in ("spatial", "temporal"))):
        if not _is_whole(value, 1024):
            raise UserError(f"the VAE's {name} is {value!r:.40}", where="model", fix="restore its config.json")
    if vae.get("attn_scales"):  # attention of whole frames between layers that are computed in tiles; no Wan VAE has it
        raise UserError(f"the VAE has attention at scales {vae['attn_scales']!r:.40}", where="model", fix="give a Wan VAE, whose attn_scales are empty")
    channels = vae.get("z_dim", 16)
    for name in ("latents_mean", "latents_std"):
        if name in vae and (not isinstance(vae[name], list) or len(vae[name]) != channels):
            raise UserError(f"the VAE's {name} does not hold {channels} numbers", where="model", fix="restore its config.json")
    if {transformer["in_channels"], transformer["out_channels"]} != {channels}:
        raise UserError(f"the transformer reads {transformer['in_channels']} channels, the VAE has {channels}", where="model", fix="give a text-to-video model")
    factors = {name: vae.get(f"scale_factor_{axis}") or usual for name, axis, usual in (("spatial_factor", "spatial", 8), ("temporal_factor", "temporal", 4))}
    return Geometry(**factors, channels=channels, patch=tuple(transformer["patch_size"]))


def _defaults(folder: Path, geometry: Geometry, two: bool) -> Defaults:
    """`muralist.json` in the folder where there is one, else Wan's published numbers for the flavour; `two`: Wan2.2-A14B."""
    if (folder / "muralist.json").is_file():
        values = weights.read_config(folder / "muralist.json")
        try:
            values = {
                "refine_steps": values["num_inference_steps"],
                "skip_share": SKIP_SHARE,
                "guidance_interval": flow.WHOLE,
                "guidance_mean_interval": flow.WHOLE,
            } | values
            values = {"refine_guidance_interval": values["guidance_interval"]} | values
            intervals = ("guidance_interval", "guidance_mean_interval", "refine_guidance_interval")
            values |= {name: tuple(values[name]) for name in intervals}
            defaults = Defaults(grid=Grid(**values["grid"]), **{k: values[k] for k in Defaults.__dataclass_fields__ if k != "grid"})
            if not isinstance(defaults.negative_prompt, str):
                raise TypeError("negative_prompt")
            numbers = (*(getattr(defaults, k) for k in _NUMBERS), *(getattr(defaults.grid, k) for k in Grid.__dataclass_fields__))
            if any(type(n) not in (int, float) or n <= 0 for n in numbers) or any(type(getattr(defaults, k)) is not int for k in _NUMBERS[:3]):
                raise TypeError("a number")
            if type(defaults.skip_share) not in (int, float) or not 0 <= defaults.skip_share < 1:
                what = f"{folder / 'muralist.json'}: skip_share is {defaults.skip_share!r:.40}"
                raise UserError(what, where="model", fix="restore the file: a share from 0 to below 1")
            for name in intervals:
                flow.check_interval(getattr(defaults, name))
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
