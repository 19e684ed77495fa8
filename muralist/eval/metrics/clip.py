"""CLIP (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021): prompt and steadiness.

`clip_text`: mean over at most `FRAMES` evenly spread frames of the cosine between the prompt's and the frame's embedding, in [-1, 1],
higher is better; CLIP-L of UltraGen (arXiv 2510.18775) with a ViT-L/14 folder.
`clip_temporal`: mean cosine between the embeddings of neighbouring frames, all of them, in [-1, 1], higher is steadier (a still image has
1); the temporal consistency of the same paper.

Weights: a folder in transformers layout (config.json, model.safetensors, tokenizer, preprocessor_config.json). A frame becomes 8-bit and
goes through the folder's own preprocessing (PIL): the shorter side to 224 pixels, then the square in the middle, so what is at the sides of
a wide frame is not seen, and neither is fine detail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from muralist.errors import UserError
from muralist.eval.features.patches import spread
from muralist.eval.metrics._shared import mean, once_a_frame
from muralist.eval.registry import Metric, Setup, Unavailable, register
from muralist.eval.source import Source
from muralist.store.weights import check_component

FRAMES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A loaded model; `image` remembers the frame at hand, so that both metrics pay for it once."""

    model: Any
    tokenizer: Any
    image: Callable[[torch.Tensor], torch.Tensor]

    @torch.inference_mode()
    def text(self, prompt: str) -> torch.Tensor:
        """Unit embedding [D]; what is beyond the model's 77 tokens is cut."""
        tokens = self.tokenizer([prompt], return_tensors="pt", truncation=True, max_length=self.model.config.text_config.max_position_embeddings)
        pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled)[0], dim=0).cpu()


@lru_cache(maxsize=1)
def load_clip(folder: Path, device: torch.device) -> Clip:
    """A CLIP folder, float32. Raises UserError where it is none."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    check_component(folder)
    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"not a CLIP model ({error})", where=str(folder), fix="give a folder as transformers' CLIPModel.save_pretrained writes it") from None

    @torch.inference_mode()
    def image(frame: torch.Tensor) -> torch.Tensor:
        pixels = processor([(frame * 255).round().byte().cpu().numpy()], return_tensors="pt").pixel_values.to(device)
        return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output)[0], dim=0).cpu()

    return Clip(model, tokenizer, once_a_frame(image))


class TextAlignment:
    """Cosine of frames and prompt."""

    def __init__(self, clip: Clip, prompt: str, num_frames: int):
        self._clip, self._text = clip, clip.text(prompt)
        self._wanted, self._index, self._found = frozenset(spread(num_frames, FRAMES)), 0, []

    def add(self, frame: torch.Tensor) -> None:
        if self._index in self._wanted:
            self._found.append(float(self._text @ self._clip.image(frame)))
        self._index += 1

    def result(self) -> dict[str, float]:
        return {"clip_text": mean(self._found), "clip_text.frames": len(self._found)}


class Steadiness:
    """Cosine of each frame and the one before."""

    def __init__(self, clip: Clip):
        self._clip, self._last, self._found = clip, None, []

    def add(self, frame: torch.Tensor) -> None:
        embedding = self._clip.image(frame)
        if self._last is not None:
            self._found.append(float(embedding @ self._last))
        self._last = embedding

    def result(self) -> dict[str, float]:
        return {"clip_temporal": mean(self._found)}


def _clip(setup: Setup) -> Clip:
    if "clip" not in setup.weights:
        raise Unavailable("no weights for clip; give a folder in transformers layout (docs/eval-weights.md)")
    return load_clip(Path(setup.weights["clip"]), setup.device)


def _start_text(setup: Setup, source: Source) -> TextAlignment:
    clip, prompt = _clip(setup), source.prompt or setup.prompts.get(source.path)
    if not prompt:
        raise Unavailable(f"{source.path.name} does not say its prompt")
    return TextAlignment(clip, prompt, source.info.num_frames)


def _start_temporal(setup: Setup, source: Source) -> Steadiness:
    if source.info.num_frames < 2:
        raise Unavailable(f"{source.path.name} has one frame")
    return Steadiness(_clip(setup))


_ORIGIN = "UltraGen (arXiv 2510.18775), section 5; Radford et al. 2021"
register(
    Metric(
        name="clip_text",
        kind="video",
        summary="likeness of frames and prompt (CLIP)",
        unit="cosine",
        better="higher",
        origin=_ORIGIN,
        start=_start_text,
        needs="--weights clip=FOLDER",
    )
)
register(
    Metric(
        name="clip_temporal",
        kind="video",
        summary="likeness of neighbouring frames (CLIP)",
        unit="cosine",
        better="higher",
        origin=_ORIGIN,
        start=_start_temporal,
        needs="--weights clip=FOLDER",
    )
)
