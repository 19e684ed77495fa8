"""Decode: ours against diffusers, untiled and with `enable_tiling()`, in one run; peak memory against length; 4K rate.

    python benchmarks/decode.py            the comparison and the memory ratio (minutes)
    python benchmarks/decode.py --uhd 29   also a 3840x2176 decode of that many frames

Random weights of the embedded VAE's shape: speed does not depend on their values. Every measurement runs in its own process, so that peak memory
(`ru_maxrss`) is its own. On a busy machine compare CPU seconds, not wall seconds. Results go to results/decode.md and .json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WAYS = ("ours, time-major", "ours, tile-major", "diffusers, untiled", "diffusers, enable_tiling")


def build(num_frames: int, height: int, width: int):
    """(vae, latents) with fixed random values."""
    import torch
    from diffusers import AutoencoderKLWan

    from muralist.base_info import inspect_base

    torch.manual_seed(0)
    unscaled = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}  # ours scales latents back by these, diffusers leaves that to its pipeline
    vae = AutoencoderKLWan.from_config(inspect_base("miniature").vae_config | unscaled).eval().requires_grad_(False)
    return vae, torch.randn(1, 48, (num_frames - 1) // 4 + 1, height // 16, width // 16)


def decode_ours(vae, z, grid, plan) -> list:
    """A thin sample of every chunk, so that the frames themselves can be dropped as an encoder would."""
    from muralist.stages.decode import decode
    from muralist.types import LatentVideo

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if type(plan).__name__ == "TileMajor" else None
        return [chunk.frames[:, ::7, ::7].clone() for chunk in decode(LatentVideo(z, grid), vae, plan, scratch=folder)]


def child(way: str, num_frames: int, height: int, width: int, tile: int) -> dict:
    """One decode: seconds of wall and CPU, peak memory, and the frames' sample as a file."""
    import torch

    from muralist.stages.decode import TileMajor, TimeMajor
    from muralist.types import Grid

    vae, z = build(num_frames, height, width)
    base = peak_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    if way.startswith("ours"):
        plan = TimeMajor(tile=tile) if "time" in way else TileMajor(tile=tile)
        sample = torch.cat(decode_ours(vae, z, Grid(num_frames=num_frames, height=height, width=width), plan))
    else:
        if "tiling" in way:
            vae.enable_tiling()
        sample = (vae.decode(z).sample[0].permute(1, 2, 3, 0) / 2 + 0.5)[:, ::7, ::7].clone()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    path = Path(tempfile.gettempdir()) / f"muralist-decode-{WAYS.index(way)}.npy"
    import numpy as np

    np.save(path, sample.numpy())
    megapixels = num_frames * height * width / 1e6
    return dict(way=way, frames=num_frames, height=height, width=width, tile=tile, wall_s=wall, cpu_s=cpu, mp_per_cpu_s=megapixels / cpu,
                mp_per_s=megapixels / wall, peak_gb=peak_bytes() / 1e9, before_gb=base / 1e9, threads=torch.get_num_threads(), sample=str(path))  # fmt: skip


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, num_frames: int, height: int, width: int, tile: int = 1024) -> dict:
    """`child` in a process of its own."""
    numbers = [str(n) for n in (num_frames, height, width, tile)]
    done = subprocess.run([sys.executable, __file__, "--child", way, *numbers], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{way:26} {num_frames}x{height}x{width}: {result['cpu_s']:.1f} CPU s, {result['mp_per_cpu_s']:.2f} MP/CPU s, peak {result['peak_gb']:.2f} GB",
        flush=True,
    )
    return result


def compare(data: dict, height: int, width: int) -> None:
    """All four ways on one clip: times, and the largest difference from diffusers untiled."""
    import numpy as np

    results = [measure(way, 9, height, width, 512) for way in WAYS]
    samples = [np.load(result.pop("sample")) for result in results]
    for way, sample in zip(WAYS, samples):
        data["ratios"][f"largest difference from diffusers untiled, {way}"] = float(abs(sample - samples[2]).max())
    data["ratios"]["CPU time, diffusers enable_tiling / ours time-major"] = results[3]["cpu_s"] / results[0]["cpu_s"]
    data["ratios"]["CPU time, ours time-major / diffusers untiled"] = results[0]["cpu_s"] / results[2]["cpu_s"]
    data["results"] += results
    save(data)


def lengths(data: dict, counts: tuple[int, int], height: int, width: int) -> None:
    """Peak memory of a long clip over that of a short one."""
    for way in (*WAYS[:2], WAYS[3]):
        pair = [measure(way, count, height, width, 256) for count in counts]
        data["ratios"][f"peak memory, {counts[1]} / {counts[0]} frames, {way}"] = pair[1]["peak_gb"] / pair[0]["peak_gb"]
        data["results"] += pair
        save(data)


def save(data: dict) -> None:
    """After every part: a run that is stopped keeps what it measured."""
    for result in data["results"]:
        result.pop("sample", None)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decode.json").write_text(json.dumps(data, indent=1) + "\n")
    (RESULTS / "decode.md").write_text(report(data))


def versions() -> dict[str, str]:
    import diffusers
    import torch

    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return dict(machine=f"{platform.machine()} {model}", python=platform.python_version(), torch=torch.__version__, diffusers=diffusers.__version__,
                date=date.today().isoformat())  # fmt: skip


def report(data: dict) -> str:
    lines = ["# Decode", "", ", ".join(f"{key} {value}" for key, value in data["versions"].items()), "", data["note"], ""]
    lines += ["| way | frames | size | tile | CPU s | wall s | MP per CPU s | MP per s | peak GB | threads |", "|---|---|---|---|---|---|---|---|---|---|"]
    for r in data["results"]:
        lines.append(
            f"| {r['way']} | {r['frames']} | {r['width']}x{r['height']} | {r['tile']} | {r['cpu_s']:.1f} | {r['wall_s']:.1f} | {r['mp_per_cpu_s']:.2f} "
            f"| {r['mp_per_s']:.2f} | {r['peak_gb']:.2f} | {r['threads']} |"
        )
    lines += ["", *(f"- {name}: {value:.3g}" for name, value in data["ratios"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=5)
    parser.add_argument("--uhd", type=int, default=0, help="frames of a 3840x2176 decode")
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], *map(int, options.child[1:]))))
        return
    data = dict(versions=versions(), note=options.note, results=[], ratios={})
    compare(data, 512, 896)
    lengths(data, (17, 65), 256, 448)
    if options.uhd:
        data["results"] += [measure(way, options.uhd, 2176, 3840) for way in WAYS[:2]]
    save(data)
    print(report(data))


if __name__ == "__main__":
    main()
