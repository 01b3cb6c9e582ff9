"""A small layer as bytes, of which the same layer can be made as files.

Theory of operation.  To make ten files on disk and sync them takes longer than all else that is durable about
a call. So what a call changed, if it is small and plain, goes as bytes into the transaction of its outcome,
and becomes files afterwards (``unwritten``). A pack is a sequence of steps, each framed: what a walk gives
its sink, in the same order.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from sandboxd.workspace.layer import Owner, take
from sandboxd.workspace.layerdigest import LayerDigest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.workspace.layer import Attributes, Figures, Looks, Sink

__all__ = ["MOST", "digest_of_pack", "pack", "unpack"]

MOST = 128 * 1024
"""Bytes of a pack: about as many as the log of the journal takes in the time of one sync."""
MOST_OF_A_LINK = 1000  # bytes, which every file system can hold
LATEST = 1 << 31  # seconds: what every file system can hold as a time

_STEP = struct.Struct("<cII")
_OWNER = struct.Struct("<IIIq")
_ENTER, _LEAVE, _OPAQUE, _WHITEOUT, _SYMLINK, _BEGIN, _RUN, _END = (b"%c" % one for one in b"elowsbrf")


class _Unfit(Exception):
    """There is too much of it, or what not every file system can hold."""


_NAMED = frozenset({_ENTER, _WHITEOUT, _SYMLINK, _BEGIN})


def pack(upper: int, base: int) -> tuple[bytes, Figures] | None:
    """An upper layer (a descriptor) as bytes; None for one that is to be made as files at once.

    Raises WorkspaceUnfit, HostFailed, OSError.
    """
    made = _Pack()
    try:
        figures = take(upper, made, base)
    except _Unfit:
        return None
    return b"".join(made.steps), figures


def unpack(data: bytes, sink: Sink) -> None:
    """Give ``sink`` what was packed. Raises OSError, ValueError for what is no pack."""
    try:
        _unpack(data, sink)
    except struct.error as error:
        raise ValueError("a step of it is cut off") from error


def _unpack(data: bytes, sink: Sink) -> None:
    for kind, name, detail in _steps(data):
        if kind == _ENTER:
            sink.enter(name)
        elif kind in {_LEAVE, _OPAQUE}:
            sink.leave(_owner(detail), [], opaque=kind == _OPAQUE)
        elif kind == _WHITEOUT:
            sink.whiteout(name)
        elif kind == _SYMLINK:
            sink.symlink(name, os.fsdecode(detail[_OWNER.size :]), _owner(detail))
        elif kind == _BEGIN:
            sink.begin(name)
        elif kind == _RUN:
            sink.run(detail[8:], int.from_bytes(detail[:8], "little"))
        elif kind == _END:
            sink.end(int.from_bytes(detail[_OWNER.size :], "little"), [], _owner(detail))
        else:
            raise ValueError("a step of it is of no known kind")


def digest_of_pack(data: bytes) -> str:
    """The digest of the layer that is made of a pack. Raises ValueError for what is no pack."""
    digest = LayerDigest()
    unpack(data, digest)
    return digest.result


def _steps(data: bytes) -> Iterator[tuple[bytes, str, bytes]]:
    at = 0
    while at < len(data):
        kind, named, length = _STEP.unpack_from(data, at)
        at += _STEP.size
        name = data[at : at + named]
        if at + named + length > len(data):
            raise ValueError("a step of it is cut off")
        if kind in _NAMED and (not name or name in {b".", b".."} or b"/" in name or b"\0" in name):
            raise ValueError("it has a name that no file has")  # nothing is made outside of the layer
        yield kind, os.fsdecode(name), data[at + named : at + named + length]
        at += named + length


def _owner(detail: bytes) -> Owner:
    return Owner(*_OWNER.unpack_from(detail))


class _Pack:
    """A sink whose steps are bytes; raises _Unfit for what is not to be packed."""

    def __init__(self) -> None:
        self.steps: list[bytes] = []
        self._size = 0

    def _add(self, kind: bytes, name: str = "", detail: bytes = b"") -> None:
        named = os.fsencode(name)
        self._size += _STEP.size + len(named) + len(detail)
        if self._size > MOST:
            raise _Unfit
        self.steps.append(_STEP.pack(kind, len(named), len(detail)) + named + detail)

    def _owned(self, kind: bytes, owner: Owner, name: str = "", detail: bytes = b"") -> Owner:
        if not 0 <= owner.mtime < LATEST * 10**9:
            raise _Unfit
        self._add(kind, name, _OWNER.pack(*owner) + detail)
        return owner

    def enter(self, name: str) -> None:
        self._add(_ENTER, name)

    def leave(self, owner: Owner, attributes: Attributes, *, opaque: bool) -> Owner:
        _plain(attributes)
        return self._owned(_OPAQUE if opaque else _LEAVE, owner)

    def whiteout(self, name: str) -> None:
        self._add(_WHITEOUT, name)

    def symlink(self, name: str, aim: str, owner: Owner) -> Owner:
        target = os.fsencode(aim)
        if len(target) > MOST_OF_A_LINK:
            raise _Unfit
        return self._owned(_SYMLINK, owner, name, target)

    def node(self, name: str, kind: int, owner: Owner) -> Owner:  # noqa: ARG002
        raise _Unfit

    def begin(self, name: str, looks: Looks | None = None) -> None:  # noqa: ARG002
        self._add(_BEGIN, name)

    def run(self, data: bytes, offset: int) -> None:
        self._add(_RUN, detail=offset.to_bytes(8, "little") + data)

    def end(self, size: int, attributes: Attributes, owner: Owner) -> Owner:
        _plain(attributes)
        if size > MOST:  # a sparse file may be longer than the file system of the state can hold
            raise _Unfit
        return self._owned(_END, owner, detail=size.to_bytes(8, "little"))

    def first(self, name: str, number: int) -> None:  # noqa: ARG002
        raise _Unfit

    def again(self, name: str, number: int) -> None:  # noqa: ARG002
        raise _Unfit


def _plain(attributes: Attributes) -> None:
    if attributes:
        raise _Unfit
