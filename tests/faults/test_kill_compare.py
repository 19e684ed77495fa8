"""A comparison that is killed goes on where it stopped, and takes the run that it was making along."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("chained_compare_kills.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_grid_that_is_killed_at_random_times_ends_in_the_same_report(tiny22, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, str(tiny22), str(tmp_path), "5", "5"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same"] and result["kills"] >= 3
    assert result["attempts"] <= 2 + result["kills"], "a finished cell ran again"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_comparison_takes_its_run_along_and_ctrl_c_says_how_to_go_on(tiny22, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball moves right\n")
    options = ["--recipes", "direct", "--prompts", "prompts.txt", "--model", str(tiny22), "--size", "96x64", "--num-frames", "5"]
    command = [sys.executable, "-m", "muralist.cli.main", "compare", *options, "--metrics", "spectrum", "--output", "out"]

    def start(number: int) -> subprocess.Popen:
        """Start it, and wait until its run is the `number`-th attempt."""
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while sum(path.read_text().count('"attempt"') for path in tmp_path.glob("out/cells/*/journal.jsonl")) < number and process.poll() is None:
            time.sleep(0.05)
        return process

    process = start(1)
    time.sleep(0.5)
    run = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    process.kill()
    process.communicate()
    for _ in range(100):
        if not Path(f"/proc/{run}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{run}").exists()
    process = start(2)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in errors.splitlines()[-1]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "report.html").is_file(), done.stderr
