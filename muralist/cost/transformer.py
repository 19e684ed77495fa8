"""FLOPs, parameters and live memory of Wan's transformer under a graft, from its configuration alone.

FLOPs are 2 a multiply-add of matrix products, convolutions and attention: what `torch.utils.flop_counter` counts (a test holds the two
to 2 %). Norms, rotations and activations are memory traffic, counted in bytes by `elementwise_bytes`. How many query-key pairs an attention
has is looked up by its dataclass in `_PAIRS`: a new kind of attention is one more entry.

Live memory follows `nn/transformer.py`: one residual stream, what its reordering needs, and the temporaries of one chunk of tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import WanTransformer3DModel

from muralist.cost import branches as branching
from muralist.nn import fp8
from muralist.nn.attention import BranchedWindows, CloseRemote, FullAttention, GuidedWindows, WindowAttention
from muralist.nn.attention.guided import pooled_shape
from muralist.nn.kinds import BranchesConfig
from muralist.nn.transformer import Graft
from muralist.nn.windows import Shape, windows_of

_DEFAULTS = {name: p.default for name, p in inspect.signature(WanTransformer3DModel.__init__).parameters.items()}
FP64 = 8  # bytes
SCORES = 2  # copies of its scores that `reference_attention` holds: as they are multiplied and scaled, then scaled and normalised
FP32 = 4  # bytes; norms, modulation and rotation compute in float32 whatever the weights are
# Bytes of eager elementwise traffic for each token, layer and channel in bf16: 170 explains both the 5.0 s (1.3B) and the 2.4 s (5B) that
# unfused norms, modulation, rotation and GELU cost in four 4K x81 forwards at 4.3 TB/s (performance notes, section 1.4; a model, not a measurement).
ELEMENTWISE_BYTES = 170


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The sizes of a Wan transformer. `patch`: latent positions a token covers."""

    width: int
    heads: int
    ffn: int
    layers: int
    channels_in: int
    channels_out: int
    patch: int
    text: int
    frequencies: int
    cross_norm: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Dimensions:
        """From `config.json`; what it leaves out is as in diffusers."""
        value = {**_DEFAULTS, **config}
        return cls(
            width=value["num_attention_heads"] * value["attention_head_dim"],
            heads=value["num_attention_heads"],
            ffn=value["ffn_dim"],
            layers=value["num_layers"],
            channels_in=value["in_channels"],
            channels_out=value["out_channels"] or value["in_channels"],
            patch=math.prod(value["patch_size"]),
            text=value["text_dim"],
            frequencies=value["freq_dim"],
            cross_norm=value["cross_attn_norm"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """FLOPs of one forward of one sample. `attention`: self-attention's scores and sums; `linear`: everything else.

    `keys_per_query`: mean over queries and layers; `full_attention`: the FLOPs that attention over all tokens would have.
    """

    tokens: int
    linear: int
    attention: int
    full_attention: int
    keys_per_query: float

    @property
    def flops(self) -> int:
        return self.linear + self.attention

    @property
    def attention_saving(self) -> float:
        """How many times fewer attention FLOPs than full attention."""
        return self.full_attention / self.attention


# -- Query-key pairs of one layer: (attention, token grid) -> one number for each kind of layer that layers cycle through --


def _full_pairs(attention: FullAttention, token_shape: Shape) -> tuple[int, ...]:
    return (math.prod(token_shape) ** 2,)


def _window_pairs(attention: WindowAttention, token_shape: Shape) -> tuple[int, ...]:
    kinds = (False, True) if attention.shift else (False,)
    return tuple(sum(count * tokens**2 for count, tokens in windows_of(token_shape, attention.size, shift, attention.start)) for shift in kinds)


def _guided_pairs(attention: GuidedWindows, token_shape: Shape) -> tuple[int, ...]:
    """A proxy, or the pooled tokens, are taken to hold as many tokens as a window asks for (`Near.within` sees to that)."""
    more = _neighbours(attention)
    return tuple(pairs + math.prod(token_shape) * more for pairs in _window_pairs(attention.windows, token_shape))


def _branched_pairs(attention: BranchedWindows, token_shape: Shape) -> tuple[int, ...]:
    """Those of the windows; the branches' are in `cost/branches.py`."""
    if attention.odd == "shifted":
        return _window_pairs(attention.swin(token_shape), token_shape)
    return tuple(branching.window_pairs(token_shape, (1, count, count), attention.place, shifted) for count, shifted in attention.kinds)


def _close_remote_pairs(attention: CloseRemote, token_shape: Shape) -> tuple[int, ...]:
    return tuple(2 * branching.window_pairs(token_shape, cut) for cut in attention.counts(token_shape))


_PAIRS: dict[type, Callable[[Any, Shape], tuple[int, ...]]] = {
    FullAttention: _full_pairs, WindowAttention: _window_pairs, GuidedWindows: _guided_pairs, BranchedWindows: _branched_pairs,
    CloseRemote: _close_remote_pairs,
}  # fmt: skip


def pairs(attention: Any, token_shape: Shape, layers: int) -> int:
    """Query-key pairs of all layers of one forward."""
    kinds = _PAIRS[type(attention)](attention, token_shape)
    plain = attention.plain if isinstance(attention, BranchedWindows) else ()
    return sum(math.prod(token_shape) ** 2 if layer in plain else kinds[layer % len(kinds)] for layer in range(layers))


def forward(size: Dimensions, graft: Graft, token_shape: Shape, text_tokens: int, branches: BranchesConfig | None = None) -> Forward:
    """FLOPs of one forward of one sample on the token grid (f, y, x) with `text_tokens` positions of text; `branches`: those of the base."""
    tokens, d = math.prod(token_shape), size.width
    every_layer = (
        4 * tokens * d * d  # self-attention: queries, keys, values, output
        + 2 * (tokens + text_tokens) * d * d  # cross-attention: queries and output; keys and values of the text
        + 2 * tokens * text_tokens * d  # its scores and sums
        + 2 * tokens * d * size.ffn
    )
    once = tokens * d * size.patch * (size.channels_in + size.channels_out) + text_tokens * (size.text + d) * d + (size.frequencies + 7 * d) * d
    attended, more = pairs(graft.attention, token_shape, size.layers), 0
    if isinstance(graft.attention, BranchedWindows):
        attended += branching.pairs(graft.attention, branches, token_shape, size.layers)
        more = branching.multiply_adds(graft.attention, branches, token_shape, size.layers)
    return Forward(
        tokens=tokens,
        linear=2 * (size.layers * every_layer + once + more),
        attention=4 * attended * d,
        full_attention=4 * pairs(FullAttention(), token_shape, size.layers) * d,
        keys_per_query=attended / (tokens * size.layers),
    )


def parameters(size: Dimensions) -> int:
    """Weights of the whole model, without adapters."""
    d = size.width
    embedders = d * (size.channels_in * size.patch + 1) + (size.frequencies + 1 + size.text + 1) * d + 2 * (d * d + d) + 6 * d * (d + 1)
    head = (d + 1) * size.channels_out * size.patch + 2 * d
    return size.layers * block_parameters(size) + embedders + head


def block_parameters(size: Dimensions) -> int:
    """Weights of a block."""
    d = size.width
    attention = 4 * (d * d + d) + 2 * d
    return 2 * attention + 2 * d * size.cross_norm + 2 * d * size.ffn + d + size.ffn + 6 * d


def fp8_saving(size: Dimensions, itemsize: int) -> int:
    """Bytes that a block's weights lose where its linear layers hold them in 8 bits, with a scale in float32 for every output channel."""
    d, f = size.width, size.ffn
    weights, rows = (8 * d * d + 2 * d * f, 9 * d + f) if fp8.fits(d, f) else (8 * d * d, 8 * d) if fp8.fits(d) else (0, 0)
    return weights * (itemsize - 1) - rows * FP32


def elementwise_bytes(size: Dimensions, tokens: int, itemsize: int) -> int:
    """Memory traffic of one forward outside matrix products, unfused as PyTorch runs it; `itemsize` in bytes of the working type."""
    return ELEMENTWISE_BYTES * tokens * size.width * size.layers * max(itemsize, 2) // 2


def live_bytes(size: Dimensions, graft: Graft, token_shape: Shape, itemsize: int, branches: BranchesConfig | None = None, *, text_tokens: int = 0) -> int:
    """Peak bytes of one forward besides weights and latents, as the forward allocates them (a test tracks it tensor by tensor).

    `itemsize`: bytes of the working type. `text_tokens`: positions of text, which matter to the slow reference alone: every other kernel holds
    no scores.
    """
    scores = 0
    if graft.kernels.attention == "reference":
        scores = max(_reference_bytes(size, *piece) for piece in _pieces(graft, token_shape, branches, text_tokens))
    return scores + _working_bytes(size, graft, token_shape, itemsize, branches)


def _reference_bytes(size: Dimensions, queries: int, keys: int) -> int:
    """Of `reference_attention`: the scores of so many queries with so many keys each, the values and the answer."""
    return FP64 * (SCORES * size.heads * queries * keys + size.width * (max(queries, keys) + queries))


def _pieces(graft: Graft, token_shape: Shape, branches: BranchesConfig | None, text_tokens: int) -> Iterator[tuple[int, int]]:
    """(queries, keys of each) that attention is given at a time, the largest of each kind."""
    attention, tokens = graft.attention, math.prod(token_shape)
    span, window = min(graft.token_chunk or tokens, tokens), _largest_window(attention, token_shape)
    yield span, text_tokens
    if isinstance(attention, FullAttention) or (isinstance(attention, BranchedWindows) and attention.plain):
        yield span, tokens
    if isinstance(attention, BranchedWindows):
        yield from branching.pieces(attention, branches, token_shape)
    yield max(span, window), window + (_neighbours(attention) if isinstance(attention, GuidedWindows) else 0)


def _neighbours(attention: GuidedWindows) -> int:
    """Proxy and pooled tokens that a window sees."""
    return math.prod(attention.near.count) + (math.prod(attention.middle.near.count) if attention.middle else 0)


def _working_bytes(size: Dimensions, graft: Graft, token_shape: Shape, itemsize: int, branches: BranchesConfig | None) -> int:
    """Of the residual stream and of the chunk at work."""
    tokens = math.prod(token_shape)
    stream, each = tokens * size.width * itemsize, _bytes_per_token(size, itemsize, in_fp8=graft.kernels.linears == "fp8" and fp8.fits(size.width, size.ffn))
    if graft.keeps_stock_blocks:
        return tokens * each
    chunk = each * min(max(graft.token_chunk or tokens, _largest_window(graft.attention, token_shape)), tokens)
    attending = 4 * stream + chunk // each * _attention_bytes(size, itemsize)  # with keys and values; in the first block also with the embedding
    if isinstance(graft.attention, FullAttention):
        return max(attending, 2 * stream + chunk)  # keys and values are gone when the FFN works
    order = 5 * 8 * tokens  # index tables of both partitions and of the switch between them
    if isinstance(graft.attention, GuidedWindows) and graft.attention.middle is not None:  # sums in float32, their means, keys and values
        order += math.prod(pooled_shape(token_shape, graft.attention.middle.pool)) * size.width * (FP32 + 5 * itemsize)
    beside = 0
    if isinstance(graft.attention, CloseRemote):
        beside = 8 * stream + _attention_bytes(size, itemsize) * _largest_window(graft.attention, token_shape)  # q, k, v in both orders, both answers
    if isinstance(graft.attention, BranchedWindows):
        working = chunk // each * _attention_bytes(size, itemsize)
        beside = branching.live_bytes(graft.attention, branches, token_shape, size.width, itemsize, working)
        beside = max(beside, attending if graft.attention.plain else 0)  # blocks with full attention
    return max(2 * stream, stream + chunk, beside) + order  # reordering copies the stream, while no chunk is at work


def _largest_window(attention: Any, token_shape: Shape) -> int:
    """A chunk holds whole windows; attention without windows takes any chunk."""
    if isinstance(attention, CloseRemote):
        return max(math.prod(-(-side // count) for side, count in zip(token_shape, cut)) for cut in attention.counts(token_shape))
    if isinstance(attention, BranchedWindows):
        return math.prod(attention.largest(token_shape))
    windows = attention.windows if isinstance(attention, GuidedWindows) else attention
    return max(tokens for _, tokens in windows_of(token_shape, windows.size)) if isinstance(windows, WindowAttention) else 1


def _bytes_per_token(size: Dimensions, itemsize: int, *, in_fp8: bool) -> int:
    """Temporaries of a token that is being computed: the larger of attention's and the FFN's, both with the residual they add to.

    `in_fp8`: what enters the FFN's second layer is divided by its scale in float32, then rounded.
    """
    second = itemsize + FP32 + 1 if in_fp8 else 0
    ffn = size.ffn * max(2 * itemsize, second) + 4 * size.width * itemsize
    return max(_attention_bytes(size, itemsize), ffn)


def _attention_bytes(size: Dimensions, itemsize: int) -> int:
    wide = FP32 if itemsize < FP32 else 0  # norms keep a float32 copy beside the working type
    return size.width * (2 * FP32 + wide + 6 * itemsize)
