"""Bringing what changed in a directory into a session: the other way of ``pulling``, and the first upload.

Theory of operation.  Three states of each path are compared: what the directory has, what the session has,
and what both last had in common (``agreement``). What changed in the directory alone is sent; what changed on
both sides is refused; what the session has changed is left for a pull. All that is sent is one tar, whose
whiteouts say what is removed, for the checkpoint that was compared with: the session takes all of it or
nothing, and where it has moved on meanwhile everything is compared again.

A session that stands on the directory shows what changes there by itself, but for what it has changed: only
that is compared then.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NotRequired, TypedDict

from sandboxd import errors, units
from sandboxd.artifacts import decode_path, encode_path
from sandboxd.client.agreement import Agreement, content_of, mark, mark_there
from sandboxd.client.checkout import MAX_ENTRIES, Found, Tree, chunks_of, look, scan
from sandboxd.kernel import files
from sandboxd.workspace.layertar import WHITEOUT, header

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    from sandboxd import models
    from sandboxd.client.sync import Client

__all__ = ["PushFields", "Pushed", "Refusal", "files_there", "push"]

MOST = 10_000
"""Changes of a session on the directory that are compared; also files in a page of a list."""
MAX_BYTES = (4 << 30) - (64 << 20)
"""What one import takes, less room for its headers."""
MAX_DIGESTED = 64 << 30
"""Bytes of a session's files that the daemon is asked to digest; holes count, of which a tool has plenty."""
TRIES = 5
_BLOCK = 512
_ENOUGH = 1 << 18


@dataclass(frozen=True)
class Refusal:
    """A path that was not brought, and why."""

    path: str
    reason: str


@dataclass
class Pushed:
    """What came of a push: paths as the daemon tells them."""

    sent: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    """Those that changed on both sides, or cannot be there."""
    left: list[Refusal] = field(default_factory=list)
    """Those that cannot be sent, whatever the session has."""
    ignored: int = 0
    size: int = 0
    """Bytes of files that were sent."""
    checkpoint: str | None = None
    """The id of the one that it made; None where nothing was sent."""
    unnoted: str | None = None
    """Why it could not be noted what both sides have now: a later push takes it for changed on both."""


@dataclass(frozen=True, slots=True)
class _There:
    kind: str
    mark: str


class PushFields(TypedDict):
    """``git``: also what is in ``.git``. ``force``: also what changed on both sides."""

    git: NotRequired[bool]
    force: NotRequired[bool]


def push(
    client: Client, session: str, directory: str | os.PathLike[str], **fields: Unpack[PushFields]
) -> Pushed:
    """Bring what changed in a directory into a session, in one checkpoint.

    What git ignores there is not sent, and nor is ``.git``, but with ``git``. What changed on both sides is
    among the refused, or with ``force`` is as the directory has it. Raises TooLarge, StateConflict for a file
    that changes while it is sent, QuotaExceeded, PreconditionFailed for a session that does not rest,
    OSError for a directory that cannot be opened, and what the daemon refuses of the session; then nothing
    has changed.
    """
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for left in reversed(range(TRIES)):
            info = client.session(session)
            with Agreement(info.id, root) as agreement:
                one = _Push(client, info, root, agreement, **fields)
                try:
                    pushed = one.run(directory)
                except errors.PreconditionFailed:
                    if not left:
                        raise
                    continue
            pushed.unnoted = agreement.unnoted
            return pushed
        raise AssertionError  # the last try returns or raises
    finally:
        os.close(root)


def files_there(client: Client, session: str, checkpoint: str) -> tuple[dict[str, models.FileInfo], int]:
    """All files of a session, with their digests, and how many have no name here. Raises TooLarge."""
    found: dict[str, models.FileInfo] = {}
    unnamed, size, after = 0, 0, None
    while True:
        page = client.session_files(
            session, checkpoint=checkpoint, recursive=True, digest=True, after=after, limit=MOST
        )
        found |= {one.path: one for one in page.files}
        unnamed += page.unnamed
        size += sum(one.size for one in page.files if one.digest is not None)
        if size > MAX_DIGESTED:
            raise errors.TooLarge(
                f"the session has more than {units.format_size(MAX_DIGESTED)} of files, holes included; "
                "export them as a layer, or remove what it does not need",
                limit=MAX_DIGESTED,
            )
        if len(found) > MAX_ENTRIES:
            raise errors.TooLarge(
                f"the session has more than {units.format_count(MAX_ENTRIES)} files; export them as a layer",
                limit=MAX_ENTRIES,
            )
        after = page.next
        if after is None:
            return found, unnamed


