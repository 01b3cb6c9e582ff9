"""The digest of a layer of which only the steps are there: the same that a walk through its files gives."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd.workspace.layer import flat, framed, owned

if TYPE_CHECKING:
    from sandboxd.workspace.layer import Attributes, Looks, Owner

__all__ = ["LayerDigest"]


@dataclass
class _Directory:
    name: bytes
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


@dataclass
class _File:
    name: bytes
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    runs: bytearray = field(default_factory=bytearray)
    end: int = -1


class LayerDigest:
    """A sink that keeps nothing but the digest, ``result``, once the last directory is complete.

    Of what a pack has: no entry has several names, no file is a FIFO or socket. Raises ValueError for steps
    that no walk gives.
    """

    def __init__(self) -> None:
        self._directories = [_Directory(b"")]
        self._file: _File | None = None
        self._result = ""

    @property
    def result(self) -> str:
        """``sha256:…``."""
        if not self._result:
            raise ValueError("it ends before its last directory does")
        return self._result

    def _add(self, entry: bytes) -> None:
        if not self._directories or self._file is not None:
            raise ValueError("its steps are not in their order")
        self._directories[-1].digest.update(entry)

    def enter(self, name: str) -> None:
        """A directory begins."""
        self._add(b"")
        self._directories.append(_Directory(os.fsencode(name)))

    def leave(self, owner: Owner, attributes: Attributes, *, opaque: bool) -> Owner:
        """It is complete."""
        self._add(b"")
        one = self._directories.pop()
        kind = b"opaque" if opaque else b"directory"
        entry = framed(kind, one.name, owned(owner), one.digest.digest(), flat(attributes))
        if self._directories:
            self._add(entry)
        else:
            self._result = f"sha256:{hashlib.sha256(entry).hexdigest()}"
        return owner

    def whiteout(self, name: str) -> None:
        """There is none of this name."""
        self._add(framed(b"whiteout", os.fsencode(name)))

    def symlink(self, name: str, aim: str, owner: Owner) -> Owner:
        """A symbolic link."""
        self._add(framed(b"symlink", os.fsencode(name), owned(owner), os.fsencode(aim), b""))
        return owner

    def node(self, name: str, kind: int, owner: Owner) -> Owner:
        """No pack has one."""
        raise ValueError(f"{name!a} is of a kind, {kind:o} of {owner.uid}, that is not packed")

    def begin(self, name: str, looks: Looks | None = None) -> None:  # noqa: ARG002
        """A file begins."""
        self._add(b"")
        self._file = _File(os.fsencode(name))

    def run(self, data: bytes, offset: int) -> None:
        """Bytes of it."""
        if self._file is None:
            raise ValueError("its steps are not in their order")
        if offset != self._file.end:
            self._file.runs += struct.pack(">q", offset)
        self._file.end = offset + len(data)
        self._file.digest.update(data)

    def end(self, size: int, attributes: Attributes, owner: Owner) -> Owner:
        """It is complete."""
        one, self._file = self._file, None
        if one is None:
            raise ValueError("its steps are not in their order")
        one.digest.update(struct.pack(">qq", size, len(one.runs)) + one.runs)
        self._add(framed(b"file", one.name, owned(owner), one.digest.digest(), flat(attributes)))
        return owner

    def first(self, name: str, number: int) -> None:
        """No pack has what has several names."""
        raise ValueError(f"{name!a}, {number}, has several names, which is not packed")

    again = first
