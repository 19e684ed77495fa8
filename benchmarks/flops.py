"""FLOPs of `plan` against `torch.utils.flop_counter`: transformer and both decoders; ratio counted / planned, goal 0.98 to 1.02.

    OMP_NUM_THREADS=1 python benchmarks/flops.py            # about a minute; writes results/flops.{json,md}

Real configurations (1.3B with the Wan2.1 VAE, 5B with the Wan2.2 VAE), shapes on PyTorch's meta device: no weights, no arithmetic. The
streaming decoders run on the CPU with narrow channels, because their code reads an index.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from common import write
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from muralist.bench.wan import SIZES
from muralist.cost import transformer, vae
from muralist.nn.attention import BranchedWindows, CloseRemote, WindowAttention
from muralist.nn.branches import attach_branches
from muralist.nn.decoder import StreamingDecoder
from muralist.nn.kinds import hierarchical
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.sampling import flow
from muralist.tiling import tile_boxes

TEXT = 512
LAYERS = 2  # all layers of a kind are alike; two, so that both partitions of shifted windows occur
GRAFTS = {
    "full attention, stock": Graft(),
    "full attention, chunks of 500": Graft(token_chunk=500),
    "windows 2x4x5, shifted": Graft(attention=WindowAttention((2, 4, 5)), token_chunk=500),
    "windows 3x4x4, not shifted": Graft(attention=WindowAttention((3, 4, 4), shift=False), token_chunk=500),
    "close and remote windows": Graft(attention=CloseRemote(tokens=80), token_chunk=500),
}
BRANCHED = Graft(attention=BranchedWindows(4, branches=("coarse", "whole")), token_chunk=500)
FORMS = ("separable", "depthwise", "dense")  # of what restores a branch


def cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def counted(work: Callable[[], object]) -> int:
    """PyTorch's count; it does not know the CPU's attention kernel."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention}) as counter:
        work()
    return counter.get_total_flops()


def row(what: str, shape: tuple[int, ...], planned: int, measured: int) -> dict[str, Any]:
    return {
        "what": what,
        "shape": "x".join(map(str, shape)),
        "planned GFLOP": planned / 1e9,
        "counted GFLOP": measured / 1e9,
        "counted / planned": round(measured / planned, 5),
    }


def transformer_rows(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    config = config | {"num_layers": LAYERS}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    kinds = [(kind, graft, None) for kind, graft in GRAFTS.items()]
    kinds += [(f"branches, {form}", BRANCHED, hierarchical(width, LAYERS, restoring=form)) for form in FORMS]
    rows = []
    for shape, (kind, graft, branches) in product(((4, 8, 10), (5, 11, 13)), kinds):
        with torch.device("meta"):
            model = MuralTransformer(**config).configure(graft)
            if branches is not None:
                attach_branches(model.blocks, branches)
            latents = torch.empty(1, config["in_channels"], shape[0], 2 * shape[1], 2 * shape[2])
            text = torch.empty(1, TEXT, config["text_dim"])
        field = lambda z, sigma, model=model, text=text: model(z, torch.ones(1, device="meta"), text, return_dict=False)[0]  # noqa: E731
        guided = flow.guided(field, field, 5.0)
        one = transformer.forward(transformer.Dimensions.of(config), graft, shape, TEXT, branches).flops
        rows.append(row(f"{name}, {kind}", shape, one, counted(lambda field=field, z=latents: field(z, 1.0))))
        rows.append(row(f"{name}, {kind}, guided", shape, 2 * one, counted(lambda guided=guided, z=latents: guided(z, 1.0))))
    return rows


def diffusers_rows(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    with torch.device("meta"):
        model = AutoencoderKLWan(**config)
    shape, rows = (2, 11, 18), []
    z = torch.empty(1, config["z_dim"], *shape, device="meta")
    rows.append(row(f"{name}, diffusers", shape, vae.diffusers_decode(config, shape).flops, counted(lambda: model.decode(z))))
    model.enable_tiling(128, 128, 96, 96)
    planned = vae.diffusers_decode(config, shape, tile=128, stride=96).flops
    return [*rows, row(f"{name}, diffusers, tiles of 128 every 96", shape, planned, counted(lambda: model.decode(z)))]


def streaming_rows(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    config = config | {"base_dim": 16, "decoder_base_dim": 16}
    shape, rows = (2, 11, 18), []
    z = torch.zeros(1, config["z_dim"], *shape)
    for dtype in (torch.float32, torch.bfloat16):
        for whole_blocks, tile in ((0, 4), (1, 6), (0, 18)):
            decoder = StreamingDecoder(AutoencoderKLWan(**config).to(dtype), whole_blocks)
            side = decoder.spatial_factor
            tiles = tile_boxes(shape[1] * side, shape[2] * side, tile * side, side)
            planned = vae.decode(vae.decoder(config, quick=dtype == torch.float32, whole_blocks=whole_blocks), shape, tiles).flops
            what = f"{name} (16 channels), streaming {str(dtype)[6:]}, {len(tiles)} tiles, {whole_blocks} whole blocks"
            rows.append(row(what, shape, planned, counted(lambda d=decoder, t=tiles: stream(d, z, t))))
    return rows


def stream(decoder: StreamingDecoder, z: torch.Tensor, tiles: tuple) -> None:
    whole, caches = {}, [{} for _ in tiles]
    for k in range(z.shape[2]):
        patch = decoder.first_part(z[:, :, k : k + 1], first=k == 0, caches=whole)
        for tile, cache in zip(tiles, caches):
            decoder.second_part(patch, tile, first=k == 0, caches=cache)


def main() -> None:
    rows = []
    for name, size in SIZES.items():
        rows += transformer_rows(name, size.transformer) + diffusers_rows(f"{name}'s VAE", size.vae) + streaming_rows(f"{name}'s VAE", size.vae)
    ratios = [line["counted / planned"] for line in rows]
    write("flops", rows, f"counted / planned: {min(ratios):.5f} to {max(ratios):.5f} over {len(rows)} cases; goal 0.98 to 1.02")
    print(f"{min(ratios):.5f} to {max(ratios):.5f} over {len(rows)} cases")


if __name__ == "__main__":
    main()
