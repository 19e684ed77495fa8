"""The command line is a contract: names that people type do not change by accident, and exit codes mean what they say."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import av
import pytest
import typer

from muralist.base_info import inspect_base
from muralist.cli import _bars
from muralist.cli.main import app
from muralist.config import jsonable
from muralist.recipes import RECIPES
from muralist.settings import changed
from muralist.store import atomic
from muralist.store.weights import EMBEDDED
from tests.shell import muralist

VIDEO = (
    "--size --width --height --num-frames --duration --fps --seed --model --revision --recipe --negative-prompt --num-inference-steps --guidance-scale "
    "--flow-shift --skip-steps --set --attention --linears --device --memory --vram-limit"
)
COMMON = VIDEO.replace("--seed ", "").replace("--recipe ", "")
OPTIONS = {
    "generate": f"prompt {VIDEO} --output -o --run-dir --keep-run --dry-run --json --debug",
    "resume": "run_dir --model --device --memory --vram-limit --keep-run --json --debug",
    "plan": f"prompt {VIDEO} --machine --json --debug",
    "inspect": "file --decode --json --debug",
    "eval": "files --metrics --reference --output -o --weights --list --device --json --debug",
    "diagnose": "file --proxy --tile --html --json --debug",
    "recipes": "--json",
    "compare": f"files {COMMON} --recipes --variant --prompts --seeds --output -o --metrics --reference --weights --json --debug",
    "bench": "what --only --quick --width --minutes --device --output -o --debug",
    "doctor": "--device --json --debug",
    "train": "name --minutes --steps --device --from --init --data --height --min-score --clips --compile --resume --output -o --debug",
    "import": "method file --model --output -o --revision --skip-unmatched --debug",
    "score": "folder --metric --debug",
    "psd": "prompts --model --revision --output -o --seeds --size --num-frames --negative-prompt --num-inference-steps --guidance-scale --flow-shift --cutoff "
    "--device --json --debug",
}
SMALL = ("--size", "128x66", "--num-frames", 5, "--seed", 1)


def test_the_options_are_frozen():
    commands = typer.main.get_command(app).commands
    found = {name: sorted(o for p in c.params for o in (p.opts if p.opts[0].startswith("-") else [p.name]) if o != "--help") for name, c in commands.items()}
    for names in found.values():
        names[:] = [name for name in names if name != "-h"]
    assert found == {name: sorted(line.split()) for name, line in OPTIONS.items()}


def generate(base, output, *more):
    return muralist("generate", "a red ball moves right", "--model", base, "-o", output, *SMALL, *more)


@pytest.fixture(scope="module")
def finished(tiny22, tmp_path_factory):
    """A finished tiny video whose run was kept."""
    output = tmp_path_factory.mktemp("finished") / "a.mp4"
    answer = generate(tiny22, output, "--keep-run")
    assert answer.code == 0, answer.err
    return output


def test_generate_makes_a_file_of_exactly_the_size(finished):
    with av.open(str(finished)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, sum(1 for _ in container.decode(video=0))) == (128, 66, 5)


def test_the_closing_table_names_every_stage(tiny22, tmp_path):
    answer = generate(tiny22, tmp_path / "a.mp4")
    assert all(re.search(rf"{stage} +[\d.]+ s +[\d.]+ [MG]B", answer.out) for stage in ("prompt", "proxy", "refine", "decode", "total")), answer.out
    assert "seed 1" in answer.out and not (tmp_path / "a.mp4.run").exists()


def test_json_lines_tell_all_stages_and_the_result(tiny22, tmp_path):
    events = generate(tiny22, tmp_path / "a.mp4", "--json").events
    assert [e["stage"] for e in events if e["event"] == "end"] == ["prompt", "proxy", "upsample", "refine", "decode"]
    assert events[-1]["event"] == "result" and events[-1]["seed"] == 1 and events[-1]["request"]["grid"]["height"] == 66


def test_a_drawn_seed_is_recorded_and_paints_the_same_again(tiny22, tmp_path):
    base = ("generate", "a ball", "--model", tiny22, "--size", "128x64", "--num-frames", 5, "--json")
    seed = muralist(*base, "-o", tmp_path / "a.mp4").events[-1]["seed"]
    muralist(*base, "-o", tmp_path / "b.mp4", "--seed", seed)
    assert atomic.file_sha256(tmp_path / "a.mp4") == atomic.file_sha256(tmp_path / "b.mp4")


def test_inspect_tells_what_made_a_file(finished):
    (facts,) = muralist("inspect", finished, "--json").events
    assert facts["width"] == 128 and facts["metadata"]["request"]["seed"] == 1
    assert "a red ball moves right" in muralist("inspect", finished).out


def test_aliases_are_accepted_and_told_once(tiny22, tmp_path):
    answer = generate(tiny22, tmp_path / "a.mp4", "--steps", 2, "--cfg", 1, "--num_inference_steps", 2, "--shift", 3)
    assert answer.code == 0 and answer.err.count("--steps is read as --num-inference-steps") == 1 and "--cfg is read as --guidance-scale" in answer.err


def test_overrides_reach_every_stage(tiny22, tmp_path):
    options = ("--num-inference-steps", 6, "--guidance-scale", 1.5, "--flow-shift", 2, "--negative-prompt", "")
    config = generate(tiny22, tmp_path / "a.mp4", "--json", *options).events[-1]["request"]["config"]
    for stage in ("proxy", "refine"):
        assert (config[stage]["num_inference_steps"], config[stage]["guidance_scale"], config[stage]["flow_shift"]) == (6, 1.5, 2)
    assert config["refine"]["skip_steps"] == 3  # the recipe's share of its 4 steps was 2


def test_frames_and_durations_snap_and_say_so(tiny22, tmp_path):
    answer = muralist("generate", "a ball", "--model", tiny22, "--size", "64x64", "--duration", "0.5s", "-o", tmp_path / "a.mp4", "--json")
    assert "8 frames become 9" in answer.err and answer.events[-1]["request"]["grid"]["num_frames"] == 9


@pytest.mark.parametrize(("name", "size"), [("1080p", (1920, 1080)), ("2k", (2560, 1440)), ("4k", (3840, 2160)), ("8K", (7680, 4320)), ("300x200", (300, 200))])
def test_sizes_by_name(name, size):
    from muralist.request import parse_size

    assert parse_size(name) == size


def test_plan_and_dry_run_compute_nothing(tiny22, tmp_path):
    (plan,) = muralist("plan", "--model", tiny22, *SMALL, "--json").events
    assert plan["stages"][0]["stage"] == "prompt" and plan["totals"]["flops"] > 0
    answer = generate(tiny22, tmp_path / "a.mp4", "--dry-run")
    assert answer.code == 0 and "refine" in answer.out and list(tmp_path.iterdir()) == []


def test_recipes_and_doctor_answer():
    assert "cascade (default)" in muralist("recipes").out
    answer = muralist("doctor", "--json")
    assert answer.code in (0, 2)  # 2 where the embedded model is not in this checkout
    assert answer.events[0]["versions"]["ok"] and "GFLOP/s" in answer.events[0]["speed"]["found"]


def test_a_bug_of_ours_is_code_1_with_a_traceback(tiny22, tmp_path, monkeypatch):
    monkeypatch.setattr("muralist.pipeline.generate", lambda *_: 1 / 0)
    answer = generate(tiny22, tmp_path / "a.mp4")
    assert answer.code == 1 and "Traceback" in answer.err and "ZeroDivisionError" in answer.err


def test_debug_shows_the_traceback_of_a_users_mistake():
    answer = muralist("generate", "a ball", "--recipe", "nonsense", "--debug")
    assert answer.code == 2 and "Traceback" in answer.err and "unknown recipe" in answer.err


# --- interrupted ------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_says_how_to_resume(tiny22, tmp_path, monkeypatch):
    whole = tmp_path / "whole.mp4"
    assert generate(tiny22, whole).code == 0
    output, run_dir = tmp_path / "a.mp4", tmp_path / "a.mp4.run"

    def interrupt(self, stage, done, advance=_bars.Bars.advance):
        advance(self, stage, done)
        if stage == "refine":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(_bars.Bars, "advance", interrupt)
        answer = generate(tiny22, output)
    line = answer.err.splitlines()[-1]
    assert answer.code == 130 and line.startswith("muralist: interrupted") and line.endswith(f"muralist resume {run_dir}")
    assert not output.exists() and any(p.name.startswith("refine-step") for p in run_dir.iterdir())
    assert muralist("resume", run_dir).code == 0
    assert atomic.file_sha256(output) == atomic.file_sha256(whole) and not run_dir.exists()


def test_a_second_ctrl_c_aborts_even_inside_a_long_operation():
    script = (
        "import time, signal, sys; from pathlib import Path; from muralist.cli._bars import resumable\n"
        "with resumable(Path('RUN')):\n"
        "    signal.signal(signal.SIGINT, lambda *_: None)\n"  # as a long C call would: the interpreter does not get to run
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(timeout=20) == 130
    assert "muralist resume RUN" in process.stderr.read()


def test_a_disk_that_fills_in_the_middle_is_one_line_with_the_bytes(tiny22, tmp_path, monkeypatch):
    output, written = tmp_path / "a.mp4", atomic.write

    def full(handle, data):
        if "refine-step-000003" in handle.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write", full)
        answer = generate(tiny22, output)
    assert answer.code == 2 and re.search(r"the disk is full: [\d,]+ bytes needed, [\d,]+ bytes free; free some space", answer.err.splitlines()[-1])
    assert muralist("resume", f"{output}.run").code == 0 and output.is_file()


# --- resumed ----------------------------------------------------------------------------------------------------------------------


def test_resume_takes_no_other_options(finished):
    assert "no such option" in muralist("resume", f"{finished}.run", "--size", "8k").error.lower()


def test_generate_refuses_a_run_directory_of_other_options(tiny22, tmp_path):
    output = tmp_path / "a.mp4"
    assert generate(tiny22, output, "--keep-run").code == 0
    assert "this run was started with proxy.guidance_scale" in generate(tiny22, output, "--guidance-scale", 3).error
    assert "started with grid.num_frames = 5, now it is 9" in generate(tiny22, output, "--num-frames", 9).error
    assert "started with seed = 1, now it is 2" in generate(tiny22, output, "--seed", 2, "--memory", "low").error, "an option that nobody typed is told"


def test_the_same_command_without_a_seed_goes_on_with_the_seed_it_drew(tiny22, tmp_path):
    output = tmp_path / "a.mp4"
    first = muralist("generate", "a ball", "--model", tiny22, "--size", "64x64", "-o", output, "--keep-run", "--json").events[-1]["seed"]
    again = muralist("generate", "a ball", "--model", tiny22, "--size", "64x64", "-o", output, "--keep-run", "--json").events[-1]["seed"]
    assert first == again


def test_a_run_whose_model_was_typed_from_here_is_resumed_from_anywhere(tiny22, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(tiny22)
    monkeypatch.chdir(tmp_path)
    assert generate("base", tmp_path / "a.mp4", "--keep-run").code == 0
    monkeypatch.chdir("/")
    answer = muralist("resume", tmp_path / "a.mp4.run")
    assert answer.code == 0, answer.err


def test_a_run_goes_on_where_its_model_lies_now(tiny22, tmp_path, monkeypatch):
    model, output = shutil.copytree(tiny22, tmp_path / "model"), tmp_path / "a.mp4"
    assert generate(model, output, "--keep-run").code == 0
    shutil.rmtree(tmp_path / "a.mp4.run" / "latent", ignore_errors=True)
    output.unlink()
    moved = model.rename(tmp_path / "elsewhere")
    assert "is gone; say by --model FOLDER" in muralist("resume", f"{output}.run").error
    assert "no folder" in muralist("resume", f"{output}.run", "--model", tmp_path / "nowhere").error
    assert "not a usable path" in muralist("resume", f"{output}.run", "--model", "~nosuchuser/x").error
    other = shutil.copytree(moved, tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-64] + bytes(64))
    assert "weights or configurations have changed" in muralist("resume", f"{output}.run", "--model", other).error
    assert "an empty path" in muralist("resume", f"{output}.run", "--model", "").error
    assert "has other weights or configurations than" in generate(other, output, "--keep-run").error
    assert muralist("resume", f"{output}.run", "--model", moved, "--keep-run").code == 0 and output.is_file()
    again = moved.rename(tmp_path / "again")
    assert generate(again, output, "--keep-run").code == 0, "the same command for a model that has moved"
    assert muralist("resume", f"{output}.run", "--keep-run").code == 0, "it is told once"
    shutil.rmtree(again)
    monkeypatch.setitem(EMBEDDED, "tiny", tiny22)
    assert generate("tiny", output, "--keep-run").code == 0, "the same weights by a name"
    assert muralist("resume", f"{output}.run").code == 0, "which the run has remembered"


CONFIGURED = {
    "vae/config.json": ("latents_mean", [0.5] * 48), "transformer/config.json": ("eps", 1e-3), "text_encoder/config.json": ("layer_norm_epsilon", 1e-3),
    "scheduler/scheduler_config.json": ("prediction_type", "sample"),
}  # fmt: skip


def test_a_run_does_not_go_on_with_the_same_weights_configured_otherwise(tiny22, tmp_path):
    model, output = shutil.copytree(tiny22, tmp_path / "model"), tmp_path / "a.mp4"
    assert generate(model, output, "--keep-run").code == 0
    for file, (name, value) in CONFIGURED.items():
        before = (model / file).read_text()
        (model / file).write_text(json.dumps(json.loads(before) | {name: value}))
        assert "weights or configurations have changed" in muralist("resume", f"{output}.run", "--keep-run").error, file
        told = {"_diffusers_version": "9"} | ({"dtype": "float16"} if file.startswith("text_encoder") else {})  # which changes nothing
        (model / file).write_text(json.dumps(json.loads(before) | told))
    (model / "tokenizer" / ".DS_Store").write_bytes(b"x")
    assert muralist("resume", f"{output}.run", "--keep-run").code == 0


def test_a_run_that_was_moved_to_a_copy_goes_back_into_the_package(tmp_path):
    from muralist.cli.resume import moved_to

    assert moved_to("miniature") == "miniature" and moved_to(str(tmp_path)) == str(tmp_path)


def test_a_record_at_odds_with_itself_is_refused(tiny22, tmp_path):
    output = tmp_path / "a.mp4"
    assert generate(tiny22, output, "--keep-run").code == 0
    record = tmp_path / "a.mp4.run" / "request.json"
    whole = json.loads(record.read_text())
    whole["options"]["request"]["grid"]["width"] = 192
    record.write_text(json.dumps(whole))
    for answer in (muralist("resume", f"{output}.run"), generate(tiny22, output)):
        assert answer.code == 2 and "what was planned is not what was asked" in answer.error
    whole["format"] = 1
    record.write_text(json.dumps(whole))
    assert "not a request of this version" in muralist("resume", f"{output}.run").error


def test_a_run_that_asks_for_what_its_base_has_not_is_refused(tiny22, tmp_path):
    """Its base, or its record, was changed since."""
    output = tmp_path / "a.mp4"
    assert generate(tiny22, output, "--keep-run").code == 0
    record = tmp_path / "a.mp4.run" / "request.json"
    whole = json.loads(record.read_text())
    for asked in (whole["options"]["typed"], whole["options"]["request"]):
        asked["config"]["refine"]["adapter"] = "nope"
    record.write_text(json.dumps(whole))
    answer = muralist("resume", f"{output}.run")
    assert answer.code == 2 and "has no adapter 'nope'" in answer.error


def part(kind, **values):
    return json.dumps({"kind": kind} | values)


REFINE = {"num_inference_steps": 3, "guidance_scale": 1.5, "skip_steps": 1}
NUMBERS = {
    "a field": ("refine.flow_shift=3", "refine.flow_shift=3.0"),
    "a field of a part": ("upsample.latent_scale=2", "upsample.latent_scale=2.0"),
    "a default without a point": ("encode.crf=20", "encode.crf=20.0"),
    "a pair": ("refine.guidance_interval=[0,0.9]", "refine.guidance_interval=[0.0,0.9]"),
    "a part": (f"upsample={part('PixelInterpolation', latent_scale=2)}", f"upsample={part('PixelInterpolation', latent_scale=2.0)}"),
    "a stage": (f"refine={part('Refine', flow_shift=3, **REFINE)}", f"refine={part('Refine', flow_shift=3.0, **REFINE)}"),
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
def test_a_number_is_the_same_written_with_and_without_a_point(numbers):
    config = RECIPES["cascade"](inspect_base("miniature"))
    without, point = (json.dumps(jsonable(changed(config, [setting]))) for setting in numbers)
    assert without == point


def test_a_run_goes_on_with_numbers_written_with_and_without_a_point(tiny22, tmp_path):
    output, crf = tmp_path / "a.mp4", ("--set", "encode.crf=16")  # the default, which has none
    assert generate(tiny22, output, "--keep-run", "--set", "refine.flow_shift=3", "--set", "refine.guidance_interval=[0,1]").code == 0
    answer = generate(tiny22, output, "--set", "refine.flow_shift=3.0", "--set", "refine.guidance_interval=[0,1.0]", *crf)
    assert answer.code == 0, answer.err


def test_a_run_and_its_output_can_be_moved_together(tiny22, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    assert generate(tiny22, old / "a.mp4", "--keep-run").code == 0
    (old / "a.mp4").unlink()
    os.rename(old, new)
    assert muralist("resume", new / "a.mp4.run").code == 0
    assert (new / "a.mp4").is_file()


def test_what_a_base_does_not_read_of_a_prompt_is_told():
    dry = ("--dry-run", "--size", "448x256")
    assert "does not know, and leaves out of account: cat, sofa" in muralist("generate", "a red cat rises over sofa", *dry).err
    assert "reads the first 16" in muralist("generate", "a red ball rises over sand, " * 4, *dry).err
    plain = muralist("generate", "A red ball rises over sand.", *dry)
    assert plain.code == 0 and "does not know" not in plain.err and "reads the first" not in plain.err


def test_the_package_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "muralist", "generate", "x", "--recipe", "no"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("muralist: error: recipe: unknown recipe 'no'; use one of ")
