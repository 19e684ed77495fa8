"""Tiny random Wan pipelines of both flavours, in diffusers layout: a folder of a few hundred kB that every recipe can run on in seconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

WORDS = ("a", "red", "ball", "moves", "right", "over", "grass", "blue", "star", "falls", "sand")


def save_pipeline(folder: Path, flavour: str, head_dim: int = 12) -> Path:
    """Write a random pipeline of flavour '2.1' (8x8x4, 16 channels) or '2.2' (16x16x4, 48 channels), two heads wide, and return its folder."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    channels = 16 if flavour == "2.1" else 48
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=head_dim, in_channels=channels, out_channels=channels, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    pipeline = WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
        vae=_vae(flavour),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0),
        transformer=transformer,
        expand_timesteps=flavour == "2.2",
    )
    pipeline.save_pretrained(folder)
    (folder / "muralist.json").write_text(json.dumps(_defaults(flavour)))
    return folder


def add_parts(folder: Path) -> Path:
    """Give a tiny pipeline the parts that recipes ask for, random ones that do something; returns the folder."""
    from muralist.base_info import UPSAMPLER, inspect_base
    from muralist.nn.branches import attach_branches
    from muralist.nn.experts import EXPERTS, ExpertConfig, ExpertsConfig
    from muralist.nn.filters import RadialFilter
    from muralist.nn.injector import AnchorInjector
    from muralist.nn.kinds import BRANCHES, INJECTOR, STEP_SIZE, InjectorConfig, hierarchical
    from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, VrtConfig
    from muralist.nn.step_size import StepSizeEmbedding
    from muralist.store.parts import save_part

    torch.manual_seed(0)
    info = inspect_base(str(folder))
    channels, width = info.geometry.channels, info.width
    network = VrtConfig(in_channels=channels, dim=12, depth=1, refine_dim=12, refine_depth=1, groups=1, heads=3, window=(2, 4, 4), still_groups=0)
    shape = LatentUpsamplerConfig(encoder=network, hidden=(16,), decoder=network, polynomials=True)
    torch.nn.init.normal_((upsampler := LatentUpsampler(shape)).polynomial.conv.weight, std=0.01)
    _save_random(folder, UPSAMPLER, asdict(shape), upsampler)
    low = ExpertConfig(place="attention", band=RadialFilter(band="low"), sigmas=(0.875, 1.0), rank=2, alpha=2.0)
    high = ExpertConfig(place="ffn", band=RadialFilter(band="high"), sigmas=(0.0, 0.875), rank=3, alpha=3.0)
    experts = ExpertsConfig(dim=width, layers=2, experts={"low": low, "high": high})
    tensors = {name: torch.randn(shape) / 3 for name, shape in experts.tensors().items()}
    save_part(folder / "parts" / EXPERTS, EXPERTS, experts.record(), tensors)
    injector = InjectorConfig(channels=channels, dim=width)
    _save_random(folder, INJECTOR, asdict(injector), AnchorInjector(injector))
    _save_random(folder, STEP_SIZE, {"dim": width}, StepSizeEmbedding(width))
    branches = hierarchical(width, 2, windows=2, rank=2)
    _save_random(folder, BRANCHES, asdict(branches), attach_branches([torch.nn.Module(), torch.nn.Module()], branches))
    _add_adapters(folder, "proxy", "detail", "anchored", "branched")
    return folder


def _save_random(folder: Path, kind: str, record: dict, network: torch.nn.Module) -> None:
    """A part whose network does something, also where it starts at zero."""
    from muralist.store.parts import save_part

    tensors = {name: parameter if parameter.any() else torch.randn_like(parameter) / 5 for name, parameter in network.named_parameters()}
    save_part(folder / "parts" / kind, kind, record, tensors)


def _add_adapters(folder: Path, *names: str) -> None:
    """Random low-rank adapters."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    for name in names:
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=name)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        transformer.save_lora_adapter(folder / "adapters" / name, adapter_name=name)


def _defaults(flavour: str) -> dict:
    """Numbers a test can afford; without this file Wan's published ones would hold (50 steps at 832x480)."""
    grid = {"num_frames": 5, "height": 64, "width": 128, "fps": 16}
    return {"grid": grid, "num_inference_steps": 4, "guidance_scale": 2.0, "flow_shift": 5.0, "negative_prompt": "blue sand", "max_sequence_length": 512}


def _vae(flavour: str):
    from diffusers import AutoencoderKLWan

    common = dict(dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    if flavour == "2.1":
        return AutoencoderKLWan(base_dim=4, z_dim=16, **common)
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=[0.0] * 48, latents_std=[1.0] * 48, **common,
    )  # fmt: skip


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyz,"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + word, -1.0) for word in WORDS), *((letter, -4.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
