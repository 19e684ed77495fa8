"""30 SIGKILLs at random times over a tiny run: nothing finished is lost, and the file is that of an undisturbed run, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("chained_kills.py")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("flavour", ["tiny22", "tiny21"])
def test_a_run_that_is_killed_at_random_times_ends_in_the_same_file(flavour, request, tmp_path):
    model = request.getfixturevalue(flavour)
    kills = 30 if flavour == "tiny22" else 4
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, SCRIPT, str(model), str(tmp_path), str(kills), "7"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same"] and result["kills"] == kills
    assert result["repeated"] <= kills, "more than one unit of work was done twice per kill"
    # frames: a group of pictures (12) that was not complete, and the latent frame (4) that its first one lies in
    assert result["decoded_again"] <= 16
    # A file cut off by a kill opens, and lacks at most the last group, if that was published and not yet appended, and the last frame before it.
    assert all(published - 13 <= playable <= 29 for published, playable in result["left"])
    assert any(0 < playable < 29 for _, playable in result["left"]), "no kill met the file while it was being written"
