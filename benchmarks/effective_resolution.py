"""Is true 4K told from enlarged? True renders of the world against renders of 720, 1080 and 1440 rows enlarged to 2160.

    python benchmarks/effective_resolution.py --count 100

Each case is a scene, a size and a kernel (bicubic, Lanczos), written as H.265 at the default quality and read back, so that the codec has
its say. A case is right if the effective height is nearer to the true one, by ratio, than to any other. Writes
results/effective_resolution.{json,md}.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import write
from PIL import Image

from muralist.data import world
from muralist.eval.metrics.resolution import EffectiveResolution
from muralist.eval.source import open_source
from muralist.stages.encode import EncodeOptions, encode
from muralist.types import FrameChunk, Grid

HEIGHTS = (720, 1080, 1440, 2160)
KERNELS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
TARGET = (2160, 3840)


def cases(count: int, seed: int = 0) -> Iterator[tuple[world.Scene, int, str]]:
    """(scene, height rendered, kernel): half of them true, the rest spread over the six ways to enlarge; every ground in turn."""
    rng = np.random.default_rng(seed)
    ways = itertools.cycle(itertools.product(HEIGHTS[:-1], KERNELS))
    grounds = itertools.cycle(world.GROUNDS)
    for number in range(count):
        scene = world.sample_scene(rng)
        scene = world.Scene(colour=scene.colour, shape=scene.shape, motion=scene.motion, ground=next(grounds), camera=scene.camera, seed=scene.seed)
        yield (scene, TARGET[0], "none") if number % 2 else (scene, *next(ways))


def frames(scene: world.Scene, height: int, kernel: str, numbers: range) -> Iterator[torch.Tensor]:
    """Frames [2160, 3840, 3] of a render of `height` rows, enlarged where need be."""
    for frame in world.render(scene, Grid(num_frames=29, height=height, width=height * 16 // 9), frames=numbers):
        yield frame if height == TARGET[0] else enlarged(frame, TARGET, kernel)


def enlarged(frame: torch.Tensor, size: tuple[int, int], kernel: str) -> torch.Tensor:
    """[H, W, 3] enlarged by Pillow, in float."""
    channels = (Image.fromarray(channel.contiguous().numpy(), mode="F") for channel in frame.unbind(-1))
    return torch.stack([torch.from_numpy(np.asarray(c.resize(size[::-1], KERNELS[kernel])).copy()) for c in channels], dim=-1).clamp_(0, 1)


def measured(video: Iterator[torch.Tensor], length: int, options: EncodeOptions | None = None) -> float:
    """Effective height of frames after a codec."""
    grid = Grid(num_frames=length, height=TARGET[0], width=TARGET[1])
    with tempfile.TemporaryDirectory() as folder:
        path = encode((FrameChunk(frame[None], k) for k, frame in enumerate(video)), grid, Path(folder) / "a.mp4", options)
        meter = EffectiveResolution(length)
        for frame in open_source(path).frames():
            meter.add(frame)
    return meter.result()["effective_resolution"]


def nearest(rows: float) -> int:
    """The height of HEIGHTS nearest by ratio."""
    return min(HEIGHTS, key=lambda height: abs(np.log(max(rows, 1) / height)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--crf", type=float, default=16)
    options = parser.parse_args()
    found: dict[tuple[int, str], list[float]] = {}
    for scene, height, kernel in cases(options.count):
        video = frames(scene, height, kernel, range(13, 13 + options.frames))
        rows = measured(video, options.frames, EncodeOptions(crf=options.crf))
        found.setdefault((height, kernel), []).append(rows)
        print(f"{world.caption(scene)}: {height} {kernel} -> {rows:.0f}{'' if nearest(rows) == height else '   WRONG'}", flush=True)
    rows = [
        {"rendered": height, "kernel": kernel, "cases": len(v), "right": sum(nearest(x) == height for x in v), "lowest": min(v), "highest": max(v)}
        for (height, kernel), v in sorted(found.items())
    ]
    right = sum(row["right"] for row in rows)
    name = "effective_resolution" + (f"_crf{options.crf:g}" if options.crf != 16 else "")
    write(name, rows, note=f"{right} of {options.count} right; {options.frames} frames a case, H.265 10 bits, CRF {options.crf:g}; heights in rows")


if __name__ == "__main__":
    main()
