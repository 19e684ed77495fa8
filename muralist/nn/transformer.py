"""Wan's transformer with grafts: the one file that reaches into diffusers' `WanTransformer3DModel`.

`MuralTransformer` is a subclass with its own forward. Parameters keep diffusers' names, so every Wan checkpoint loads, and
`adopt` turns a loaded stock model into one by changing its class: nothing is copied. A `Graft` says what differs from the stock
model; the default graft differs in nothing: stock blocks run in stock order, and the output is equal bit for bit.

What a graft changes:
- attention in windows: tokens are put into window-major order once, positions travel with them by index, and odd layers may use
  the shifted partition (one permutation where the order changes); the small projected output is put back into raster order;
- rotary positions at any scale (`rope.py`);
- frequency experts beside attention and FFN (`experts.py`), where the blocks have them;
- `token_chunk`: everything that treats tokens alone (norms, modulation, projections, cross-attention, FFN) runs on chunks, as
  does window attention on whole windows, so that live memory is one residual stream and one chunk (with full attention also the
  keys and values of the sequence). Without gradients the residual stream is updated in place.

Shapes: see `types.py`. Block-level caching hooks of diffusers (first-block cache and relatives) do not know `MuralBlock` and
refuse it with an error: they compare a block's input with its output, and ours is updated in place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from diffusers.utils import apply_lora_scale
from einops import rearrange

from muralist.errors import UserError
from muralist.nn.attention import FullAttention, WindowAttention, attend_full, attend_windows
from muralist.nn.chunked import join_chunks, map_chunks
from muralist.nn.experts import Branch, Place
from muralist.nn.rope import RopeScale, RotaryTable, interleaved, rotary_table, rotate
from muralist.nn.windows import Chunk, Partition, Shape, chunks, partition, reorder, spans

TEXT_LENGTH = 512  # diffusers' fixed number of text tokens; image tokens stand in front of them


@dataclass(frozen=True, slots=True)
class Graft:
    """What differs from the stock model. The default: nothing.

    `token_chunk`: tokens computed at a time where tokens are independent (>= 1); None: all at once. `experts`: names of those at work.
    """

    attention: FullAttention | WindowAttention = field(default_factory=FullAttention)
    rope: RopeScale = field(default_factory=RopeScale)
    token_chunk: int | None = None
    experts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.token_chunk is not None and self.token_chunk < 1:
            raise UserError(f"{self.token_chunk} tokens", where="token_chunk", fix="give at least 1, or None for all at once")

    @property
    def keeps_stock_blocks(self) -> bool:
        """Stock blocks can serve: full attention, all tokens at once, no experts."""
        return isinstance(self.attention, FullAttention) and self.token_chunk is None and not self.experts


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What a grafted block has to know about the tokens of this forward; one for each partition that layers cycle through.

    `levels` [B, N], in the partition's order: the row of the timestep embedding that a token takes; None: its sample's row.
    `windows`: chunks of whole windows; `spans`: plain chunks. `attend`: the self-attention of a block.
    `in_place`: no gradient is wanted, tensors may be overwritten. `experts`: names of those at work.
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


class MuralTransformer(WanTransformer3DModel):
    """Wan's transformer with a `Graft`; see the module's docstring. `from_pretrained` and `save_pretrained` work as for the stock class."""

    _no_split_modules = ["WanTransformerBlock", "MuralBlock"]  # noqa: RUF012 (diffusers' class attribute)
    _repeated_blocks = ["WanTransformerBlock", "MuralBlock"]  # noqa: RUF012

    graft = Graft()

    @classmethod
    def adopt(cls, stock: WanTransformer3DModel) -> MuralTransformer:
        """Make a loaded stock model a `MuralTransformer`, in place and without copying; returns the same object.

        Raises:
            TypeError: not a `WanTransformer3DModel` (its relatives with further inputs have forwards of their own).
        """
        if type(stock) is not cls:
            if type(stock) is not WanTransformer3DModel:
                raise TypeError(f"adopt takes a WanTransformer3DModel, not a {type(stock).__name__}")
            _refuse_hooks([stock])
            stock.__class__ = cls
        return stock

    def configure(self, graft: Graft) -> MuralTransformer:
        """Set the graft for all following forwards; returns self. Parameters are not touched. Configure before offloading or caching hooks are attached."""
        wanted = WanTransformerBlock if graft.keeps_stock_blocks else MuralBlock
        changing = [block for block in self.blocks if type(block) is not wanted]
        _refuse_hooks(changing)
        for block in changing:
            block.__class__ = wanted
        self.graft = graft
        return self

    def to_json_string(self) -> str:
        """The configuration under the stock class name: what we save is a plain Wan folder for everyone else."""
        return json.dumps(json.loads(super().to_json_string()) | {"_class_name": WanTransformer3DModel.__name__}, indent=2, sort_keys=True) + "\n"

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity of a latent video; the signature is the stock one.

        Args:
            hidden_states: [B, C, F, h, w], noisy normalised latents (about zero mean, unit variance).
            timestep: [B], 0 to 1000 (1000 * sigma); or [B, N], one for each token in raster order.
            encoder_hidden_states: [B, L, D_text].
            encoder_hidden_states_image: [B, L_image, D_image] for image-conditioned bases.

        Returns:
            [B, C_out, F, h, w], as `.sample` or as a tuple of one.
        """
        patch = self.config.patch_size
        token_shape = tuple(size // side for size, side in zip(hidden_states.shape[2:], patch))
        run = self._stock_blocks if self.graft.keeps_stock_blocks else self._grafted_blocks
        tokens = run(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, token_shape)
        f, y, x = token_shape
        pt, py, px = patch
        output = rearrange(tokens, "b (f y x) (pt py px c) -> b c (f pt) (y py) (x px)", f=f, y=y, x=x, pt=pt, py=py, px=px)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _stock_blocks(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None, token_shape: Shape) -> torch.Tensor:
        """diffusers' own sequence of operations -> [B, N, C_out * patch]; only the rotary positions may differ."""
        rotary = self._rotary(latents, token_shape)
        tokens = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [B, N, D]
        per_token = timestep.shape[1] if timestep.ndim == 2 else None
        temb, temb6, text, image = self.condition_embedder(timestep.flatten(), text, image, timestep_seq_len=per_token)
        temb6 = temb6.unflatten(-1, (6, -1))  # [B, 6, D] or [B, N, 6, D]
        context = text if image is None else torch.cat([image, text], dim=1)
        for block in self.blocks:
            tokens = self._run(block, tokens, context, temb6, rotary)
        # [1, 2, D] + [B, 1, D], or [1, 1, 2, D] + [B, N, 1, D]
        table = self.scale_shift_table if per_token is None else self.scale_shift_table.unsqueeze(0)
        shift, scale = (table.to(temb.device) + temb.unsqueeze(-2)).to(tokens.device).chunk(2, dim=-2)
        if per_token is not None:
            shift, scale = shift.squeeze(2), scale.squeeze(2)
        return self.proj_out(_modulated(self.norm_out, tokens, shift, scale))

    def _grafted_blocks(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None, token_shape: Shape
    ) -> torch.Tensor:
        """The same function in windows and chunks -> [B, N, C_out * patch] in raster order."""
        levels = None
        if timestep.ndim == 2:  # few distinct values (one a frame): embed each once instead of 6 D numbers for every token
            timestep, levels = torch.unique(timestep, return_inverse=True)
        temb, temb6, text, image = self.condition_embedder(timestep, text, image)
        temb6 = temb6.unflatten(-1, (6, -1))  # [B or levels, 6, D]
        context = text if image is None else torch.cat([image, text], dim=1)
        raster = partition(token_shape, token_shape).to(latents.device)
        layers = self._layers(raster, levels, latents.device)

        tokens = self.patch_embedding(latents).flatten(2).transpose(1, 2)  # [B, N, D]
        order = raster
        for block, layer in zip(self.blocks, cycle(layers)):
            tokens, order = reorder(tokens, order, layer.partition), layer.partition
            tokens = self._run(block, tokens.contiguous(), context, temb6, layer)
        return reorder(self._output(tokens, temb, layer), order, raster)

    def _layers(self, raster: Partition, levels: torch.Tensor | None, device: torch.device) -> list[Layer]:
        """One for each partition of the token grid."""
        graft, token_shape = self.graft, raster.token_shape
        rope = rotary_table(graft.rope, token_shape, self.config.attention_head_dim, device)
        layers = []
        for cut in graft.attention.partitions(token_shape):
            cut = cut.to(device)
            layers.append(
                Layer(
                    partition=cut,
                    raster=raster,
                    rope=rope,
                    levels=None if levels is None else levels[:, cut.order],
                    windows=chunks(cut.groups, graft.token_chunk),
                    spans=spans(cut.num_tokens, graft.token_chunk),
                    attend=_SELF_ATTENTION[type(graft.attention)],
                    in_place=not torch.is_grad_enabled(),
                    experts=graft.experts,
                )
            )
        return layers

    def _output(self, tokens: torch.Tensor, temb: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Final norm, modulation and projection, in chunks: [B, N, D] -> [B, N, C_out * patch]."""
        table = self.scale_shift_table.to(temb.device) + temb.unsqueeze(1)  # [B or levels, 2, D]

        def project(x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
            shift, scale = _rows(table, layer.levels, chunk)
            return self.proj_out(_modulated(self.norm_out, x, shift, scale))

        return join_chunks(project, tokens, layer.spans, layer.in_place)

    def _rotary(self, latents: torch.Tensor, token_shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [1, N, 1, d] float32. Positions within reach of diffusers' table come from its own module, so that hooks on it stay alive."""
        if self.graft.rope == RopeScale() and max(token_shape) <= self.config.rope_max_seq_len:
            return self.rope(latents)
        table = rotary_table(self.graft.rope, token_shape, self.config.attention_head_dim, latents.device)
        return interleaved(*table.at(torch.arange(math.prod(token_shape), device=latents.device)))

    def _run(self, block: torch.nn.Module, *arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)


def _refuse_hooks(modules: Sequence[torch.nn.Module]) -> None:
    """Hooks replace an instance's `forward` and would go on calling the old class's."""
    if any("forward" in vars(module) for module in modules):
        raise ValueError("this transformer already carries hooks (offloading, caching); adopt and configure it first, then attach them")


# -- Self-attention: x [B, N, D] in the layer's order, table [B or levels, 6, D] -> x + gate * attention, [B, N, D] --


def _window_attention(block: MuralBlock, x: torch.Tensor, table: torch.Tensor, layer: Layer, branch: Branch | None) -> torch.Tensor:
    """A chunk holds whole windows, so queries, keys and values of the full sequence never exist together."""
    attn = block.attn1

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        shift, scale, gate, *_ = _rows(table, layer.levels, chunk)
        normed = _seen(_modulated(block.norm1, part, shift, scale), branch)
        rope = layer.rope.at(layer.partition.order[chunk.span])
        query, key, value = _query(attn, normed, rope), _key(attn, normed, rope), _value(attn, normed)
        return _gated(part, _project(attn, attend_windows(query, key, value, chunk.runs)), gate)

    return _with_branch(map_chunks(update, x, layer.windows, layer.in_place), branch, table, layer, gate=2)


def _full_attention(block: MuralBlock, x: torch.Tensor, table: torch.Tensor, layer: Layer, branch: Branch | None) -> torch.Tensor:
    """Keys and values of the full sequence first, then queries chunk by chunk."""
    attn = block.attn1

    def prepare(part: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        shift, scale, gate, *_ = _rows(table, layer.levels, chunk)
        return _modulated(block.norm1, part, shift, scale), layer.rope.at(layer.partition.order[chunk.span]), gate

    def keys_and_values(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        normed, rope, _ = prepare(part, chunk)
        return torch.stack([_key(attn, normed, rope), _value(attn, normed)], dim=2)  # [B, n, 2, H, d]

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        normed, rope, gate = prepare(part, chunk)
        _seen(normed, branch)
        return _gated(part, _project(attn, attend_full(_query(attn, normed, rope), key, value)), gate)

    key, value = join_chunks(keys_and_values, x, layer.spans, layer.in_place).unbind(2)
    return _with_branch(map_chunks(update, x, layer.spans, layer.in_place), branch, table, layer, gate=2)


_SELF_ATTENTION = {FullAttention: _full_attention, WindowAttention: _window_attention}


def _query(attn: WanAttention, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return rotate(_heads(attn, attn.norm_q(attn.to_q(x))), *rope)


def _key(attn: WanAttention, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return rotate(_heads(attn, attn.norm_k(attn.to_k(x))), *rope)


def _value(attn: WanAttention, x: torch.Tensor) -> torch.Tensor:
    return _heads(attn, attn.to_v(x))


def _heads(attn: WanAttention, x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "b n (H d) -> b n H d", H=attn.heads)


def _project(attn: WanAttention, x: torch.Tensor) -> torch.Tensor:
    """Output projection and dropout: [B, n, H, d] -> [B, n, D]."""
    return attn.to_out[1](attn.to_out[0](rearrange(x, "b n H d -> b n (H d)")))


# -- Work that treats every token alone --


def _per_token(
    block: MuralBlock, x: torch.Tensor, texts: Sequence[tuple[torch.Tensor, torch.Tensor]], table: torch.Tensor, layer: Layer, branch: Branch | None
) -> torch.Tensor:
    """Cross-attention and FFN of a block, chunk by chunk: [B, N, D] -> [B, N, D]."""

    def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        *_, shift, scale, gate = _rows(table, layer.levels, chunk)
        part = part + _cross_attention(block.attn2, block.norm2(part.float()).type_as(part), texts)
        return _gated(part, block.ffn(_seen(_modulated(block.norm3, part, shift, scale), branch)).float(), gate)

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
        return _gated(part, branch.update(filtered[:, chunk.span]), _rows(table, layer.levels, chunk)[gate])

    return map_chunks(update, x, layer.spans, layer.in_place)


def _text_keys(attn: WanAttention, context: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the text, and of the image in front of it where the base takes one: each [B, L, H, d]. Once a block, not once a chunk."""
    num_image = 0 if attn.add_k_proj is None else context.shape[1] - TEXT_LENGTH
    image, text = context[:, :num_image], context[:, num_image:]
    pairs = [(_heads(attn, attn.norm_k(attn.to_k(text))), _value(attn, text))]
    if attn.add_k_proj is not None:
        pairs.append((_heads(attn, attn.norm_added_k(attn.add_k_proj(image))), _heads(attn, attn.add_v_proj(image))))
    return pairs


def _cross_attention(attn: WanAttention, x: torch.Tensor, texts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One softmax for the text and one for the image, summed: [B, n, D] -> [B, n, D]."""
    query = _heads(attn, attn.norm_q(attn.to_q(x)))
    return _project(attn, sum(attend_full(query, key, value) for key, value in texts))


def _modulated(norm: torch.nn.Module, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def _gated(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x.float() + update * gate).type_as(x)


def _rows(table: torch.Tensor, levels: torch.Tensor | None, chunk: Chunk) -> tuple[torch.Tensor, ...]:
    """The modulation vectors of a chunk: table [B, m, D] -> m tensors [B, 1, D]; with levels table [levels, m, D] -> m tensors [B, n, D]."""
    rows = table.unsqueeze(1) if levels is None else table[levels[:, chunk.span]]
    return rows.unbind(2)
