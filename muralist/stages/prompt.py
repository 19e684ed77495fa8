"""prompt -> text conditioning, by the base's own tokenizer and UMT5 encoder, or from the cache of prompts that were encoded before."""

from __future__ import annotations

import html
import re
from pathlib import Path

import ftfy
import torch

from muralist.base import Base
from muralist.store import atomic, prompt_cache, weights
from muralist.types import TextCond

WORTH_KEEPING = 100_000_000  # bytes of a text encoder; a smaller one (the embedded base's) is loaded faster than an entry is hashed and synced


def encode_prompt(base: Base, prompt: str, negative_prompt: str) -> TextCond:
    """Both prompts as [1, L, D_text], L = the base's `max_sequence_length`, padded with zeros after the last token."""
    folder = prompt_cache.cache_folder() if base.info.component_bytes["text_encoder"] >= WORTH_KEEPING else None
    return TextCond(*(_embedding(base, clean(text), folder) for text in (prompt, negative_prompt)))


def embed(base: Base, text: str) -> torch.Tensor:
    """One text as above, computed and not kept: thousands of captions would drive a user's own prompts out of the cache."""
    return _embedding(base, clean(text), None)


def clean(text: str) -> str:
    """The text as Wan was trained on it: mended unicode, no HTML entities, single spaces (diffusers' `prompt_clean`)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _embedding(base: Base, text: str, folder: Path | None) -> torch.Tensor:
    """From the cache in `folder`, or computed and kept there; the encoder is loaded only in that case."""
    length = base.info.defaults.max_sequence_length
    if folder is None:
        return _embed(base.tokenizer(), base.text_encoder(), text, length)
    key = prompt_cache.key_of(model=_identity(base.info.folder), text=text, length=length, dtype=base.dtype, device=base.device.type)
    found = prompt_cache.find(folder, key)
    if found is not None:
        return found.to(base.device)
    computed = _embed(base.tokenizer(), base.text_encoder(), text, length)
    prompt_cache.keep(folder, key, computed)
    return computed


def _identity(model: Path) -> tuple[str, ...]:
    """What tells one text encoder from another: its weights, what its configuration makes of them, and its tokenizer."""
    encoder = model / "text_encoder"
    return weights.fingerprint(encoder), atomic.file_sha256(encoder / "config.json"), weights.digest_of_tokenizer(model / "tokenizer")


@torch.inference_mode()
def _embed(tokenizer, encoder, text: str, length: int) -> torch.Tensor:
    tokens = tokenizer(
        [text], padding="max_length", max_length=length, truncation=True, add_special_tokens=True, return_attention_mask=True, return_tensors="pt"
    ).to(encoder.device)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    # positions after the prompt are exact zeros, as in training
    return (states * tokens.attention_mask[..., None].to(states.dtype)).clone()
