"""Wan's transformer with grafts: the one file that reaches into diffusers' `WanTransformer3DModel`.

`MuralTransformer` is a subclass with its own forward. Parameters keep diffusers' names, so every Wan checkpoint loads, and
`adopt` turns a loaded stock model into one by changing its class: nothing is copied. A `Graft` says what differs from the stock
model; the default graft differs in nothing: stock blocks run in stock order, and the output is equal bit for bit.

What a graft changes:
- attention in windows: tokens are put into window-major order once, positions travel with them by index, and odd layers may use
  the shifted partition (one permutation where the order changes); the small projected output is put back into raster order;
- rotary positions at any scale (`rope.py`);
- keys of a proxy of the scene, computed once by `remember`, beside those of each window (`attention/guided.py`);
- lattices beside those windows (`attention/close_remote.py`), or
- branches of pooled tokens beside those windows, fused with them (`branches.py`);
- frequency experts beside attention and FFN (`experts.py`), where the blocks have them;
- `token_chunk`: everything that treats tokens alone (norms, modulation, projections, cross-attention, FFN) runs on chunks, as
  does window attention on whole windows, so that live memory is one residual stream and one chunk (with full attention also the
  keys and values of the sequence). Without gradients the residual stream is updated in place.

Shapes: see `types.py`. Block-level caching hooks of diffusers (first-block cache and relatives) do not know `MuralBlock` and
refuse it with an error: they compare a block's input with its output, and ours is updated in place. The first-block cache is
there all the same, without hooks: the loop over the blocks asks `block_cache.py` after the first one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.utils import apply_lora_scale
from einops import rearrange

from muralist.errors import UserError
from muralist.nn.attention import BranchedWindows, CloseRemote, FullAttention, GuidedWindows, ProxyMemory, WindowAttention
from muralist.nn.attention.close_remote import remote
from muralist.nn.attention.guided import Pooling, Within, neighbours, places, pooled_places
from muralist.nn.block import SELF_ATTENTION, Layer, MuralBlock, keys_and_values, token_rows
from muralist.nn.block_cache import Pass
from muralist.nn.block_parts import modulated
from muralist.nn.branches import Blocks
from muralist.nn.chunked import join_chunks, map_chunks
from muralist.nn.kernels import PLAIN, Kernels
from muralist.nn.rope import RopeScale, RotaryTable, interleaved, rotary_table
from muralist.nn.streaming import BlockStream, rest_to
from muralist.nn.windows import Chunk, Partition, Shape, chunks, partition, reorder, spans

Injected = Callable[[int, torch.Tensor, Layer | None], torch.Tensor]
"""(number of a block, tokens [B, N, D], their layer; None: raster order, all at once) -> tokens"""


@dataclass(frozen=True, slots=True)
class Graft:
    """What differs from the stock model. The default: nothing.

    `token_chunk`: tokens computed at a time where tokens are independent (>= 1); None: all at once. `experts`: names of those at work.
    `kernels`: how attention is computed, and whether blocks are compiled (8-bit `linears` are a matter of loading, `Base`).
    """

    attention: FullAttention | WindowAttention | GuidedWindows | BranchedWindows | CloseRemote = field(default_factory=FullAttention)
    rope: RopeScale = field(default_factory=RopeScale)
    token_chunk: int | None = None
    experts: tuple[str, ...] = ()
    kernels: Kernels = PLAIN

    def __post_init__(self) -> None:
        if self.token_chunk is not None and self.token_chunk < 1:
            raise UserError(f"{self.token_chunk} tokens", where="token_chunk", fix="give at least 1, or None for all at once")

    @property
    def keeps_stock_blocks(self) -> bool:
        """Stock blocks can serve: full attention, all tokens at once, no experts, PyTorch's own kernels."""
        return isinstance(self.attention, FullAttention) and self.token_chunk is None and not self.experts and self.kernels == PLAIN


