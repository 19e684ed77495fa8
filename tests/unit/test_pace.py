"""Saves come as often as their cost allows."""

from __future__ import annotations

import pytest
import torch

from muralist.nn.decoder import StreamingDecoder
from muralist.stages import decode as stage
from muralist.store import pace
from tests.parity.test_decode import F, Killed, decode, frames, latent, model


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def save(pace_, clock, seconds):
    with pace_.saving():
        clock[0] += seconds


def test_the_first_save_is_due_at_once_and_the_next_after_ten_times_what_it_took(clock):
    it = pace.Pace()
    assert it.due()
    save(it, clock, 2.0)
    clock[0] += 19.9
    assert not it.due()
    clock[0] += 0.2
    assert it.due()
    save(it, clock, 0.001)
    clock[0] += 0.011
    assert it.due()


def test_work_waits_for_no_more_than_a_tenth_of_its_time(clock):
    it, saving, working = pace.Pace(), 0.0, 0.0
    for _ in range(1000):
        clock[0] += 0.05
        working += 0.05
        if it.due():
            save(it, clock, 1.0)
            saving += 1.0
    assert 3 <= saving <= 0.1 * working + 1.0


class Seldom:
    """Due after every other frame."""

    def __init__(self):
        self.asked = 0
        self.saving = pace.Pace().saving

    def due(self) -> bool:
        self.asked += 1
        return self.asked % 2 == 0


@pytest.mark.parametrize("killed", range(1, F + 1))
def test_layers_of_the_whole_frame_go_on_from_their_last_save(killed, tmp_path, monkeypatch):
    """Killed after `killed` latent frames: no more is computed again than since the last save, and the frames are the same bits."""
    video, vae, plan = latent("wan22"), model("wan22"), stage.TileMajor(tile=32)
    whole, computed = frames(decode(video, vae, plan)), []
    work = StreamingDecoder.first_part
    monkeypatch.setattr(stage, "Pace", Seldom)
    monkeypatch.setattr(StreamingDecoder, "first_part", lambda *a, **k: computed.append(1) or work(*a, **k))

    def on_tile(done, total):
        if len(computed) == killed:
            raise Killed

    with pytest.raises(Killed):
        frames(decode(video, vae, plan, scratch=tmp_path, on_tile=on_tile))
    del computed[:]
    assert torch.equal(frames(decode(video, vae, plan, scratch=tmp_path)), whole)
    assert len(computed) == F - killed // 2 * 2
