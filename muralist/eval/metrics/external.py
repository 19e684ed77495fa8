"""Metrics of public tools that cannot live beside us: MUSIQ, MANIQA, NIQE (pyiqa), HPSv3, DOVER, and dimensions of VBench.

Their requirements contradict ours (torchvision, old transformers), so each runs in an environment of its own, made once by a person
(docs/eval-external.md): `MURALIST_EVAL_ENV` names its folder or its python, `MURALIST_EVAL_ENV_PYIQA`, `_HPSV3`, `_VBENCH` and `_DOVER`
one for a single tool. A stand-alone script runs there, JSON in, JSON out. Where there is no environment, the metric is skipped.

MUSIQ (Ke et al., 2021), 0 to 100, higher is better; MANIQA (Yang et al., 2022), 0 to 1, higher; NIQE (Mittal et al., 2012), above 0, lower;
HPSv3 (Ma et al., 2025), human preference for frames as pictures of the prompt, about 0 to 15, higher (LUVE trains on clips above 6.5): means
over `FRAMES` evenly spread frames at native size. DOVER (Wu et al., 2023): fused score of the file, 0 to 1, higher. VBench (Huang et al.,
2024): dimensions that need no prompt list of its own, 0 to 1, higher; it shrinks what it sees to 512 pixels or less.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from muralist.eval import external_worker
from muralist.eval.features.patches import spread
from muralist.eval.registry import Better, Metric, Setup, Unavailable, register
from muralist.eval.source import Source

FRAMES = 8
VARIABLE = "MURALIST_EVAL_ENV"
TIMEOUT = 3600.0  # seconds for one video
VBENCH = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tool:
    """A metric as its tool calls it; `sees_frames`: it judges pictures, not files; `reads_prompt`: it asks what they shall show."""

    name: str
    metric: str
    sees_frames: bool = False
    reads_prompt: bool = False


def find_python(tool: str) -> Path:
    """The python of the environment that a person has set up for the tool; Unavailable where there is none."""
    own = f"{VARIABLE}_{tool.upper()}"
    named = os.environ.get(own) or os.environ.get(VARIABLE)
    if not named:
        raise Unavailable(f"{tool} runs in an environment of its own; set {VARIABLE} (docs/eval-external.md)")
    path = Path(named).expanduser()
    python = path / "bin" / "python" if path.is_dir() else path
    if not os.access(python, os.X_OK) or python.is_dir():
        raise Unavailable(f"no python in {path}, which {own if os.environ.get(own) else VARIABLE} names (docs/eval-external.md)")
    return python.absolute()


def ask(python: Path, request: dict, timeout: float = TIMEOUT) -> dict:
    """One question to the worker; its answer, checked. Unavailable with the tool's last word where it has none."""
    # isolated: neither our modules nor our variables reach the other environment
    command = [str(python), "-I", external_worker.__file__]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout, env=environment, check=False)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{request['tool']} did not answer within {timeout:g} s") from None
    except (OSError, ValueError):
        raise Unavailable(f"{request['tool']} gave no answer in JSON") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("value"), int | float):
        error = answer.get("error") if isinstance(answer, dict) else None
        raise Unavailable(f"{request['tool']}: {error or 'no value'}")
    return answer


class External:
    """Gathers frames if the tool wants them, then asks."""

    def __init__(self, name: str, tool: Tool, source: Source, prompt: str = ""):
        self._name, self._tool, self._source, self._prompt, self._python = name, tool, source, prompt, find_python(tool.name)
        self._wanted = frozenset(spread(source.info.num_frames, FRAMES) if tool.sees_frames else ())
        self._folder, self._index, self._frames = tempfile.TemporaryDirectory(prefix="muralist-"), 0, []

    def add(self, frame: torch.Tensor) -> None:
        if self._index in self._wanted:
            path = Path(self._folder.name) / f"{self._index:06d}.png"
            Image.fromarray((frame * 255).round().byte().cpu().numpy()).save(path, compress_level=1)
            self._frames.append(str(path))
        self._index += 1

    def result(self) -> dict[str, float]:
        video = str(self._source.path.absolute())
        with self._folder:
            request = {"tool": self._tool.name, "metric": self._tool.metric, "frames": self._frames, "video": video, "prompt": self._prompt}
            answer = ask(self._python, request)
        return {self._name: float(answer["value"])}


def _register(name: str, tool: Tool, summary: str, better: Better, origin: str) -> None:
    def start(setup: Setup, source: Source) -> External:
        prompt = source.prompt or setup.prompts.get(source.path) or ""
        if tool.reads_prompt and not prompt:
            raise Unavailable(f"{source.path.name} does not say its prompt")
        return External(name, tool, source, prompt)

    register(Metric(name=name, kind="video", summary=summary, unit="", better=better, origin=origin, start=start, needs=VARIABLE))


_register("musiq", Tool("pyiqa", "musiq", True), "picture quality (pyiqa)", "higher", "Ke et al., ICCV 2021")
_register("maniqa", Tool("pyiqa", "maniqa", True), "picture quality (pyiqa)", "higher", "Yang et al., CVPRW 2022")
_register("niqe", Tool("pyiqa", "niqe", True), "naturalness of pictures (pyiqa)", "lower", "Mittal et al., 2012")
_register("hpsv3", Tool("hpsv3", "hpsv3", True, True), "human preference for the prompt (HPSv3)", "higher", "Ma et al., ICCV 2025")
_register("dover", Tool("dover", "fused"), "quality of the video (DOVER)", "higher", "Wu et al., ICCV 2023")
for _dimension in VBENCH:
    _register(f"vbench_{_dimension}", Tool("vbench", _dimension), f"VBench, {_dimension.replace('_', ' ')}", "higher", "Huang et al., CVPR 2024")
