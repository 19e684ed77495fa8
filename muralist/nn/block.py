"""A block of Wan's transformer that computes in chunks, in windows, and with what a graft puts beside its layers.

`MuralBlock` has the stock block's parameters and none of its own. `Layer` is all that it is told: which tokens stand where, and what they see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from einops import rearrange

from muralist.nn.attention import BranchedWindows, CloseRemote, FullAttention, GuidedWindows, WindowAttention, attend_full, attend_windows, guided
from muralist.nn.attention.guided import Neighbours, Pooling
from muralist.nn.attention.window import ExtraKeys
from muralist.nn.block_parts import (
    after_attention,
    after_ffn,
    after_text,
    gated,
    heads,
    joined,
    keys_values,
    modulated,
    queries,
    queries_keys_values,
    text_queries,
    value_of,
)  # fmt: skip
from muralist.nn.branches import Blocks, CompressedBranch, Pools, attend_pooled, fused
from muralist.nn.chunked import join_chunks, map_chunks
from muralist.nn.experts import Branch, Place
from muralist.nn.rope import RotaryTable, rotate
from muralist.nn.windows import Chunk, Partition, switch

TEXT_LENGTH = 512  # diffusers' fixed number of text tokens; image tokens stand in front of them


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What a grafted block has to know about the tokens of this forward; one for each partition that layers cycle through.

    `levels` [B, N], in the partition's order: the row of the timestep embedding that a token takes; None: its sample's row.
    `windows`: chunks of whole windows; `spans`: plain chunks. `attend`: the self-attention of a block.
    `in_place`: no gradient is wanted, tensors may be overwritten. `experts`: names of those at work.
    `proxy`, `middle`: the neighbours of each window in the proxy and among the pooled tokens; `memory`: the proxy's keys and values in this block.
    `blocks`: how each compressed branch pools; `timestep` [B], which its fusion weight follows.
    `remote`: the lattices beside the windows.
    """

    partition: Partition
    raster: Partition
    rope: RotaryTable
    levels: torch.Tensor | None
    windows: tuple[Chunk, ...]
    spans: tuple[Chunk, ...]
    attend: Callable[[MuralBlock, torch.Tensor, torch.Tensor, Layer, Branch | None], torch.Tensor]
    in_place: bool
    experts: tuple[str, ...]
    proxy: Neighbours | None = None
    middle: tuple[Pooling, Neighbours] | None = None
    memory: tuple[torch.Tensor, torch.Tensor] | None = None
    blocks: Mapping[str, Blocks] | None = None
    timestep: torch.Tensor | None = None
    remote: Partition | None = None


class MuralBlock(WanTransformerBlock):
    """A stock block (same parameters) that computes in chunks and in windows."""

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, layer: Layer) -> torch.Tensor:
        """hidden_states [B, N, D] in the layer's order, encoder_hidden_states [B, L, D], temb [B or levels, 6, D] -> [B, N, D].

        Without gradients `hidden_states` may be overwritten: the result is the same storage.
        """
        table = self.scale_shift_table + temb.float()
        hidden_states = layer.attend(self, hidden_states, table, layer, self._branch("attention", layer))
        return _per_token(self, hidden_states, _text_keys(self.attn2, encoder_hidden_states), table, layer, self._branch("ffn", layer))

    def _branch(self, place: Place, layer: Layer) -> Branch | None:
        """The expert at work beside the attention or the FFN."""
        found = [expert for name in layer.experts if (expert := self.experts[name]).place == place]
        return Branch(found[0], layer.partition, layer.raster) if found else None


# -- Self-attention: x [B, N, D] in the layer's order, table [B or levels, 6, D] -> x + gate * attention, [B, N, D] --


def _window_attention(block: MuralBlock, x: torch.Tensor, table: torch.Tensor, layer: Layer, branch: Branch | None) -> torch.Tensor:
    """A chunk holds whole windows, so queries, keys and values of the full sequence never exist together."""
    extra = _extra_keys(block, x, table, layer)

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        shift, scale, gate, *_ = token_rows(table, layer.levels, chunk)
        normed, query, key, value = queries_keys_values(block, part, shift, scale, *layer.rope.at(layer.partition.order[chunk.span]))
        _seen(normed, branch)
        return after_attention(block, part, attend_windows(query, key, value, chunk.runs, extra), gate)

    return _with_branch(map_chunks(update, x, layer.windows, layer.in_place), branch, table, layer, gate=2)


