"""The trainings that make the embedded base: its VAE (or the decoder alone), its transformer with text encoder, and the UHR adapter.

Each is one command, `muralist train NAME --minutes M`, that can be stopped and resumed at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from muralist.base_info import CLASSES, inspect_base
from muralist.data import latents, world
from muralist.errors import UserError
from muralist.nn.transformer import MuralTransformer
from muralist.store import weights
from muralist.train import state
from muralist.train.loop import CHECKPOINTS, Length, Schedule, begin, draw_curve, fit
from muralist.train.objectives.flow import Batch, FlowConfig, FlowMatching
from muralist.train.objectives.reconstruction import FURTHER as FURTHER_HEIGHTS
from muralist.train.objectives.reconstruction import Reconstruction, ReconstructionConfig
from muralist.types import Grid

GRID = Grid(num_frames=29, height=256, width=448, fps=16)
REDUCTION = 2
SMALL_GRID = replace(GRID, height=GRID.height // REDUCTION, width=GRID.width // REDUCTION)  # where motion is learned at a quarter of the price
TEXT_LENGTH = 16  # the longest caption has 11 words
FLOW_SHIFT = 3.0
# above it guidance overshoots the tone of the brightest and darkest grounds, and in what it makes of them objects stay small or never come
GUIDANCE_MEAN_INTERVAL = (0.0, 0.93)
REFINE_STEPS = 10  # of the schedule on a guide
REFINE_GUIDANCE = (0.5, 0.93)  # the last two of four steps look the same without
SKIP_SHARE = 0.6  # of these that the guide replaces: with the adapter for large sizes more of them leave the edges of windows in the object's outline
VAE_CONFIG = dict(
    base_dim=16, decoder_base_dim=16, z_dim=48, dim_mult=[1, 1, 4, 4], num_res_blocks=1, attn_scales=[], temperal_downsample=[False, True, True],
    is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16,
    latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
)  # fmt: skip
TRANSFORMER_CONFIG = dict(
    patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=48, out_channels=48, text_dim=128, freq_dim=128,
    ffn_dim=1024, num_layers=6, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
)  # fmt: skip
LATENTS = "48 channels, 16x16x4"
TEXT_CONFIG = dict(vocab_size=64, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0)
# weights that are gone on with have had their single frames; at the rate of fresh ones they lose in 200 steps what they took an hour to learn
# a convolution over time meets the padding before a clip in every one of its first latents: weights that have seen no others lose 2 dB on the later ones
FURTHER_VAE = ReconstructionConfig(
    heights=FURTHER_HEIGHTS, side=128, lengths=(17, 29), batch_clip=2, single_share=0.0, band=0.04, band_from=0.0, learning_rate=2e-4
)
FURTHER_DECODER = replace(FURTHER_VAE, learning_rate=4e-4)  # its latents stay where they are: it can be moved more
TAUGHT_VAE = ReconstructionConfig(side=128, batch_clip=3, single_share=0.0, taught=0.4)  # crops through which what moves fast is seen to go


def new_vae(seed: int = 0) -> AutoencoderKLWan:
    """A fresh VAE of the Wan2.2 flavour (16x16x4, patch 2), set up so that it learns on small crops.

    Residual branches start small. The two mid-block attentions stay at zero: what they would learn on the 64 positions of a
    crop does not carry over to the 32,640 of a 4K frame, and without them the decoder sees a bounded neighbourhood.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    for module in vae.modules():
        if type(module).__name__ == "WanResidualBlock":
            module.conv2.weight.data.mul_(0.1)
        if type(module).__name__ == "WanAttentionBlock":
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
    return _channels_last(vae)


def _trainable(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Everything but the attentions that stay at zero."""
    for module in vae.modules():
        if type(module).__name__ == "WanAttentionBlock":
            module.requires_grad_(False)
    return vae


def load_vae(folder: Path) -> AutoencoderKLWan:
    """In float32, its convolution weights in the layout that the CPU's kernels want."""
    return _channels_last(AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32))


