"""Does the embedded base paint what the prompt says? Held-out prompts, judged by `muralist.data.score`.

    python benchmarks/adherence.py --count 105                      # at the base's own size
    python benchmarks/adherence.py --count 12 --size 3840x2160      # by the cascade
    python benchmarks/adherence.py --count 12 --size 1920x1080 --recipe luve
    python benchmarks/adherence.py --count 12 --size 896x512 --num-frames 1 --recipe ultragen --set 'refine.attention.branches=["coarse"]' --label no-global

Where a proxy has the target's frames, it is judged too: what of the misses is refinement's, and what was there before.
What stands in the folder of `--keep` is not painted again, so a stopped run goes on. Of a single frame motion is not judged.
Writes results/adherence-SIZE.{json,md} (-RECIPE, -N-frames and -LABEL where they are given) and a contact sheet of first, middle and last frames.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from judged import score_of
from kept import LARGE, STRIDE
from PIL import Image
from safetensors.torch import load_file

import muralist
from muralist.data import world
from muralist.data.latents import decode

ATTRIBUTES = ("colour", "shape", "ground", "motion", "camera")


def scenes(count: int, seed: int) -> list[world.Scene]:
    """Held-out scenes without a camera move, spread over all words."""
    every = list(world.all_scenes(held_out=True))
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:count]]


def main() -> None:
    options = arguments()
    if options.settings and not options.label:
        raise SystemExit("--set: give the results a name of their own by --label")
    if options.first < 0 or (options.first and not options.keep):
        raise SystemExit("--first: from 0, and beyond it into the folder of --keep, of which it paints a part")
    width, height = (int(v) for v in options.size.split("x"))
    recipe = options.recipe or ("direct" if (width, height) == (448, 256) else "cascade")
    pipe = muralist.load(options.model, recipe=recipe)
    sheet, rows, started = [], [], time.time()
    about = {"size": options.size, "recipe": recipe, "model": options.model, "num_frames": options.num_frames, "seed": options.seed}
    about |= {"weights": pipe.base.info.fingerprint, "dtype": str(pipe.base.dtype)} | ({"settings": options.settings} if options.settings else {})
    about |= {"configuration": configuration(pipe, width, height, options)}
    for number, scene in list(enumerate(scenes(options.count, options.seed)))[options.first :]:
        kept = options.keep and options.keep / f"{number:03d}"
        if kept and kept.is_dir():
            row, three = known(kept, about), torch.from_numpy(np.array(Image.open(kept / "small.png")))
        else:
            frames, proxy = painted(pipe, scene, width, height, options.num_frames, options.settings)
            row, three = judged(frames, scene) | ({} if proxy is None else {"proxy": judged(proxy, scene)}), small(frames)
            if kept:
                keep(kept, {"about": about, "row": row}, frames)
        rows.append(row)
        sheet.append(three)
        print(row, f"{(time.time() - started) / len(rows):.1f} s a clip", flush=True)
    if options.first:
        return  # the rest of a job that is shared; whoever sees all of it judges
    means = [{"measure": name, "percent": value} for name, value in averages(rows, options.num_frames).items()]
    if all("proxy" in row for row in rows):
        means = [mean | {"its proxy": value} for mean, value in zip(means, averages([row["proxy"] for row in rows], options.num_frames).values())]
    print(means)
    frames = None if options.num_frames == 29 else f"{options.num_frames}-frames"
    name = "-".join(["adherence", options.size, *filter(None, (options.recipe, frames, options.label))])
    settings = "".join(f", {setting}" for setting in options.settings)
    note = f"{len(rows)} held-out prompts, recipe {recipe}, {options.size} x {options.num_frames}, seed {options.seed}{settings}"
    write(name, means, note, cases=rows)
    Image.fromarray(torch.cat(sheet[:24]).numpy()).save(options.sheet)


def configuration(pipe: muralist.Pipeline, width: int, height: int, options: argparse.Namespace) -> str:
    """A digest of all that a recipe has settled, and of the code: the same options may stand for something else in another version."""
    sized = {"width": width, "height": height, "num_frames": options.num_frames, "seed": options.seed}
    request = pipe.request("a red ball over grass", **sized, settings=tuple(options.settings))
    digest = hashlib.sha256(repr(request.config).encode())
    package = Path(muralist.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def painted(
    pipe: muralist.Pipeline, scene: world.Scene, width: int, height: int, num_frames: int, settings: list[str]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Frames [t, H, W, 3] of a prompt, of large clips every fourth, and those of its proxy if it has one with all of them."""
    with tempfile.TemporaryDirectory() as folder:
        sized = {"width": width, "height": height, "num_frames": num_frames}
        video = pipe(world.caption(scene), **sized, seed=scene.seed, settings=tuple(settings), run_dir=Path(folder) / "run")
        frames = torch.cat([chunk.frames[:: (1 if height < LARGE else STRIDE)] for chunk in video])
        stored = next((Path(folder) / "run" / "proxy").glob("*.safetensors"), None)
        latent = None if stored is None else load_file(stored)["latent"]
        whole = latent is not None and latent.shape[2] == video.latent.z.shape[2]
        return frames, decode(pipe.base.vae(), latent.to(pipe.base.device)) if whole else None


