"""Training ablations of the papers on the embedded base: every variant is trained with one budget on the same clips and judged on the same scenes.

    python benchmarks/studies.py shortcut --minutes 20 --trunk 40      # PixelWizard, Table 9.3: what few steps need, from one training without them
    python benchmarks/studies.py injector --minutes 20 --trunk 40      # PixelWizard, Table 4: the way in of anchors, after one training without them
    python benchmarks/studies.py branches --minutes 40      # UltraGen, Table 4: branches and windows
    python benchmarks/studies.py branches --minutes 14 --heights 512 --size 896x512 --num-frames 1 --scenes 32     # the same of single pictures
    python benchmarks/studies.py experts --minutes 20       # LUVE, Table 6: the frequency experts

Stopped at any time, the same command goes on with the variant that it was at. Results go to results/study-NAME.{json,md}; the runs stay in --folder.
The metrics are not the papers': adherence is the share of colour, shape, motion (not of single frames) and "one object" that `muralist.data.score` finds
right, `one_object` that of one object alone, `seams` how far the strongest comb of lines stands out (`diagnose`; of `branches` the lines where K x K windows
meet, from which Swin's stray by a token where K does not divide), spectral distance (dB) is to a true render of the same caption. What can be compared is the
order of the variants.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import write
from judged import paint_and_judge, seams, window_borders

import muralist
from muralist.base import pick_dtype
from muralist.base_info import BaseInfo, inspect_base
from muralist.compare.ablation import Budget, Measured, Outcome, Study, Variant, changed, held_out, pairs, run
from muralist.data import world
from muralist.nn.experts import EXPERTS, ExpertsConfig
from muralist.nn.filters import RadialFilter
from muralist.nn.kernels import Kernels
from muralist.nn.kinds import InjectorConfig, hierarchical
from muralist.store.parts import WEIGHTS, load_part, save_part
from muralist.train.anchored import AnchoredConfig, train_anchored
from muralist.train.branched import BranchedConfig, train_branched
from muralist.train.experts import LESSONS, Lesson, train_experts
from muralist.train.loop import Length
from muralist.train.trainee import VideoData
from muralist.types import Grid

CPU = torch.device("cpu")
ADHERENCE = Measured("adherence", "higher", paper="quality")
ONE_OBJECT = Measured("one_object", "higher", paper="quality")
SEAMS = Measured("seams", "lower", paper="quality", paper_better="higher")
DISTANCE = Measured("spectral_distance", "lower", paper="quality", paper_better="higher")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a study is about: its variants, how one is trained, what the base must not have yet, and how what was trained paints.

    `paper`: the metric that the variants' `quality` is, higher being better. `trunk`: what may be trained before all variants, for them to go on from.
    `windows`: along each side, of those at whose borders seams are looked for; None: anywhere.
    """

    base: Any
    variants: Sequence[Variant]
    train: Callable[..., Path]
    without: Sequence[str]
    recipe: Callable[[Any], str]
    paper: str
    settings: Callable[[Any], tuple[str, ...]] = lambda config: ()
    trunk: Variant | None = None
    windows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expertise:
    """The experts that are trained, by name; none: refinement with the adapter alone. `from_noise`: at the target size, without a proxy."""

    lessons: Mapping[str, Lesson] = field(default_factory=lambda: LESSONS)
    from_noise: bool = False


def anchored(info: BaseInfo, **about: Any) -> Subject:
    """What the studies of the anchor and its few steps share."""
    full = AnchoredConfig(injector=InjectorConfig(channels=info.geometry.channels, dim=info.width))
    without = ("adapters/anchored", "parts/injector", "parts/step_size")
    return Subject(base=full, train=train_anchored, without=without, **{"recipe": lambda config: "pixelwizard"} | about)


def shortcut(info: BaseInfo) -> Subject:
    return anchored(
        info,
        paper="Tech. of Table 9.3",
        # without shortcuts only steps of size 0 are learned, and no guidance: it paints as any base does
        settings=lambda config: () if config.shortcut.rate else ('refine.steps={"kind": "PlainSteps"}', f"refine.guidance_scale={config.shortcut.guidance}"),
        variants=[
            Variant("flow matching alone", {"shortcut.rate": 0.0}, {"quality": 12.98}),
            Variant("uniform", {"shortcut.beta": 0.0, "shortcut.power": 0.0}, {"quality": 13.31}),
            Variant("exponential", {"shortcut.power": 0.0}, {"quality": 13.88}),
            Variant("exponential, calibrated", {}, {"quality": 14.31}),
        ],
        trunk=Variant("trunk", {"shortcut.rate": 0.0, "learning_rate": 1e-3}),  # no large steps are lost yet
    )


