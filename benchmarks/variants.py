"""What single choices of a recipe cost and bring when it paints: the same base, prompts and seeds, a variant for each choice.

    python benchmarks/variants.py few_steps --size 896x512 --count 4      # PixelWizard, Table 5: 2 to 8 steps without guidance, and 50 with it
    python benchmarks/variants.py anchor --size 896x512 --count 4         # PixelWizard, section 9.4: what a flawed anchor does, and none
    python benchmarks/variants.py sight --size 1344x768 --count 4         # AtlasVid: windows, their shift, the proxy, a middle level, full attention
    python benchmarks/variants.py proxy --size 1344x768 --count 4         # AtlasVid: the proxy's rate, size, nearness and noise; the fine-tuning at 4K

    python benchmarks/variants.py upsample --size 896x512 --count 4       # LUVE, Table 5: pixels, latents, the upsampler; seconds of each
    python benchmarks/variants.py rest --size 1792x1024 --count 4         # the same from half of the size on, where `cascade` stops enlarging pixels
    python benchmarks/variants.py skip --size 896x512 --count 4           # LUVE, Table 7: the share of steps that the guide replaces
    python benchmarks/variants.py experts --size 896x512 --count 4        # LUVE, Table 6: the rows that need no training of their own (studies.py: all)
    python benchmarks/variants.py together --size 896x512 --count 4       # parts of the methods in the default recipe

Held-out prompts; the variants of one prompt are painted one after the other in one process. What stands in the file of `--cases` is not painted again, so a
stopped run goes on. Writes results/variants-STUDY.{json,md} and a sheet of middle frames, one row a prompt, in the order of the table.
`faster`: the first variant's time in refinement against this one's. `seams`: how far the strongest comb of lines stands out, by `diagnose`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adherence import ATTRIBUTES, scenes, small
from common import write
from judged import paint_and_judge, seams
from PIL import Image

import muralist
from muralist.data import world
from muralist.eval.metrics.temporal import DynamicDegree
from muralist.progress import Silent
from muralist.types import Grid

DYNAMIC = "dynamic_degree[blocks]"


@dataclass(frozen=True, slots=True)
class Choices:
    """A recipe, and by name what each variant of it sets."""

    recipe: str
    variants: Mapping[str, tuple[str, ...]]


SMALL_WINDOWS = ("refine.adapter=detail", "refine.attention.tokens=112", "refine.attention.reach=[6.5, 4, 4]")  # those that `detail` was trained in
ALONE = '{"kind": "Windows", "tokens": 448, "max_frames": 4'
SIGHT = {
    "windows": (f'refine.attention={ALONE}, "shift": false, "travel": false}}',),
    "+ shift": (f"refine.attention={ALONE}}}",),
    "+ proxy": (),
    "+ middle level": ("refine.attention.pool=[1, 4, 4]",),
    "full attention": ('refine.attention={"kind": "FullAttention"}',),
}
SKIPPED = ("refine.num_inference_steps=20",)  # shares of the paper's 50; the last is that of the embedded base
LEARNED = 'upsample={"kind": "LearnedUpsampling"}'
FEW_FROM_GUIDE = (  # half of four steps, one pass each
    'refine.steps={"kind": "ShortcutSteps"}', "refine.adapter=anchored", "refine.num_inference_steps=4", "refine.skip_steps=2",
    "refine.guidance_scale=1", "refine.flow_shift=5.5",
)  # fmt: skip
GUIDED = ("refine.guidance_scale=4", "refine.guidance_mean_interval=[0, 0.93]")  # as the embedded base guides
FROM_NOISE = ("refine.skip_steps=0",)  # nothing of the proxy but what its keys show
STUDIES = {
    "few_steps": Choices(
        "pixelwizard",
        {"50 steps, guidance": ('refine.steps={"kind": "PlainSteps"}', "refine.num_inference_steps=50", *GUIDED)}
        | {f"{count} steps": (f"refine.num_inference_steps={count}",) for count in (8, 5, 4, 3, 2)},
    ),
    "anchor": Choices(
        "pixelwizard",
        {"as it is": ()}
        | {f"painted in {count} steps": (f"proxy.num_inference_steps={count}",) for count in (4, 2)}
        | {"224x128": ("proxy.width=224", "proxy.height=128"), "none": ("proxy=null", "refine.anchor=none")},
    ),
    "upsample": Choices(
        "luve",
        {
            "LUVE's upsampler": (),
            "latents": ('upsample={"kind": "LatentInterpolation"}',),
            "pixels": ('upsample={"kind": "PixelInterpolation"}',),
            "pixels to half the size": ('upsample={"kind": "PixelInterpolation", "latent_scale": 2}',),
        },
    ),
    "rest": Choices(
        "cascade",
        {
            "latents the rest of the way": ('upsample.rest={"kind": "LatentInterpolation"}',),
            "the upsampler the rest of the way": ('upsample.rest={"kind": "LearnedUpsampling"}',),
            "all by pixels": ("upsample.latent_scale=1",),
        },
    ),
    "skip": Choices("luve", {f"{of_50} of 50": (*SKIPPED, f"refine.skip_steps={step}") for of_50, step in ((2.5, 1), (5, 2), (10, 4), (15, 6), (30, 12))}),
    "experts": Choices(
        "luve",  # from a noise level above that at which the experts change places, so that both have work
        {name: (f"refine.experts={which}", "refine.skip_steps=2") for name, which in
         (("none", "[]"), ("no high", '["low"]'), ("no low", '["high"]'), ("both", '["low", "high"]'))},
    ),
    "together": Choices(
        "cascade",
        {
            "cascade": (),
            "LUVE's upsampler": (LEARNED,),
            "LUVE's expert": ('refine.experts=["high"]',),
            "both": (LEARNED, 'refine.experts=["high"]'),
            "PixelWizard's steps": FEW_FROM_GUIDE,
            "and its anchor": (*FEW_FROM_GUIDE, "refine.anchor=injected"),
            "and LUVE's upsampler": (*FEW_FROM_GUIDE, "refine.anchor=injected", LEARNED),
            "AtlasVid's windows": (
                'refine.attention={"kind": "ProxyWindows", "tokens": 448, "max_frames": 4, "reach": [6.5, 16, 24]}', "refine.adapter=detail_uhr",
            ),
        },
    ),
    "sight": Choices(
        "atlasvid", SIGHT | {f"from noise: {name}": (*SIGHT[name], *FROM_NOISE) for name in ("+ shift", "+ proxy")}
    ),
    "proxy": Choices(
        "atlasvid",
        {
            "as it is": (),
            "a quarter of the frames": ("proxy.spanned=0",),
            "every frame, with its adapter": ("proxy.spanned=0", "proxy.every=1"),
            "224x128": ("proxy.width=224", "proxy.height=128"),
            "8 tokens near": ("refine.attention.near=[2, 2, 2]",),
            "noisy": ("refine.attention.proxy_noise=same",),
            "not fine-tuned": SMALL_WINDOWS,
        },
    ),
}  # fmt: skip


def painted(pipe: muralist.Pipeline, scene: world.Scene, grid: Grid, settings: tuple[str, ...]) -> tuple[dict[str, float], torch.Tensor]:
    """What is measured of a video, and its middle frame."""
    observer = Silent()
    found = paint_and_judge(pipe, scene, grid, settings, fps=grid.fps, observer=observer)
    dynamic = DynamicDegree(grid.fps)
    for frame in found.frames:
        dynamic.add(frame)
    moved = dynamic.result()
    right = {name: float(bool(getattr(found.score, name))) for name in ATTRIBUTES if name != "camera"}  # the prompts say nothing of one
    right["one object"] = float(found.score.num_objects == 1)
    seconds = {f"{stage}_s": sum(report.seconds for report in observer.reports if report.stage == stage) for stage in ("refine", "upsample")}
    about = {"dynamic": moved[DYNAMIC], "speed": moved[f"{DYNAMIC}.speed"], "seams": seams(found.frames).value}
    return seconds | right | found.distance | about, small(found.frames)[:, 448:896]


class Cases:
    """What is painted already, a line each: the values by prompt and variant; the pictures beside it."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about = path, about
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        variants = STUDIES[about["study"]].variants
        if any(line["about"] != about or tuple(line["settings"]) != variants.get(line["variant"]) for line in lines):
            raise SystemExit(f"{path} holds other options, settings or weights: keep each in a file of its own")
        self.known = {(line["number"], line["variant"]): line["values"] for line in lines}

    def add(self, number: int, variant: str, settings: tuple[str, ...], values: dict[str, float], picture: torch.Tensor) -> None:
        self.picture(number, variant).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(self.picture(number, variant))
        self.known[number, variant] = values
        with self.path.open("a") as log:
            line = {"about": self.about, "number": number, "variant": variant, "settings": settings, "values": values}
            log.write(json.dumps(line) + "\n")

    def picture(self, number: int, variant: str) -> Path:
        return self.path.with_suffix("") / f"{number:03d}-{variant}.png"


