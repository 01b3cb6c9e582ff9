"""What git's configuration says is ignored is ignored, and nothing that it names is run, or waited for."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

import pytest
from ignoring import compared, git, home, make, scanned

from sandboxd import errors
from sandboxd.client import gitconfig

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["home"]

FILES = dict.fromkeys(
    ("a.o", "b.c", "sub/a.o", "sub/c.d", "sub/deep/e.f", "x y/z", "only-dir/f", "kept.o"), ""
)
ELSEWHERE = {"rules": "*.o\n", "other": "*.c\n", 'h#s; "q"': "sub/c.d\n", "é": "x y/\n"}
OBJECTS = {"a.o", "sub/a.o", "kept.o"}


@pytest.fixture
def top(tmp_path: Path) -> Path:
    place = tmp_path / "top"
    place.mkdir()
    git(place, "init", "-q")
    make(place, FILES)
    return place


RULES, OTHER = ("[core]\nexcludesFile = ~/rules\n", "[core]\nexcludesFile = ~/other\n")
DEFAULT = {".config/git/ignore": "*.c\n"}
# Of each: the user's configuration, the repository's, other files at home, and what is ignored of FILES.
CASES: dict[str, tuple[str, str, dict[str, str], set[str]]] = {
    "nothing": ("", "", {}, set()),
    "the default": ("", "", {".config/git/ignore": "*.o\n/sub/deep\n"}, {*OBJECTS, "sub/deep/e.f"}),
    "named, and not the default": (RULES, "", DEFAULT, OBJECTS),
    "empty, and not the default": ("[core]\nexcludesFile =\n", "", DEFAULT, set()),
    "missing": ("[core]\nexcludesFile = ~/nothing\n", "", DEFAULT, set()),
    "the last counts": (OTHER + "[Core]\nEXCLUDESFILE = ~/rules\n", "", {}, OBJECTS),
    "quoted": ('[core]\nexcludesFile = "~/h#s; \\"q\\"" # a comment\n', "", {}, {"sub/c.d"}),
    "on two lines": ("[core]\nexcludesFile = ~/\\\né\n", "", {}, {"x y/z"}),
    "the repository's": (RULES, OTHER, {}, {"b.c"}),
    "from the top on": ("", "[core]\nexcludesFile = .rules\n", {}, {"sub/c.d"}),
    "included": ("[include]\npath = more\n", "", {"more": RULES}, OBJECTS),
    "included by place": ('[includeIf "gitdir:**/top/.git"]\npath = more\n', "", {"more": RULES}, OBJECTS),
    "not included": ('[includeIf "gitdir:**/bottom/.git"]\npath = more\n', "", {"more": RULES}, set()),
    "included by branch": ("", '[includeIf "onbranch:main"]\npath = ~/more\n', {"more": RULES}, OBJECTS),
    "another place of the user's": ("", "", {".config/git/config": RULES}, OBJECTS),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_configuration_names_is_ignored_as_by_git(top: Path, home: Path, case: str) -> None:
    user, own, more, ignored = CASES[case]
    make(home, ELSEWHERE | more | {".gitconfig": user})
    git(top, "symbolic-ref", "HEAD", "refs/heads/main")
    with (top / ".git" / "config").open("a") as file:
        file.write(own)
    make(top, {".rules": "/sub/c.d\n"})
    assert FILES.keys() - {os.fsdecode(path) for path in compared(top)} == ignored
    compared(top, top / "sub")  # its rules are about paths from the top on


def test_what_is_named_is_asked_last(top: Path, home: Path) -> None:
    make(home, {".config/git/ignore": "*.o\nonly-dir\n!b.c\n!c.d\n!sub/\n"})
    make(top, {".gitignore": "!kept.o\n", "sub/.gitignore": "c.d\n", ".git/info/exclude": "b.c\n!sub/*.o\n"})
    ignored = FILES.keys() - {os.fsdecode(path) for path in compared(top)}
    assert ignored == {"a.o", "b.c", "sub/c.d", "only-dir/f"}


def test_the_environment_counts_as_for_git(
    top: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(home, ELSEWHERE | {".config/git/ignore": "*.o\n"})
    make(tmp_path, {"xdg/git/ignore": "*.c\n", "config": "[core]\nexcludesFile = ~/é\n"})
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    assert b"a.o" not in compared(top)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    found = compared(top)
    assert b"a.o" in found
    assert b"b.c" not in found
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    assert b"x y" not in compared(top)
    for name, value in {"COUNT": "1", "KEY_0": "core.excludesfile", "VALUE_0": str(home / "rules")}.items():
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    assert b"a.o" not in compared(top)


def test_as_a_hook_of_another_repository(
    top: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    make(home, ELSEWHERE)
    git(other, "config", "core.excludesFile", "~/rules")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_CONFIG", str(other / ".git" / "config"))
    assert "a.o" in scanned(top).files


def test_links_lead_to_the_rules_and_work_trees_have_their_own(top: Path, home: Path) -> None:
    """Home directories are full of links to where their owner keeps such files."""
    make(home, {"kept/ignore": "*.o\n"} | ELSEWHERE)
    (home / ".config").mkdir()
    (home / ".config" / "git").symlink_to("../kept")
    assert b"a.o" not in compared(top)
    (home / "kept" / "ignore").rename(home / "kept" / "elsewhere")
    (home / "kept" / "ignore").symlink_to("elsewhere")
    assert b"a.o" not in compared(top)
    git(top, "config", "extensions.worktreeConfig", "true")
    git(top, "config", "--worktree", "core.excludesFile", "~/other")
    found = compared(top)
    assert b"a.o" in found
    assert b"b.c" not in found


def test_a_directory_in_no_repository_is_as_one_that_is(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(home, ELSEWHERE | {".gitconfig": "[core]\nexcludesFile = ~/rules\n"})
    make(tmp_path / "plain", FILES)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    found = scanned(tmp_path / "plain").files
    assert not {"a.o", "sub/a.o"} & found.keys()
    assert {"b.c", "sub/c.d"} <= found.keys()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
def test_a_strangers_repository_names_no_rules(top: Path, home: Path) -> None:
    """Git does not work in it, and takes what it says for nothing, but for what the user trusts."""
    make(home, ELSEWHERE)
    git(top, "config", "core.excludesFile", str(home / "rules"))
    assert "a.o" not in scanned(top).files
    for one in (top, top / ".git"):
        os.chown(one, 4242, 4242)
    assert "a.o" in scanned(top).files
    make(home, {".gitconfig": f"[safe]\ndirectory = {top}\n"})
    assert b"a.o" not in compared(top)


RUNNING = """
[core]
fsmonitor = "{run}"
hooksPath = {hooks}
pager = "{run}"
editor = "{run}"
sshCommand = "{run}"
askPass = "{run}"
gitProxy = "{run}"
alternateRefsCommand = "{run}"
excludesFile = .rules
[pager]
config = true
[alias]
config = "!{run}"
[credential]
helper = "!{run}"
[diff]
external = "{run}"
[filter "x"]
clean = "{run}"
process = "{run}"
[uploadpack]
packObjectsHook = "{run}"
[trace2]
eventTarget = {marker}
normalTarget = {marker}
[include]
path = "|{run}"
path = "`{run}`"
path = "$({run})"
"""


def test_nothing_that_a_repository_configures_is_run(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, hooks = tmp_path / "marker", tmp_path / "hooks"
    make(tmp_path, {"run": f"#!/bin/sh\necho ran >>{marker}\n", "pager/run": ""})
    (tmp_path / "run").chmod(0o755)
    hooks.mkdir()
    for name in ("post-index-change", "fsmonitor-watchman", "reference-transaction", "pre-auto-gc"):
        (hooks / name).symlink_to(tmp_path / "run")
    with (top / ".git" / "config").open("a") as file:
        file.write(RUNNING.format(run=tmp_path / "run", hooks=hooks, marker=marker))
    make(top, {".rules": "*.o\n", ".gitattributes": "* filter=x\n"})
    for name in ("GIT_PAGER", "PAGER", "EDITOR"):
        monkeypatch.setenv(name, str(tmp_path / "run"))
    shutil.copy(tmp_path / "run", top / "git")  # for who has "." on the path, it is not this one
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:.")
    assert "a.o" not in scanned(top).files
    assert not marker.exists()
    git(top, "status")  # whereas this runs some of it
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["/dev/null", "/dev/zero", "/proc/kmsg", "/", "fifo", "socket", "~nobody-here/x", "loop"]
)
def test_what_is_no_file_of_rules_says_nothing(top: Path, name: str) -> None:
    os.mkfifo(top / "fifo")
    os.mknod(top / "socket", 0o140644)
    (top / "loop").symlink_to("loop")
    make(top, {".gitignore": "kept.o\n"})
    git(top, "config", "core.excludesFile", name)
    started = time.monotonic()
    found = scanned(top).files
    assert ("a.o" in found, "kept.o" in found) == (True, False)
    assert time.monotonic() - started < 20


def test_a_repository_that_git_cannot_read_leaves_the_users_rules(
    top: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(home, ELSEWHERE | {".gitconfig": "[core]\nexcludesFile = ~/rules\n"})
    config = top / ".git" / "config"
    good = config.read_text()
    os.mkfifo(top / "fifo")
    monkeypatch.setattr(gitconfig, "PATIENCE", 1.0)
    for bad in (
        "[core\n",
        "[core]\nexcludesFile\n",
        "\0",
        f"[include]\npath = {top / 'fifo'}\n",
        f"[include]\npath = {config}\n",
        "[core]\nrepositoryFormatVersion = 99\n",
    ):
        config.write_text(good + bad)
        found = scanned(top).files
        assert "a.o" not in found, bad
        assert "b.c" in found, bad
    config.write_text(good)
    (home / ".gitconfig").write_text("[core\n")
    with pytest.raises(errors.InvalidRequest, match=r"bad config line 1 in file .*gitconfig"):
        scanned(top)


def test_rules_that_are_too_many_are_refused(top: Path, home: Path) -> None:
    make(home, {".config/git/ignore": "x\n" * 21_000})
    with pytest.raises(errors.TooLarge, match="over 20000 rules"):
        scanned(top)
    make(home, {".config/git/ignore": "#" * (1 << 20) + "\n"})
    with pytest.raises(errors.TooLarge, match=r"config/git/ignore.* is no file of rules"):
        scanned(top)


def test_without_git_its_default_counts(
    top: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(home, {".config/git/ignore": "*.o\n"})
    monkeypatch.setenv("PATH", str(tmp_path))
    found = scanned(top).files
    assert ("a.o" in found, "b.c" in found) == (False, True)
    monkeypatch.delenv("HOME")
    assert "a.o" in scanned(top).files
