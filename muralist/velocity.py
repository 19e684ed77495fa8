"""What a base paints with: its velocity field for a text, under a graft, with an adapter, in sight of other latents.

What does not change between steps is computed once: the keys and values of a clean proxy, what the injector makes of an anchor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from muralist.base import Base
from muralist.nn.block_cache import FirstBlockCache, Pass
from muralist.nn.out_of_memory import Chunks
from muralist.sampling import flow
from muralist.types import TextCond

if TYPE_CHECKING:  # diffusers takes seconds to import
    from muralist.nn.attention import ProxyMemory
    from muralist.nn.transformer import Graft, MuralTransformer


@dataclass(frozen=True, slots=True, eq=False)
class ProxyView:
    """A coarse video [1, C, F, h, w] that a finer one of the same scene is painted in sight of.

    `time_scale`: fine latent frames from one of its own to the next; `adapter`: the one it was painted with, and is looked at with;
    `noise`: it is seen clean, or at the noise level of each step (then with noise of its own, drawn once by `seed`).
    """

    z: torch.Tensor
    time_scale: float
    adapter: str | None
    noise: Literal["clean", "same"]
    seed: int

    def level(self, sigma: float) -> float:
        """Its noise level for a step at sigma."""
        return 0.0 if self.noise == "clean" else sigma

    def at(self, level: float) -> torch.Tensor:
        """The latent at a noise level of its own, on the straight path from the noise that it was painted from."""
        if level == 0:
            return self.z
        return flow.renoise(self.z, flow.keyed_noise(tuple(self.z.shape), seed=self.seed, stage="proxy").to(self.z), level)

    def takes_turns_with(self, adapter: str | None) -> bool:
        """Whether its own adapter and this one both have their turn at every step."""
        return self.noise == "same" and self.adapter != adapter


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What a velocity field is told beside text and noise; nothing by default.

    `proxy`: for guided windows. `anchor` [1, C, F, h, w]: for the injector. `step_sizes`: how far the step goes that starts at a noise level, on
    the scale of timesteps, for a base that was given step sizes.
    """

    proxy: ProxyView | None = None
    anchor: torch.Tensor | None = None
    step_sizes: Mapping[float, float] | None = None


NOTHING = Sight()


def velocity_field(
    base: Base,
    text: TextCond,
    *,
    guidance_scale: float,
    guidance_interval: flow.Interval = flow.WHOLE,
    guidance_mean_interval: flow.Interval = flow.WHOLE,
    graft: Graft,
    grafts: Mapping[float, Graft] = MappingProxyType({}),
    adapter: str | None,
    sight: Sight = NOTHING,
    cache: FirstBlockCache | None = None,
) -> flow.Velocity:
    """The guided velocity field under a graft, with a named adapter of the base or none; runs without gradients.

    The adapter is made a part of the weights, unless every step has another one's turn too: a proxy's, seen at the noise level of each.
    `grafts`: those of the steps to come, by noise level, in place of `graft`; they differ from it in their windows alone. Of a graft's experts those work
    that are there for the noise level. With a `cache` it depends on the steps before: for one run of them.
    """
    guided = any(flow.passes(level, guidance_scale, guidance_interval) == 2 for level in grafts) if grafts else guidance_scale != 1
    embeds = [e.to(base.device, base.dtype) for e in (text.positive, text.negative)]
    fields = Fields(base, embeds, 2 if guided else 1, graft, grafts, adapter, sight)
    passes = (None, None) if cache is None else (cache.conditional, cache.unconditional)
    conditional, unconditional = (fields.field(number, cached) for number, cached in enumerate(passes))
    return flow.guided(conditional, unconditional, guidance_scale, guidance_interval, guidance_mean_interval)


