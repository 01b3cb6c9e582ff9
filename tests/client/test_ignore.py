"""What is ignored is what git ignores: both are asked about the same trees."""

# ruff: noqa: E501, PTH102, PTH109, PTH118, PTH123, PTH211  -- names are bytes, which pathlib does not take

from __future__ import annotations

import os
import random
import re
import time
from typing import TYPE_CHECKING

import pytest
from ignoring import compared, git, home, make, scanned

from sandboxd import errors
from sandboxd.client.ignore import Ignore
from sandboxd.client.rule import rules_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["home"]

NAMES = (
    b"a",
    b"b",
    b"ab",
    b"a.b",
    b"aab",
    b"-",
    b" ",
    b"a ",
    b"!a",
    b"#a",
    b"a]",
    b"\\a",
    b"[a]",
    b"*",
    b"\xff",
)
PIECES = (
    b"a", b"b", b"*", b"**", b"?", b"[a]", b"[!a]", b"[a-b]", b"[^b]", b"\\a", b"\\*", b"/", b"/", b".", b"!", b"#",
    b" ", b"[", b"]", b"[]a]", b"\\", b"[[:alpha:]]", b"**/", b"/**", b"\\ ", b"-", b"[a-", b"[[:foo:]]", b"[[:a]",
    b"\xff",
)  # fmt: skip


