"""FLOPs and parameters of the UMT5 text encoder, from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def forward(config: Mapping[str, Any], text_tokens: int) -> int:
    """FLOPs of one prompt of `text_tokens` positions: gated feed-forward, attention over all positions."""
    inner = config["num_heads"] * config["d_kv"]
    layer = 4 * text_tokens * config["d_model"] * inner + 2 * text_tokens**2 * inner + 3 * text_tokens * config["d_model"] * config["d_ff"]
    return 2 * config["num_layers"] * layer


def parameters(config: Mapping[str, Any]) -> int:
    """Weights of the encoder with its word embedding; the position biases of every layer are counted, the decoder does not exist."""
    inner, width = config["num_heads"] * config["d_kv"], config["d_model"]
    layer = 4 * width * inner + 3 * width * config["d_ff"] + 2 * width + config.get("relative_attention_num_buckets", 32) * config["num_heads"]
    return config["vocab_size"] * width + config["num_layers"] * layer + width