def _extra_keys(block: MuralBlock, x: torch.Tensor, table: torch.Tensor, layer: Layer) -> ExtraKeys | None:
    """What windows see besides themselves: their neighbours in the proxy, and in the means of the tokens."""
    if layer.proxy is None:
        return None
    sources = [(layer.proxy, *layer.memory)]
    if layer.middle is not None:
        pooling, between = layer.middle

        def normed(chunk: Chunk) -> torch.Tensor:
            shift, scale, *_ = token_rows(table, layer.levels, chunk)
            return modulated(block.norm1, x[:, chunk.span], shift, scale)

        means = pooling.mean((chunk.span, normed(chunk)) for chunk in layer.spans)
        sources.append((between, *_unrotated(block.attn1, means)))
    return guided.joined(sources)


def keys_and_values(block: MuralBlock, x: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a block's self-attention offers to others, keys not rotated: x [B, N, D] -> twice [B, N, H, d]."""
    shift, scale, *_ = (block.scale_shift_table + temb.float()).unsqueeze(1).unbind(2)
    return _unrotated(block.attn1, modulated(block.norm1, x, shift, scale))


def _unrotated(attn: WanAttention, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return heads(attn, attn.norm_k(attn.to_k(normed))), value_of(attn, normed)


def _full_attention(block: MuralBlock, x: torch.Tensor, table: torch.Tensor, layer: Layer, branch: Branch | None) -> torch.Tensor:
    """Keys and values of the full sequence first, then queries chunk by chunk."""

    def rope(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.rope.at(layer.partition.order[chunk.span])

    def prepare(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        shift, scale, *_ = token_rows(table, layer.levels, chunk)
        return keys_values(block, part, shift, scale, *rope(chunk))

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        shift, scale, gate, *_ = token_rows(table, layer.levels, chunk)
        normed, query = queries(block, part, shift, scale, *rope(chunk))
        _seen(normed, branch)
        return after_attention(block, part, attend_full(query, key, value), gate)

    key, value = join_chunks(prepare, x, layer.spans, layer.in_place).unbind(2)
    return _with_branch(map_chunks(update, x, layer.spans, layer.in_place), branch, table, layer, gate=2)


def _close_remote_attention(block: MuralBlock, x: torch.Tensor, table: torch.Tensor, layer: Layer, branch: Branch | None) -> torch.Tensor:
    """Queries, keys and values of the full sequence first: the lattices need them all. Then the mean of both kinds of window."""

    def prepare(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        shift, scale, *_ = token_rows(table, layer.levels, chunk)
        normed, *projected = queries_keys_values(block, part, shift, scale, *layer.rope.at(layer.partition.order[chunk.span]))
        _seen(normed, branch)
        return torch.stack(projected, dim=2)  # [B, n, 3, H, d]

    def attend(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return attend_windows(*part.unbind(2), chunk.runs)

    prepared = join_chunks(prepare, x, layer.spans, layer.in_place)
    to_remote, to_close = switch(layer.partition, layer.remote), switch(layer.remote, layer.partition)
    close = join_chunks(attend, prepared, layer.windows, layer.in_place)
    prepared = prepared.index_select(1, to_remote)
    apart = join_chunks(attend, prepared, layer.windows, layer.in_place).index_select(1, to_close)
    del prepared

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        gate = token_rows(table, layer.levels, chunk)[2]
        return after_attention(block, part, torch.lerp(close[:, chunk.span], apart[:, chunk.span], 0.5), gate)

    return _with_branch(map_chunks(update, x, layer.spans, layer.in_place), branch, table, layer, gate=2)


def _branched_attention(block: MuralBlock, x: torch.Tensor, table: torch.Tensor, layer: Layer, branch: Branch | None) -> torch.Tensor:
    """Windows as above, while the branches gather their pooled tokens; then those attend, and all are fused before the one output projection."""
    if not layer.blocks:
        return _window_attention(block, x, table, layer, branch)
    attn, branches = block.attn1, block.branches
    pools = Pools(branches, layer.blocks)

    def look(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        shift, scale, *_ = token_rows(table, layer.levels, chunk)
        normed = _seen(modulated(block.norm1, part, shift, scale), branch)
        query, key, value = attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)
        pools.add(chunk, (normed, query, key, value) if branches.config.projecting == "once" else (normed,))
        query, key, value = heads(attn, attn.norm_q(query)), heads(attn, attn.norm_k(key)), heads(attn, value)
        rope = layer.rope.at(layer.partition.order[chunk.span])
        return rearrange(attend_windows(rotate(query, *rope), rotate(key, *rope), value, chunk.runs), "b n H d -> b n (H d)")

    local = join_chunks(look, x, layer.windows, layer.in_place)
    restored = [_restored(attn, pools.take(name, local.dtype), branches[name], layer.blocks[name]) for name in layer.blocks]
    alphas = [branches[name].fusion(layer.timestep) for name in layer.blocks]

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        gate = token_rows(table, layer.levels, chunk)[2]
        others = [z[:, layer.partition.order[chunk.span]] for z in restored]
        return gated(part, joined(attn, fused(local[:, chunk.span], alphas, others, of_branch=branches.config.of_branch)), gate)

    return _with_branch(map_chunks(update, x, layer.windows, layer.in_place), branch, table, layer, gate=2)


def _restored(attn: WanAttention, pooled: Sequence[torch.Tensor], branch: CompressedBranch, blocks: Blocks) -> torch.Tensor:
    """What a branch makes of its pooled tokens (and of their q, k and v, if those were pooled too): [B, N, D] in raster order."""
    x, *projected = pooled
    key_layer = attn.to_q if branch.config.key_of_query else attn.to_k
    query, key, value = projected or (attn.to_q(x), key_layer(x), attn.to_v(x))
    query, key = attn.norm_q(query + branch.q(x)), attn.norm_k(key + branch.k(x))
    return branch.restore(attend_pooled(*(heads(attn, y) for y in (query, key, value + branch.v(x))), blocks), blocks)


SELF_ATTENTION = {
    FullAttention: _full_attention, WindowAttention: _window_attention, GuidedWindows: _window_attention, BranchedWindows: _branched_attention,
    CloseRemote: _close_remote_attention,
}  # fmt: skip


# -- Work that treats every token alone --


def _per_token(
    block: MuralBlock, x: torch.Tensor, texts: Sequence[tuple[torch.Tensor, torch.Tensor]], table: torch.Tensor, layer: Layer, branch: Branch | None
) -> torch.Tensor:
    """Cross-attention and FFN of a block, chunk by chunk: [B, N, D] -> [B, N, D]."""

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        *_, shift, scale, gate = token_rows(table, layer.levels, chunk)
        part, normed = after_text(block, part, _attend_texts(text_queries(block, part), texts), shift, scale)
        return after_ffn(block, part, _seen(normed, branch), gate)

    return _with_branch(map_chunks(update, x, layer.spans, layer.in_place), branch, table, layer, gate=5)


def _seen(normed: torch.Tensor, branch: Branch | None) -> torch.Tensor:
    if branch is not None:
        branch.see(normed)
    return normed


def _with_branch(x: torch.Tensor, branch: Branch | None, table: torch.Tensor, layer: Layer, gate: int) -> torch.Tensor:
    """x + gate * what the expert adds, [B, N, D]; `gate` is the row of the table that belongs to the layer beside it."""
    if branch is None:
        return x
    filtered = branch.filtered()

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return gated(part, branch.update(filtered[:, chunk.span]), token_rows(table, layer.levels, chunk)[gate])

    return map_chunks(update, x, layer.spans, layer.in_place)


def _text_keys(attn: WanAttention, context: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the text, and of the image in front of it where the base takes one: each [B, L, H, d]. Once a block, not once a chunk.

    And once a forward, though they are the same at every step: they take 0.5 % of one at 448x256, 0.02 % at 1080p (`benchmarks/compiling.py`).
    """
    num_image = 0 if attn.add_k_proj is None else context.shape[1] - TEXT_LENGTH
    image, text = context[:, :num_image], context[:, num_image:]
    pairs = [(heads(attn, attn.norm_k(attn.to_k(text))), value_of(attn, text))]
    if attn.add_k_proj is not None:
        pairs.append((heads(attn, attn.norm_added_k(attn.add_k_proj(image))), heads(attn, attn.add_v_proj(image))))
    return pairs


def _attend_texts(query: torch.Tensor, texts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One softmax for the text and one for the image, summed: [B, n, H, d] -> [B, n, H, d]."""
    return sum(attend_full(query, key, value) for key, value in texts)


def token_rows(table: torch.Tensor, levels: torch.Tensor | None, chunk: Chunk) -> tuple[torch.Tensor, ...]:
    """The modulation vectors of a chunk: table [B, m, D] -> m tensors [B, 1, D]; with levels table [levels, m, D] -> m tensors [B, n, D]."""
    rows = table.unsqueeze(1) if levels is None else table[levels[:, chunk.span]]
    return rows.unbind(2)
