"""How much of a whole run is neither transformer nor VAE: a miniature video of 29 frames, in a process of its own.

    python benchmarks/overhead.py [--size 1920x1080 3840x2160] [--ahead 0 8]     minutes; frames decoded while others are compressed

Wall time counts from the start of the process; `start`: until the pipeline stands, imports included; `store`: what is written so that a killed
run goes on. Results go to results/overhead.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

PROMPT = "a red ball moves right over grass"
GOAL = 1.15


class Watch:
    """Seconds spent inside functions; a device is waited for, since its work goes on when a function returns."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def over(self, owner: Any, method: str, name: str) -> None:
        """Count the method of a class under a name."""
        import torch

        inner = getattr(owner, method)

        @wraps(inner)
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = inner(*arguments, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        setattr(owner, method, timed)


def child(ahead: int, size: tuple[int, int], folder: Path) -> dict[str, Any]:
    """One video, painted by the command's own way."""
    started = time.perf_counter()
    from muralist import load, pipeline
    from muralist.nn.decoder import StreamingDecoder
    from muralist.nn.encoder import StreamingEncoder
    from muralist.nn.transformer import MuralTransformer
    from muralist.store import atomic
    from muralist.store.video_write import SegmentEncoder

    watch, pipe = Watch(), load()
    watch.seconds["start"] = time.perf_counter() - started
    for owner, method, name in (
        (MuralTransformer, "forward", "transformer"),
        (StreamingDecoder, "first_part", "decode"),
        (StreamingDecoder, "second_part", "decode"),
        (StreamingEncoder, "first_part", "vae_encode"),
        (StreamingEncoder, "second_part", "vae_encode"),
        (SegmentEncoder, "add_planes", "compress"),
        (SegmentEncoder, "finish", "compress"),
        *((atomic, name, "store") for name in ("open_new", "write", "sync", "publish", "remove")),
    ):
        watch.over(owner, method, name)
    device = pipe.base.device.type
    pipeline.AHEAD[device] = ahead
    with pipe(PROMPT, width=size[0], height=size[1], num_frames=29, seed=0) as video:
        video.save(folder / "out.mp4")
    return {"size": "x".join(map(str, size)), "ahead": ahead, "device": device, **{f"{name}_s": seconds for name, seconds in watch.seconds.items()}}


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--size", type=_size, nargs="+", default=[(1920, 1080), (3840, 2160)])
    parser.add_argument("--child", action="store_true")
    options, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        if options.child:
            print(json.dumps(child(options.ahead[0], options.size[0], Path(folder))))
            return
    for (width, height), ahead in product(options.size, options.ahead):
        started = time.perf_counter()
        one = ["--child", "--ahead", str(ahead), "--size", f"{width}x{height}"]
        done = subprocess.run([sys.executable, __file__, *one], check=True, stdout=subprocess.PIPE, text=True)
        wall, row = time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])
        networks = row["transformer_s"] + row["decode_s"]
        ratios = {"wall / (transformer + decode)": wall / networks, "wall / (transformer + VAE)": wall / (networks + row["vae_encode_s"])}
        rows.append(row | {"wall_s": wall} | ratios)
        print(rows[-1], flush=True)
    from common import write

    write("overhead", rows, f"miniature, cascade, 29 frames; the goal is {GOAL}")


if __name__ == "__main__":
    main()