def injector(info: BaseInfo) -> Subject:
    return anchored(
        info,
        paper="Tech. of Table 4",
        recipe=lambda config: "direct" if config.injector is None else "pixelwizard",  # which asks for an injector
        settings=lambda config: WITHOUT_ANCHOR if config.injector is None else (),
        variants=[
            Variant("no anchor", {"injector": None}),
            Variant("added without an injector", {"injector.refined": False, "injector.gate": "none"}, {"quality": 12.51}),
            Variant("no gate", {"injector.gate": "none"}, {"quality": 13.47}),
            Variant("full", {}, {"quality": 14.31}),
        ],
        trunk=Variant("trunk", {"injector": None, "shortcut.rate": 0.0, "learning_rate": 1e-3}),  # each variant's way in is new after it
    )


def branches(info: BaseInfo) -> Subject:
    known = hierarchical(info.width, info.transformer_config["num_layers"], travel=False)  # as in the paper
    return Subject(
        base=BranchedConfig(branches=known),
        windows=known.windows,
        train=train_branched,
        without=("adapters/branched", "parts/branches"),
        recipe=lambda config: "ultragen",
        paper="VBench average of Table 4",
        settings=lambda config: tuple(branch_settings(config)),
        variants=[
            Variant("full", {}, {"quality": 0.8536}),
            Variant("no global", {"names": ("coarse",)}, {"quality": 0.8033}),
            Variant("no hierarchical", {"names": ("whole",)}, {"quality": 0.8350}),
            Variant("no domain-aware LoRA", {"branches.rank": 0}, {"quality": 0.8499}),
            Variant("no cross-window", {"odd": "same"}, {"quality": 0.8141}),
            Variant("Swin windows", {"odd": "shifted"}, {"quality": 0.8405}),
        ],
    )


def experts(info: BaseInfo) -> Subject:
    return Subject(
        base=Expertise(),
        train=train_lessons,
        without=("parts/experts",),
        recipe=lambda config: "luve",
        paper="-FID-patch of Table 6",
        settings=expert_settings,
        variants=[
            Variant("large sizes alone, from noise", {"lessons": {}, "from_noise": True}, {"quality": -54.10}),
            Variant("no experts", {"lessons": {}}, {"quality": -46.48}),
            Variant("no low", {"lessons": only("high")}, {"quality": -43.86}),
            Variant("no high", {"lessons": only("low")}, {"quality": -44.44}),
            Variant("LoRA experts", {"lessons": unfiltered()}, {"quality": -47.03}),
            Variant("no sharpening", {"lessons": unsharpened()}, {"quality": -42.96}),
            Variant("full", {}, {"quality": -41.03}),
        ],
    )


WITHOUT_ANCHOR = (  # `pixelwizard` but for it
    'refine.steps={"kind": "ShortcutSteps"}', "refine.adapter=anchored", 'refine.attention={"kind": "Windows", "tokens": 1024}',
    "refine.num_inference_steps=4", "refine.guidance_scale=1", "refine.flow_shift=5.5",
)  # fmt: skip

SUBJECTS: dict[str, Callable[[BaseInfo], Subject]] = {"shortcut": shortcut, "injector": injector, "branches": branches, "experts": experts}


def branch_settings(config: BranchedConfig) -> list[str]:
    names = list_of(config.names or tuple(config.branches.branches))
    return [f"refine.attention.odd={config.odd}", f"refine.attention.branches={names}", f"refine.attention.travel={str(config.branches.travel).lower()}"]


FROM_NOISE = ("proxy=null", "upsample=null", "refine.skip_steps=0", 'refine.attention={"kind": "FullAttention"}')


def expert_settings(config: Expertise) -> tuple[str, ...]:
    """Where there is a proxy, from a noise level above that at which the experts change places, so that both have work."""
    return (f"refine.experts={list_of(config.lessons)}", *(FROM_NOISE if config.from_noise else ("refine.skip_steps=2",)))


