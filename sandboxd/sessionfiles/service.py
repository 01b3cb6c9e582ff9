"""The files of sessions for who is outside of them: listed, compared, read, written, exported, imported.

Theory of operation.  What is read is a ``View`` of the layers of a checkpoint, in a thread; a session is
not removed while somebody reads. A change waits for its turn as a call does, and is a layer and a
checkpoint as a call's are, so that it can be rolled back, and no running call sees half of it.

What a tool made may be deep, wide and large, so no answer costs what there is: each operation has its time
and bytes (``Effort``), runs in few threads for each caller (``Lanes``), and stops when nobody waits for it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import GeneratorType
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from sandboxd import errors, models
from sandboxd.artifacts import decode_path
from sandboxd.images.tarstream import ImportLimits
from sandboxd.session import OWNER, lowest
from sandboxd.sessionfiles.bodies import Bodies, Body, Unpacked
from sandboxd.sessionfiles.shown import MAX_DIFFS, MAX_FILE, Page, change_of, info_of, is_digested, order_of
from sandboxd.workspace import edit
from sandboxd.workspace.diff import compare
from sandboxd.workspace.effort import Effort
from sandboxd.workspace.layerimport import import_layer
from sandboxd.workspace.layertar import export_diff, export_stack
from sandboxd.workspace.view import Lent, View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from sandboxd.api.identity import Caller
    from sandboxd.digests import Digests
    from sandboxd.room import Room
    from sandboxd.sessions import Sessions, Standing
    from sandboxd.workspace.layertar import Export
    from sandboxd.workspace.view import Entry

__all__ = ["SessionFiles"]

MAX_IMPORT = ImportLimits(total=4 << 30, entries=200_000)
_CHUNK = 1 << 18

T = TypeVar("T")


class SessionFiles:
    """Raises NotFound for a session that is not the caller's, as do all its methods."""

    def __init__(
        self, sessions: Sessions, scratch: Path, *, room: Room, body_time: int, digests: Digests
    ) -> None:
        """``scratch`` is where bodies are kept while they come, in ``room``, for ``body_time`` µs at most."""
        self._sessions = sessions
        self._digests = digests
        self._bodies = Bodies(sessions, scratch, room, body_time)

    async def diff(
        self,
        caller: Caller,
        named: str,
        *,
        since: str,
        to: str | None,
        text: bool,
        limit: int,
        sound: bool = False,
    ) -> models.SessionDiff:
        """What differs between two checkpoints; with ``text``, how.

        ``sound``: the layers that make it so are compared with their digests first. Raises Corrupt.
        """

        def compared(old: Standing, new: Standing) -> models.SessionDiff:
            if sound:
                new.check(effort, old.layers)
            page = Page[models.FileChange](limit)
            with self._views(effort, old, new) as (before, after):
                left = MAX_DIFFS if text else 0
                for change in compare(before, after, into=page.into):
                    if not change.path or page.is_unnamed(change.path):  # the directory itself, or too deep
                        continue
                    if page.is_full or not page.add(
                        one := change_of(before, after, change, left if text else None)
                    ):
                        page.truncated = True
                        break
                    left -= len(one.diff or "")
            return models.SessionDiff(
                since=old.checkpoint,
                to=new.checkpoint,
                changes=page.found,
                truncated=page.truncated,
                unnamed=page.unnamed,
            )

        effort = Effort()
        async with self._sessions.standing(caller, named, since, to) as (old, new):
            return await self._threaded(caller, effort, lambda: compared(old, new))

    async def list(
        self,
        caller: Caller,
        named: str,
        path: str,
        *,
        checkpoint: str | None,
        recursive: bool,
        digest: bool = False,
        after: str | None = None,
        limit: int,
    ) -> models.FileList:
        """What a directory has, or all beneath it, behind the path ``after``; the path of the root is empty.

        With ``digest`` a page ends where no more may be digested. Raises StateConflict.
        """
        place = _path(path) if path else b""
        passed = order_of(_path(after)) if after is not None else []

        def into(directory: Entry) -> bool:
            """Whether anything in it can be behind ``after``."""
            parts = order_of(directory.path)
            return page.into(directory) and (parts > passed or parts == passed[: len(parts)])

        def listed(one: Standing) -> models.FileList:
            with self._views(effort, one) as (view,):
                entry = _found(view, place)
                if not entry.is_directory:
                    raise errors.StateConflict(f"{path!r} is a {entry.kind}, and no directory")
                for each in view.walk(entry, into=into) if recursive else view.children(entry):
                    if order_of(each.path) <= passed or page.is_unnamed(each.path):
                        continue
                    asked = digest and is_digested(each)
                    late = asked and bool(page.found) and not view.effort.may_digest(each.size)
                    if late or page.is_full or not page.add(info_of(view, each, digest=asked)):
                        page.truncated = True
                        break
            return models.FileList(
                files=page.found,
                truncated=page.truncated,
                next=page.found[-1].path if page.truncated and page.found else None,
                unnamed=page.unnamed,
            )

        page = Page[models.FileInfo](limit)

        effort = Effort()
        async with self._sessions.standing(caller, named, checkpoint) as (one,):
            return await self._threaded(caller, effort, lambda: listed(one))

    @asynccontextmanager
    async def read(
        self, caller: Caller, named: str, path: str, *, checkpoint: str | None
    ) -> AsyncIterator[tuple[models.FileInfo, Callable[[int, int], AsyncIterator[bytes]]]]:
        """A regular file: what it is, with its digest, and its bytes from a place on, so many.

        A small layer that it is in is compared with its digest first. Raises StateConflict, Corrupt.
        """
        place, effort = _path(path), Effort()
        async with self._sessions.standing(caller, named, checkpoint) as (one,), self._held(caller) as stack:

            def opened() -> tuple[models.FileInfo, View, Entry]:
                stack.is_used = True
                (view,) = stack.enter_context(self._views(effort, one))
                entry = _found(view, place)
                if entry.members and entry.members[0] < len(one.layers):  # else it is lent
                    one.check_small(effort, one.layers[entry.members[0]])
                return info_of(view, entry, digest=True), view, entry

            def pieces(start: int, length: int) -> AsyncIterator[bytes]:
                chunks = view.content(entry, start, length)
                stack.callback(_close, chunks)
                return self._streamed(caller, effort, chunks)

            info, view, entry = await self._threaded(caller, effort, opened)
            yield info, pieces

    async def write(
        self,
        caller: Caller,
        named: str,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        condition: edit.Condition,
        mode: int | None,
    ) -> models.FileWritten:
        """Write a file. Raises PreconditionFailed, StateConflict, TooLarge, QuotaExceeded."""
        place = _path(path)
        async with self._bodies.spooled(caller, named, chunks, MAX_FILE) as body:

            def fill(view: View, into: int) -> edit.Written:
                content = iter(lambda: Body(body, view.effort).read(_CHUNK), b"")
                owner = _owner(view)
                return edit.put(
                    view, into, place, content, owner=owner, most=MAX_FILE, mode=mode, condition=condition
                )

            written, made = await self._changed(caller, named, fill)
        return models.FileWritten(
            path=path, size=written.size, digest=written.digest, created=written.created, checkpoint=made.id
        )

    async def make_directory(
        self, caller: Caller, named: str, path: str, *, condition: edit.Condition
    ) -> models.FileWritten:
        """Make a directory, and those above it.

        Raises PreconditionFailed, StateConflict where something is already.
        """
        place = _path(path)

        def fill(view: View, into: int) -> None:
            edit.make_directory(view, into, place, owner=_owner(view), condition=condition)

        _, made = await self._changed(caller, named, fill)
        return models.FileWritten(path=path, created=True, checkpoint=made.id)

    async def remove(
        self, caller: Caller, named: str, path: str, *, condition: edit.Condition, recursive: bool
    ) -> models.FileWritten:
        """Remove what is at a path. Raises PreconditionFailed, StateConflict for a directory with files."""
        place = _path(path)
        _, made = await self._changed(
            caller,
            named,
            lambda view, into: edit.remove(view, into, place, recursive=recursive, condition=condition),
        )
        return models.FileWritten(path=path, checkpoint=made.id)

    @asynccontextmanager
    async def export(
        self, caller: Caller, named: str, *, since: str | None, to: str | None, times: bool
    ) -> AsyncIterator[tuple[Export, AsyncIterator[bytes]]]:
        """A layer of a checkpoint's files, or of what makes it of an earlier one.

        Raises StateConflict, Corrupt.
        """
        wanted, effort = (to,) if since is None else (since, to), Effort()
        async with (
            self._sessions.standing(caller, named, *wanted) as stands,
            self._held(caller) as stack,
        ):

            def made() -> Export:
                stack.is_used = True
                for one in stands:  # nothing leaves as the session's that is not
                    one.check(effort)
                views = stack.enter_context(self._views(effort, *stands))
                if len(views) == 1:
                    export = export_stack(views[0], times=times)
                else:
                    export = export_diff(views[0], views[1], times=times)
                stack.callback(_close, export.chunks)
                return export

            export = await self._threaded(caller, effort, made)
            yield export, self._streamed(caller, effort, export.chunks)

    async def bring(
        self,
        caller: Caller,
        named: str,
        chunks: AsyncIterator[bytes],
        *,
        match: frozenset[str] | None = None,
        own: bool = False,
    ) -> models.CheckpointInfo:
        """Put a layer's tar over what the session has, if it stands on a checkpoint of those of ``match``.

        It may be compressed (gzip, bzip2, xz), and counts as what it is without that.
        ``own``: what comes is the owner's of the session's files, whatever the archive says. Raises
        InvalidRequest, PreconditionFailed, TooLarge, QuotaExceeded.
        """
        async with self._bodies.spooled(caller, named, chunks, MAX_IMPORT.total) as body:
            left, allowed = self._sessions.left(caller), caller.sessions.size

            def unpack(view: View, into: int) -> None:
                stream = Unpacked(Body(body, view.effort), left, allowed)
                import_layer(stream, into, view, owner=_owner(view), own=own, limits=MAX_IMPORT)

            _, made = await self._changed(caller, named, unpack, match=match)
        return made

    async def _changed(
        self,
        caller: Caller,
        named: str,
        fill: Callable[[View, int], T],
        *,
        match: frozenset[str] | None = None,
    ) -> tuple[T, models.CheckpointInfo]:
        results: list[T] = []

        def filled(below: Sequence[Path | Lent], into: int) -> None:
            with View(below, effort, self._digests) as view:
                results.append(fill(view, into))

        effort = Effort()
        made = await self._sessions.change(caller, named, filled, effort=effort, match=match)
        return results[0], made

    @contextmanager
    def _views(self, effort: Effort, *stands: Standing) -> Iterator[tuple[View, ...]]:
        """Views of checkpoints; what a caller has lent is the same layer in all that stand on it."""
        with ExitStack() as stack:
            checkouts = {id(one.checkout): one.checkout for one in stands}
            bottom = {key: stack.enter_context(lowest(one)) for key, one in checkouts.items()}
            yield tuple(
                stack.enter_context(View((*one.layers, *bottom[id(one.checkout)]), effort, self._digests))
                for one in stands
            )

    async def _threaded(
        self, caller: Caller, effort: Effort, work: Callable[[], T], *, always: bool = False
    ) -> T:
        """What it returns; it is stopped, and waited for, where nobody waits for it any more."""
        return await self._sessions.work.run(
            caller.uid, lambda: effort.within(work), stop=effort.stop, always=always
        )

    @asynccontextmanager
    async def _held(self, caller: Caller) -> AsyncIterator[_Held]:
        """What is closed in a thread at the end of the block: a mount of what is lent may take its time."""
        stack = _Held()
        try:
            yield stack
        finally:
            if stack.is_used:
                with anyio.CancelScope(shield=True):
                    await self._threaded(caller, Effort(), stack.close, always=True)

    async def _streamed(
        self, caller: Caller, effort: Effort, chunks: Iterator[bytes]
    ) -> AsyncIterator[bytes]:
        """Chunks that are read from the disk, each in a thread, and with a time of its own."""
        while (
            chunk := await self._threaded(caller, effort, lambda: next(chunks, None), always=True)
        ) is not None:
            yield chunk


def _close(chunks: Iterator[bytes]) -> None:
    if isinstance(chunks, GeneratorType):
        chunks.close()


class _Held(ExitStack):
    """What a read holds; nothing until its turn has come."""

    is_used = False


def _owner(view: View) -> tuple[int, int]:
    """Who has what is made: who has the workspace, unless it is a directory of a caller's."""
    root = view.root()
    lent = any(isinstance(one, Lent) for one in view.layers)
    return (root.uid, root.gid) if root.members and not lent else OWNER


def _path(text: str) -> bytes:
    try:
        return decode_path(text)
    except ValueError:
        raise errors.InvalidRequest("the path is no valid Unicode", field="path") from None


def _found(view: View, path: bytes) -> Entry:
    entry = view.find(path)
    if entry is None:
        raise errors.NotFound(f"the session has no {os.fsdecode(path[:200])!a}")
    return entry