def _channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def train_vae(folder: Path, *, length: Length, device: torch.device, resume: bool, init: Path | None = None, report: Callable[[str], None] = print) -> Path:
    """`miniature-vae`: reconstruction of world crops at all scales; writes `folder/vae` in diffusers layout.

    `init`: a model folder whose VAE it starts from instead of a fresh one, and to whose latents it is held at the base's own size and where nothing moves.
    One of other layers teaches it these latents first.
    """
    earlier = None if init is None else load_vae(init / "vae")
    vae, config = (new_vae(), ReconstructionConfig()) if earlier is None else _successor(earlier)
    vae = _fit_vae(vae, config, folder, length, device, resume, report, _origin(init, "vae"), earlier)
    if earlier is None:
        mean, std = _latent_statistics(vae, device)
        vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(folder / "vae")
    draw_curve(folder)
    return folder / "vae"


def _made_for(vae: AutoencoderKLWan) -> tuple[int, int, int]:
    """Channels of its latents, and the pixels and frames that one stands for."""
    return vae.config.z_dim, vae.config.scale_factor_spatial, vae.config.scale_factor_temporal


def _successor(earlier: AutoencoderKLWan) -> tuple[AutoencoderKLWan, ReconstructionConfig]:
    """A VAE for the same latents with every weight of the earlier one that fits, and how it is trained: gone on with, or taught where layers are others.

    Raises UserError for latents of other channels or another scale.
    """
    vae, made_for = new_vae(), _made_for(earlier)
    if made_for != _made_for(vae):
        what = "its latents have {0} channels, {1}x{1}x{2}".format(*made_for)
        raise UserError(what, where="init", fix=f"give a VAE of {LATENTS}")
    old, new = earlier.state_dict(), vae.state_dict()
    fitting = {name: old[name] for name, weight in new.items() if name in old and old[name].shape == weight.shape}
    vae.load_state_dict(new | fitting)
    vae.register_to_config(latents_mean=earlier.config.latents_mean, latents_std=earlier.config.latents_std)
    if fitting.keys() == new.keys() == old.keys():
        return vae, FURTHER_VAE
    return vae, TAUGHT_VAE


def train_decoder(
    folder: Path, *, length: Length, device: torch.device, resume: bool, vae: Path, init: Path | None = None, report: Callable[[str], None] = print
) -> Path:
    """`miniature-decoder`: a decoder for the latents of `vae`, whose encoder stays as it is; writes `folder/vae`.

    What was trained on those latents goes on working. `init`: a model folder whose decoder it starts from instead of a fresh one.
    """
    old = load_vae(vae)
    new, config = (new_vae(), ReconstructionConfig()) if init is None else (load_vae(init / "vae"), FURTHER_DECODER)
    for part in ("encoder", "quant_conv"):
        try:
            getattr(new, part).load_state_dict(getattr(old, part).state_dict())
        except RuntimeError:
            raise UserError(
                f"the encoder of {vae} has other layers", where="from", fix="give a VAE of today's miniature-vae, or its own model by --init"
            ) from None
        getattr(new, part).requires_grad_(False)
    new.register_to_config(latents_mean=old.config.latents_mean, latents_std=old.config.latents_std)
    origin = _origin(init, "vae") | {"--from": latents.digest_of(old)}
    _fit_vae(new, config, folder, length, device, resume, report, origin).save_pretrained(folder / "vae")
    draw_curve(folder)
    return folder / "vae"


def _fit_vae(
    vae: AutoencoderKLWan,
    config: ReconstructionConfig,
    folder: Path,
    length: Length,
    device: torch.device,
    resume: bool,
    report: Callable[[str], None],
    origin: Mapping[str, str],
    earlier: AutoencoderKLWan | None = None,
) -> AutoencoderKLWan:
    objective = Reconstruction(_trainable(vae).to(device), config, device, None if earlier is None else earlier.to(device).requires_grad_(False))
    schedule = Schedule(length=length, learning_rate=config.learning_rate, decay=0.6)
    how = {"clips": json.dumps([config.heights, config.side, config.lengths])}
    return fit(objective, schedule, folder, resume=resume, origin=origin | how, report=report)


