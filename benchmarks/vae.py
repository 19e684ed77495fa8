"""How well the embedded VAE rebuilds what it has never seen: held-out scenes at 448x256, crops of 4K renders, and crops through which the object moves.

    python benchmarks/vae.py [--model DIR] [--sheet vae.png]

Writes results/vae.{json,md}; the sheet shows original and rebuilt crops side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import write
from PIL import Image

from muralist.base_info import inspect_base
from muralist.data import latents, world
from muralist.train.miniature import load_vae
from muralist.train.objectives.reconstruction import band_error
from muralist.types import Grid

SMALL = Grid(num_frames=29, height=256, width=448)
LARGE = Grid(num_frames=29, height=2176, width=3840)
HD = Grid(num_frames=29, height=1088, width=1920)
START = 9  # frames of a clip in which a causal VAE still meets its beginning
OWN, EDGE, MOVING, WHOLE = "448x256", "4K crops", "4K crops, moving", "1080p crops, moving"


def cases(kind: str, count: int):
    """Held-out scenes: whole clips at 448x256; at 4K nine frames of a crop of 896x512 over the object's edge, or where what moves is in the middle of its
    way; at 1080p that for whole clips, of which an encoder and a decoder see more than one clip's start."""
    rng = np.random.default_rng(5)
    while count:
        scene = world.sample_scene(rng, held_out=True)
        if kind in (MOVING, WHOLE) and scene.motion == "stays still":
            continue
        count -= 1
        if kind == OWN:
            yield world.render_clip(scene, SMALL)
        elif kind == EDGE:
            x, y, reach = world.object_on(scene, LARGE, 0)
            yield around(scene, LARGE, x - reach, y, range(9))
        elif kind == MOVING:
            yield around(scene, LARGE, *world.object_on(scene, LARGE, 12)[:2], range(8, 17))
        else:
            yield around(scene, HD, *world.object_on(scene, HD, 14)[:2], range(29))


def around(scene: world.Scene, grid: Grid, x: float, y: float, frames: range) -> torch.Tensor:
    crop = world.Crop(int(np.clip(y - 256, 0, grid.height - 512)), int(np.clip(x - 448, 0, grid.width - 896)), 512, 896)
    return world.render_clip(scene, grid, crop=crop, frames=frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--sheet", type=Path, default=Path("vae.png"))
    options = parser.parse_args()
    vae = load_vae(inspect_base(options.model).folder / "vae").eval()
    rows, sheet = [], []
    for kind in (OWN, EDGE, MOVING, WHOLE):
        errors, bands, frames, later = [], [], [], []
        for index, video in enumerate(cases(kind, options.count)):
            rebuilt = latents.decode(vae, latents.encode(vae, video[None]))
            square = (rebuilt - video).square()
            errors.append(decibels(square.mean()))
            frames.append(min(map(decibels, square.mean(dim=(1, 2, 3)))))
            later += [decibels(square[START:].mean())] if len(square) > START else []
            bands.append(band_error(rebuilt.permute(3, 0, 1, 2)[None] * 2, video.permute(3, 0, 1, 2)[None] * 2).item())
            if index < 5:
                pair = torch.cat([video[5], rebuilt[5]], dim=1)
                sheet.append(pair if kind == OWN else torch.nn.functional.avg_pool2d(pair.permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0))
        means = {"psnr_db": float(np.mean(errors)), "worst_db": min(errors), "worst_frames_db": float(np.mean(frames))}
        means["later_db"] = float(np.mean(later)) if later else None
        rows.append({"what": kind, "clips": options.count, **means, "upper_octaves_db": 10 * float(np.mean(bands)) / np.log(10)})
    print(rows)
    what = f"worst_frames_db: mean over clips of their worst frame; later_db: frames from {START} on"
    what += "; upper_octaves_db: mean difference of log power, two finest octaves"
    write("vae", rows, note=f"Held-out scenes through the embedded VAE in float32, 9 frames of 4K, else 29; {what}")
    Image.fromarray((torch.cat(sheet) * 255).byte().numpy()).save(options.sheet)


def decibels(square: torch.Tensor) -> float:
    return -10 * torch.log10(square).item()


if __name__ == "__main__":
    main()
