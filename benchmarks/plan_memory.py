"""Peak memory of a forward, of a decode and of an enlargement, through pixels or learned, against what the plan says, each case in a process of its own.

    python benchmarks/plan_memory.py            # about seven minutes on one core
    python benchmarks/plan_memory.py --only 3   # every third case

Measured is the highest resident memory less that before the model was made (libraries imported and warm). The plan's figure is that of its stage less
the process itself. Writes results/plan_memory.{json,md}.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import write
from diffusers import AutoencoderKLWan

from muralist.cost import transformer, upsampling
from muralist.cost.machine import Machine
from muralist.cost.stages import through_pixels
from muralist.nn.attention import WindowAttention
from muralist.nn.heap import return_large_blocks
from muralist.nn.latent_upsampler import LatentUpsampler, miniature
from muralist.nn.latent_upsampler.tiles import upsample_in_tiles
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.stages.decode import TileMajor, TimeMajor, decode, decode_bytes
from muralist.stages.upsample import LearnedUpsampling, PixelInterpolation, upsample
from muralist.types import Geometry, Grid, LatentVideo

GRAFTS = {
    "stock": {},
    "full": {"token_chunk": 2048},
    "windows": {"attention": (5, 6, 8), "token_chunk": 2048},
    "windows, 8192": {"attention": (5, 6, 8), "token_chunk": 8192},
}
FORWARDS = [  # width, heads, feed-forward, graft, token grid
    (768, 6, 4480, "stock", (3, 20, 30)), (512, 4, 2048, "stock", (3, 24, 40)), (512, 4, 2048, "full", (5, 24, 30)), (768, 6, 4480, "full", (3, 24, 40)),
    (512, 4, 2048, "windows", (5, 30, 40)), (512, 4, 2048, "windows", (5, 40, 60)), (512, 4, 2048, "windows, 8192", (5, 40, 60)),
    (768, 6, 4480, "windows", (5, 24, 40)),
]  # fmt: skip
DECODES = [  # flavour, base width, frames, width, height, order, tile
    ("2.1", 32, 5, 448, 256, "time", 1024), ("2.1", 32, 5, 640, 384, "time", 512), ("2.1", 32, 9, 448, 256, "tile", 256),
    ("2.1", 48, 5, 448, 256, "tile", 256), ("2.2", 32, 5, 640, 384, "time", 1024), ("2.2", 32, 5, 960, 512, "time", 512),
    ("2.2", 32, 9, 640, 384, "tile", 256), ("2.2", 64, 5, 448, 256, "tile", 256),
]  # fmt: skip
ENLARGEMENTS = [  # flavour, base width, frames, the proxy's width and height, times larger, tile
    ("2.1", 32, 5, 320, 192, 2, 768), ("2.1", 32, 5, 320, 192, 2, 256), ("2.1", 96, 5, 224, 128, 2, 256), ("2.1", 16, 9, 448, 256, 2, 64),
    ("2.2", 32, 5, 448, 256, 2, 768), ("2.2", 32, 5, 448, 256, 2, 256), ("2.2", 96, 5, 256, 128, 2, 256), ("2.2", 16, 29, 640, 384, 2, 128),
]  # fmt: skip
LEARNED = [  # latent frames, rows and columns, and the larger rows and columns
    (31, 60, 106, 68, 120), (8, 16, 28, 68, 120), (21, 34, 60, 68, 120), (13, 30, 53, 34, 60), (5, 16, 28, 136, 240),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A forward, a decode or an enlargement, by its place in the lists above."""

    kind: str
    number: int

    def measure(self) -> dict[str, Any]:
        """In this process: the row of the case."""
        return_large_blocks()
        return {"forward": _forward, "decode": _decode, "upsample": _upsample, "learned": _learned}[self.kind](self.number)

    def apart(self) -> dict[str, Any]:
        """In a process of its own: what another case has left would count as there already. Forked, so that libraries are imported once."""
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            return pool.apply(self.measure)


LISTS = {"forward": FORWARDS, "decode": DECODES, "upsample": ENLARGEMENTS, "learned": LEARNED}
CASES = [Case(kind, n) for kind, cases in LISTS.items() for n in range(len(cases))]


class Growth:
    """Bytes by which resident memory rises above what it is at the start, at most, by the kernel's own mark: a thread that looks now and then is late."""

    def __enter__(self) -> Growth:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the warm-up has freed would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the mark back to what is resident now
        self._before = self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._mark() - self._before

    @staticmethod
    def _mark() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