class Fields:
    """The fields of several prompts, as in `velocity_field`, and what stays between their steps.

    Args:
        embeds: of each prompt, [1, L, D_text], on the base's device and of its type.
        prompts: how many of them, from the first on, have their turn in the steps to come.
    """

    def __init__(
        self, base: Base, embeds: Sequence[torch.Tensor], prompts: int, graft: Graft, grafts: Mapping[float, Graft], adapter: str | None, sight: Sight
    ):
        self.base, self.embeds, self.prompts, self.adapter, self.sight = base, embeds, prompts, adapter, sight
        self.graft, self.grafts = graft, grafts
        self.merged = sight.proxy is None or not sight.proxy.takes_turns_with(adapter)
        self.chunks = Chunks()
        self._memories: dict[int, tuple[str, float, ProxyMemory]] = {}
        self._features: tuple[str, torch.Tensor] | None = None

    def field(self, number: int, cached: Pass | None = None) -> flow.Velocity:
        """That of prompt `number`; runs without gradients. With a cache it depends on the steps before."""

        @torch.inference_mode()
        def velocity(z: torch.Tensor, sigma: float) -> torch.Tensor:
            base, experts = self.base, self.base.info.experts
            base.multiply_in(self.graft.kernels.linears)
            at_work = tuple(name for name in self.graft.experts if experts.experts[name].works_at(sigma))

            def forward(token_chunk: int | None) -> torch.Tensor:
                # its kernels and chunks are those of the proxy's pass too
                graft = replace(self.grafts.get(sigma, self.graft), experts=at_work, token_chunk=token_chunk)
                seen = {} if self.sight.proxy is None else {"proxy": self._memory(number, sigma, graft)}
                transformer = self._ready(sigma, graft, self.adapter)
                seen |= self._seen(transformer, z, sigma) | {"cache": cached}
                return transformer(z.to(base.dtype), self._timestep(sigma), self.embeds[number], return_dict=False, attention_kwargs=seen)[0].float()

            output = self.chunks.attempt(forward, self.graft.token_chunk, math.prod(z.shape[2:]) // math.prod(base.info.geometry.patch))
            return output if base.info.prediction == "flow" else flow.velocity_of_sample(z, output, sigma)

        return velocity

    def _ready(self, sigma: float, graft: Graft, adapter: str | None) -> MuralTransformer:
        """The transformer that serves noise level sigma, with one adapter at work: as a part of its weights, or beside them."""
        from muralist.nn.adapters import select_adapter

        self.base.merge(adapter if self.merged else None)
        transformer = self.base.transformer(sigma).configure(graft)
        select_adapter(transformer, adapter)
        return transformer

    def _memory(self, number: int, sigma: float, graft: Graft) -> ProxyMemory:
        """The proxy's keys and values for a prompt and a step; those of the last step again if nothing that they depend on has changed.

        Of a clean proxy those of all prompts together: its adapter has its turn once.
        """
        key = self.base.serving(sigma), self.sight.proxy.level(sigma)
        for each in {number, *range(self.prompts)} if self.sight.proxy.noise == "clean" else {number}:
            if self._memories.get(each, ())[:2] != key:
                self._memories.pop(each, None)  # two memories of a prompt at a time would be one too many
                self._memories[each] = (*key, self._remember(each, sigma, graft))
        return self._memories[number][2]

    def _remember(self, number: int, sigma: float, graft: Graft) -> ProxyMemory:
        proxy, base, level = self.sight.proxy, self.base, self.sight.proxy.level(sigma)
        transformer = self._ready(sigma, graft, proxy.adapter)
        return transformer.remember(proxy.at(level).to(base.device, base.dtype), self._timestep(level), self.embeds[number], proxy.time_scale)

    def _seen(self, transformer: MuralTransformer, z: torch.Tensor, sigma: float) -> dict[str, Any]:
        """What the transformer is given of an anchor, and how far the step goes."""
        seen = {}
        if self.sight.anchor is not None:
            if self._features is None or self._features[0] != self.base.serving(sigma):
                anchor = self.sight.anchor.to(self.base.device, self.base.dtype)
                self._features = (self.base.serving(sigma), transformer.injector.refine(anchor, transformer.token_shape(z)))
            seen["anchor"] = self._features[1]
        if self.sight.step_sizes is not None:
            seen["step_size"] = torch.tensor([self.sight.step_sizes[sigma]], device=self.base.device)
        return seen

    def _timestep(self, sigma: float) -> torch.Tensor:
        return torch.tensor([1000 * sigma], device=self.base.device, dtype=torch.float32)
