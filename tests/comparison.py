"""What tests of comparisons share: the command, and a metric that takes no time."""

from __future__ import annotations

import pytest

from muralist.eval.registry import Metric
from tests.shell import Answer, muralist


class Brightness:
    """A metric for these tests."""

    def __init__(self):
        self.means = []

    def add(self, frame):
        self.means.append(frame.mean().item())

    def result(self):
        return {"brightness": sum(self.means) / len(self.means), "frames": len(self.means)}


BRIGHTNESS = Metric(name="brightness", kind="video", summary="mean", unit="", better="higher", origin="this test", start=lambda setup, source: Brightness())


def only_brightness(patch: pytest.MonkeyPatch) -> None:
    """Nothing else is measured."""
    patch.setattr("muralist.eval.measure.available", lambda: {"brightness": BRIGHTNESS})


def compare(*arguments: object) -> Answer:
    return muralist("compare", *arguments)
