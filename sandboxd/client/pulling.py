"""Bringing what a session changed into a directory, with the rights of who asks.

Theory of operation.  The daemon tells what differs; here, nothing that it or the tool says is trusted
with a path. The directory is open, and every name is reached from it through no link and onto no other
mount (``kernel.files.openat2``). A file that changed on both sides is refused: on this side it changed if
its inode did (ctime, which only the kernel sets) since the session stands on the directory, unless it is as
it was when both sides were the same (``agreement``); that alone counts where the session stands on none.
A file is written beside its place, compared with the digest that was announced, and renamed. A directory
makes way for one if all in it is what the session had and removed (``clearance``); else all of it stays.
What a tool has no business with is refused too: ``.git`` by whatever name, whose hooks and configuration
run programs; links that may lead out of the directory, by way of others too; devices, FIFOs and sockets.
Set-id bits are dropped, and modes are held to the umask and to who could write before. A change that fails
fails alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NotRequired, TypedDict

from sandboxd import errors, models, units
from sandboxd.artifacts import decode_path, encode_path
from sandboxd.client.agreement import Agreement, link_mark, mark
from sandboxd.client.clearance import Clearance, change_mode
from sandboxd.client.difference import since_agreed, since_lent
from sandboxd.client.place import beside, content_at, is_git, link_target, own_umask, status_of, write_sparse
from sandboxd.client.pushing import Refusal
from sandboxd.client.side import NotBrought, Side
from sandboxd.kernel import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Unpack

    from sandboxd.client.sync import Client

__all__ = ["MOST_BYTES", "PullFields", "Pulled", "Refusal", "pull"]

MOST_BYTES = 4 << 30
"""Bytes of files that one pull reads, if its caller does not say; holes count."""
_PARENT = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


@dataclass
class Pulled:
    """What came of a pull: paths as the daemon tells them."""

    applied: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    """Those that are here as the session has them."""
    removed: list[str] = field(default_factory=list)
    """Those of ``applied`` that were removed here."""
    refused: list[Refusal] = field(default_factory=list)
    unnoted: str | None = None
    """Why it could not be noted what both sides have now: a later pull takes it for changed on both."""


class PullFields(TypedDict):
    """``git``: also what is in ``.git``. ``force``: also what changed on both sides. ``most``: bytes read."""

    git: NotRequired[bool]
    force: NotRequired[bool]
    most: NotRequired[int]


def pull(
    client: Client, session: str, directory: str | os.PathLike[str], **fields: Unpack[PullFields]
) -> Pulled:
    """Apply what a session changed to a directory: that which it stands on, one that was pushed, or any.

    What changed is what the session and this directory do not have in common since the last push or pull; of
    one that it stands on, since then. ``git``: also what is in ``.git``. ``force``: also what changed on both
    sides. ``most``: bytes of files that are read; a file that is over it is among the refused, and so is what
    the daemon does not give. Raises TooLarge, OSError for a directory that cannot be opened, and what the
    daemon refuses of the session.
    """
    info = client.session(session)
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with Agreement(info.id, root) as agreement:
            if info.checkout is None:
                to, changes, unnamed = since_agreed(client, info, agreement)
            else:
                to, changes, unnamed = since_lent(client, info)
            one = _Pull(client, info, to, root, agreement, **fields)
            pulled = one.run(changes)
        pulled.unnoted = agreement.unnoted
    finally:
        os.close(root)
    if unnamed:
        why = f"{unnamed} files have paths of over 4,095 bytes, which no file here can have"
        pulled.refused.append(Refusal("", why))
    return pulled


class _Pull:
    def __init__(
        self,
        client: Client,
        info: models.SessionInfo,
        to: str,
        root: int,
        agreement: Agreement,
        *,
        git: bool = False,
        force: bool = False,
        most: int = MOST_BYTES,
    ) -> None:
        self._client = client
        self._info = info
        self._to = to
        self._root = root
        self._agreement = agreement
        self._side = Side(info.lent, agreement, force=force)
        self._git = git
        self._most = most
        self._left = most
        self._umask = own_umask()
        self._result = Pulled()
        self._modes: dict[str, int | None] = {}
        """Those that directories had before; None: there was none."""
        self._gone: errors.Unavailable | None = None
        self._removed: dict[str, models.FileChange] = {}
        """What the session has no more."""
        self._replaced: dict[str, bool] = {}
        """Whether what is no directory in the session is here; what it has removed in there went with it."""

    def run(self, changes: list[models.FileChange]) -> Pulled:
        """What is removed goes last, from the leaves up, and then directories get their modes.

        But for what is removed in a directory that became a file or a link: that goes with it, or stays.
        """
        self._removed = {one.path: one for one in changes if one.change == "removed"}
        directories = []
        for change in changes:
            if change.change == "removed":
                continue
            if change.new is not None and change.new.kind == "directory":
                if self._bring(change, self._make_directory):
                    directories.append(change)
            else:
                self._replaced[change.path] = self._bring(change, self._apply)
        for change in list(self._removed.values())[::-1]:
            above = self._replaced_above(change.path)
            if above is None:
                self._bring(change, self._apply)
            elif not self._replaced[above]:
                why = f"it is in {above}, which is something else in the session and was not brought"
                self._result.refused.append(Refusal(change.path, why))
            else:
                self._agreement.drop(change.path)
                self._result.already.append(change.path)
        for change in directories[::-1]:
            self._bring(change, self._close_directory)
        return self._result

    def _replaced_above(self, path: str) -> str | None:
        while path := path.rpartition("/")[0]:
            if path in self._replaced:
                return path
        return None

    def _bring(
        self, change: models.FileChange, do: Callable[[models.FileChange, bytes], bool | None]
    ) -> bool:
        """Do it, and note it: whether something changed here, None where more is to come; False: refused."""
        try:
            if self._gone is not None:
                raise self._gone  # once is enough to wait for a daemon
            path = self._path(change.path)
            done = do(change, path)
            if done is not None:
                self._agree(change, path)
                (self._result.applied if done else self._result.already).append(change.path)
                if done and change.new is None:
                    self._result.removed.append(change.path)
        except (NotBrought, errors.SandboxdError) as why:
            if isinstance(why, errors.Unavailable):
                self._gone = why
            self._result.refused.append(Refusal(change.path, str(why)))
        except OSError as error:
            self._result.refused.append(Refusal(change.path, error.strerror or str(error)))
        else:
            return True
        return False

    def _path(self, text: str) -> bytes:
        try:
            path = decode_path(text)
            parts = files.split_path(path)
        except (ValueError, errors.InvalidRequest) as error:
            raise NotBrought("the daemon told a path that no file here can have") from error
        if any(is_git(part) for part in parts) and not self._git:
            raise NotBrought("it is in .git; ask for it with --git")
        return path

    def _apply(self, change: models.FileChange, path: bytes) -> bool:
        with self._parent(path) as (parent, name):
            here = status_of(parent, name)
            if change.new is None:
                return self._remove(change, parent, name, here)
            match change.new.kind:
                case "file":
                    return self._write(change, parent, name, here)
                case "symlink":
                    return self._link(change, parent, name, here)
                case kind:
                    raise NotBrought(f"it is a {kind}")

    def _agree(self, change: models.FileChange, path: bytes) -> None:
        """Note what both sides have now."""
        new = change.new
        with self._parent(path) as (parent, name):
            here = status_of(parent, name)
            if here is None or new is None:
                self._agreement.drop(change.path)
                return
            content = new.digest or content_at(parent, name, here) or ""
            kind = "symlink" if stat.S_ISLNK(here.st_mode) else new.kind
            self._agreement.agree(
                change.path, mark(kind, content, here.st_mode), mark(kind, content, new.mode)
            )

    @contextmanager
    def _parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        above, _, name = path.rpartition(b"/")
        try:
            parent = files.openat2(self._root, above or b".", _PARENT)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.EXDEV}:
                raise NotBrought("its directory is a link, a file or another mount here") from error
            if error.errno == errno.ENOENT:
                raise NotBrought("its directory is not here") from error
            raise
        try:
            yield parent, name
        finally:
            os.close(parent)

    def _write(
        self, change: models.FileChange, parent: int, name: bytes, here: os.stat_result | None
    ) -> bool:
        new = change.new
        assert new is not None  # noqa: S101  (the caller has looked)
        mode = self._mode(new.mode, None if here is None else here.st_mode, stat.S_IFREG)
        if here is not None and stat.S_ISREG(here.st_mode):
            # No digest is told of a file that differs from what is here in its mode or owner alone.
            alike = change.old is not None and not {"kind", "content"} & set(change.aspects)
            same = alike if new.digest is None else new.digest == content_at(parent, name, here)
            if same and stat.S_IMODE(here.st_mode) == mode:
                return False
        way = self._clearance(change, parent, name, here)
        if new.size is not None and new.size > self._left:
            raise self._too_much()
        with beside(parent) as temporary:
            fd = files.openat2(parent, temporary, _NEW, 0o600)
            try:
                digest = self._copy(change.path, fd)
                if new.digest is not None and digest != new.digest:
                    raise NotBrought("it changed in the session while it was read")
                os.fchmod(fd, mode)
                os.fsync(fd)
            finally:
                os.close(fd)
            self._replace(change.path, (parent, temporary, name), here, way)
        return True

    def _copy(self, path: str, fd: int) -> str:
        digest = hashlib.sha256()
        size = 0
        with self._client.read_file(self._info.id, path, checkpoint=self._to) as chunks:
            for chunk in chunks:
                if len(chunk) > self._left:
                    raise self._too_much()
                self._left -= len(chunk)
                digest.update(chunk)
                write_sparse(fd, chunk, size)
                size += len(chunk)
        os.ftruncate(fd, size)
        return f"sha256:{digest.hexdigest()}"

    def _too_much(self) -> NotBrought:
        return NotBrought(f"it is over the {units.format_size(self._most)} of files that one pull brings")

    def _mode(self, mode: int, here: int | None, kind: int) -> int:
        """What of a mode is brought: to what is here, no right to write beyond its owner's is added.

        Nor is it taken from its owner that he reads it: who brought it would, and this session stand on what
        nobody can read.
        """
        mode |= stat.S_IRUSR | (stat.S_IXUSR if kind == stat.S_IFDIR else 0)
        if here is None or stat.S_IFMT(here) != kind:
            return mode & 0o777 & ~self._umask & ~stat.S_IWOTH
        shared = stat.S_IWGRP | stat.S_IWOTH
        return mode & 0o777 & (~self._umask | here) & (~shared | here)

    def _link(self, change: models.FileChange, parent: int, name: bytes, here: os.stat_result | None) -> bool:
        new = change.new
        assert new is not None  # noqa: S101
        try:
            target = link_target(new.target or "", change.path.count("/"), git=self._git)
        except ValueError as error:
            raise NotBrought(str(error)) from error
        digest = link_mark(target)
        if here is not None and stat.S_ISLNK(here.st_mode) and content_at(parent, name, here) == digest:
            return False
        way = self._clearance(change, parent, name, here)
        with beside(parent) as temporary:
            os.symlink(target, temporary, dir_fd=parent)
            self._replace(change.path, (parent, temporary, name), here, way)
        return True

    def _clearance(
        self, change: models.FileChange, parent: int, name: bytes, here: os.stat_result | None
    ) -> Clearance | None:
        """What has to go for a file or a link where a directory is here. Raises NotBrought."""
        if here is None or not stat.S_ISDIR(here.st_mode):
            self._side.check(change, parent, name, here)
            return None
        way = Clearance(parent, name, partial(self._check_below, decode_path(change.path)))
        if way.is_empty:  # else what is in it tells that the session had it
            self._side.check(change, parent, name, here)
        return way

    def _check_below(self, above: bytes, path: bytes, parent: int, name: bytes, here: os.stat_result) -> None:
        text = encode_path(above + b"/" + path)
        change = self._removed.get(text)
        if change is None:
            raise NotBrought(f"a directory is here, with {text}, which the session never had")
        try:
            self._path(text)
            if not stat.S_ISDIR(here.st_mode):
                self._side.check_removal(change, parent, name, here)
        except NotBrought as why:
            raise NotBrought(f"a directory is here, with {text}: {why}") from why

    def _replace(
        self,
        path: str,
        place: tuple[int, bytes, bytes],
        here: os.stat_result | None,
        way: Clearance | None = None,
    ) -> None:
        parent, temporary, name = place
        now = status_of(parent, name)
        if (now and (now.st_ino, now.st_ctime_ns)) != (here and (here.st_ino, here.st_ctime_ns)):
            raise NotBrought("it was changed here just now")
        for below in () if way is None else way.remove():
            text = encode_path(decode_path(path) + b"/" + below)
            self._agreement.drop(text)
            del self._removed[text]
            self._result.applied.append(text)
            self._result.removed.append(text)
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)

    def _make_directory(self, change: models.FileChange, path: bytes) -> None:
        """Have it here, and open to its owner until all that is to be in it is."""
        with self._parent(path) as (parent, name):
            here = status_of(parent, name)
            if here is not None and not stat.S_ISDIR(here.st_mode):
                self._side.check(change, parent, name, here)
                os.unlink(name, dir_fd=parent)
                here = None
            if here is None:
                os.mkdir(name, 0o700, dir_fd=parent)
            elif change.change != "added" and ~here.st_mode & stat.S_IRWXU:
                change_mode(parent, name, stat.S_IMODE(here.st_mode) | stat.S_IRWXU)
        self._modes[change.path] = None if here is None else here.st_mode

    def _close_directory(self, change: models.FileChange, path: bytes) -> bool:
        new, before = change.new, self._modes[change.path]
        assert new is not None  # noqa: S101
        if before is not None and change.change == "added":
            return False
        mode = self._mode(new.mode, before, stat.S_IFDIR)
        with self._parent(path) as (parent, name):
            change_mode(parent, name, mode)
        return before is None or stat.S_IMODE(before) != mode

    def _remove(
        self, change: models.FileChange, parent: int, name: bytes, here: os.stat_result | None
    ) -> bool:
        if here is None:
            return False
        if stat.S_ISDIR(here.st_mode):
            try:
                os.rmdir(name, dir_fd=parent)
            except OSError as error:
                if error.errno == errno.ENOTEMPTY:
                    raise NotBrought(
                        "it has files here that the session does not know, or that were refused"
                    ) from error
                raise
            return True
        self._side.check_removal(change, parent, name, here)
        os.unlink(name, dir_fd=parent)
        return True