def main() -> None:
    options = arguments()
    study, (width, height) = STUDIES[options.study], map(int, options.size.split("x"))
    grid, pipe = Grid(num_frames=29, height=height, width=width), muralist.load(options.model, recipe=study.recipe)
    about = {"study": options.study, "size": options.size, "weights": pipe.base.info.fingerprint, "dtype": str(pipe.base.dtype), "seed": options.seed}
    cases = Cases(options.cases or Path(f"variants-{options.study}.jsonl"), about)
    for number, scene in enumerate(scenes(options.count, options.seed)):
        for name, settings in study.variants.items():
            if (number, name) not in cases.known:
                cases.add(number, name, settings, *painted(pipe, scene, grid, settings))
                print(world.caption(scene), name, cases.known[number, name], flush=True)
        note = f"{number + 1} held-out prompts, {study.recipe}, {options.size} x 29, seed {options.seed}"
        write(f"variants-{options.study}", rows(cases, list(study.variants), number + 1), note=note)
    sheet = [np.concatenate([np.array(Image.open(cases.picture(number, name))) for name in study.variants], axis=1) for number in range(options.count)]
    Image.fromarray(np.concatenate(sheet)).save(options.sheet or cases.path.with_suffix(".png"))


def rows(cases: Cases, names: list[str], count: int) -> list[dict[str, Any]]:
    """Means over the first `count` prompts."""
    found = {name: [cases.known[number, name] for number in range(count)] for name in names}
    means = {name: {key: float(np.mean([values[key] for values in each])) for key in each[0]} for name, each in found.items()}
    return [{"variant": name, "faster": means[names[0]]["refine_s"] / values["refine_s"]} | values for name, values in means.items()]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--size", default="896x512")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=Path, help="what is painted already; variants-STUDY.jsonl")
    parser.add_argument("--sheet", type=Path, help="the middle frames; beside the cases")
    return parser.parse_args()


if __name__ == "__main__":
    main()
