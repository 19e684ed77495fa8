"""`muralist psd`: how the predicted clean latent comes to be along the denoising trajectory, low and high frequencies apart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muralist.cli import _options, _show
from muralist.cli._options import Debug, Device, Json
from muralist.errors import UserError

if TYPE_CHECKING:
    from muralist.base_info import BaseInfo
    from muralist.config import Request
    from muralist.eval.trajectory import Result, Study


def command(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What the videos show.")],
    model: Annotated[str, typer.Option(help="miniature, a diffusers folder of Wan2.1 or Wan2.2, or a hub id with --revision.")] = "miniature",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The .png to write; .json and .csv of the same name come beside it.")] = "psd.png",
    seeds: Annotated[str, typer.Option(help="Such as 0,1 or 0-3; every prompt with each.")] = "0",
    size: Annotated[str | None, typer.Option(help="1080p, 2k, 4k, 8k or WIDTHxHEIGHT. [default: the base's own]")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames; the nearest 4n + 1 is made. [default: the base's own]")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the videos shall not show. [default: the base's own]")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps, each a point of the curves. [default: the base's own]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance, 1 is off. [default: the base's own]")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule. [default: the base's own]")] = None,
    cutoff: Annotated[float, typer.Option(help="Where low ends and high begins, as a share of the latent's Nyquist frequency.")] = 0.25,
    device: Device = "auto",
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Show at which noise level detail overtakes structure while a base denoises, and draw the power spectra on the way."""
    from muralist.base import pick_device
    from muralist.base_info import inspect_base
    from muralist.compare.grid import read_seeds
    from muralist.eval.trajectory import check_cutoff, require_room
    from muralist.eval.trajectory_report import require_matplotlib
    from muralist.request import check_prompt, parse_size
    from muralist.structure import check_structure

    picture, numbers, sides = _picture(output), read_seeds(seeds), None if size is None else parse_size(size)
    require_matplotlib()
    check_cutoff(cutoff)
    for prompt in prompts:
        check_prompt(prompt)
    where = pick_device(device)
    info = inspect_base(model, revision)
    texts = {"revision": revision, "num_frames": num_frames, "negative_prompt": negative_prompt}
    schedule = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "flow_shift": flow_shift}
    requests = _requests(info, prompts, max(numbers), sides, texts | schedule)
    study = _study(requests, numbers, info, schedule, cutoff)
    require_room(study, info.geometry.latent_shape(study.grid), picture.parent)
    check_structure(info)
    return _execute(study, info, where, picture, json=json)


def _picture(text: str) -> Path:
    """Where the picture goes, with room beside it for the numbers; checked before minutes of work."""
    from muralist.store.paths import typed_path

    path = typed_path(text, "output")
    if path.suffix.lower() != ".png":
        raise UserError(f"{path.name!r} is no picture's name", where="output", fix="name a .png, such as psd.png")
    typed_path(f"{path.with_suffix('.json')}.tmp", "output")  # the longest name that will be written
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written", where="output", fix="name a file in an existing directory of yours, such as psd.png")
    return path


def _requests(info: BaseInfo, prompts: list[str], seed: int, sides: tuple[int, int] | None, values: dict[str, Any]) -> list[Request]:
    """A request for each prompt, so that texts, sizes, seeds and schedules are resolved, and refused, as everywhere; nothing of a recipe is used."""
    from muralist.request import Asked, make_request

    width, height = sides or (info.defaults.grid.width, info.defaults.grid.height)
    asked = [Asked(prompt=prompt, width=width, height=height, seed=seed, **values) for prompt in dict.fromkeys(prompts)]
    found = [make_request(one, info, _options.note) for one in asked]
    _options.notes[:] = dict.fromkeys(_options.notes)  # the same for every prompt
    return found


def _study(requests: list[Request], seeds: list[int], info: BaseInfo, schedule: dict[str, Any], cutoff: float) -> Study:
    from muralist.eval.trajectory import Study

    numbers = {name: getattr(info.defaults, name) if value is None else value for name, value in schedule.items()}
    texts = {"prompts": tuple(request.prompt for request in requests), "negative_prompt": requests[0].negative_prompt}
    numbers |= {name: getattr(info.defaults, name) for name in ("guidance_interval", "guidance_mean_interval")}
    return Study(**texts, seeds=tuple(seeds), grid=info.geometry.legal(requests[0].grid), cutoff=cutoff, **numbers)


def _execute(study: Study, info: BaseInfo, device: Any, picture: Path, *, json: bool) -> int:
    from muralist.base import Base
    from muralist.cli._bars import Bars, JsonLines
    from muralist.eval import trajectory, trajectory_report

    _show.notes()
    _show.quiet()
    base = Base(info, device)
    about = {"name": Path(info.name).name, "fingerprint": info.fingerprint, "dtype": str(base.dtype).removeprefix("torch."), "device": device.type}
    about["cutoff_of_tokens"] = study.cutoff * info.geometry.patch[1]  # in the unit of the filters on tokens
    with JsonLines() if json else Bars(["prompt", "denoise"]) as observer:
        result = trajectory.run(study, base, picture.parent, observer)
    found = trajectory_report.write(result, picture, about)
    if json:
        _show.emit({"event": "result", "output": str(picture), "base": about, **found["summary"]})
    else:
        _tell(result, found["summary"], picture)
    return 0


def _tell(result: Result, found: dict[str, Any], picture: Path) -> None:
    """The table, and in one sentence what it is for."""
    at = [("at the published switch, " + f"{found['switch']['sigma']:g}", found["switch"])]
    at += [(f"where the high band overtakes, {found['crossing']:.3f}", found["at_crossing"])] if found["crossing"] is not None else []
    share = found["final_power"]["low"] + found["final_power"]["high"] or 1.0
    rows = [("half settled at sigma", *(f"{found['half_settled'][band]:.3f}" for band in ("low", "high")))]
    rows += [(f"settled {name}", *(f"{values[band]:.1%}" for band in ("low", "high"))) for name, values in at]
    rows += [("share of the final power", *(f"{found['final_power'][band] / share:.1%}" for band in ("low", "high")))]
    _show.table("", ["", "low band", "high band"], rows, numbers=["low band", "high band"])
    number, single = len(result.videos), found["crossing_of_videos"]
    spread = f" (single videos: {single['lowest']:.3f} to {single['highest']:.3f})" if single["found"] > 1 else ""
    none = "no crossing: the low band gains no lead after the first prediction"
    print(none if found["crossing"] is None else f"the high band overtakes the low band at sigma {found['crossing']:.3f}{spread}")
    print(_show.plain(f"{picture}: {number} video{'s' * (number > 1)}, numbers in {picture.with_suffix('.json').name} and {picture.with_suffix('.csv').name}"))
