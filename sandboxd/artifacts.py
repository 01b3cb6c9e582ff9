"""Files released from a call: found by pattern in a hostile tree, copied by digest, listed with the rest.

Theory of operation: ``collect`` walks the workspace through its descriptor, one directory at a time
and without recursion, looking only where a pattern can still match. What matches is opened as
``kernel.files`` describes, its size is checked before and while it is copied, and it goes into the
``BlobStore``. Whatever matched and is not released is in the second list with a reason, so that nothing
is dropped silently:

    symlink       it is a symbolic link; links are never followed
    not_regular   it is a FIFO, socket or device
    too_large     it is over its rule's size, or all artifacts together would be over the total
    too_many      more files matched than are collected, or than its rule allows; on ``.``: the walk or this
                  list is at its bound
    type          its content is of another type than its rule allows
    secret        it has a secret of the call, or what looks like a well-known token
    changed       it changed, or went away, while it was collected
    unreadable    the host refused to read it, or another file system is mounted there
    name          its path is longer than 4,095 bytes

A file with several names (hard links) is released under each name that matches: in a container no
link can be made to a file of another mount (link(2), EXDEV), so it names nothing that the tool could
not have copied.

Paths in results are text, and still say exactly which file is meant: valid UTF-8 stands as it is, any
other byte is ``%XX``, and a ``%`` that two hex digits follow is ``%25``. So ``100%.txt`` and ``a b`` are
unchanged, and ``decode_path`` undoes all of it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sandboxd import globs, models, units
from sandboxd.kernel import files
from sandboxd.release import HEAD, Rule, Scan, fits, media_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.blobs import BlobStore
    from sandboxd.redaction import Redactor

__all__ = ["MAX_FILES", "MAX_TOTAL", "MAX_WALK", "collect", "decode_path", "encode_path"]

MAX_FILES = 1000
MAX_TOTAL = 1 << 30
MAX_WALK = 200_000
"""Directory entries that one collection looks at."""
MAX_SECONDS = 60.0
"""How long one collection looks and copies before it ends with what it has."""
MAX_PENDING = 20_000
"""Directories that wait to be looked into; a tree wider than that ends the walk."""
MAX_WITHHELD = 1000
_MAX_SHOWN = 1024  # characters of a path that is too long to be one
_CHUNK = 1 << 20

_PERCENT = re.compile("%(?=[0-9A-Fa-f]{2})")
_ESCAPED = re.compile("%([0-9A-Fa-f]{2})")


def encode_path(path: bytes) -> str:
    """The text of a path; see the top of this file for the rule."""
    text = _PERCENT.sub("%25", path.decode("utf-8", "surrogateescape"))
    return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in text)


def decode_path(text: str) -> bytes:
    """The path that ``encode_path`` made this text of. Raises ValueError for a lone surrogate."""
    parts = _ESCAPED.split(text)
    literal = [part.encode() for part in parts[::2]]
    escaped = [bytes.fromhex(part) for part in parts[1::2]]
    return b"".join(a + b for a, b in zip(literal, [*escaped, b""], strict=True))


@dataclass(frozen=True, slots=True)
class _Node:
    """A directory to look into. It names only its parent, so that deep trees stay small."""

    parent: _Node | None
    name: bytes
    positions: tuple[int, ...]

    def path(self, name: bytes = b"") -> bytes:
        names = [name] if name else []
        node = self
        while node.parent is not None:
            names.append(node.name)
            node = node.parent
        return b"/".join(reversed(names))


class _Withdrawn(Exception):
    """Raised when a file that matched is not released."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass
