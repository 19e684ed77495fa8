"""Whether the weights of a model are those that its configurations build, from the headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from muralist.base_info import UPSAMPLER, BaseInfo, require_tensors
from muralist.errors import UserError
from muralist.nn.kinds import ADAPTER_FILE
from muralist.store import weights
from muralist.store.parts import read_part

TIED = ("shared.weight", "encoder.embed_tokens.weight")  # the text encoder's two names of one tensor; its file holds either


def check_structure(info: BaseInfo) -> None:
    """Compare names and shapes in the headers of all weights with what the configurations build; no weight is read. Takes a second or two.

    Raises UserError for a configuration that builds nothing and for the first tensor that is missing or of another shape: diffusers would
    fail with a traceback there, or start with random numbers in its place.
    """
    for name, build in _builders(info).items():
        expected, found = _shapes(name, build), weights.tensor_shapes(info.folder / name)
        for key, shape in expected.items():
            if key not in found and key not in TIED:
                raise UserError(f"{name} lacks the tensor {key}", where="model", fix="download its weights again")
            if key in found and found[key] != shape:
                raise UserError(f"{name}: {key} is {found[key]}, its config.json says {shape}", where="model", fix="download both again")
        if name in ("transformer", "transformer_2"):
            _check_adapters(info, name, expected)


def _shapes(name: str, build: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """Those of the tensors of what is built in the folder `name`. Raises UserError."""
    try:
        with torch.device("meta"):
            return {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}
    except UserError:
        raise
    except Exception as error:  # whatever a constructor makes of a number it did not expect
        raise UserError(f"{name}/config.json cannot be built ({type(error).__name__}: {error})", where="model", fix="download it again") from None


def _check_adapters(info: BaseInfo, transformer: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError unless each adapter's pairs of matrices fit the weights that they are added to."""
    for adapter in info.adapters:
        folder = info.adapter_folder(adapter, transformer)
        place = folder.relative_to(info.folder)
        if not (folder / ADAPTER_FILE).is_file():
            raise UserError(f"{place} lacks {ADAPTER_FILE}", where="adapter", fix="give the file that name")
        for key, shape in weights.tensor_shapes(folder).items():
            layer, _, side = key.partition(".lora_")
            weight = shapes.get(f"{layer}.weight", ())
            fits = {"A.weight": shape[1:] == weight[1:], "B.weight": shape[:1] == weight[:1], "B.bias": shape == weight[:1]}.get(side, True)
            if not (weight and fits) or 0 in shape:
                raise UserError(f"{place}: {key} {list(shape)} fits no layer of this base", where="adapter", fix="use one that was made for it")


def _builders(info: BaseInfo) -> dict[str, Callable[[], torch.nn.Module]]:
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from muralist.nn.empty import empty_vae

    text = weights.read_config(info.folder / "text_encoder" / "config.json")
    if text.get("model_type") != "umt5":
        raise UserError(f"text_encoder is a {text.get('model_type')!r:.40}", where="model", fix="give a folder whose text_encoder is a UMT5 encoder")
    builders = {"transformer": lambda: WanTransformer3DModel.from_config(info.transformer_config)}
    if info.boundary is not None:
        second = weights.read_config(info.folder / "transformer_2" / "config.json")
        builders["transformer_2"] = lambda: WanTransformer3DModel.from_config(second)
    return builders | {"vae": lambda: empty_vae(info.vae_config, torch.float32), "text_encoder": lambda: UMT5EncoderModel(UMT5Config(**text))}


def check_upsampler(info: BaseInfo) -> None:
    """The same for the base's latent upsampler: the paper's takes two seconds to build, and only what enlarges by it needs it. Raises UserError."""
    from muralist.nn.latent_upsampler.model import LatentUpsampler, LatentUpsamplerConfig

    folder = info.folder / "parts" / UPSAMPLER

    def build() -> LatentUpsampler:
        config = LatentUpsamplerConfig.of(read_part(folder, UPSAMPLER))
        if config.channels != info.geometry.channels:
            what = f"it enlarges latents of {config.channels} channels, those of {info.name} have {info.geometry.channels}"
            raise UserError(what, where=f"part {UPSAMPLER}", fix="use one that was made for this base")
        return LatentUpsampler(config)

    require_tensors(folder, _shapes(f"parts/{UPSAMPLER}", build))
