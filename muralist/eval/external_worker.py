"""Runs one public tool on one video, in the environment where that tool lives: JSON in on stdin, one line of JSON out on stdout.

Started by `muralist.eval.metrics.external` with another environment's python. It stands alone: the standard library and the tool, nothing
of muralist, whose requirements contradict the tools' own. In: `{"tool": ..., "metric": ..., "frames": [PNG, ...], "video": PATH, "prompt": TEXT}`;
out: `{"value": ..., "tool": "NAME VERSION"}` or `{"error": "one line"}`. Whatever the tool prints goes to stderr.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def run_pyiqa(request):
    """Mean score of the frames (MUSIQ, MANIQA, NIQE)."""
    import pyiqa
    import torch

    metric = pyiqa.create_metric(request["metric"], device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.inference_mode():
        scores = [float(metric(path)) for path in request["frames"]]
    return sum(scores) / len(scores), f"pyiqa {version('pyiqa')}"


def run_vbench(request):
    """One dimension of VBench on a video of one's own."""
    import torch
    import vbench

    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bench = vbench.VBench(device, str(Path(vbench.__file__).parent / "VBench_full_info.json"), folder)
        bench.evaluate(videos_path=request["video"], name="one", dimension_list=[request["metric"]], mode="custom_input")
        results = json.loads((Path(folder) / "one_eval_results.json").read_text())
    return results[request["metric"]][0], f"vbench {version('vbench')}"


def run_dover(request):
    """The fused score of DOVER's own script, from its checkout."""
    folder = os.environ.get("MURALIST_DOVER", "")
    if not os.path.isfile(os.path.join(folder, "evaluate_one_video.py")):
        raise RuntimeError("MURALIST_DOVER does not name a checkout of DOVER")
    command = [sys.executable, "evaluate_one_video.py", "-v", request["video"], "-f"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = re.search(r"fused overall score.*:\s*([-+\d.eE]+)", done.stdout)
    if found is None:
        raise RuntimeError("no score: " + (done.stderr or done.stdout).strip()[-200:])
    return float(found[1]), "DOVER"


def run_hpsv3(request):
    """Mean preference of the frames for the prompt (the first of the two numbers that the tool gives is the mean of its distribution)."""
    import torch
    from hpsv3 import HPSv3RewardInferencer

    judge = HPSv3RewardInferencer(device="cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        rewards = judge.reward(prompts=[request["prompt"]] * len(request["frames"]), image_paths=request["frames"])
    return sum(float(reward[0]) for reward in rewards) / len(rewards), f"hpsv3 {version('hpsv3')}"


TOOLS = {"pyiqa": run_pyiqa, "vbench": run_vbench, "dover": run_dover, "hpsv3": run_hpsv3}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # from here on a tool that prints does not disturb the answer
    try:
        request = json.load(sys.stdin)
        value, tool = TOOLS[request["tool"]](request)
        answer = {"value": float(value), "tool": tool}
    except Exception as error:  # whatever a tool raises is for the other side to tell
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