class _Push:
    def __init__(
        self,
        client: Client,
        info: models.SessionInfo,
        root: int,
        agreement: Agreement,
        *,
        git: bool = False,
        force: bool = False,
    ) -> None:
        self._client = client
        self._info = info
        self._root = root
        self._agreement = agreement
        self._git = git
        self._force = force
        self._tree = Tree()
        self._there: dict[str, _There] = {}
        self._gone: dict[str, bytes] = {}
        """What is to be removed: paths as text and as bytes."""
        self._sent: dict[str, Found] = {}
        self._result = Pushed()

    def run(self, directory: str | os.PathLike[str]) -> Pushed:
        """Compare and send."""
        if self._info.checkout is None:
            self._tree = scan(self._root, directory, git=self._git)
            there, _ = files_there(self._client, self._info.id, self._info.head.id)
            self._there = {path: _There(one.kind, mark_there(one)) for path, one in there.items()}
            paths = {*self._tree.files, *self._there, *self._agreement.paths()}
        else:
            paths = self._changed_there()
        named = {path: name for path in paths if (name := _name(path)) is not None}
        for path, name in sorted(named.items(), key=lambda one: one[1].split(b"/")):
            if self._is_asked(name):
                self._compare(path, name)
        self._keep_directories()
        self._send()
        self._result.left = [Refusal(path, why) for path, why in sorted(self._tree.left.items())]
        self._result.ignored = self._tree.ignored
        return self._result

    def _changed_there(self) -> set[str]:
        """What a session on the directory has changed: both sides of that are looked at."""
        found = self._client.diff_session(self._info.id, "root", self._info.head.id, limit=MOST)
        if found.truncated:
            raise errors.TooLarge(f"the session has more than {MOST} changes", limit=MOST)
        for change in found.changes:
            name = _name(change.path)
            here = None if name is None else self._look(change.path, name)
            if here is not None:
                self._tree.files[change.path] = here
            new = change.new
            if new is None:
                continue
            word = mark_there(new)
            if new.digest is None and here is not None and not {"kind", "content"} & set(change.aspects):
                word = mark(new.kind, content_of(here.mark) or "", new.mode)  # it is as the directory's
            self._there[change.path] = _There(new.kind, word)
        return {change.path for change in found.changes}

    def _look(self, path: str, name: bytes) -> Found | None:
        above, _, last = name.rpartition(b"/")
        try:
            parent = files.open_directory(self._root, above or b".")
        except OSError:
            return None
        try:
            return look(parent, last, name, os.stat(last, dir_fd=parent, follow_symlinks=False))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tree.left[path] = error.strerror or str(error)
            return None
        finally:
            os.close(parent)

    def _is_asked(self, name: bytes) -> bool:
        parts = name.split(b"/")
        if b".git" in parts and not self._git:
            return False
        left = self._tree.left
        return not left or not any(
            encode_path(b"/".join(parts[:depth])) in left for depth in range(len(parts) + 1)
        )

    def _compare(self, path: str, name: bytes) -> None:
        found, there = self._tree.files.get(path), self._there.get(path)
        here_mark, there_mark = found and found.mark, there and there.mark
        if here_mark == there_mark:
            if found is not None:
                self._agreement.agree(path, found.mark, found.mark)
            else:
                self._agreement.drop(path)
            return
        if not self._is_changed_here(path, found):
            return
        both = there_mark != self._agreement.there(path)
        if found is None:
            is_directory = there is not None and there.kind == "directory"
            if both and not self._force:
                self._refuse(path, "it was removed here, and changed in the session")
            elif there is not None and not self._tree.is_ignored(name, is_directory=is_directory):
                self._gone[path] = name
            return
        if both and not self._force:
            if found.kind != "directory" or there is None or there.kind != "directory":
                known = there is None or self._agreement.there(path) is not None
                both_had = known or self._info.lent is not None
                why = "it changed on both sides" if both_had else "the session has it, with other content"
                self._refuse(path, why)
            return
        self._sent[path] = found

    def _is_changed_here(self, path: str, found: Found | None) -> bool:
        known = self._agreement.here(path)
        if known is not None or self._info.lent is None:
            return (found and found.mark) != known
        # Only the kernel sets this time.
        return found is not None and found.status.st_ctime_ns // 1000 >= self._info.lent

    def _refuse(self, path: str, why: str) -> None:
        self._result.refused.append(Refusal(path, why))

    def _keep_directories(self) -> None:
        """Directories stay where the session has what is not removed; nothing is sent into what is none."""
        needed: set[str] = set()
        for path in self._there:
            if path not in self._gone and path not in self._sent:
                while path := path.rpartition("/")[0]:
                    needed.add(path)
        for path, found in list(self._sent.items()):
            there = self._there.get(path)
            if (
                found.kind != "directory"
                and there is not None
                and there.kind == "directory"
                and path in needed
            ):
                self._refuse(path, "the session has a directory there, with files that are not here")
                del self._sent[path]
        for path in [path for path in self._gone if path in needed]:
            del self._gone[path]
        for path in list(self._sent):
            above = path
            while above := above.rpartition("/")[0]:
                there = self._there.get(above)
                if there is not None and there.kind != "directory" and above not in self._sent:
                    self._refuse(path, f"its directory is a {there.kind} in the session")
                    del self._sent[path]
                    break

    def _send(self) -> None:
        self._result.size = sum(one.size for one in self._sent.values() if one.kind == "file")
        if self._result.size > MAX_BYTES:
            raise errors.TooLarge(
                f"there are {units.format_size(self._result.size)} to send, more than the "
                f"{units.format_size(MAX_BYTES)} that go at once; have git ignore what is not needed there",
                limit=MAX_BYTES,
            )
        if self._sent or self._gone:
            made = self._client.import_session(
                self._info.id,
                _together(_tar(self._root, self._sent, self._gone)),
                match=self._info.head.digest,
                own=True,
            )
            self._result.checkpoint = made.id
        for path, found in self._sent.items():
            self._agreement.agree(path, found.mark, found.mark)
        for path in self._gone:
            self._agreement.drop(path)
        self._agreement.settle()
        self._result.sent, self._result.removed = list(self._sent), list(self._gone)


