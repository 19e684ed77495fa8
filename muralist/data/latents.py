"""Videos encoded once and kept: normalised latents with their captions, in memory and on disk.

A world clip of 29 frames costs about a second to render and encode and is then used many times. Shards are safetensors with the
captions in the header; a cache that was interrupted goes on where it stopped, and a shard is a pure function of its number, of the
encoder, of the source and of the configuration. It says in its header which (`stamp`), and one that does not fit is refused: latents of another encoder
would train without a word and be worth nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from muralist.data.degrade import AnchorDamage
from muralist.data.sharpen import Unsharp
from muralist.data.sources import Drawn, Source, World
from muralist.errors import UserError
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.encoder import StreamingEncoder
from muralist.nn.enlarge import MODE, EnlargedPixels, between, sampled
from muralist.nn.latent_upsampler.model import LatentUpsampler
from muralist.nn.latent_upsampler.tiles import upsample_part
from muralist.store import weights
from muralist.store.tensors import load_tensors, save_tensors
from muralist.tiling import Box, Span
from muralist.types import Grid

Shard = tuple[dict[str, torch.Tensor], dict[str, str]]  # tensors and the header's metadata
WORLD = World()
FORMAT = 3  # of a shard: raise it when one holds other tensors
SHARD = 20  # videos: a minute or two of one core
GUIDES = {"bicubic": 2, "learned": 3}  # of a shard's guides by what enlarges them last: raise it when they are made otherwise
AROUND = 64  # pixels beside a crop that are encoded for its guide: it is then the whole frame's to 0.3 % (of its deviation)
LATER = {"aimed": 0.0, "guide_rest": "bicubic"}  # fields of configurations that are younger than some shards, and what those were made with


@dataclass(frozen=True, slots=True)
class LatentPool:
    """Latents [n, C, F, h, w] in half precision, one caption each, where the caption's object is, if that is known: [n, F, h, w], bool.

    `proxy` [n, C, F', h', w']: the same videos whole on a coarse grid, if one was asked for; `places` [n, 4]: top, left, height and width of each crop
    as shares of the whole frame. `guide`, of the shape of `z`: what refinement is given where the crops lie, if that was asked for.
    """

    z: torch.Tensor
    captions: list[str]
    near_object: torch.Tensor | None
    proxy: torch.Tensor | None = None
    places: torch.Tensor | None = None
    guide: torch.Tensor | None = None

    def take(self, index: np.ndarray) -> tuple[torch.Tensor, list[str], torch.Tensor | None]:
        """The videos at `index`: latents in float32, captions, places of the object."""
        chosen = torch.from_numpy(index)
        return self.z[chosen].float(), [self.captions[i] for i in index], None if self.near_object is None else self.near_object[chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Which videos: their grid, how many consecutive frames of it (all by default), a crop (height, width) in pixels for large grids, sharpened or not.

    `proxy`: a coarse grid on which whole videos are encoded too, damaged or not. With `guide_scale` there are guides as well, what refinement is given
    where a crop lies: the small video after the VAE, enlarged through pixels (`PixelInterpolation`, whose `latent_scale` it is) and from there on as
    `guide_rest` says, by interpolation or by the base's latent upsampler. `aimed`: the share of crops that are moved onto the caption's object, where
    the source knows it.
    """

    name: str
    count: int
    grid: Grid
    frames: int | None = None
    crop: tuple[int, int] | None = None
    sharpen: Unsharp | None = None
    proxy: Grid | None = None
    damage: AnchorDamage | None = None
    guide_scale: float | None = None
    guide_rest: Literal["bicubic", "learned"] = "bicubic"
    aimed: float = 0.0
    seed: int = 1

    @property
    def length(self) -> int:
        return self.frames or self.grid.num_frames


@dataclass(frozen=True, slots=True)
class LatentPairs:
    """The same videos twice: `low` [n, C, F, h, w] and `high` [n, C, F, H, W], in half precision."""

    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """Crops of `side` pixels of videos at the size `low`, and the same part of them `scale` times larger; `side * scale` must be legal."""

    name: str
    count: int
    low: Grid
    scale: float
    side: int
    frames: int
    seed: int = 1


def stamp(vae: AutoencoderKLWan, config: PoolConfig | PairConfig, source: Source, upsampler: LatentUpsampler | None = None) -> dict[str, str]:
    """What a shard's header says of its origin: `encoder`, a sha256, and `config`, JSON.

    The hash covers the encoder, `quant_conv` and the statistics that normalise the latents; the decoder as well where guides are made, which go
    through its pixels. The configuration holds that of `upsampler`, if guides are enlarged by one. `name` and `count` are left out of it, since a pool
    may grow, and so is what is as in LATER.
    """
    guides = isinstance(config, PoolConfig) and config.guide_scale is not None
    fields = {name: value for name, value in asdict(config).items() if name not in ("name", "count") and (name, value) not in LATER.items()}
    if guides:
        fields |= {"guides": GUIDES[config.guide_rest], "around": AROUND}
    if upsampler is not None:
        fields |= {"upsampler": _digest(upsampler.state_dict())}
    return {"encoder": digest_of(vae, decoder=guides), "config": json.dumps(fields | source.identity | {"format": FORMAT}, sort_keys=True)}


def digest_of(vae: AutoencoderKLWan, *, decoder: bool = False) -> str:
    """A sha256 of what decides latents: encoder, `quant_conv`, statistics and type; of the decoder too if asked for."""
    about = json.dumps([list(vae.config.latents_mean), list(vae.config.latents_std), str(vae.dtype)])
    parts = ("encoder", "quant_conv", *(("decoder", "post_quant_conv") if decoder else ()))
    return _digest({f"{part}.{name}": tensor for part in parts for name, tensor in sorted(getattr(vae, part).state_dict().items())}, about)


def _digest(tensors: dict[str, torch.Tensor], about: str = "") -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, origin: dict[str, str]) -> Shard:
    """Tensors and metadata of a shard; UserError if it is damaged or not of this origin."""
    try:
        found = weights.check_safetensors(path).get("__metadata__") or {}
    except UserError as error:
        raise UserError(error.what, where=str(path.parent), fix=f"remove {path.name}: it is encoded again") from None
    for name, what in (("encoder", "a VAE with another encoder"), ("config", "another configuration")):
        if found.get(name) != origin[name]:
            made = f"was made by {what}" if name in found else f"does not say which {name} made it"
            raise UserError(f"{path.name} {made}", where=str(path.parent), fix="remove this folder, or name another --output")
    return load_tensors(path), found


