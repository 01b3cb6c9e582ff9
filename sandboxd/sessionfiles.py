"""The files of sessions from outside: read without a container, and changed by layers of one change each."""

from __future__ import annotations

import io
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import anyio.to_thread

from sandboxd import errors, models
from sandboxd.artifacts import decode_path, encode_path
from sandboxd.images.tarstream import ImportLimits
from sandboxd.workspace import diff, edit
from sandboxd.workspace.layerimport import import_layer
from sandboxd.workspace.layertar import export_diff, export_stack
from sandboxd.workspace.textdiff import MAX_TEXT, text_diff
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from sandboxd.api.identity import Caller
    from sandboxd.sessions import Sessions, Shown
    from sandboxd.workspace.diff import Change
    from sandboxd.workspace.edit import Condition
    from sandboxd.workspace.view import Entry

__all__ = ["SessionFiles"]

T = TypeVar("T")
MOST = 1000  # entries of a page
MOST_TEXT = 4 << 20  # bytes of all texts of one diff


class SessionFiles:
    """What ``Sessions`` has, as files. ``checkpoint`` is an id or digest; None: where the session stands.

    Each method raises NotFound, and HostFailed where the disk fails.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def list(
        self, caller: Caller, named: str, path: str, *, checkpoint: str | None, after: str | None, limit: int
    ) -> models.FileList:
        """What a directory has. Raises StateConflict for what is none."""
        wanted, beyond = _path(path), None if after is None else _path(after)

        def read(view: View) -> models.FileList:
            found = _found(view, wanted)
            if not found.is_directory:
                raise errors.StateConflict(f"{path!r} is no directory but a {found.kind}")
            entries = [one for one in view.children(found) if beyond is None or one.path > beyond]
            page = entries[: min(limit, MOST)]
            files = [_info(view, one) for one in page]
            return models.FileList(files=files, next=files[-1].path if len(entries) > len(page) else None)

        return await self._read(caller, named, checkpoint, read)

    async def stat(self, caller: Caller, named: str, path: str, *, checkpoint: str | None) -> models.FileInfo:
        """One file."""
        wanted = _path(path)
        return await self._read(caller, named, checkpoint, lambda view: _info(view, _found(view, wanted)))

    @asynccontextmanager
    async def opened(
        self, caller: Caller, named: str, path: str, *, checkpoint: str | None
    ) -> AsyncIterator[tuple[int, str, AsyncIterator[bytes]]]:
        """Size, digest and bytes of a regular file. Raises StateConflict for what is none."""
        wanted = _path(path)
        async with self._sessions.look(caller, named, checkpoint) as (shown,):
            with await anyio.to_thread.run_sync(_entered, shown) as view:
                entry = await anyio.to_thread.run_sync(_found, view, wanted)
                digest = await anyio.to_thread.run_sync(view.digest, entry)
                yield entry.size, digest, _pieces(view.content(entry))

    async def write(
        self, caller: Caller, named: str, path: str, data: bytes, *, mode: int | None, condition: Condition
    ) -> tuple[models.FileWritten, bool]:
        """Write a file, whose directories are made; whether it is new.

        Raises InvalidRequest, PreconditionFailed, StateConflict, QuotaExceeded, SessionBusy.
        """
        wanted = _path(path)

        def fill(view: View, into: int, owner: tuple[int, int]) -> edit.Written:
            return edit.put(
                view, into, wanted, (data,), owner=owner, most=len(data), mode=mode, condition=condition
            )

        made, written = await self._sessions.change(caller, named, fill)
        told = models.FileWritten(
            path=encode_path(wanted), digest=written.digest, size=written.size, checkpoint=made.digest
        )
        return told, written.created

    async def remove(
        self, caller: Caller, named: str, path: str, *, recursive: bool, condition: Condition
    ) -> models.FileWritten:
        """Remove what is at a path. Raises as ``write``."""
        wanted = _path(path)

        def fill(view: View, into: int, _: tuple[int, int]) -> None:
            edit.remove(view, into, wanted, recursive=recursive, condition=condition)

        made, _ = await self._sessions.change(caller, named, fill)
        return models.FileWritten(path=encode_path(wanted), checkpoint=made.digest)

    async def take_in(self, caller: Caller, named: str, data: bytes) -> models.LayerImported:
        """Unpack a tar over the files of a session, as a layer of an OCI image. Raises as ``write``."""

        def fill(view: View, into: int, owner: tuple[int, int]) -> int:
            limits = ImportLimits(total=caller.sessions.size)
            return import_layer(io.BytesIO(data), into, view, owner=owner, limits=limits).entries

        made, entries = await self._sessions.change(caller, named, fill)
        return models.LayerImported(entries=entries, checkpoint=made.digest)

    async def diff(
        self, caller: Caller, named: str, *, old: str | None, new: str | None, text: bool, limit: int
    ) -> models.SessionDiff:
        """What differs between two checkpoints; ``old`` None: that with which the session began."""
        async with self._sessions.look(caller, named, old, new, origin=old is None) as (before, after):
            changes, complete = await anyio.to_thread.run_sync(
                partial(_compare, before, after, text=text, limit=min(limit, MOST))
            )
        return models.SessionDiff(
            old=before.checkpoint.digest, new=after.checkpoint.digest, changes=changes, complete=complete
        )

    @asynccontextmanager
    async def exported(
        self, caller: Caller, named: str, *, checkpoint: str | None, since: str | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """A tar of all files, or of what changed ``since`` a checkpoint, as a layer of an OCI image.

        Raises StateConflict for names that such a layer cannot have.
        """
        wanted = [checkpoint] if since is None else [checkpoint, since]
        async with self._sessions.look(caller, named, *wanted) as shown:
            with await anyio.to_thread.run_sync(_entered, shown[0]) as new:
                if since is None:
                    export = await anyio.to_thread.run_sync(export_stack, new)
                    yield _pieces(export.chunks)
                    return
                with await anyio.to_thread.run_sync(_entered, shown[1]) as old:
                    export = await anyio.to_thread.run_sync(export_diff, old, new)
                    yield _pieces(export.chunks)

    async def _read(self, caller: Caller, named: str, checkpoint: str | None, read: Callable[[View], T]) -> T:
        async with self._sessions.look(caller, named, checkpoint) as (shown,):

            def work() -> T:
                with View(shown.layers) as view:
                    return read(view)

            return await anyio.to_thread.run_sync(work)


def _entered(shown: Shown) -> View:
    """A view that closes itself again where it cannot be opened."""
    return View(shown.layers)


def _path(text: str) -> bytes:
    try:
        return decode_path(text.strip("/"))
    except ValueError as error:
        raise errors.InvalidRequest(f"path: {error}", field="path") from None


def _found(view: View, path: bytes) -> Entry:
    found = view.find(path) if path else view.root()
    if found is None:
        raise errors.NotFound(f"the session has no {encode_path(path)!r}")
    return found


def _info(view: View, entry: Entry) -> models.FileInfo:
    return models.FileInfo(
        path=encode_path(entry.path),
        kind=entry.kind,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        size=entry.size if entry.kind == "file" else None,
        modified=entry.mtime_ns // 1000,
        target=encode_path(view.target(entry)) if entry.kind == "symlink" else None,
    )


def _compare(before: Shown, after: Shown, *, text: bool, limit: int) -> tuple[list[models.FileChange], bool]:
    left = MOST_TEXT if text else 0
    with View(before.layers) as old, View(after.layers) as new:
        # a session without files has a root that is nobody's yet, and the next has one: that is no change
        both = bool(before.layers and after.layers)
        differing = (one for one in diff.compare(old, new) if one.path or both)
        found = list(islice(differing, limit + 1))
        changes = []
        for one in found[:limit]:
            change = _change(old, new, one, text=left > 0)
            left -= len(change.diff or "")
            changes.append(change)
    return changes, len(found) <= limit


def _change(old: View, new: View, one: Change, *, text: bool) -> models.FileChange:
    kept = one.new or one.old
    assert kept is not None  # noqa: S101  (one of them is there)
    told = models.FileChange(
        path=encode_path(one.path),
        change=one.change,
        kind=kept.kind,
        aspects=list(one.aspects),
        old_size=one.old.size if one.old is not None and one.old.kind == "file" else None,
        new_size=one.new.size if one.new is not None and one.new.kind == "file" else None,
    )
    files = [entry for entry in (one.old, one.new) if entry is not None and entry.kind == "file"]
    if not text or not files or (one.aspects and not {"content", "kind"} & set(one.aspects)):
        return told
    if max(entry.size for entry in files) > MAX_TEXT:
        return told.model_copy(update={"omitted": "too_large"})
    made = text_diff(one.path, _text(old, one.old), _text(new, one.new))
    return told.model_copy(update={"diff": made.text or None, "omitted": made.omitted})


def _text(view: View, entry: Entry | None) -> bytes | None:
    return None if entry is None or entry.kind != "file" else b"".join(view.content(entry, most=MAX_TEXT))


async def _pieces(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """What a blocking iterator has, each piece read in a thread."""
    while (piece := await anyio.to_thread.run_sync(next, chunks, None)) is not None:
        yield piece