def list_of(names: Sequence[str] | Mapping[str, Any]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def only(name: str) -> dict[str, Lesson]:
    return {name: LESSONS[name]}


def unfiltered() -> dict[str, Lesson]:
    """Plain LoRA in the experts' places: a filter that lets everything through."""
    open_filter = RadialFilter(band="low", cutoff=1.5, edge=0.0)
    return {name: replace(lesson, expert=replace(lesson.expert, band=open_filter)) for name, lesson in LESSONS.items()}


def unsharpened() -> dict[str, Lesson]:
    return {name: replace(lesson, sharpen=None) for name, lesson in LESSONS.items()}


def train_lessons(folder: Path, *, config: Expertise, length: Length, resume: bool, **options: Any) -> Path:
    """Each expert alone, in half of the length whether it has a neighbour or not; variants that have the same expert train it once."""
    parts: list[ExpertsConfig] = []
    tensors: dict[str, torch.Tensor] = {}
    for name, lesson in config.lessons.items():
        alone = learned(folder, name, lesson, length.part(len(LESSONS)), **options)
        for curve in (alone / name).glob("curve.csv"):  # none of a few steps
            shutil.copy(curve, _made(folder / name))
        record, weights = load_part(alone / "parts" / EXPERTS, EXPERTS)
        parts.append(ExpertsConfig.of(record))
        tensors |= weights
    if parts:
        all_of_them = replace(parts[0], experts={name: expert for part in parts for name, expert in part.experts.items()})
        save_part(folder / "parts" / EXPERTS, EXPERTS, all_of_them.record(), tensors)
    return folder


def learned(folder: Path, name: str, lesson: Lesson, length: Length, *, model: Path, data: VideoData, **options: Any) -> Path:
    """The folder in which one expert has been trained, beside those of the variants."""
    known = hashlib.sha256(repr((lesson, length, data, inspect_base(str(model)).fingerprint)).encode()).hexdigest()[:8]
    alone = _made(folder.parents[1] / "lessons" / f"{name}-{known}")
    if not (alone / "parts" / EXPERTS / WEIGHTS).exists():
        if not (alone / "latents").is_symlink():
            (alone / "latents").symlink_to(folder.parents[1] / "latents")
        train_experts(alone, lessons={name: lesson}, length=length, model=model, data=data, resume=any(alone.rglob("checkpoints")), **options)
    return alone


def main() -> None:
    options = arguments()
    info = inspect_base(options.model)
    subject = SUBJECTS[options.name](info)
    if options.trunk is not None and (subject.trunk is None or options.trunk <= 0 or (options.steps is not None and options.trunk < 1)):
        raise SystemExit(f"--trunk: above 0, whole steps, and not for {options.name} if its variants have nothing in common to begin with")
    folder = (options.folder / options.name).absolute()
    model = stripped(info.folder, folder / f"base {info.fingerprint[:8]}", subject.without)
    (folder / "latents").mkdir(parents=True, exist_ok=True)
    budget = Budget(steps=options.steps) if options.steps is not None else Budget(minutes=20 if options.minutes is None else options.minutes)

    if options.trunk is not None:
        model = with_trunk(model, subject, options, folder)

    def train(config: Any, budget: Budget, directory: Path) -> tuple[Path, Any]:
        return trained(subject, config, budget, directory, model, options), config

    def evaluate(made: tuple[Path, Any], scenes: Sequence[world.Scene]) -> dict[str, list[float]]:
        painter = muralist.load(str(made[0]), recipe=subject.recipe(made[1]))
        judged = [judge(painter, scene, options, subject.settings(made[1]), subject.windows) for scene in scenes]
        return {name: [values[name] for values in judged] for name in judged[0]}

    study = Study(
        name=f"{options.name} ({subject.paper})", base=subject.base, variants=subject.variants, train=train, evaluate=evaluate,
        measures=(ADHERENCE, ONE_OBJECT, SEAMS, DISTANCE),
        budget=budget, scenes=held_out(options.scenes),
        facts=facts(model, options),
    )  # fmt: skip
    outcomes = run(study, folder)
    rows = [
        {
            "variant": o.variant.name,
            **{f"{m.name}": o.mean(m.name) for m in study.measures},
            **{f"{m.name} error": o.error(m.name) for m in study.measures},
            "steps": steps(folder / o.variant.name),
            f"paper: {subject.paper}": o.variant.paper.get("quality"),
            "failure": o.failure,
        }
        for o in outcomes
    ]
    judged = f"{options.scenes} held-out scenes at {options.size} x {options.num_frames}"
    before = "" if options.trunk is None else f"after {options.trunk:g} {'minutes' if options.steps is None else 'steps'} of one training for all, "
    clips = f"{options.clips} clips" + ("" if options.heights is None else f" ({', '.join(map(str, options.heights))} rows)")
    note = f"{before}{budget} a variant, {clips} of each size; {judged}. {verdicts(study, outcomes)}"
    write(f"study-{options.name}", rows, note, cases=[{"variant": o.variant.name, **o.values} for o in outcomes])


def verdicts(study: Study, outcomes: Sequence[Outcome]) -> str:
    """By measure: how many pairs that the paper tells apart come out as there; see `ablation.pairs` for which are decided."""
    found = {m.name: Counter(pair.verdict for pair in pairs(study, outcomes) if pair.measure == m.name) for m in study.measures}
    told = (f"{name} {', '.join(f'{count} {verdict}' for verdict, count in sorted(counts.items()))}" for name, counts in found.items() if counts)
    return f"Of the paper's pairs, differences paired by scene: {'; '.join(told) or 'none'}"


def trained(subject: Subject, config: Any, length: Length, directory: Path, model: Path, options: argparse.Namespace) -> Path:
    """The base together with what one variant has learned; the clips are the same for all of a study."""
    run_folder, latents = _made(directory / "run"), directory.parent / "latents"
    if not (run_folder / "latents").exists():
        (run_folder / "latents").symlink_to(latents)
    begun = any(run_folder.rglob("checkpoints"))
    data = VideoData(clips=options.clips, heights=options.heights and tuple(options.heights))
    with Kernels(compile="blocks" if options.compile else "off").at_work():
        subject.train(run_folder, length=length, device=CPU, resume=begun, model=model, data=data, config=config)
    return with_results(model, run_folder, directory / "model")


def with_trunk(model: Path, subject: Subject, options: argparse.Namespace, folder: Path) -> Path:
    """The base after the training from which all variants go on, in a folder of its own for each length."""
    length = Length(minutes=options.trunk) if options.steps is None else Length(steps=round(options.trunk))
    clips = f"{options.clips} clips" + ("" if options.heights is None else f" of {options.heights}")
    made = folder / f"trunk of {length}, {clips}, {inspect_base(str(model)).fingerprint[:8]}"
    if not (made / "done").exists():
        trained(subject, changed(subject.base, subject.trunk.override), length, made, model, options)
        (made / "done").touch()
    return made / "model"


def facts(model: Path, options: argparse.Namespace) -> dict[str, str]:
    """What results stand on besides configuration, budget and scenes."""
    asked = {f"--{name}": str(getattr(options, name.replace("-", "_"))) for name in ("clips", "size", "num-frames")}
    asked |= {} if options.heights is None else {"--heights": str(options.heights)}
    asked |= ({} if options.trunk is None else {"--trunk": str(options.trunk)}) | ({"--compile": ""} if options.compile else {})
    return {"--model": inspect_base(str(model)).fingerprint, "dtype": str(pick_dtype(CPU)), **asked}


def stripped(base: Path, folder: Path, without: Sequence[str]) -> Path:
    """A copy of the base without what the study trains."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as temporary:
            copy = shutil.copytree(base, Path(temporary) / "base")
            for part in without:
                shutil.rmtree(copy / part, ignore_errors=True)
            copy.rename(folder)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def with_results(model: Path, results: Path, folder: Path) -> Path:
    """The base together with the adapters and parts that a variant has learned."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    for kind in ("adapters", "parts"):
        if (results / kind).is_dir():
            shutil.copytree(results / kind, folder / kind, dirs_exist_ok=True)
    return folder


def judge(painter: muralist.Pipeline, scene: world.Scene, options: argparse.Namespace, settings: tuple[str, ...], windows: int | None) -> dict[str, float]:
    width, height = (int(side) for side in options.size.split("x"))
    grid = Grid(num_frames=options.num_frames, height=height, width=width)
    found = paint_and_judge(painter, scene, grid, settings)
    right = (found.score.colour, found.score.shape, *((found.score.motion,) if options.num_frames > 1 else ()), found.score.num_objects == 1)
    return {
        "adherence": sum(map(bool, right)) / len(right),
        "one_object": float(right[-1]),
        "seams": seams(found.frames, windows and window_borders(painter.base.info.geometry, grid, windows)).value,
        "spectral_distance": found.distance["spectral_distance"],
    }


def steps(folder: Path) -> str:
    """Steps that a variant had, of each of its trainings."""
    return ", ".join(curve.read_text().splitlines()[-1].split(",")[0] for curve in sorted(folder.rglob("curve.csv")))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(SUBJECTS))
    parser.add_argument("--model", default="miniature")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="of each variant; 20")
    length.add_argument("--steps", type=int, help="of each variant instead: fair on a machine that does other work beside")
    parser.add_argument("--trunk", type=float, help="of a training before all variants, in the same unit (shortcut and injector)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: quicker steps")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--heights", type=int, nargs="+", help="rows of the renders that all learn from; the training's own")
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--size", default="1920x1080")
    parser.add_argument("--num-frames", type=int, default=29)  # in fewer, scenes do not move far enough to be judged
    parser.add_argument("--folder", type=Path, default=Path("runs/studies"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
