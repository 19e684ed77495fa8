"""prompt -> text conditioning, by the base's own tokenizer and UMT5 encoder."""

from __future__ import annotations

import html
import re

import ftfy
import torch

from muralist.base import Base
from muralist.types import TextCond


def encode_prompt(base: Base, prompt: str, negative_prompt: str) -> TextCond:
    """Both prompts as [1, L, D_text], L = the base's `max_sequence_length`, padded with zeros after the last token."""
    tokenizer, encoder = base.tokenizer(), base.text_encoder()
    length = base.info.defaults.max_sequence_length
    positive, negative = (_embed(tokenizer, encoder, text, length) for text in (prompt, negative_prompt))
    return TextCond(positive, negative)


def clean(text: str) -> str:
    """The text as Wan was trained on it: mended unicode, no HTML entities, single spaces (diffusers' `prompt_clean`)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@torch.inference_mode()
def _embed(tokenizer, encoder, text: str, length: int) -> torch.Tensor:
    tokens = tokenizer(
        [clean(text)], padding="max_length", max_length=length, truncation=True, add_special_tokens=True, return_attention_mask=True, return_tensors="pt"
    ).to(encoder.device)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    # positions after the prompt are exact zeros, as in training
    return (states * tokens.attention_mask[..., None].to(states.dtype)).clone()