class MuralTransformer(WanTransformer3DModel):
    """Wan's transformer with a `Graft`; see the module's docstring. `from_pretrained` and `save_pretrained` work as for the stock class."""

    _no_split_modules = ["WanTransformerBlock", "MuralBlock"]  # noqa: RUF012 (diffusers' class attribute)
    _repeated_blocks = ["WanTransformerBlock", "MuralBlock"]  # noqa: RUF012

    graft = Graft()
    streamed: BlockStream | None = None

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

    def stream_blocks(self, device: torch.device) -> MuralTransformer:
        """Blocks wait in main memory and come to `device` for their turn; all else stays there. After all weights are loaded; `to` is over."""
        self.streamed = BlockStream(self.blocks, device)
        rest_to(self, self.streamed, device)
        return self

    def _in_turn(self) -> Iterable[torch.nn.Module]:
        return self.blocks if self.streamed is None else self.streamed.in_turn()

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
            attention_kwargs: `scale` of adapters as in diffusers; `proxy`: what `remember` made of a coarse video of the same scene, for
                `GuidedWindows`, which cannot do without; `step_size`: [B], 0 to 1000, for a transformer that was given a `StepSizeEmbedding`; `anchor`:
                [B, N, D] in raster order, what its `AnchorInjector` made of a small video; `cache`: the `Pass` of a `FirstBlockCache`, without gradients.

        Returns:
            [B, C_out, F, h, w], as `.sample` or as a tuple of one.
        """
        patch, token_shape = self.config.patch_size, self.token_shape(hidden_states)
        given = attention_kwargs or {}
        step_size, cached = given.get("step_size"), given.get("cache")
        injected = self._injected(given.get("anchor"), timestep, step_size)
        inputs = (hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, token_shape, step_size, injected, cached)
        tokens = self._stock_blocks(*inputs) if self.graft.keeps_stock_blocks else self._grafted_blocks(*inputs, given.get("proxy"))
        f, y, x = token_shape
        pt, py, px = patch
        output = rearrange(tokens, "b (f y x) (pt py px c) -> b c (f pt) (y py) (x px)", f=f, y=y, x=x, pt=pt, py=py, px=px)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def remember(self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, time_scale: float) -> ProxyMemory:
        """Keys and values of every block for a coarse video, whose tokens see each other and nothing else.

        Args:
            hidden_states: [B, C, F, h, w], normalised latents at the noise level that `timestep` says.
            timestep: [B], 0 to 1000.
            encoder_hidden_states: [B, L, D_text].
            time_scale: fine latent frames from one coarse one to the next; the coarse frames take those places.
        """
        before, collected = self.graft, []
        shape = self.token_shape(hidden_states)
        tokens = math.prod(shape)
        self.configure(Graft(rope=RopeScale(t=time_scale), token_chunk=min(before.token_chunk or tokens, tokens), kernels=before.kernels))
        try:
            self._grafted_blocks(hidden_states, timestep, encoder_hidden_states, None, shape, collect=collected)
        finally:
            self.configure(before)
        return ProxyMemory(shape, time_scale, tuple(collected))

    def token_shape(self, latents: torch.Tensor) -> Shape:
        """The token grid (f, y, x) of latents [B, C, F, h, w]."""
        return tuple(size // side for size, side in zip(latents.shape[2:], self.config.patch_size))

    def _stock_blocks(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None,
        token_shape: Shape,
        step_size: torch.Tensor | None,
        injected: Injected | None,
        cached: Pass | None,
    ) -> torch.Tensor:
        """diffusers' own sequence of operations -> [B, N, C_out * patch]; only the rotary positions may differ."""
        rotary = self._rotary(latents, token_shape)
        tokens = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [B, N, D]
        per_token = timestep.shape[1] if timestep.ndim == 2 else None
        temb, temb6, text, image = self._conditioned(timestep.flatten(), text, image, step_size, timestep_seq_len=per_token)
        temb6 = temb6.unflatten(-1, (6, -1))  # [B, 6, D] or [B, N, 6, D]
        context = text if image is None else torch.cat([image, text], dim=1)
        if cached is not None:
            cached.begin(tokens, self, self.graft)
        for number, block in enumerate(self._in_turn()):
            tokens = tokens if injected is None else injected(number, tokens, None)
            tokens = self._run(block, tokens, context, temb6, rotary)
            if number == 0 and cached is not None and cached.skips(tokens):
                break
        else:
            if cached is not None:
                cached.keep(tokens)
        # [1, 2, D] + [B, 1, D], or [1, 1, 2, D] + [B, N, 1, D]
        table = self.scale_shift_table if per_token is None else self.scale_shift_table.unsqueeze(0)
        shift, scale = (table.to(temb.device) + temb.unsqueeze(-2)).to(tokens.device).chunk(2, dim=-2)
        if per_token is not None:
            shift, scale = shift.squeeze(2), scale.squeeze(2)
        return self.proj_out(modulated(self.norm_out, tokens, shift, scale))

    def _grafted_blocks(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None,
        token_shape: Shape,
        step_size: torch.Tensor | None = None,
        injected: Injected | None = None,
        cached: Pass | None = None,
        proxy: ProxyMemory | None = None,
        collect: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """The same function in windows and chunks -> [B, N, C_out * patch] in raster order; `collect` takes every block's keys and values."""
        levels = None
        if timestep.ndim == 2:  # few distinct values (one a frame): embed each once instead of 6 D numbers for every token
            timestep, levels = torch.unique(timestep, return_inverse=True)
        temb, temb6, text, image = self._conditioned(timestep, text, image, step_size)
        temb6 = temb6.unflatten(-1, (6, -1))  # [B or levels, 6, D]
        context = text if image is None else torch.cat([image, text], dim=1)
        raster = partition(token_shape, token_shape).to(latents.device)
        layers = self._layers(raster, timestep, levels, proxy)

        tokens = self.patch_embedding(latents).flatten(2).transpose(1, 2)  # [B, N, D]
        tokens, order = reorder(tokens, raster, layers[0].partition), layers[0].partition
        if cached is not None:
            cached.begin(tokens, self, self.graft)
        for number, (block, layer) in enumerate(zip(self._in_turn(), layers)):
            tokens, order = reorder(tokens, order, layer.partition), layer.partition
            if injected is not None:
                tokens = injected(number, tokens, layer)
            if proxy is not None:
                layer = replace(layer, memory=proxy.layers[number])
            if collect is not None:
                collect.append(keys_and_values(block, tokens, temb6))
            tokens = self._run(block, tokens.contiguous(), context, temb6, layer)
            if number == 0 and cached is not None and cached.skips(tokens):
                break
        else:
            if cached is not None:
                cached.keep(reorder(tokens, order, layers[0].partition))
        return reorder(self._output(tokens, temb, layer), order, raster)

    def _injected(self, anchor: torch.Tensor | None, timestep: torch.Tensor, step_size: torch.Tensor | None) -> Injected | None:
        """Adds the anchor's features [B, N, D] to the tokens before a block; a layer says in which order they stand and in which chunks to work."""
        if anchor is None:
            return None
        if timestep.ndim != 1:
            raise ValueError("an anchor goes with one timestep a sample")
        gain = self.injector.gain(timestep, torch.zeros_like(timestep) if step_size is None else step_size)

        def inject(number: int, tokens: torch.Tensor, layer: Layer | None) -> torch.Tensor:
            if not self.injector.works_before(number):
                return tokens
            if layer is None:
                return tokens + self.injector.update(number, anchor, gain).to(tokens.dtype)
            features = reorder(anchor, layer.raster, layer.partition)

            def update(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
                return part + self.injector.update(number, features[:, chunk.span], gain).to(part.dtype)

            return map_chunks(update, tokens, layer.spans, layer.in_place)

        return inject

    def _conditioned(
        self, timestep: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None, step_size: torch.Tensor | None, **rest: Any
    ) -> tuple[torch.Tensor, ...]:
        """The stock embedding of noise level and texts; a step's size is added to the noise level's before that is projected for the blocks."""
        embedder = self.condition_embedder
        temb, temb6, text, image = embedder(timestep, text, image, **rest)
        if step_size is None:
            return temb, temb6, text, image
        if temb.ndim != 2 or len(temb) != len(step_size):
            raise ValueError("step sizes go with one timestep a sample")
        temb = temb + self.step_size(step_size).to(temb.dtype)
        return temb, embedder.time_proj(embedder.act_fn(temb)), text, image

    def _layers(self, raster: Partition, timestep: torch.Tensor, levels: torch.Tensor | None, proxy: ProxyMemory | None) -> list[Layer]:
        """One for each block."""
        attention = self.graft.attention
        if isinstance(attention, GuidedWindows) != (proxy is not None):
            raise ValueError("guided windows need a proxy, and nothing else takes one")
        rope = rotary_table(self.graft.rope, raster.token_shape, self.config.attention_head_dim, raster.order.device)
        layers = [self._layer(cut.to(raster.order.device), raster, rope, levels, type(attention)) for cut in attention.partitions(raster.token_shape)]
        if proxy is not None:
            layers = [self._guided(layer, proxy) for layer in layers]
        if isinstance(attention, BranchedWindows) and attention.branches:
            layers = [self._branched(layer, timestep, levels, odd=bool(number % 2)) for number, layer in enumerate(layers)]
        if isinstance(attention, CloseRemote):
            apart = (remote(cut).to(raster.order.device) for cut in attention.partitions(raster.token_shape))
            layers = [replace(layer, remote=lattices) for layer, lattices in zip(layers, apart)]
        whole = {number: self._layer(raster, raster, rope, levels, FullAttention) for number in getattr(attention, "plain", ())}
        return [whole.get(number, layers[number % len(layers)]) for number in range(len(self.blocks))]

    def _layer(self, cut: Partition, raster: Partition, rope: RotaryTable, levels: torch.Tensor | None, attention: type) -> Layer:
        return Layer(
            partition=cut,
            raster=raster,
            rope=rope,
            levels=None if levels is None else levels[:, cut.order],
            windows=chunks(cut.groups, self.graft.token_chunk),
            spans=spans(cut.num_tokens, self.graft.token_chunk),
            attend=SELF_ATTENTION[attention],
            in_place=not torch.is_grad_enabled(),
            experts=self.graft.experts,
        )

    def _branched(self, layer: Layer, timestep: torch.Tensor, levels: torch.Tensor | None, *, odd: bool) -> Layer:
        """The same layer with the pools of the branches that are at work."""
        if levels is not None:
            raise ValueError("branches go with one timestep a sample")
        attention, config = self.graft.attention, next((block.branches.config for block in self.blocks if hasattr(block, "branches")), None)
        if config is None or not set(attention.branches) <= set(config.branches):
            raise ValueError(f"this transformer lacks some of the branches {', '.join(attention.branches)}")
        odd = odd and attention.odd != "same"
        how = {"head_dim": self.config.attention_head_dim, "odd": odd, "place": attention.place}
        found = {name: Blocks.of(layer.partition, config.branches[name], **how) for name in attention.branches}
        return replace(layer, blocks=found, timestep=timestep)

    def _guided(self, layer: Layer, proxy: ProxyMemory) -> Layer:
        """The same layer with the neighbours of its windows."""
        attention, cut, dim = self.graft.attention, layer.partition, self.config.attention_head_dim
        axes = places(proxy.token_shape, proxy.within or Within(cut.token_shape), proxy.time_scale)
        near = neighbours(cut, proxy.token_shape, axes, attention.near, dim)
        if attention.middle is None:
            return replace(layer, proxy=near)
        pooling = Pooling.of(cut, attention.middle.pool)
        between = neighbours(cut, pooling.shape, pooled_places(cut, attention.middle.pool), attention.middle.near, dim)
        return replace(layer, proxy=near, middle=(pooling, between))

    def _output(self, tokens: torch.Tensor, temb: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Final norm, modulation and projection, in chunks: [B, N, D] -> [B, N, C_out * patch]."""
        table = self.scale_shift_table.to(temb.device) + temb.unsqueeze(1)  # [B or levels, 2, D]

        def project(x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
            shift, scale = token_rows(table, layer.levels, chunk)
            return self.proj_out(modulated(self.norm_out, x, shift, scale))

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
        with self.graft.kernels.at_work():
            return block(*arguments)


def _refuse_hooks(modules: Sequence[torch.nn.Module]) -> None:
    """Hooks replace an instance's `forward` and would go on calling the old class's."""
    if any("forward" in vars(module) for module in modules):
        raise ValueError("this transformer already carries hooks (offloading, caching); adopt and configure it first, then attach them")
