"""Names from outside never lead outside; output paths are refused before any work is done."""

from __future__ import annotations

import os
import random
import shutil
from collections import namedtuple

import pytest

from muralist.errors import UserError
from muralist.store.paths import check_output, safe_join

HOSTILE = [
    "", ".", "..", "/", "//", "./", "../", "../x", "a/..", "a/../..", "a/../../x", "a/./b", "a//b", "/etc/passwd", "//host/share", "~/../x/..",
    "..\\x", "a\\b", "\\\\host\\share", "C:x", "C:\\x", "c:/x", "x:stream", "file:///etc/passwd", "http://x/y",
    "a\0b", "\0", "a\nb", "a\rb", "a\tb", "\x1b[31m", "a\x7fb", "a\u202eb", "a\u200bb", "a\ud800b",
    "．．/x", "。。" + "/../x", "‥/x", "․․/x", "a/．．/．．/x", "a∕../x/..", "a／../..", "..;/x/..", " ../x/..", ".. /x",
    "... /x", "a/ /b", "a/.../b", " ", "a/ . /b",
    "x" * 256, "é" * 200, "link_out", "link_out/x", "link_up/x", "dir/link_out/x", "loop/x", "link_root",
]  # fmt: skip
HARMLESS = [
    "a",
    "a.mp4",
    "dir/a",
    "dir/b/c.json",
    ".hidden",
    "a..b",
    "..a",
    "a b",
    "ünïcode",
    "日本",
    "%2e%2e",
    "%2e%2e%2fx",
    "$(rm)",
    "-rf",
    "~",
    "link_in/x",
    "x" * 255,
]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "dir").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link_out").symlink_to(tmp_path / "outside")
    (root / "link_up").symlink_to("..")
    (root / "dir" / "link_out").symlink_to(tmp_path / "outside")
    (root / "link_in").symlink_to("dir")
    (root / "link_root").symlink_to(".")
    (root / "loop").symlink_to("loop")
    return root


@pytest.mark.parametrize("name", HOSTILE, ids=[f"{n}" for n in range(len(HOSTILE))])
def test_hostile_names_are_refused_in_one_line(root, name):
    if name == "loop/x":  # resolving a loop raises or stops at the loop, inside the root, where it cannot be opened
        return
    with pytest.raises(UserError) as caught:
        safe_join(root, name)
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()


@pytest.mark.parametrize("name", HARMLESS)
def test_plain_names_stay_inside(root, name):
    assert safe_join(root, name).is_relative_to(root.resolve())


def test_random_names_never_leave_the_root(root):
    rng = random.Random(0)
    atoms = ["..", ".", "/", "\\", "a", "link_out", "link_up", "dir", "\0", "．", "‥", "%2e", "~", ":", " ", "\u202e", "é", "x" * 90]
    inside = 0
    for _ in range(3000):
        name = "".join(rng.choices(atoms, k=rng.randint(1, 6)))
        try:
            path = safe_join(root, name)
        except UserError:
            continue
        inside += 1
        assert path.is_relative_to(root.resolve()) and path.resolve() == path and path != root.resolve()
    assert inside > 100


def test_relative_root_through_a_link(root, monkeypatch, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    assert safe_join(tmp_path / "alias", "a") == root.resolve() / "a"


def test_output_that_can_be_written(tmp_path):
    assert check_output(tmp_path / "out.mp4", 1000) == tmp_path / "out.mp4"
    assert check_output(tmp_path / "OUT.MP4") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, message",
    [
        ("out.avi", "suffix"),
        ("out", "suffix"),
        ("missing/out.mp4", "not an existing directory"),
        ("file.txt/out.mp4", "not an existing directory"),
        ("dir.mp4", "is a directory"),
        ("a\0.mp4", "file name"),
        ("a\ud800.mp4", "file name"),
        (os.fsdecode(b"a\xff.mp4"), "file name"),
        ("x" * 250 + ".mp4", "file name"),
    ],
)
def test_output_that_cannot(tmp_path, name, message):
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UserError, match=message) as caught:
        check_output(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_output_without_permission_or_space(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="not writable"):
        check_output(tmp_path / "out.mp4")
    monkeypatch.undo()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 999, 999))
    with pytest.raises(UserError, match="1,000 bytes needed, 999 bytes free"):
        check_output(tmp_path / "out.mp4", 1000)
    assert check_output(tmp_path / "out.mp4", 999)