def build_pairs(vae: AutoencoderKLWan, config: PairConfig, folder: Path, report: Callable[[str], None] = print, source: Source = WORLD) -> LatentPairs:
    """As `build_pool`: load the shards from `folder`, encoding those that are missing."""

    def make(rng: np.random.Generator) -> Shard:
        encoder = StreamingEncoder(vae)
        pairs = [[_encode(encoder, video).half().cpu() for video in source.pair(rng, config)] for _ in range(SHARD)]
        return {name: torch.cat(tensors) for name, tensors in zip(("low", "high"), zip(*pairs))}, {}

    shards = [tensors for tensors, _ in _shards(config, stamp(vae, config, source), folder, make, lambda done: report(f"{done} pairs encoded"))]
    return LatentPairs(*(torch.cat([tensors[name] for tensors in shards])[: config.count] for name in ("low", "high")))


def build_pool(
    vae: AutoencoderKLWan,
    config: PoolConfig,
    folder: Path,
    report: Callable[[str], None] = print,
    source: Source = WORLD,
    upsampler: LatentUpsampler | None = None,
) -> LatentPool:
    """Load the pool's shards from `folder`, encoding those that are missing; `upsampler`: the base's own, for guides that it enlarges.

    Raises UserError for a shard of another encoder or configuration, a damaged one, and a full disk.
    """
    if (config.guide_rest == "learned") != (upsampler is not None):
        raise ValueError(f"guides by {config.guide_rest!r}, {'no' if upsampler is None else 'an'} upsampler")

    def make(rng: np.random.Generator) -> Shard:
        drawn = [source.draw(rng, config) for _ in range(SHARD)]
        near_object = [d.near_object(vae.config.scale_factor_spatial, vae.config.scale_factor_temporal) for d in drawn]
        known = {} if near_object[0] is None else {"near_object": torch.stack(near_object)}
        z = _encode_all(vae, [_sharpened(d.pixels, config) for d in drawn])
        coarse = {} if config.proxy is None else _coarse(vae, config, drawn, z.shape[-2:], rng, upsampler)
        return {"z": z, **coarse, **known}, {"captions": json.dumps([d.caption for d in drawn])}

    origin = stamp(vae, config, source, upsampler)
    shards = list(_shards(config, origin, folder, make, lambda done: report(f"{done} videos encoded")))
    captions = [text for _, metadata in shards for text in json.loads(metadata["captions"])]
    tensors = {name: torch.cat([tensors[name] for tensors, _ in shards])[: config.count] for name in shards[0][0]}
    return LatentPool(tensors["z"], captions[: config.count], *(tensors.get(name) for name in ("near_object", "proxy", "places", "guide")))


