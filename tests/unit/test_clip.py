"""CLIP metrics on a tiny random model in transformers layout: cosines against the model's own words, and what is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from muralist.errors import UserError
from muralist.eval.metrics.clip import load_clip
from muralist.eval.registry import Setup, Unavailable, available
from muralist.eval.source import Source
from muralist.store.video_read import VideoInfo

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole CLIP folder with random weights."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = size | dict(vocab_size=8, max_position_embeddings=6, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    CLIPModel(CLIPConfig(text_config=text, vision_config=size | dict(image_size=32, patch_size=8), projection_dim=12)).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "red": 3, "ball": 4, "<unk>": 5}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>").save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def source(num_frames: int, prompt: str | None = PROMPT) -> Source:
    metadata = {"request": {"prompt": prompt}} if prompt else {}
    return Source(Path("a.mp4"), VideoInfo(48, 32, num_frames, 16.0, "h264", "", "yuv420p", 8, *["unspecified"] * 4, metadata=metadata))


def run(name: str, setup: Setup, video: torch.Tensor, of: Source | None = None) -> float:
    meter = available()[name].start(setup, of or source(len(video)))
    for frame in video:
        meter.add(frame)
    return meter.result()[name]


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 48, 3), generator=torch.Generator().manual_seed(0)).float() / 255


@pytest.fixture(scope="module")
def embeddings(folder, video):
    """Of the frames [3, D] and the prompt [D], by the model's own forward; 32 rows need no resizing, so the middle square is cut by hand."""
    model = CLIPModel.from_pretrained(folder).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    pixels = (video[:, :, 8:40].permute(0, 3, 1, 2) - mean) / std
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([[0, 2, 3, 4, 1]]), pixel_values=pixels)
    return output.image_embeds, output.text_embeds[0]


def test_text_alignment_is_the_mean_cosine(folder, video, embeddings):
    images, text = embeddings
    wanted = sum(float(torch.cosine_similarity(image, text, dim=0)) for image in images) / 3
    setup = Setup(weights={"clip": folder})
    assert run("clip_text", setup, video) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    given = Setup(weights={"clip": folder}, prompts={Path("a.mp4"): PROMPT})
    assert run("clip_text", given, video, source(3, prompt=None)) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_steadiness_is_the_mean_cosine_of_neighbours(folder, video, embeddings):
    images, _ = embeddings
    wanted = sum(float(torch.cosine_similarity(images[t], images[t + 1], dim=0)) for t in (0, 1)) / 2
    setup = Setup(weights={"clip": folder})
    assert run("clip_temporal", setup, video) == pytest.approx(wanted, rel=1e-5)
    assert run("clip_temporal", setup, video[:1].expand(4, -1, -1, -1)) == pytest.approx(1, rel=1e-5)


def test_what_is_missing_is_told(folder, tmp_path):
    metrics, setup = available(), Setup(weights={"clip": folder})
    with pytest.raises(Unavailable, match="no weights for clip"):
        metrics["clip_text"].start(Setup(), source(3))
    with pytest.raises(Unavailable, match="does not say its prompt"):
        metrics["clip_text"].start(setup, source(3, prompt=None))
    with pytest.raises(Unavailable, match="one frame"):
        metrics["clip_temporal"].start(setup, source(1))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError):
        load_clip(tmp_path, torch.device("cpu"))