def judged(frames: torch.Tensor, scene: world.Scene) -> dict[str, Any]:
    result = score_of(frames, scene)
    return {"prompt": world.caption(scene)} | {a: bool(getattr(result, a)) for a in ATTRIBUTES} | {"objects": result.num_objects}


def averages(rows: list[dict[str, Any]], num_frames: int) -> dict[str, float]:
    """Percent of the clips in which each measure is right."""
    judgeable = [a for a in ATTRIBUTES if num_frames > 1 or a not in ("motion", "camera")]
    right = {a: [row[a] for row in rows] for a in judgeable} | {"exactly one object": [row["objects"] == 1 for row in rows]}
    return {name: 100 * float(np.mean(values)) for name, values in right.items()}


def known(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The scores in a kept folder. Ends the run if they are of other options."""
    record = json.loads((folder / "score.json").read_text())
    if record["about"] != about:
        raise SystemExit(f"{folder} holds {record['about']}, not {about}: keep each in a folder of its own")
    return record["row"]


def keep(folder: Path, record: dict[str, Any], frames: torch.Tensor) -> None:
    """The scores, the middle frame as it is and three small ones; the folder is there when all of it is."""
    pending = folder.with_suffix(f".{os.getpid()}.tmp")
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    (pending / "score.json").write_text(json.dumps(record))
    Image.fromarray((frames[len(frames) // 2] * 255).round().byte().numpy()).save(pending / "middle.png")
    Image.fromarray(small(frames).numpy()).save(pending / "small.png")
    try:
        pending.rename(folder)
    except OSError:  # painted on another core meanwhile
        shutil.rmtree(pending)


def small(frames: torch.Tensor) -> torch.Tensor:
    """First, middle and last frame side by side at 448x256, uint8."""
    three = frames[[0, len(frames) // 2, -1]].permute(0, 3, 1, 2)
    three = torch.nn.functional.interpolate(three, size=(256, 448), mode="area")
    return (torch.cat(list(three), dim=2).permute(1, 2, 0) * 255).byte()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=105)
    parser.add_argument("--first", type=int, default=0, help="paint from this prompt on, into --keep alone: a part of the work for another core")
    parser.add_argument("--size", default="448x256")
    parser.add_argument("--recipe", help="another than the usual one of the size")
    parser.add_argument("--set", dest="settings", metavar="NAME=VALUE", action="append", default=[], help="a value of the recipe's configuration; often")
    parser.add_argument("--label", help="of such values, in the results' name")
    parser.add_argument("--num-frames", type=int, default=29)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for scores and pictures of each prompt")
    parser.add_argument("--sheet", type=Path, default=Path("adherence.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
