"""The Python interface: `load` a pipeline, call it, read or save the video.

    pipe  = muralist.load("miniature", recipe="cascade")
    video = pipe("a red ball moves right over grass", width=3840, height=2160, num_frames=29, seed=0)
    video.save("out.mp4")

A call denoises; decoding waits until frames are read, because a 4K video as floats does not fit where its latent does. What a call
has finished stands in its run directory (a temporary one unless `run_dir` is given), which a later call with the same arguments resumes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muralist import recipes
from muralist.base import Base, pick_device
from muralist.base_info import inspect_base
from muralist.errors import Note
from muralist.progress import Observer, Silent
from muralist.request import Asked, make_request, tell_of_kernels
from muralist.store.paths import check_output, typed_path
from muralist.types import FrameChunk, Grid, LatentVideo

if TYPE_CHECKING:
    from muralist.config import Request
    from muralist.plan import Plan
    from muralist.store.run import RunDirectory


def load(model: str | Path = "miniature", *, recipe: str = recipes.DEFAULT, device: str = "auto", revision: str | None = None) -> Pipeline:
    """A pipeline of a base and a recipe; weights are loaded when they are first needed.

    Args:
        model: `miniature`, a diffusers folder of Wan2.1 or Wan2.2, or a hub id together with `revision` (a commit).
        recipe: a name that `muralist recipes` lists.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    Raises:
        UserError: an unknown recipe or device, or a folder that is missing, incomplete, or holds pickles.
    """
    recipes.find(recipe)
    return Pipeline(Base(inspect_base(str(model), revision), pick_device(device)), recipe, revision)


class Pipeline:
    """A base and a recipe, ready to paint. Components stay loaded between calls as far as the data flow lets them."""

    def __init__(self, base: Base, recipe: str, revision: str | None = None):
        self.base, self.recipe, self._revision = base, recipe, revision

    def __call__(
        self,
        prompt: str,
        *,
        run_dir: str | Path | None = None,
        observer: Observer | None = None,
        memory: str = "auto",
        vram_limit: float | None = None,
        **options: Any,
    ) -> Video:
        """Denoise a video and return it undecoded.

        Args:
            prompt: what the video shows.
            run_dir: where finished work is kept and found again; None: a temporary directory that goes with the video.
            observer: told of the progress (`muralist.progress.Observer`).
            memory, vram_limit: a level (`high`, `balanced`, `low`, `auto`: the first that fits) and gigabytes, as on the command line.
            options: `negative_prompt, width, height, num_frames, duration, fps, seed, num_inference_steps, guidance_scale, flow_shift,
                skip_steps, attention, linears, settings` (a sequence of `NAME=VALUE`), as in diffusers and on the command line; the recipe's or the base's own
                values where left out.
        Raises:
            UserError: options that cannot be, a video that does not fit this machine, or a run directory made with other options.
        """
        from muralist.cost.budget import Budget
        from muralist.pipeline import denoise, prepare_memory
        from muralist.plan import Machine
        from muralist.request import as_begun, plan_run, run_record, stored_seed
        from muralist.store.run import RunDirectory

        budget = Budget(memory, vram_limit)
        temporary = tempfile.TemporaryDirectory(prefix="muralist-") if run_dir is None else None
        folder = Path(temporary.name) if temporary else typed_path(str(run_dir), "run_dir")
        asked = as_begun(self.request(prompt, **{"seed": stored_seed(folder)} | options), self.base.info, folder)
        plan = plan_run(asked, self.base.info, Machine.measure(self.base.device, folder), folder, budget)
        plan.check()
        prepare_memory(self.base, plan)
        request = plan.request
        run = RunDirectory.create(folder, run_record(asked, request, self.base.info), dtype=str(self.base.dtype).removeprefix("torch."))
        try:
            latent = denoise(request, self.base, run, observer or Silent())
        except BaseException:
            run.close()
            raise
        return Video(self.base, request, latent, run, temporary)

    def plan(self, prompt: str = "a video", *, machine: str | None = None, memory: str = "auto", vram_limit: float | None = None, **options: Any) -> Plan:
        """What the same call would cost, stage by stage; `machine`: '24GB', '80GB' or '140GB' instead of this one."""
        from muralist.cost.budget import Budget
        from muralist.plan import Machine, plan
        from muralist.request import check_weights

        budget, request = Budget(memory, vram_limit), self.request(prompt, **options)
        check_weights(request.config, self.base.info)
        return plan(request, self.base.info, Machine.measure(self.base.device) if machine is None else Machine.of(machine), budget=budget)

    def request(self, prompt: str, **options: Any) -> Request:
        """The complete request of a call: every default filled in, every number checked."""
        unknown = sorted(options.keys() - Asked.__dataclass_fields__.keys())
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}")
        asked = Asked(prompt=prompt, **{"recipe": self.recipe, "revision": self._revision} | options)
        request = make_request(asked, self.base.info, note=lambda _: None)
        tell_of_kernels(request, self.base.info, self.base.device, note=_warn)
        return request


def _warn(text: str) -> None:
    warnings.warn(text, Note, stacklevel=4)


class Video:
    """A denoised video: iterate for its frames, or `save` it. Nothing is decoded before that, and no frame is kept."""

    def __init__(self, base: Base, request: Request, latent: LatentVideo, run: RunDirectory, temporary: tempfile.TemporaryDirectory | None):
        self._base, self.request, self.latent, self._run, self._temporary = base, request, latent, run, temporary

    @property
    def grid(self) -> Grid:
        """Frames, height, width and rate."""
        return self.request.grid

    @property
    def seed(self) -> int:
        return self.request.seed

    def __len__(self) -> int:
        return self.grid.num_frames

    def __iter__(self) -> Iterator[FrameChunk]:
        """Chunks of consecutive frames [t, H, W, 3] in [0, 1], in order."""
        from muralist.pipeline import frames

        return frames(self.latent, self.request, self._base)

    def save(self, path: str | Path, *, observer: Observer | None = None) -> Path:
        """Decode into an .mp4 as frames come, with prompt, seed, recipe and versions inside and in a JSON beside it."""
        from muralist.pipeline import paint

        return paint(self.latent, self.request, self._base, self._run, check_output(Path(path).expanduser()), observer or Silent())

    def close(self) -> None:
        """Release the run directory, and remove it if it is a temporary one."""
        self._run.close()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
