"""Memory and time of measuring a 4K file: every core metric against a reference, peak memory of this process and of its readers.

    python benchmarks/eval_memory.py                    # 3840x2160, 161 frames
    python benchmarks/eval_memory.py --frames 9

The file is a world render, its reference the same at a lower quality. Writes results/eval_memory.{json,md}.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import psutil
from common import write

from muralist.data import world
from muralist.eval.measure import chosen, measure
from muralist.eval.source import open_source
from muralist.stages.encode import EncodeOptions, encode
from muralist.types import FrameChunk, Grid

CORE = (
    "psnr", "ssim", "hd_mse", "mhd_mse", "spectrum", "spectral_distance", "effective_resolution", "temporal_flickering", "dynamic_degree[blocks]",
    "world_adherence", "latent_mse[miniature]",
)  # fmt: skip
SCENE = world.parse("a red star moves right over grass, camera pans right", seed=3)


class Peak:
    """The highest memory of this process with its children, and of this process alone, in bytes, sampled ten times a second."""

    def __init__(self):
        self.all = self.own = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.1):
            own, children = process.memory_info().rss, 0
            for child in process.children(recursive=True):
                try:
                    children += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.own, self.all = max(self.own, own), max(self.all, own + children)


def make(path: Path, grid: Grid, crf: float) -> Path:
    """A file of the scene; its motion lasts the whole clip."""
    scene = world.Scene(**{name: getattr(SCENE, name) for name in ("colour", "shape", "motion", "ground", "camera", "seed")}, duration=grid.duration)
    frames = (FrameChunk(frame[None], k) for k, frame in enumerate(world.render(scene, grid)))
    return encode(frames, grid, path, EncodeOptions(crf=crf), metadata={"request": {"prompt": world.caption(scene)}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=161)
    parser.add_argument("--metrics", default=",".join(CORE))
    parser.add_argument("--files", type=Path, help="a folder that keeps the two files for the next run")
    options = parser.parse_args()
    grid = Grid(num_frames=options.frames, height=2160, width=3840)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files or Path(temporary)
        paths = [folder / name / f"{options.frames}.mp4" for name in ("files", "references")]
        for path, crf in zip(paths, (16, 26)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                make(path, grid, crf)
        source, reference = map(open_source, paths)
        started = time.time()
        with Peak() as peak:
            report = measure([source], chosen(options.metrics.split(","), reference=True), references=[reference])
        seconds = time.time() - started
    print(report.csv())
    row = {
        "frames": options.frames,
        "metrics": len(report.rows),
        "skipped": sum(row.skipped is not None for row in report.rows),
        "peak GB": peak.own / 1e9,
        "peak GB with readers": peak.all / 1e9,
        "seconds": seconds,
        "seconds a frame": seconds / options.frames,
    }
    print(row)
    name = "eval_memory" + ("" if options.frames == 161 else f"_{options.frames}")
    write(name, [row], note=f"3840x2160 H.265 10 bits against a reference: {', '.join(options.metrics.split(','))}")


if __name__ == "__main__":
    main()