def _origin(init: Path | None, part: str) -> dict[str, str]:
    """What a training started from: without the same `--init` a resume would go on by the plan for fresh weights."""
    return {"--init": "nothing" if init is None else weights.fingerprint(init / part)}


def _latent_statistics(vae: AutoencoderKLWan, device: torch.device, clips: int = 16) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over clips of the base's own size."""
    rng = np.random.default_rng(0)
    z = torch.cat([latents.encode(vae, world.render_clip(world.sample_scene(rng), GRID)[None].to(device)) for _ in range(clips)])
    return z.mean(dim=(0, 2, 3, 4)).tolist(), z.std(dim=(0, 2, 3, 4)).tolist()


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of the world's captions, lower case; anything else is `<unk>`."""
    scenes = [*world.all_scenes(held_out=False), *(world.Scene(colour="red", shape="ball", motion="rises", ground="sand", camera=c) for c in world.CAMERAS)]
    words = sorted({word for scene in scenes for word in world.caption(scene).replace(",", " ,").split()} | {"a", "an", "."})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class TextToVideo(nn.Module):
    """What `miniature-base` trains together: the transformer and the text encoder it listens to."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.transformer = MuralTransformer(**TRANSFORMER_CONFIG)
        self.text_encoder = UMT5EncoderModel(UMT5Config(**TEXT_CONFIG))
        self.tokenizer = new_tokenizer()

    @classmethod
    def of(cls, folder: Path) -> TextToVideo:
        """The trained pair of a model folder, in float32. Raises UserError for a base of another kind: it has other words and another output."""
        if inspect_base(str(folder)).prediction != "sample":
            raise UserError(f"{folder} was not made by this training", where="model", fix="give a model of miniature-base")
        model = cls()
        model.transformer = MuralTransformer.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        model.text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        return model

    def embed(self, captions: Sequence[str]) -> torch.Tensor:
        """[B, L, D_text], zeros after the last token of each caption."""
        tokens = self.tokenizer(list(captions), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").to(self.text_encoder.device)
        states = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return states * tokens.attention_mask[..., None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Until `until`, a share of the training, how often a batch is of each kind; the four shares add up to 1."""

    until: float
    single: float = 0.0
    small: float = 0.0
    sparse: float = 0.0
    whole: float = 0.0


PHASES = (
    Phase(until=0.35, single=1.0),
    Phase(until=0.85, single=0.2, small=0.5, sparse=0.15, whole=0.15),
    Phase(until=1.0, single=0.15, small=0.15, whole=0.7),
)