def _shards(
    config: PoolConfig | PairConfig,
    origin: dict[str, str],
    folder: Path,
    make: Callable[[np.random.Generator], Shard],
    report: Callable[[str], None],
) -> Iterator[Shard]:
    """Every shard of a pool in order; those that are missing are made first, each from a generator of its own, and published."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range((config.count + SHARD - 1) // SHARD):
        path = folder / f"{config.name}-{shard:04d}.safetensors"
        if not path.is_file():
            tensors, metadata = make(np.random.Generator(np.random.Philox(key=[config.seed, shard])))
            save_tensors(path, tensors, metadata | origin)
            report(f"{config.name}: {min((shard + 1) * SHARD, config.count)} of {config.count}")
        yield _read(path, origin)


def _coarse(
    vae: AutoencoderKLWan, config: PoolConfig, drawn: list[Drawn], size: tuple[int, int], rng: np.random.Generator, upsampler: LatentUpsampler | None
) -> dict[str, torch.Tensor]:
    """The drawn videos whole on the coarse grid, and where in them the crops lie; `size`: rows and columns of a crop's latent."""
    whole = [d.on(config.proxy).pixels for d in drawn]
    if config.damage is not None:
        whole = [_damaged(make, config.damage, np.random.default_rng(rng.integers(2**63))) for make in whole]
    places = torch.tensor([d.place for d in drawn], dtype=torch.float32)
    coarse = {"proxy": _encode_all(vae, whole), "places": places}
    if config.guide_scale is None:
        return coarse
    guide = _Guides(vae, config, upsampler)
    return coarse | {"guide": torch.cat([guide(z[None].to(vae.device).float(), size, d.place) for z, d in zip(coarse["proxy"], drawn)])}


