"""The protocol with tools in other environments, tried with environments that hold fake tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from muralist.eval import external_worker
from muralist.eval.metrics import external
from muralist.eval.registry import Setup, Unavailable, available
from muralist.eval.source import Source
from muralist.store.video_read import VideoInfo

FAKES = {
    # a tool that prints what it likes, and scores a picture by its number of bytes
    "pyiqa.py": """
import os
print("loading weights ...")
def create_metric(name, device):
    return lambda path: {"musiq": 1.0, "niqe": 2.0}[name] * int(os.path.basename(path)[:6])
""",
    "torch.py": """
import contextlib
class cuda:
    is_available = staticmethod(lambda: False)
device, inference_mode = str, contextlib.nullcontext
""",
    "vbench.py": """
import json, os
class VBench:
    def __init__(self, device, info, folder):
        self.folder = folder
    def evaluate(self, videos_path, name, dimension_list, mode):
        assert mode == "custom_input" and os.path.isabs(videos_path)
        json.dump({d: [0.75, []] for d in dimension_list}, open(os.path.join(self.folder, name + "_eval_results.json"), "w"))
""",
}


def environment(folder: Path, script: str) -> Path:
    """A folder that looks like a virtual environment; `script` is its python."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(script)
    python.chmod(0o755)
    return folder


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """An environment with fake tools: this python, started with nothing but the standard library and the fakes on its path."""
    tools = tmp_path / "tools"
    for name, text in FAKES.items():
        (tools / f"{name[:-3]}-1.2.3.dist-info").mkdir(parents=True)
        (tools / f"{name[:-3]}-1.2.3.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name[:-3]}\nVersion: 1.2.3\n")
        (tools / name).write_text(text)
    start = f"import runpy, sys; sys.path.insert(0, {str(tools)!r}); runpy.run_path(sys.argv[-1], run_name='__main__')"
    folder = environment(tmp_path / "env", f'#!/bin/sh\nexec {sys.executable} -I -S -c "{start}" "$2"\n')
    monkeypatch.setenv("MURALIST_EVAL_ENV", str(folder))
    return folder


def source(num_frames: int = 20) -> Source:
    return Source(Path("a.mp4"), VideoInfo(48, 32, num_frames, 16.0, "h264", "", "yuv420p", 8, *["unspecified"] * 4))


def run(name: str, frames: int = 20) -> dict[str, float]:
    meter = available()[name].start(Setup(), source(frames))
    for _ in range(frames):
        meter.add(torch.rand(32, 48, 3))
    return meter.result()


def test_picture_tools_see_eight_frames_as_lossless_files(fake):
    wanted = [0, 3, 5, 8, 11, 14, 16, 19]
    assert run("musiq") == {"musiq": pytest.approx(sum(wanted) / 8)}
    assert run("niqe") == {"niqe": pytest.approx(2 * sum(wanted) / 8)}


def test_frames_are_written_without_loss(fake, monkeypatch):
    seen = []
    monkeypatch.setattr(external, "ask", lambda python, request: seen.extend(Image.open(p).copy() for p in request["frames"]) or {"value": 1})
    meter = available()["musiq"].start(Setup(), source(1))
    frame = torch.randint(0, 256, (32, 48, 3))
    meter.add(frame.float() / 255)
    meter.result()
    assert torch.equal(torch.tensor(list(seen[0].tobytes())), frame.flatten())
    assert not Path(meter._folder.name).exists()


def test_video_tools_get_the_file(fake):
    assert run("vbench_imaging_quality") == {"vbench_imaging_quality": 0.75}


def test_dover_is_read_from_its_own_script(fake, tmp_path, monkeypatch):
    with pytest.raises(Unavailable, match="MURALIST_DOVER does not name a checkout"):
        run("dover")
    script = "import sys; assert sys.argv[1:] == ['-v', '/a.mp4', '-f']; print('Normalized fused overall score (scale in [0,1]): 0.4108')"
    (tmp_path / "evaluate_one_video.py").write_text(script)
    monkeypatch.setenv("MURALIST_DOVER", str(tmp_path))
    found = external_worker.run_dover({"video": "/a.mp4", "metric": "fused"})
    assert found == (0.4108, "DOVER")


def test_a_tool_that_fails_is_one_line(fake):
    with pytest.raises(Unavailable, match="pyiqa: KeyError: 'maniqa'") as caught:
        run("maniqa")
    assert "\n" not in str(caught.value)


def test_no_environment_is_a_skip(monkeypatch, tmp_path):
    monkeypatch.delenv("MURALIST_EVAL_ENV", raising=False)
    for name in ("musiq", "maniqa", "niqe", "dover", "vbench_subject_consistency"):
        with pytest.raises(Unavailable, match="set MURALIST_EVAL_ENV"):
            available()[name].start(Setup(), source())
    monkeypatch.setenv("MURALIST_EVAL_ENV_DOVER", str(tmp_path / "nothing"))
    with pytest.raises(Unavailable, match="MURALIST_EVAL_ENV_DOVER names"):
        available()["dover"].start(Setup(), source())


def test_one_tool_may_have_an_environment_of_its_own(fake, tmp_path, monkeypatch):
    other = environment(tmp_path / "other", "#!/bin/sh\n")
    monkeypatch.setenv("MURALIST_EVAL_ENV_PYIQA", str(other))
    assert external.find_python("pyiqa") == other / "bin" / "python"
    assert external.find_python("vbench") == fake / "bin" / "python"


@pytest.mark.parametrize(
    "script, says", [("echo hello", "no answer in JSON"), ("echo '[1]'", "no value"), ("echo '{}'", "no value"), ("sleep 30", "within 0.2 s")]
)
def test_environments_that_answer_nonsense(tmp_path, script, says):
    folder = environment(tmp_path / "env", f"#!/bin/sh\nexec {script}\n")
    with pytest.raises(Unavailable, match=says):
        external.ask(folder / "bin" / "python", {"tool": "pyiqa"}, timeout=0.2 if "sleep" in script else 30)


def test_the_worker_stands_alone():
    """Nothing but the standard library is imported before a tool is asked for."""
    code = f"import runpy, sys; runpy.run_path({external_worker.__file__!r}); print({{'torch', 'muralist', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=True)
    assert done.stdout.strip() == "set()"