class _Collection:
    root: int
    store: BlobStore
    patterns: tuple[globs.Pattern, ...]
    rules: tuple[Rule, ...]
    """The patterns after the rules' are the request's."""
    max_files: int
    max_total: int
    durable: bool
    until: float
    redactor: Redactor | None = None
    released_by: Counter[int] = field(default_factory=Counter)
    """How many files each rule released, by its number."""
    left: int = MAX_WALK
    total: int = 0
    released: list[models.Artifact] = field(default_factory=list)
    withheld: list[models.Withheld] = field(default_factory=list)
    unlisted: int = 0
    late: bool = False

    def run(self) -> None:
        pending = [_Node(None, b"", tuple(pattern.start() for pattern in self.patterns))]
        while pending and self.left > 0 and len(pending) <= MAX_PENDING and not self.late:
            pending.extend(reversed(self._visit(pending.pop())))
        if self.left <= 0 or pending or self.late:
            seen = f"the walk ended early, after {MAX_WALK - self.left} directory entries"
            self.withheld.append(models.Withheld(path=".", reason="too_many", detail=seen))
        if self.unlisted:
            note = f"{self.unlisted} more files were withheld and are not listed"
            self.withheld.append(models.Withheld(path=".", reason="too_many", detail=note))

    def _visit(self, node: _Node) -> list[_Node]:
        """Collect what matches in one directory; returns the directories to look into next."""
        beneath: list[_Node] = []
        for name, is_directory in self._names(node):
            if time.monotonic() > self.until:
                self.late = True
                break
            at = tuple(
                pattern.step(p, name) for pattern, p in zip(self.patterns, node.positions, strict=True)
            )
            if is_directory:
                if self._wanted(at):
                    beneath.append(_Node(node, name, at))
                continue
            accepted = tuple(int(pattern.accepts(p)) for pattern, p in zip(self.patterns, at, strict=True))
            if self._wanted(accepted):
                self._take(node.path(name), accepted)
        return beneath

    def _wanted(self, hits: tuple[int, ...]) -> bool:
        rules, request = hits[: len(self.rules)], hits[len(self.rules) :]
        return any(rules) and (any(request) or not request)

    def _names(self, node: _Node) -> list[tuple[bytes, bool]]:
        """The entries of a directory in order, each with whether it is a directory."""
        path = node.path() or b"."
        try:
            fd = files.open_directory(self.root, path)
        except OSError as error:
            self._refused(path, error)
            return []
        names: list[tuple[bytes, bool]] = []
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    self.left -= 1
                    names.append((os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)))
                    if self.left <= 0:
                        break
        except OSError as error:
            self._refused(path, error)
        finally:
            os.close(fd)
        names.sort()
        return names

    def _take(self, path: bytes, accepted: tuple[int, ...]) -> None:
        rules = [number for number, hit in enumerate(accepted[: len(self.rules)]) if hit]
        try:
            self._check(path)
            fd, found = files.open_regular(self.root, path)
            try:
                number = self._rule(rules, fd, found.st_size)
                self.released.append(self._copy(path, fd, found, scan=self.rules[number].secrets == "deny"))
                self.released_by[number] += 1
            finally:
                os.close(fd)
        except _Withdrawn as why:
            self._withhold(path, why.reason, why.detail)
        except files.NotRegular as error:
            reason = "symlink" if error.is_link else "not_regular"
            self._withhold(path, reason, "" if error.is_link else f"it is a {error.kind}")
        except OSError as error:
            self._refused(path, error)

    def _check(self, path: bytes) -> None:
        if len(path) > files.MAX_PATH:
            raise _Withdrawn("name", f"its path has {len(path)} bytes")
        if len(self.released) >= self.max_files:
            raise _Withdrawn("too_many", f"{self.max_files} files are collected from a call")

    def _rule(self, numbers: list[int], fd: int, size: int) -> int:
        """The rule that releases a file, of those that it matches: first one that asks for no scan."""
        known = [most for number in numbers if (most := self.rules[number].max_size) is not None]
        numbers = [n for n in numbers if self._large_enough(self.rules[n], size)]
        if not numbers:
            raise _Withdrawn("too_large", f"{size} bytes are over {units.format_size(max(known))}")
        if any(self.rules[number].types for number in numbers):
            found = media_type(os.pread(fd, HEAD, 0))
            types = [one for number in numbers for one in self.rules[number].types]
            numbers = [number for number in numbers if fits(found, self.rules[number].types)]
            if not numbers:
                raise _Withdrawn("type", f"its content is {found}; released are {', '.join(types)}")
        counts = [most for number in numbers if (most := self.rules[number].files) is not None]
        numbers = [n for n in numbers if self.released_by[n] < (self.rules[n].files or self.max_files)]
        if not numbers:
            raise _Withdrawn("too_many", f"{max(counts)} files are released by its rule")
        return min(numbers, key=lambda number: self.rules[number].secrets == "deny")

    @staticmethod
    def _large_enough(rule: Rule, size: int) -> bool:
        return rule.max_size is None or size <= rule.max_size

    def _copy(self, path: bytes, fd: int, found: os.stat_result, *, scan: bool) -> models.Artifact:
        size = found.st_size
        secrets = Scan(self.redactor) if scan else None
        if self.total + size > self.max_total:
            raise _Withdrawn(
                "too_large", f"all artifacts together are over {units.format_size(self.max_total)}"
            )
        with self.store.writer() as blob:
            # One byte more than it had shows that it grows; nothing that grows is read without end.
            while blob.size <= size and (chunk := os.read(fd, min(_CHUNK, size + 1 - blob.size))):
                blob.write(chunk)
                if secrets is not None:
                    secrets.feed(chunk)
            now = os.fstat(fd)
            if blob.size != size or (now.st_size, now.st_mtime_ns) != (size, found.st_mtime_ns):
                raise _Withdrawn("changed", "it was written to while it was copied")
            if secrets is not None and (what := secrets.finish()):
                raise _Withdrawn("secret", what)
            digest = blob.commit(durable=self.durable)
        self.total += size
        executable = bool(found.st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH))
        return models.Artifact(path=encode_path(path), size=size, digest=digest, executable=executable)

    def _refused(self, path: bytes, error: OSError) -> None:
        match error.errno:
            case errno.ENOENT | errno.ENOTDIR | errno.ELOOP:
                self._withhold(path, "changed", "it was moved while it was collected")
            case errno.ENAMETOOLONG:
                self._withhold(path, "name", f"its path has {len(path)} bytes")
            case errno.EXDEV:
                self._withhold(path, "unreadable", "another file system is mounted there")
            case _:
                self._withhold(path, "unreadable", error.strerror or "")

    def _withhold(self, path: bytes, reason: str, detail: str) -> None:
        if len(self.withheld) >= MAX_WITHHELD:
            self.unlisted += 1
            return
        shown = encode_path(path)
        if len(path) > files.MAX_PATH:
            shown = shown[:_MAX_SHOWN] + "…"
        self.withheld.append(models.Withheld(path=shown, reason=reason, detail=detail))