def _tar(root: int, sent: dict[str, Found], gone: dict[str, bytes]) -> Iterator[bytes]:
    """A layer of what is sent, with whiteouts for what is removed; read as it is taken."""
    for path, name in gone.items():
        above = path.rpartition("/")[0]
        if above in gone or (above in sent and sent[above].kind != "directory"):
            continue  # it goes with what it is in
        directory, _, last = name.rpartition(b"/")
        hidden = WHITEOUT + last
        yield header(directory + b"/" + hidden if directory else hidden, tarfile.REGTYPE)
    for found in sent.values():
        ids = (found.mode, 0, 0, max(0, int(found.status.st_mtime)))
        if found.kind == "directory":
            yield header(found.path, tarfile.DIRTYPE, ids=ids)
        elif found.kind == "symlink":
            yield header(found.path, tarfile.SYMTYPE, target=found.target, ids=ids)
        else:
            yield header(found.path, tarfile.REGTYPE, size=found.size, ids=ids)
            yield from chunks_of(root, found)
            if found.size % _BLOCK:
                yield bytes(-found.size % _BLOCK)
    yield bytes(2 * _BLOCK)


def _together(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer pieces: most files are small."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= _ENOUGH:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def _name(path: str) -> bytes | None:
    """The path that the daemon tells, if it is one that a file can have here."""
    try:
        name = decode_path(path)
        files.split_path(name)
    except (ValueError, errors.InvalidRequest):
        return None
    return name
