"""How well the embedded VAE rebuilds what it has never seen: held-out scenes at 448x256 and crops of 4K renders.

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


def cases(kind: str, count: int):
    """Nine frames each of held-out scenes; at 4K a crop of 512x896 over the object's edge."""
    rng = np.random.default_rng(5)
    for _ in range(count):
        scene = world.sample_scene(rng, held_out=True)
        if kind == "448x256":
            yield scene, world.render_clip(scene, SMALL, frames=range(9))
            continue
        where = world.layout(scene)
        left, top = ((where.start[0] - where.radius) / world.ASPECT + 0.5) * 3840 - 448, (where.start[1] + 0.5) * 2176 - 256
        crop = world.Crop(int(np.clip(top, 0, 2176 - 512)), int(np.clip(left, 0, 3840 - 896)), 512, 896)
        yield scene, world.render_clip(scene, LARGE, crop=crop, frames=range(9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--sheet", type=Path, default=Path("vae.png"))
    options = parser.parse_args()
    vae = load_vae(inspect_base(options.model).folder / "vae").eval()
    rows, sheet = [], []
    for kind in ("448x256", "4K crops"):
        errors, bands = [], []
        for index, (_, video) in enumerate(cases(kind, options.count)):
            rebuilt = latents.decode(vae, latents.encode(vae, video[None]))
            errors.append(-10 * torch.log10((rebuilt - video).square().mean()).item())
            bands.append(band_error(rebuilt.permute(3, 0, 1, 2)[None] * 2, video.permute(3, 0, 1, 2)[None] * 2).item())
            if index < 5:
                sheet.append(
                    torch.cat([video[4], rebuilt[4]], dim=1)[:256, : 2 * 448]
                    if kind == "448x256"
                    else torch.cat([video[4, 128:384, 224:672], rebuilt[4, 128:384, 224:672]], dim=1)
                )
        rows.append(
            {
                "what": kind,
                "clips": options.count,
                "psnr_db": float(np.mean(errors)),
                "worst_db": min(errors),
                "upper_octaves_db": 10 * float(np.mean(bands)) / np.log(10),
            }
        )
    print(rows)
    write(
        "vae", rows, note="9 frames of held-out scenes through the embedded VAE in float32; upper_octaves_db: mean difference of log power, two finest octaves"
    )
    Image.fromarray((torch.cat(sheet) * 255).byte().numpy()).save(options.sheet)


if __name__ == "__main__":
    main()