def _forward(number: int) -> dict[str, Any]:
    width, heads, ffn, name, shape = FORWARDS[number]
    given = GRAFTS[name]
    graft = Graft(**given | ({"attention": WindowAttention(given["attention"])} if "attention" in given else {}))
    config = {"num_attention_heads": heads, "attention_head_dim": width // heads, "ffn_dim": ffn, "num_layers": 2, "text_dim": 64, "freq_dim": 64}

    def run(token_shape: tuple[int, int, int]) -> None:
        model = MuralTransformer(**config, in_channels=16, out_channels=16, patch_size=(1, 2, 2)).eval().configure(graft)
        f, y, x = token_shape
        with torch.inference_mode():
            model(torch.zeros(1, 16, f, 2 * y, 2 * x), torch.ones(1), torch.zeros(1, 16, 64))

    run((2, 6, 8))
    started = time.monotonic()
    with Growth() as growth:
        run(shape)
    size = transformer.Dimensions.of(config | {"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "cross_attn_norm": True})
    said = 4 * transformer.parameters(size) + transformer.live_bytes(size, graft, shape, 4)
    tokens = "x".join(map(str, shape))
    return _row("forward", f"{name}, {width} wide, {tokens} tokens", said, growth.bytes, time.monotonic() - started)


def _decode(number: int) -> dict[str, Any]:
    flavour, base, frames, width, height, order, tile = DECODES[number]
    config = _vae_config(flavour, base)
    plan = (TimeMajor if order == "time" else TileMajor)(tile=tile)

    def run(grid: Grid) -> int:
        factor = config["scale_factor_spatial"]
        z = torch.zeros(1, 16, (grid.num_frames - 1) // 4 + 1, grid.height // factor, grid.width // factor)
        vae = AutoencoderKLWan(**config).eval().requires_grad_(False)
        with torch.inference_mode():
            for _ in decode(LatentVideo(z, grid), vae, plan):
                pass
        return decode_bytes(vae, tuple(z.shape[1:]), plan).peak + z.nbytes

    run(Grid(num_frames=5, height=64, width=64))
    started = time.monotonic()
    with Growth() as growth:
        said = run(Grid(num_frames=frames, height=height, width=width))
    return _row("decode", f"Wan{flavour}, {base} wide, {width}x{height} x{frames}, {order}, tile {tile}", said, growth.bytes, time.monotonic() - started)


def _upsample(number: int) -> dict[str, Any]:
    """The stage in full: the proxy is decoded, its enlarged pixels are encoded."""
    flavour, base, frames, width, height, times, tile = ENLARGEMENTS[number]
    config, part = _vae_config(flavour, base), PixelInterpolation(tile=tile)
    machine = replace(Machine.of("24GB"), device_bytes=None, dtype="float32")

    def run(small: Grid) -> int:
        vae = AutoencoderKLWan(**config).eval().requires_grad_(False)
        geometry = Geometry(spatial_factor=config["scale_factor_spatial"], temporal_factor=4, channels=16, patch=(1, 2, 2))
        large = replace(small, height=small.height * times, width=small.width * times)
        proxy = LatentVideo(torch.zeros(1, *geometry.latent_shape(small)), small)
        with torch.inference_mode():
            z = upsample(proxy, large, SimpleNamespace(info=SimpleNamespace(geometry=geometry), vae=lambda: vae), part).z
        return through_pixels(dict(vae.config), small, large.num_frames, (large.height, large.width), part, machine).memory_bytes + z.nbytes

    run(Grid(num_frames=5, height=64, width=64))
    started = time.monotonic()
    with Growth() as growth:
        said = run(Grid(num_frames=frames, height=height, width=width))
    case = f"Wan{flavour}, {base} wide, {width}x{height} x{frames} enlarged {times} times, tile {tile}"
    return _row("upsample", case, said, growth.bytes, time.monotonic() - started)


def _learned(number: int) -> dict[str, Any]:
    """The embedded base's upsampler, with random weights, on latents of 48 channels."""
    frames, height, width, *size = LEARNED[number]
    config, part = miniature(), LearnedUpsampling()

    def run(shape: tuple[int, int, int], size: tuple[int, int]) -> int:
        z, network = torch.zeros(1, config.channels, *shape), LatentUpsampler(config).eval()
        with torch.inference_mode():
            upsample_in_tiles(network, z, size, part.tile, part.overlap)
        need = upsampling.measure(config, part, shape, (shape[0], *size))
        return sum(parameter.nbytes for parameter in network.parameters()) + need.live_bytes

    run((2, 8, 8), (9, 9))
    started = time.monotonic()
    with Growth() as growth:
        said = run((frames, height, width), tuple(size))
    return _row("learned", f"{frames} latent frames, {width}x{height} to {size[1]}x{size[0]}", said, growth.bytes, time.monotonic() - started)


def _vae_config(flavour: str, base: int) -> dict[str, Any]:
    config = {"base_dim": base, "z_dim": 16, "scale_factor_spatial": 8}
    if flavour == "2.2":
        config |= {"decoder_base_dim": base, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    return config


def _row(kind: str, case: str, said: int, measured: int, seconds: float) -> dict[str, Any]:
    return {"stage": kind, "case": case, "plan MB": said / 1e6, "measured MB": measured / 1e6, "plan / measured": said / measured, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, default=1, help="every n-th case")
    options = parser.parse_args()
    rows = []
    for case in CASES[:: options.only]:
        rows.append(case.apart())
        print(rows[-1], flush=True)
    if options.only == 1:
        write("plan_memory", rows, note="Resident memory above that of the process with its libraries warm, against the plan's stage less the process.")


if __name__ == "__main__":
    main()
