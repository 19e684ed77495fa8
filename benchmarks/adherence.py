"""Does the embedded base paint what the prompt says? Held-out prompts, judged by `muralist.data.score`.

    python benchmarks/adherence.py --count 105                      # at the base's own size
    python benchmarks/adherence.py --count 12 --size 3840x2160      # by the cascade
    python benchmarks/adherence.py --count 12 --size 1920x1080 --recipe luve

What stands in the folder of `--keep` is not painted again, so a stopped run goes on.
Writes results/adherence-SIZE.{json,md} (-RECIPE where one is given) and a contact sheet of first, middle and last frames.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from PIL import Image

import muralist
from muralist.data import world
from muralist.data.score import score

ATTRIBUTES = ("colour", "shape", "ground", "motion", "camera")


def scenes(count: int, seed: int) -> list[world.Scene]:
    """Held-out scenes without a camera move, spread over all words."""
    every = list(world.all_scenes(held_out=True))
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:count]]


def main() -> None:
    options = arguments()
    width, height = (int(v) for v in options.size.split("x"))
    recipe = options.recipe or ("direct" if (width, height) == (448, 256) else "cascade")
    pipe = muralist.load(options.model, recipe=recipe)
    sheet, rows, started = [], [], time.time()
    about = {"size": options.size, "recipe": recipe, "model": options.model, "num_frames": options.num_frames, "seed": options.seed}
    for number, scene in enumerate(scenes(options.count, options.seed)):
        kept = options.keep and options.keep / f"{number:03d}"
        if kept and kept.is_dir():
            row, three = known(kept, about), torch.from_numpy(np.array(Image.open(kept / "small.png")))
        else:
            frames = painted(pipe, scene, width, height, options.num_frames)
            row, three = judged(frames, scene), small(frames)
            if kept:
                keep(kept, {"about": about, "row": row}, frames)
        rows.append(row)
        sheet.append(three)
        print(row, f"{(time.time() - started) / len(rows):.1f} s a clip", flush=True)
    means = [{"measure": a, "percent": 100 * float(np.mean([r[a] for r in rows]))} for a in ATTRIBUTES]
    means.append({"measure": "exactly one object", "percent": 100 * float(np.mean([r["objects"] == 1 for r in rows]))})
    print(means)
    name = f"adherence-{options.size}" + (f"-{recipe}" if options.recipe else "")
    write(name, means, note=f"{len(rows)} held-out prompts, recipe {recipe}, {options.size} x {options.num_frames}, seed {options.seed}")
    Image.fromarray(torch.cat(sheet[:24]).numpy()).save(options.sheet)


def painted(pipe: muralist.Pipeline, scene: world.Scene, width: int, height: int, num_frames: int) -> torch.Tensor:
    """Frames [t, H, W, 3] of a prompt; of large clips every fourth: a whole one at 4K is 2.9 GB of floats."""
    with tempfile.TemporaryDirectory() as folder:
        video = pipe(world.caption(scene), width=width, height=height, num_frames=num_frames, seed=scene.seed, run_dir=Path(folder) / "run")
        return torch.cat([chunk.frames[:: (1 if height < 1000 else 4)] for chunk in video])


def judged(frames: torch.Tensor, scene: world.Scene) -> dict[str, Any]:
    result = score(frames, scene)
    return {"prompt": world.caption(scene)} | {a: bool(getattr(result, a)) for a in ATTRIBUTES} | {"objects": result.num_objects}


def known(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The scores in a kept folder. Ends the run if they are of other options."""
    record = json.loads((folder / "score.json").read_text())
    if record["about"] != about:
        raise SystemExit(f"{folder} holds {record['about']}, not {about}: keep each in a folder of its own")
    return record["row"]


def keep(folder: Path, record: dict[str, Any], frames: torch.Tensor) -> None:
    """The scores, the middle frame as it is and three small ones; the folder is there when all of it is."""
    pending = folder.with_suffix(".tmp")
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    (pending / "score.json").write_text(json.dumps(record))
    Image.fromarray((frames[len(frames) // 2] * 255).round().byte().numpy()).save(pending / "middle.png")
    Image.fromarray(small(frames).numpy()).save(pending / "small.png")
    pending.rename(folder)


def small(frames: torch.Tensor) -> torch.Tensor:
    """First, middle and last frame side by side at 448x256, uint8."""
    three = frames[[0, len(frames) // 2, -1]].permute(0, 3, 1, 2)
    three = torch.nn.functional.interpolate(three, size=(256, 448), mode="area")
    return (torch.cat(list(three), dim=2).permute(1, 2, 0) * 255).byte()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=105)
    parser.add_argument("--size", default="448x256")
    parser.add_argument("--recipe", help="another than the usual one of the size")
    parser.add_argument("--num-frames", type=int, default=29)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for scores and pictures of each prompt")
    parser.add_argument("--sheet", type=Path, default=Path("adherence.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