def collect(
    workspace_fd: int,
    rules: Sequence[tuple[Any, ...]],
    narrowed: Sequence[str] | None,
    store: BlobStore,
    *,
    max_files: int = MAX_FILES,
    max_total: int = MAX_TOTAL,
    durable: bool = False,
    redactor: Redactor | None = None,
) -> tuple[list[models.Artifact], list[models.Withheld]]:
    """Copy the files that the policy releases, and the request asks for, into the store.

    ``rules`` have the fields of ``release.Rule``, from its pattern (see ``globs``) on; a file that several
    match is released if it is what one of them asks for. ``redactor`` has the call's secrets. ``narrowed``
    are patterns of which one must match too; None asks for all. ``workspace_fd`` is a descriptor of
    the workspace's root (``O_PATH`` will do). ``durable`` syncs each blob before this returns. Blocks;
    call it in a thread. Raises InvalidRequest for a bad pattern, HostFailed when the store cannot be
    written; whatever is wrong with a file is in the second list.
    """
    whole = tuple(Rule(*rule) for rule in rules)
    patterns = [globs.Pattern.of(rule.path) for rule in whole]
    asked = [globs.Pattern.of(text) for text in narrowed or ()]
    if not patterns or (narrowed is not None and not asked):
        return [], []
    until = time.monotonic() + MAX_SECONDS
    collection = _Collection(
        workspace_fd, store, (*patterns, *asked), whole, max_files, max_total, durable, until, redactor
    )
    collection.run()
    return collection.released, collection.withheld