FURTHER = (Phase(until=0.6, single=0.2, small=0.4, sparse=0.1, whole=0.3), PHASES[-1])  # for weights that know the words and shapes


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Appearance and words on single frames, then motion on clips of half the size, on three latent frames at their true places, and on whole clips.

    A single frame has 112 tokens, a whole clip 896 and one of half the size 224, which stand at the places of the tokens that they cover: what
    moves where is learned on four times as many clips, and shapes on single frames, which stay in the mixture. Motion is decided in the
    first steps, so clips see more noise than single frames.
    """

    frames: latents.LatentPool
    clips: latents.LatentPool
    small_clips: latents.LatentPool
    phases: tuple[Phase, ...] = PHASES

    def __call__(self, rng: np.random.Generator, progress: float) -> Batch:
        phase = next((p for p in self.phases if progress < p.until), self.phases[-1])
        kinds = {self._single: phase.single, self._small: phase.small, self._sparse: phase.sparse, self._whole: phase.whole}
        return list(kinds)[rng.choice(len(kinds), p=list(kinds.values()))](rng)

    def _single(self, rng: np.random.Generator) -> Batch:
        return _batch(self.frames, rng, 64)

    def _small(self, rng: np.random.Generator) -> Batch:
        return replace(_batch(self.small_clips, rng, 40), spacing=float(REDUCTION), shift=1.5)

    def _sparse(self, rng: np.random.Generator) -> Batch:
        batch = _batch(self.clips, rng, 24)
        stride = int(rng.integers(2, 4))
        first = int(rng.integers(batch.x.shape[2] - 2 * stride))
        places = slice(first, first + 2 * stride + 1, stride)
        return replace(batch, x=batch.x[:, :, places], focus=batch.focus[:, places], first=first, stride=stride)

    def _whole(self, rng: np.random.Generator) -> Batch:
        return replace(_batch(self.clips, rng, 10), shift=2.5)


def _batch(pool: latents.LatentPool, rng: np.random.Generator, size: int) -> Batch:
    return Batch(*pool.take(rng.integers(len(pool.captions), size=size)))


def train_base(
    folder: Path,
    *,
    length: Length,
    device: torch.device,
    resume: bool,
    vae: Path,
    init: Path | None = None,
    frames: int = 6_000,
    clips: int = 1_000,
    small_clips: int = 3_000,
    report: Callable[[str], None] = print,
) -> Path:
    """`miniature-base`: transformer and text encoder on latents of `vae`; writes a whole diffusers folder, `folder/model`.

    `init`: a model folder whose transformer and text encoder it starts from instead of fresh ones; they are moved less, and see clips from the start.
    """
    begin(folder, resume=resume)
    autoencoder = load_vae(vae).to(device).eval()
    origin = _origin(init, "transformer") | {"--from": latents.digest_of(autoencoder)}
    state.require_origin(folder / CHECKPOINTS, origin)
    made_for = _made_for(autoencoder)
    if made_for != (TRANSFORMER_CONFIG["in_channels"], VAE_CONFIG["scale_factor_spatial"], VAE_CONFIG["scale_factor_temporal"]):
        raise UserError(f"{vae} has (channels, space, time) {made_for}", where="from", fix=f"give a VAE of {LATENTS}, such as miniature-vae makes")
    model = (TextToVideo() if init is None else TextToVideo.of(init)).to(device)
    pools, first = folder / "latents", 1 if init is None else 101  # seeds: what goes on sees other scenes
    single = latents.build_pool(autoencoder, latents.PoolConfig(name="frames", count=frames, grid=GRID, frames=1, seed=first), pools, report)
    whole = latents.build_pool(autoencoder, latents.PoolConfig(name="clips", count=clips, grid=GRID, seed=first + 1), pools, report)
    small = latents.build_pool(autoencoder, latents.PoolConfig(name="small", count=small_clips, grid=SMALL_GRID, seed=first + 2), pools, report)
    source = Curriculum(single, whole, small, PHASES if init is None else FURTHER)
    objective = FlowMatching(model, model.transformer, model.embed, source, FlowConfig(), device)
    schedule = Schedule(length=length, learning_rate=1.5e-3 if init is None else 5e-4, muon=True)
    fit(objective, schedule, folder, resume=resume, origin=origin, report=report)
    made = save_model(model, autoencoder, folder / "model")
    draw_curve(folder)
    return made


def save_model(model: TextToVideo, vae: AutoencoderKLWan, folder: Path) -> Path:
    """A diffusers folder (bfloat16 weights) with the base's own numbers in `muralist.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    model.text_encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    model.tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = UniPCMultistepScheduler(prediction_type="sample", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline", "_diffusers_version": "0.42.0", "boundary_ratio": None, "expand_timesteps": False, "transformer_2": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"], "transformer": ["diffusers", CLASSES["transformer"]], "vae": ["diffusers", CLASSES["vae"]],
    }  # fmt: skip
    numbers = {
        "grid": {"num_frames": GRID.num_frames, "height": GRID.height, "width": GRID.width, "fps": GRID.fps},
        "num_inference_steps": 20, "guidance_scale": 4.0, "guidance_mean_interval": GUIDANCE_MEAN_INTERVAL, "flow_shift": FLOW_SHIFT,
        "negative_prompt": "", "max_sequence_length": TEXT_LENGTH,
        "refine_guidance_interval": REFINE_GUIDANCE, "refine_steps": REFINE_STEPS, "skip_share": SKIP_SHARE,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "muralist.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return folder
