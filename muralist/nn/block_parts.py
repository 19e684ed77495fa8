"""What a block of Wan's transformer does to tokens one by one, before and after attention: plain functions of a block and tensors.

Each is one graph for `torch.compile` (`compiled.py`); the arithmetic, and without compiling its every bit, is diffusers'.
Shapes: x [B, n, D]; shift, scale, gate [B, 1, D] or [B, n, D]; cos, sin [n, d / 2]; queries, keys, values and `mixed` [B, n, H, d].
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from einops import rearrange

from muralist.nn.compiled import regional
from muralist.nn.rope import rotate


@regional
def queries_keys_values(
    block: WanTransformerBlock, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normalised and modulated x, queries, keys, values) of self-attention, the middle two rotated."""
    attn, normed = block.attn1, modulated(block.norm1, x, shift, scale)
    return normed, _query(attn, normed, cos, sin), _key(attn, normed, cos, sin), value_of(attn, normed)


@regional
def queries(
    block: WanTransformerBlock, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two of those."""
    normed = modulated(block.norm1, x, shift, scale)
    return normed, _query(block.attn1, normed, cos, sin)


@regional
def keys_values(block: WanTransformerBlock, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The last two of them, [B, n, 2, H, d]."""
    normed = modulated(block.norm1, x, shift, scale)
    return torch.stack([_key(block.attn1, normed, cos, sin), value_of(block.attn1, normed)], dim=2)


@regional
def after_attention(block: WanTransformerBlock, x: torch.Tensor, mixed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * the output projection of what self-attention gave."""
    return gated(x, joined(block.attn1, rearrange(mixed, "b n H d -> b n (H d)")), gate)


@regional
def text_queries(block: WanTransformerBlock, x: torch.Tensor) -> torch.Tensor:
    """Queries of cross-attention."""
    attn = block.attn2
    return heads(attn, attn.norm_q(attn.to_q(block.norm2(x.float()).type_as(x))))


@regional
def after_text(block: WanTransformerBlock, x: torch.Tensor, mixed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + the output projection of what cross-attention gave, the same normalised and modulated for the FFN)."""
    x = x + joined(block.attn2, rearrange(mixed, "b n H d -> b n (H d)"))
    return x, modulated(block.norm3, x, shift, scale)


@regional
def after_ffn(block: WanTransformerBlock, x: torch.Tensor, normed: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * FFN."""
    return gated(x, block.ffn(normed).float(), gate)


def _query(attn: WanAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return rotate(heads(attn, attn.norm_q(attn.to_q(x))), cos, sin)


def _key(attn: WanAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return rotate(heads(attn, attn.norm_k(attn.to_k(x))), cos, sin)


def value_of(attn: WanAttention, x: torch.Tensor) -> torch.Tensor:
    return heads(attn, attn.to_v(x))


def heads(attn: WanAttention, x: torch.Tensor) -> torch.Tensor:
    """[B, n, D] -> [B, n, H, d]"""
    return rearrange(x, "b n (H d) -> b n H d", H=attn.heads)


def joined(attn: WanAttention, x: torch.Tensor) -> torch.Tensor:
    """Output projection and dropout of heads side by side: [B, n, D] -> [B, n, D]."""
    return attn.to_out[1](attn.to_out[0](x))


def modulated(norm: torch.nn.Module, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def gated(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x.float() + update * gate).type_as(x)