def test_a_checkout_as_people_have_them(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    make(
        tmp_path,
        {
            ".gitignore": "*.pyc\n/build/\n!/build/keep\nnode_modules\n*.log\n!important.log\n\\!bang\n\\#hash\n"
            "trailing  \nspace\\ \ndoc/**/*.tmp\n**/deep/x\nsecret?\n[Tt]humbs.db\nonly-dir/\n",
            "src/.gitignore": "!*.log\n/local\n*\n!*.py\n!.gitignore\n!sub\n",
            "src/a.py": "", "src/a.pyc": "", "src/local": "", "src/x.log": "", "src/sub/b.py": "", "src/sub/c": "",
            "build/keep": "", "build/x": "", "sub/build/x": "", "node_modules/m/a.js": "", "web/node_modules/b": "",
            "a.log": "", "important.log": "", "!bang": "", "#hash": "", "trailing": "", "space ": "", "space": "",
            "doc/a.tmp": "", "doc/x/y/a.tmp": "", "doc/x/a.txt": "", "q/deep/x": "", "deep/x": "", "deep/y": "",
            "secret1": "", "secret": "", "Thumbs.db": "", "thumbs.db": "", "only-dir": "", "p/only-dir/x": "",
            ".git/info/exclude": "excluded\n!a.log\n", "excluded": "", "src/excluded.py": "",
        },
    )  # fmt: skip
    (tmp_path / "link").symlink_to("p")
    (tmp_path / "p" / "self").symlink_to(".")
    found = compared(tmp_path)
    assert b"important.log" in found
    assert {b"src/a.py", b"src/sub/b.py", b"link", b"p/self", b"only-dir", b"deep/y"} <= found
    assert not {b"src/a.pyc", b"build/keep", b"a.log", b"excluded", b"src/sub/c", b"p/only-dir"} & found


@pytest.mark.parametrize("seed", range(40))
def test_rules_and_names_at_random(tmp_path: Path, home: Path, seed: int) -> None:
    chosen = random.Random(seed)
    git(tmp_path, "init", "-q")
    top = os.fsencode(tmp_path)
    directories = [b""]
    for _ in range(16):
        path = os.path.join(chosen.choice(directories), chosen.choice(NAMES))
        full = os.path.join(top, path)
        if os.path.lexists(full):
            continue
        what = chosen.random()
        if what < 0.5:
            os.mkdir(full)
            directories.append(path)
        elif what < 0.9:
            os.close(os.open(full, os.O_CREAT | os.O_WRONLY))
        else:
            os.symlink(b".", full)

    def rule() -> bytes:
        """One as gitignore(5) has them; what git does with others is said nowhere."""
        while True:
            middle = b"".join(chosen.choice(PIECES) for _ in range(chosen.randint(1, 5)))
            if not re.search(rb"[^/*]\*\*+(/|$)|//|\\/", middle):
                return chosen.choice((b"", b"", b"!")) + middle + chosen.choice((b"", b"", b"/"))

    for path in directories:
        if not path or chosen.random() < 0.4:
            rules = b"\n".join(rule() for _ in range(chosen.randint(1, 4)))
            with open(os.path.join(top, path, b".gitignore"), "wb") as file:
                file.write(rules)
    with open(os.path.join(top, b".git/info/exclude"), "wb") as file:
        file.write(rule())
    (home / ".config" / "git").mkdir(parents=True)
    (home / ".config" / "git" / "ignore").write_bytes(rule() + b"\n" + rule())
    compared(tmp_path)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("kind", ["sha1", "sha256"])
def test_what_git_tracks_is_not_ignored(tmp_path: Path, version: int, kind: str) -> None:
    git(tmp_path, "init", "-q", f"--object-format={kind}")
    git(tmp_path, "config", "index.version", str(version))
    names = ["a.o", "out/kept", "out/deep/er/kept", "src/a.c", "src/out/x", "é", "out/deep-not/y", "zz" * 100]
    make(tmp_path, {".gitignore": "*.o\nout\n", **dict.fromkeys(names, "")})
    make(tmp_path, dict.fromkeys(("b.o", "out/not", "out/deep/not", "out/deep/er/not", "src/out/y"), ""))
    git(tmp_path, "add", "-f", *names[:6], names[7])
    git(tmp_path, "add", "-N", "-f", "src/a.c", "b.o")  # an entry with more flags, of version 3
    found = compared(tmp_path)
    assert {b"a.o", b"b.o", b"out/kept", b"out/deep/er/kept", b"src/out/x"} <= found
    assert not {b"out/not", b"out/deep/not", b"out/deep/er/not", b"src/out/y", b"out/deep-not"} & found
    assert compared(tmp_path, tmp_path / "src") == {b"a.c", b"out", b"out/x"}
    assert "not" in scanned(tmp_path / "out").files  # who names a directory wants what is in it
    index = (tmp_path / ".git" / "index").read_bytes()
    for damaged in (b"", b"DIRC", index[:60], b"DIRC" + b"\xff" * 100, index[:12] + bytes(62) + b"x" * 500):
        (tmp_path / ".git" / "index").write_bytes(damaged)
        assert "src/a.c" in scanned(tmp_path).files


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
def test_a_strangers_index_brings_nothing_out(tmp_path: Path) -> None:
    """Who may write above somebody's directory says nothing of what is tracked in it."""
    git(tmp_path, "init", "-q")
    make(
        tmp_path,
        {"mine/.gitignore": "secret\n", "mine/secret": "", "mine/plain": "", ".gitignore": "!secret\n"},
    )
    git(tmp_path, "add", "-f", "mine/secret")
    assert "secret" in scanned(tmp_path / "mine").files
    os.chown(tmp_path / ".git", 4242, 4242)
    assert scanned(tmp_path / "mine").files.keys() == {".gitignore", "plain"}
    os.chown(tmp_path / "mine", 4242, 4242)  # as of a checkout that root works on
    assert "secret" in scanned(tmp_path / "mine").files


def test_rules_of_the_repository_that_a_directory_is_in(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    make(
        tmp_path,
        {
            ".gitignore": "*.o\n/a/b/anchored\nb/**/two\n", "a/.gitignore": "!keep.o\nnamed\n",
            ".git/info/exclude": "private\n",
            "a/b/x.o": "", "a/b/keep.o": "", "a/b/anchored": "", "a/b/c/anchored": "", "a/b/named": "",
            "a/b/c/two": "", "a/b/private": "", "a/b/y": "",
        },
    )  # fmt: skip
    assert compared(tmp_path, tmp_path / "a" / "b") == {b"keep.o", b"c", b"c/anchored", b"c/two", b"y"}
    git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "--allow-empty", "-m", "x")
    tree = tmp_path.parent / f"{tmp_path.name}-tree"
    git(tmp_path, "worktree", "add", "-q", str(tree))
    make(tree, {"private": "", "public": ""})
    assert compared(tree) == {b"public"}


def test_rules_of_a_stranger_take_no_time(tmp_path: Path) -> None:
    """Where a matcher goes back over every star, each of these takes years."""
    text = (
        b"*a" * 100
        + b"b\n"
        + b"/".join([b"**", b"*a"] * 30)
        + b"/b\n"
        + b"[!" * 1000
        + b"\n"
        + b"*" * 5000
        + b"x\n"
    )
    rules = rules_of(text)
    start = time.monotonic()
    for path in ([b"a" * 255], [b"a" * 15] * 250, [b"a"] * 2000):
        assert not any(rule.matches(path, is_directory=False) for rule in rules)
    assert time.monotonic() - start < 20


def test_rules_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = rules_of(b"[!a]" * 200_000 + b"\n" + b"?" * 255)  # the first matches only what no name can be
    assert [rule.matches([b"b" * 255], is_directory=False) for rule in rules] == [True, False]
    make(tmp_path, {".gitignore": "x\n" * 15_000, "a/.gitignore": "y\n" * 6_000, "a/b": ""})
    with pytest.raises(errors.TooLarge, match="have over 20000 rules"):
        scanned(tmp_path)
    (tmp_path / "a" / ".gitignore").unlink()
    monkeypatch.setattr("sandboxd.client.ignore.MAX_LOOKS", 20_000)
    with pytest.raises(errors.TooLarge, match="too many files for so many rules"):
        scanned(tmp_path)


def test_files_of_rules_that_are_none(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("*\n")
    for name in ("link", "fifo", "directory", "broken"):
        (tmp_path / "top" / name).mkdir(parents=True)
        (tmp_path / "top" / name / "file").touch()
    (tmp_path / "top" / "link" / ".gitignore").symlink_to(outside)
    os.mkfifo(tmp_path / "top" / "fifo" / ".gitignore")
    (tmp_path / "top" / "directory" / ".gitignore").mkdir()
    (tmp_path / "top" / "broken" / ".git").write_text("gitdir: /dev/zero\n")
    tree = scanned(tmp_path / "top")
    assert {f"{name}/file" for name in ("link", "fifo", "directory", "broken")} <= set(tree.files)
    assert tree.left == {"fifo/.gitignore": "it is a FIFO"}
    assert scanned(tmp_path / "top" / "broken").files.keys() == {"file"}
    (tmp_path / "top" / ".gitignore").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(errors.TooLarge, match="no file of rules"):
        scanned(tmp_path / "top")
    ignore = Ignore()
    ignore.add((), b"\xef\xbb\xbfa\r\nb")
    assert ignore.has([b"a"], is_directory=False)
    assert ignore.has([b"b"], is_directory=True)


def test_what_cannot_be_sent_is_left_out_and_told(tmp_path: Path) -> None:
    top = tmp_path / "top"
    make(top, {"plain": "x", ".wh.plain": "x", "sub/deep": "x"})
    os.mkfifo(top / "fifo")
    with (top / "huge").open("wb") as file:
        file.truncate((1 << 30) + 1)
    (top / "out").symlink_to("/etc/passwd")
    here = os.getcwd()
    os.chdir(top)
    try:  # deeper than a path can say
        for _ in range(20):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
    finally:
        os.chdir(here)
    tree = scanned(top)
    assert {"plain", "sub", "sub/deep", "out"} <= set(tree.files)
    assert (tree.files["out"].kind, tree.files["out"].target) == ("symlink", b"/etc/passwd")
    deep = [path for path in tree.left if path.startswith("dd")]
    assert [tree.left[path] for path in deep] == ["its path is over 4,095 bytes"]
    assert {path: why for path, why in tree.left.items() if path not in deep} == {
        ".wh.plain": "names that begin with .wh. say what is removed",
        "fifo": "it is a FIFO",
        "huge": "it is over 1GiB",
    }
