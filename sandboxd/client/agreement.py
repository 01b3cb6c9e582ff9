"""What a directory and a session last had in common, kept on this side: what differs has changed since.

For each path there is what the directory had, and what the session had, as a *mark*: a digest and a mode, or
where a link points. They need not be the same, as a pull keeps to the umask. One file for each session and
directory, in ``$XDG_STATE_HOME/sandboxd/agreements``; without it nothing is taken to be known.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sandboxd.artifacts import decode_path

if TYPE_CHECKING:
    from sandboxd import models

__all__ = ["Agreement", "content_of", "forget", "link_mark", "mark", "mark_there"]

VERSION = 1


def mark(kind: str, content: str, mode: int) -> str:
    """What a file is, in a word. ``content`` is the digest of a file, or the mark of a link."""
    return content if kind == "symlink" else f"{content or kind}/{mode & 0o777:o}"


def link_mark(target: bytes) -> str:
    """The same of a link."""
    return f"link:{hashlib.sha256(target).hexdigest()}"


def mark_there(info: models.FileInfo) -> str:
    """The same of a file of a session, of which the digest is told."""
    if info.kind == "symlink":
        try:
            return link_mark(decode_path(info.target or ""))
        except ValueError:  # no target that a link here can have
            return link_mark(b"")
    return mark(info.kind, info.digest or "" if info.kind == "file" else "", info.mode)


def _directory() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "sandboxd" / "agreements"


def forget(session: str) -> None:
    """Remove what is known of a session, by its id."""
    with suppress(OSError):
        for one in _directory().glob(f"{session}.*.json"):
            one.unlink(missing_ok=True)


class Agreement:
    """A context manager: what was learnt is written at its end, whatever that is, if it can be."""

    def __init__(self, session: str, directory: int) -> None:
        """Of a session, by its id, and an open directory."""
        found = os.fstat(directory)
        # An inode's number is used again, so the path has to be the same as well.
        self._place = str(Path(f"/proc/self/fd/{directory}").readlink())
        self._path = _directory() / f"{session}.{found.st_dev:x}-{found.st_ino}.json"
        self._marks: dict[str, tuple[str, str]] = {}
        self.is_known = False
        """Whether there was one."""
        self.unnoted: str | None = None
        """Why what was learnt could not be written, once that is so."""
        self._is_changed = False

    def __enter__(self) -> Self:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(self._path.read_bytes())
            if found["version"] == VERSION and found["directory"] == self._place:
                self._marks = {
                    str(path): (str(here), str(there)) for path, (here, there) in found["marks"].items()
                }
                self.is_known = True
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_changed:
            return
        try:
            self._write()
        except OSError as error:  # what was brought is brought, and who asked is told that first
            self.unnoted = f"{self._path.parent}: {error.strerror}"

    def _write(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = self._path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        document = {"version": VERSION, "directory": self._place, "marks": self._marks}
        try:
            beside.write_text(json.dumps(document))
            beside.replace(self._path)
        finally:
            beside.unlink(missing_ok=True)

    def paths(self) -> set[str]:
        """Those that are known, as the daemon tells them."""
        return set(self._marks)

    def here(self, path: str) -> str | None:
        """What the directory had."""
        found = self._marks.get(path)
        return None if found is None else found[0]

    def there(self, path: str) -> str | None:
        """What the session had."""
        found = self._marks.get(path)
        return None if found is None else found[1]

    def agree(self, path: str, here: str, there: str) -> None:
        """Both are told, or brought to be so."""
        self._is_changed |= self._marks.get(path) != (here, there)
        self._marks[path] = (here, there)

    def drop(self, path: str) -> None:
        """Neither has it."""
        self._is_changed |= self._marks.pop(path, None) is not None

    def settle(self) -> None:
        """Have it written, also where nothing is in it."""
        self._is_changed = True


def content_of(known: str | None) -> str | None:
    """The digest in a mark, or the mark of a link."""
    return None if known is None else known.partition("/")[0]
