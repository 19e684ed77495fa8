"""Exact tiled decode at the real width of Wan2.1's VAE (base_dim 96, 127 M parameters) against diffusers' untiled decode.

    python benchmarks/decode_real.py            512x896, 5 frames, float32: minutes

Random weights. Each decode runs in a process of its own, so that peak memory (`ru_maxrss`) is its own; the frames are compared afterwards.
Results go to results/decode-real.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("diffusers, untiled", "ours, time-major", "ours, tile-major")


def build(num_frames: int, height: int, width: int):
    """(vae, latents [1, 16, F, h, w]) with fixed random values."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan().eval().requires_grad_(False)  # diffusers' defaults are Wan2.1's
    return vae, torch.randn(1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8)


def decoded(way: str, vae, z, size: tuple[int, int, int], tile: int):
    """Frames [T, H, W, 3] in [0, 1]."""
    import torch

    from muralist.stages.decode import TileMajor, TimeMajor, decode
    from muralist.types import Grid, LatentVideo

    if way.startswith("ours"):
        grid = Grid(num_frames=size[0], height=size[1], width=size[2])
        plan = TimeMajor(tile=tile) if "time" in way else TileMajor(tile=tile)
        return torch.cat([chunk.frames for chunk in decode(LatentVideo(z, grid), vae, plan)])
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.decode(z * std + mean).sample[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp_(0, 1)


def child(way: str, num_frames: int, height: int, width: int, tile: int, path: str) -> dict:
    """One decode: seconds and peak memory; the frames go to `path`."""
    import numpy as np
    import torch

    vae, z = build(num_frames, height, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        frames = decoded(way, vae, z, (num_frames, height, width), tile)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.save(path, frames.numpy())
    return {"way": way, "seconds": seconds, "cpu_s": cpu, "peak_gb": peak / 1e9, "before_gb": before / 1e9, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "PATH"))
    parser.add_argument("--size", type=int, nargs=3, default=(5, 512, 896), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--tile", type=int, default=128)
    options = parser.parse_args()
    if options.child:
        way, path = options.child
        print(json.dumps(child(way, *options.size, options.tile, path)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report(measured(Path(folder), options), options)


def measured(folder: Path, options: argparse.Namespace) -> list[dict]:
    import numpy as np

    rows, sizes = [], [str(n) for n in options.size]
    for i, way in enumerate(WAYS):
        path = folder / f"{i}.npy"
        command = [sys.executable, __file__, "--child", way, str(path), "--size", *sizes, "--tile", str(options.tile)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        first, frames = np.load(folder / "0.npy", mmap_mode="r"), np.load(path, mmap_mode="r")
        rows[-1] |= {"decode_of_untiled": added(rows[-1]) / added(rows[0]), "largest_difference": float(np.abs(frames - first).max())}
        print(rows[-1], flush=True)
    return rows


def added(row: dict) -> float:
    """Peak memory of the decode above what the process held before it (libraries and weights), in GB."""
    return row["peak_gb"] - row["before_gb"]


def report(rows: list[dict], options: argparse.Namespace) -> None:
    from common import write

    frames, height, width = options.size
    write("decode-real", rows, f"Wan2.1's VAE at base_dim 96, random weights, {width}x{height}, {frames} frames, float32, tiles of {options.tile} pixels")


if __name__ == "__main__":
    main()