class _Guides:
    """What `PixelInterpolation` makes of a proxy where a crop lies, with the upsampler as its rest if one is given.

    The whole frame's size follows from the crop's and its share of it: footage may be a little smaller than the grid.
    """

    def __init__(self, vae: AutoencoderKLWan, config: PoolConfig, upsampler: LatentUpsampler | None = None):
        self.encoder, self.decoder = StreamingEncoder(vae), StreamingDecoder(vae)
        self.config, self.upsampler = config, upsampler

    @torch.no_grad()
    def __call__(self, proxy: torch.Tensor, size: tuple[int, int], place: tuple[float, float, float, float]) -> torch.Tensor:
        """A proxy [1, C, F', h', w'] -> [1, C, F, *size] in half precision."""
        first, share = place[:2], place[2:]
        whole = tuple(round(length / part) for length, part in zip(size, share))  # latents of the whole frame, else not always a whole number
        encoded = tuple(between(*sides, self.config.guide_scale) for sides in zip(proxy.shape[-2:], whole))
        spans = tuple(_covering(start * side, part * side, side, AROUND // self.encoder.spatial_factor) for start, part, side in zip(first, share, encoded))
        if self.upsampler is None:
            z, whole = self._encoded(proxy, encoded, spans), encoded
        else:
            z, spans = self._upsampled(proxy, encoded, spans, whole)
        starts = [(start * side - span.start) / len(span) for start, side, span in zip(first, whole, spans)]
        sides = [part * side / len(span) for part, side, span in zip(share, whole, spans)]
        return sampled(z, torch.tensor([starts + sides]), size, MODE).half().cpu()

    def _encoded(self, proxy: torch.Tensor, size: tuple[int, int], spans: tuple[Span, Span]) -> torch.Tensor:
        """The proxy through pixels, `size` latent rows and columns of it, where the spans lie."""
        rate, unit = self.config.proxy.fps / self.config.grid.fps, self.encoder.spatial_factor
        pixels = EnlargedPixels(_decode(self.decoder, proxy), tuple(side * unit for side in size), MODE, self.encoder.device, rate)
        return _encode(self.encoder, pixels(range(self.config.length), Box(*spans).times(unit)))

    def _upsampled(
        self, proxy: torch.Tensor, size: tuple[int, int], spans: tuple[Span, Span], whole: tuple[int, int]
    ) -> tuple[torch.Tensor, tuple[Span, Span]]:
        """What the spans become on the way from `size` to `whole`, and where that stands; not through pixels where the stage starts from the proxy's latent."""
        if size != tuple(proxy.shape[-2:]) or self.config.proxy.fps != self.config.grid.fps:
            (y, x), (height, width) = spans, size
            proxy = F.pad(self._encoded(proxy, size, spans), (x.start, width - x.stop, y.start, height - y.stop, 0, 0), mode="replicate")
        if size == whole:  # the upsampler would change what is there already
            return proxy, tuple(Span(0, side) for side in whole)
        return upsample_part(self.upsampler, proxy, spans, whole)


def _covering(start: float, length: float, side: int, more: int) -> Span:
    """The whole latents that cover `length` of them from `start`, of an axis of `side`, and `more` on either side.

    The outermost are not those of the whole frame, whose encoder sees pixels beyond them, and interpolation looks at two beside each place.
    """
    return Span(max(math.floor(start + 1e-6) - more, 0), min(math.ceil(start + length - 1e-6) + more, side))


def _damaged(make: Callable[[], torch.Tensor], damage: AnchorDamage, rng: np.random.Generator) -> Callable[[], torch.Tensor]:
    return lambda: damage(make(), rng)


def _sharpened(make: Callable[[], torch.Tensor], config: PoolConfig) -> Callable[[], torch.Tensor]:
    return make if config.sharpen is None else lambda: config.sharpen(make())


def _encode_all(vae: AutoencoderKLWan, makers: list[Callable[[], torch.Tensor]]) -> torch.Tensor:
    """Latents of videos [T, H, W, 3], which are made when their turn comes, in half precision."""
    encoder = StreamingEncoder(vae)
    return torch.cat([_encode(encoder, make()).half().cpu() for make in makers])


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Pixel videos [B, T, H, W, 3] in [0, 1] -> normalised latents [B, C, F, h, w] in float32, the posterior's mean; equal to diffusers' (`nn.encoder`)."""
    encoder = StreamingEncoder(vae)
    return torch.cat([_encode(encoder, one) for one in video])


def _encode(encoder: StreamingEncoder, video: torch.Tensor) -> torch.Tensor:
    size = tuple(video.shape[1:3])
    return encoder.encode(
        lambda frames, box: video[frames.start : frames.stop, box.y.start : box.y.stop, box.x.start : box.x.stop], len(video), size, max(size)
    )


def decode(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """The inverse for small videos: [1, C, F, h, w] -> [T, H, W, 3] in [0, 1], equal to diffusers' (`nn.decoder`)."""
    return _decode(StreamingDecoder(vae), z)


def _decode(decoder: StreamingDecoder, z: torch.Tensor) -> torch.Tensor:
    first_caches, caches = {}, {}
    frame = Box.whole(*(side * decoder.spatial_factor for side in z.shape[-2:]))
    video = []
    for f, latent in enumerate(z.split(1, dim=2)):
        patch = decoder.first_part(latent, first=f == 0, caches=first_caches)
        video.append(decoder.second_part(patch, frame, first=f == 0, caches=caches).float().clone())
    return torch.cat(video)


def latent_statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, each [1, C, 1, 1, 1], from the VAE's configuration."""
    return tuple(torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
