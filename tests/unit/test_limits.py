"""What reads files of unknown origin limits itself, by whatever the system allows."""

from __future__ import annotations

import resource
import sys

import pytest

from muralist.store import pickle_copy, video_probe

CPU_AND_FILES = {resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE}


@pytest.mark.parametrize("script", [video_probe, pickle_copy])
@pytest.mark.parametrize("platform, more", [("linux", {resource.RLIMIT_AS}), ("darwin", set())])
def test_macos_has_no_limit_of_address_space_and_all_others(script, platform, more, monkeypatch):
    known = {}
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: known.update({what: limits[0]}))
    script.limit(100)
    assert known.keys() == CPU_AND_FILES | more
    assert all(most != resource.RLIM_INFINITY for most in known.values())
