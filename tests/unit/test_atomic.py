"""The commit protocol, exhaustively: kill, fill or fail at every call of the five functions that touch the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from muralist.errors import UserError
from muralist.store import atomic

FIVE = ("open_new", "write", "sync", "publish", "remove")
OLD, NEW = {"a.bin": b"old" * 10, "b.bin": b"o"}, {"a.bin": b"new" * 20, "b.bin": b"n", "c.bin": b""}


def in_child(work) -> int:
    """Run `work` in a forked child; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def hooked(name: str, call: int, act, after: bool) -> None:
    """Replace one of the five so that `act` runs before or after its `call`-th call."""
    original, count = getattr(atomic, name), 0

    def replacement(*args):
        nonlocal count
        count += 1
        if count == call and not after:
            act()
        result = original(*args)
        if count == call and after:
            act()
        return result

    setattr(atomic, name, replacement)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in atomic.verify_dir(directory)["files"]}


@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_at_every_call(tmp_path, name, after, overwrite):
    """Whatever the moment of death: the old directory or the new one; never a part of one, and nothing only where nothing was."""
    outcomes, call = [], 0
    while True:
        call += 1
        root = tmp_path / str(call)
        root.mkdir()
        if overwrite:
            atomic.publish_dir(root / "r", OLD)

        def work(root=root, call=call):
            hooked(name, call, kill_self, after)
            atomic.publish_dir(root / "r", NEW, {"k": 1})

        killed = os.WIFSIGNALED(in_child(work))
        atomic.clean(root)
        assert not list(root.rglob("*.tmp"))
        if (root / "r").exists():
            outcomes.append(content(root / "r"))
            assert outcomes[-1] == NEW or (overwrite and outcomes[-1] == OLD)
        else:
            assert not overwrite
        atomic.publish_dir(root / "r", NEW)  # the work can be redone over whatever was left
        assert content(root / "r") == NEW
        if not killed:
            break
    assert call > 1 or name == "remove"
    assert outcomes[-1] == NEW


@pytest.mark.parametrize("name", ["open_new", "write", "sync", "publish"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_failure_at_every_call_is_one_line_and_keeps_the_old_state(tmp_path, monkeypatch, name, code):
    atomic.publish_dir(tmp_path / "r", OLD)
    original = getattr(atomic, name)
    for call in range(1, 20):
        left = call

        def failing(*args):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(code, os.strerror(code))
            return original(*args)

        monkeypatch.setattr(atomic, name, failing)
        try:
            atomic.publish_dir(tmp_path / "r", NEW)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            assert code == errno.EACCES or "bytes free" in str(error)
        else:
            assert left > 0 and call > 1
            break
        finally:
            monkeypatch.setattr(atomic, name, original)
        assert not list(tmp_path.glob("*.tmp"))
        assert content(tmp_path / "r") in (OLD, NEW)
    assert content(tmp_path / "r") == NEW


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40])
def test_what_does_not_stay_in_memory_is_written_whole(tmp_path, monkeypatch, size):
    """In parts, each on the disk before the next; size and hash are those of the whole."""
    monkeypatch.setattr(atomic, "STRIDE", 8)
    data, synced = bytes(range(size)), []

    def payload(sink):
        for start in range(0, size, 5):
            sink.write(data[start : start + 5])

    inner = atomic.sync
    monkeypatch.setattr(atomic, "sync", lambda target: (synced.append(target), inner(target)))
    for what in (data, payload):
        synced.clear()
        atomic.write_file(tmp_path / "file", what, cached=False)
        assert (tmp_path / "file").read_bytes() == data
        assert len(synced) == size // 8 + 2  # each whole part, the end, the directory
    atomic.publish_dir(tmp_path / "r", {"x": payload}, cached=False)
    assert content(tmp_path / "r") == {"x": data}
    assert atomic.verify_dir(tmp_path / "r")["files"] == {"x": {"sha256": hashlib.sha256(data).hexdigest(), "size": size}}


@pytest.mark.parametrize("name", ["write", "sync"])
def test_a_full_disk_between_its_parts_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(atomic, "STRIDE", 8)
    original, left = getattr(atomic, name), 3

    def failing(*args):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(atomic, name, failing)
    with pytest.raises(UserError, match="40 bytes needed"):
        atomic.write_file(tmp_path / "file", bytes(40), cached=False)
    assert not list(tmp_path.iterdir())


def test_short_writes_are_completed(tmp_path):
    class Slow:
        """A raw file that takes three bytes at a time."""

        def __init__(self):
            self.taken = b""

        def write(self, data):
            self.taken += bytes(data[:3])
            return min(3, len(data))

    slow = Slow()
    atomic.write(slow, b"0123456789")
    assert slow.taken == b"0123456789"


def test_leftovers_and_links_do_not_block_or_escape(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    root = tmp_path / "root"
    root.mkdir()
    (root / "r.tmp").symlink_to(victim)
    atomic.publish_dir(root / "r", NEW)
    (root / "x.json.tmp").symlink_to(victim)
    atomic.write_json(root / "x.json", {"a": 1})
    (root / "link.tmp").symlink_to(tmp_path, target_is_directory=True)
    atomic.clean(root)
    assert victim.read_bytes() == b"precious" and content(root / "r") == NEW
    assert sorted(p.name for p in root.iterdir()) == ["r", "x.json"]


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"files": []}',
        b'{"format": 1, "files": {"../x": {"sha256": "", "size": 0}}, "info": {}}',
        b"\xff\xfe",
        b'"\\ud800"',
    ],
)
def test_malformed_manifest_is_one_line(tmp_path, manifest):
    atomic.publish_dir(tmp_path / "r", OLD)
    (tmp_path / "r" / atomic.MANIFEST).write_bytes(manifest)
    with pytest.raises(UserError) as caught:
        atomic.verify_dir(tmp_path / "r")
    assert "\n" not in str(caught.value)


def test_every_flipped_byte_is_found(tmp_path):
    atomic.publish_dir(tmp_path / "r", OLD)
    path = tmp_path / "r" / "a.bin"
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(UserError, match=r"a\.bin"):
            atomic.verify_dir(tmp_path / "r")


def test_json_keeps_lone_surrogates_and_refuses_nan(tmp_path):
    atomic.write_json(tmp_path / "x.json", {"prompt": "\ud800 é", "b": [1, 2.5, None]})
    assert atomic.read_json(tmp_path / "x.json") == {"prompt": "\ud800 é", "b": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text())["b"][0] == 1
