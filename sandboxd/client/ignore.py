"""What git would ignore in a directory.

Theory of operation (gitignore(5); ``dir.c`` of git).  A path is asked about from the top down, each directory
before what is in it, and nothing in an ignored directory is asked about. The file of rules nearest to it
decides, ``.gitignore`` there and above, and in it the last rule that matches (``rule``); ``info/exclude`` of
the repository is asked next, and last what ``core.excludesFile`` names (``gitconfig``). What is tracked is
not ignored (``gitindex``). A directory in no repository is as one that was made of it just now.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Self

from sandboxd import errors
from sandboxd.client import gitconfig
from sandboxd.client.gitindex import tracked
from sandboxd.client.rule import Rule, rules_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["Ignore"]

NAME = b".gitignore"
MAX_FILE = 1 << 20
"""Bytes of a file of rules."""
MAX_RULES = 20_000  # of a directory and all beneath
MAX_LOOKS = 200_000_000  # of a rule at a path: some minutes


class Ignore:
    """What is ignored in a directory and beneath. A directory's rules are added before its paths."""

    def __init__(self) -> None:
        self._above: list[tuple[tuple[bytes, ...], tuple[Rule, ...]]] = []
        """Rules from above, the nearest first, each with the names that lead from them to the directory."""
        self._within: dict[tuple[bytes, ...], tuple[Rule, ...]] = {}
        self._deepest = -1
        self._count = self._looks = 0
        self._tracked: set[bytes] = set()
        self._on_the_way: set[bytes] = set()
        """Directories that what is tracked is in."""

    @classmethod
    def above(cls, directory: Path) -> Self:
        """With the rules that count in a directory, but for those that are in it or beneath.

        Raises TooLarge, OSError, and InvalidRequest where git's configuration cannot be read.
        """
        ignore = cls()
        place = directory.resolve()
        top = place
        names: tuple[bytes, ...] = ()
        found: list[tuple[tuple[bytes, ...], tuple[Rule, ...]]] = []
        for one in (place, *place.parents):
            if one != place:
                names = (os.fsencode(place.relative_to(one).parts[0]), *names)
                found.append((names, rules_of(read(one / os.fsdecode(NAME)))))
            if os.path.lexists(one / ".git"):
                own, common = _repository(one / ".git")
                found.append((names, rules_of(read(common / "info" / "exclude"))))
                # A stranger's rules, as in /tmp, can but ignore more; a stranger's index could ignore less.
                if (one / ".git").lstat().st_uid in {os.geteuid(), place.stat().st_uid}:
                    ignore._track(tracked(own), b"".join(name + b"/" for name in names))
                top = one
                break
        else:
            names, found = (), []
        excluded = gitconfig.excludes_file(place)
        if excluded is not None:
            found.append((names, rules_of(read_named(top / excluded))))
        ignore._above = [each for each in found if each[1]]
        ignore._check(sum(len(rules) for _, rules in found))
        return ignore

    def _track(self, paths: Iterable[bytes], above: bytes) -> None:
        self._tracked = {path[len(above) :] for path in paths if path.startswith(above)}
        for path in self._tracked:
            while (path := path.rpartition(b"/")[0]) and path not in self._on_the_way:
                self._on_the_way.add(path)

    def add(self, directory: Sequence[bytes], text: bytes) -> None:
        """Take the rules of a directory, whose path are its names. Raises TooLarge."""
        if rules := rules_of(text):
            self._check(len(rules))
            self._within[tuple(directory)] = rules
            self._deepest = max(self._deepest, len(directory))

    def _check(self, more: int) -> None:
        self._count += more
        if self._count > MAX_RULES:
            raise errors.TooLarge(f"files of ignored names have over {MAX_RULES} rules", limit=MAX_RULES)

    def has(self, path: Sequence[bytes], *, is_directory: bool, within: bool = False) -> bool:
        """Whether a path is ignored, by the rules or, ``within``, since a directory that it is in is.

        What git tracks is not, and nor is a directory that has any of it.
        """
        path = tuple(path)
        name = b"/".join(path)
        if name in self._tracked or (is_directory and self.tracks_in(name)):
            return False
        return within or self.ruled_out(path, is_directory=is_directory)

    def tracks_in(self, directory: bytes) -> bool:
        """Whether git tracks anything in a directory."""
        return directory in self._on_the_way

    def ruled_out(self, path: Sequence[bytes], *, is_directory: bool) -> bool:
        """Whether the rules say so of a path, of which they say it of no directory. Raises TooLarge."""
        path = tuple(path)
        if self._looks > MAX_LOOKS:
            raise errors.TooLarge(
                "there are too many files for so many rules of ignored names", limit=MAX_LOOKS
            )
        for depth in range(min(len(path) - 1, self._deepest), -1, -1):
            rules = self._within.get(path[:depth], ())
            self._looks += len(rules)
            for rule in rules:
                if rule.matches(path[depth:], is_directory=is_directory):
                    return not rule.negated
        for names, rules in self._above:
            self._looks += len(rules)
            for rule in rules:
                if rule.matches((*names, *path), is_directory=is_directory):
                    return not rule.negated
        return False


def read(path: Path) -> bytes:
    """A file of rules; nothing where there is none, or what is no regular file. Raises TooLarge, OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return read_fd(fd, os.fspath(path))
    finally:
        os.close(fd)


def read_named(path: Path) -> bytes:
    """The same of a file that a configuration names: its links are followed, as its owner wants.

    The repository may be a stranger's, who may name a device: nothing is opened that is no regular file.
    """
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return b""
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return b""
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return read_fd(fd, os.fspath(path))
        finally:
            os.close(fd)
    except OSError:  # also of what is a file in name alone, as in /proc
        return b""
    finally:
        os.close(handle)


def read_fd(fd: int, name: str) -> bytes:
    """The same of an open file."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return b""
    data = b""
    while chunk := os.read(fd, MAX_FILE + 1 - len(data)):
        data += chunk
    if len(data) > MAX_FILE:
        raise errors.TooLarge(f"{name!a} is over 1 MiB, which is no file of rules", limit=MAX_FILE)
    return data


def _repository(git: Path) -> tuple[Path, Path]:
    """Where a work tree's own things are, and what all of its repository share (gitrepository-layout(5))."""
    text = b"" if git.is_dir() else read(git)
    if not text.startswith(b"gitdir: "):
        return git, git
    place = git.parent / os.fsdecode(text[8:].strip())
    shared = read(place / "commondir").strip()
    return place, place / os.fsdecode(shared) if shared else place
