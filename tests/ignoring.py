"""What is not ignored in a directory, by us and by git, both with the same home."""

# ruff: noqa: PTH118  -- names are bytes, which pathlib does not take

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from sandboxd.client.checkout import scan

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.client.checkout import Tree


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own directory, with nothing in it, for git and for us."""
    place = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith(("GIT_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return place


def git(directory: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    if shutil.which("git") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have git")
        pytest.skip("needs git")
    done = subprocess.run(
        ["git", "-C", directory, *arguments], input=stdin, capture_output=True, check=False, timeout=60
    )
    assert done.returncode in {0, 1}, done.stderr  # 1: check-ignore has found none
    return done.stdout


def scanned(directory: Path) -> Tree:
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return scan(root, directory, git=False)
    finally:
        os.close(root)


def everything(directory: Path) -> set[bytes]:
    found = set()
    for place, directories, names in os.walk(os.fsencode(directory)):
        if b".git" in directories:
            directories.remove(b".git")
        found |= {
            os.path.relpath(os.path.join(place, one), os.fsencode(directory)) for one in directories + names
        }
    return found - {b".git"}  # a file, in a work tree


def compared(directory: Path, at: Path | None = None) -> set[bytes]:
    """What is not ignored, after it was found to be the same as git says."""
    at = at or directory
    tree = scanned(at)
    assert tree.left == {}
    ours = {one.path for one in tree.files.values()}
    paths = everything(at)
    ignored = git(at, "check-ignore", "-z", "--stdin", stdin=b"".join(path + b"\0" for path in sorted(paths)))
    theirs = paths - set(ignored.split(b"\0"))
    assert ours == theirs, {path: path in theirs for path in ours ^ theirs}
    return ours


def make(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
