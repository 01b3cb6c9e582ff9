"""Evidence bundles: calls with all that their records name, and a part of the chain up to a signed head.

Theory of operation: a bundle is a plain tar (POSIX ustar) of regular files, so that it can be checked in
one pass without unpacking it: ``manifest.json``, ``key.pem``, ``records.jsonl`` (the headers from the first
that is needed to the signed head, as they are in the chain), then ``policies/HEX.json``,
``calls/ID/body.json``, ``stdout``, ``stderr``, ``events`` and ``details`` beside it, and ``blobs/HEX``.
Whoever checks one believes nothing in it but a signature of a key that they know, and what follows from it by
digests. If all calls of a session were asked for, the manifest names it in ``sessions``, and no header may be
of another call of it. ``events`` and ``details`` have what the header vouches for: all up to the outcome.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import tarfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd import canonical, errors
from sandboxd.journal.chain import Head, read_head
from sandboxd.journal.evidence import Evidence, opened
from sandboxd.journal.sessioncalls import numbers_of, session_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sandboxd.journal.signing import NodeKey

__all__ = ["Chosen", "Exported", "export", "select"]

_STEP = 500


@dataclass(frozen=True)
class Exported:
    """What a bundle has."""

    calls: int
    records: int
    files: int
    head: Head


@dataclass(frozen=True)
class Chosen:
    """Numbers and ids of records, in order, and the newest record; ``sessions`` are whole."""

    calls: list[tuple[int, str]]
    sessions: list[str]
    head: Head


def select(
    connection: sqlite3.Connection,
    ids: Sequence[str],
    *,
    session: str | None = None,
    everything: bool = False,
) -> Chosen:
    """Choose calls. Raises NotFound for one that has no record, InvalidRequest for a name of two sessions."""
    connection.execute("BEGIN")  # one moment of the journal
    try:
        return _select(connection, ids, session, everything=everything)
    finally:
        connection.execute("ROLLBACK")


def _select(
    connection: sqlite3.Connection, ids: Sequence[str], session: str | None, *, everything: bool
) -> Chosen:
    head = read_head(connection)
    if everything:
        return Chosen(connection.execute("SELECT n, id FROM records ORDER BY n").fetchall(), [], head)
    found: dict[int, str] = {}
    for id_ in ids:
        row = connection.execute("SELECT n FROM records WHERE id = ?", (id_,)).fetchone()
        if row is None:
            raise errors.NotFound(f"call {id_!r} has no record here; one that still runs has none yet")
        found[row[0]] = id_
    if session is None:
        return Chosen(sorted(found.items()), [], head)
    named = _session(connection, session)
    of_session = numbers_of(connection, named)
    if not of_session:
        raise errors.NotFound(f"no call of session {session!r} has a record here")
    found.update(of_session)
    return Chosen(sorted(found.items()), [named], head)


def _session(connection: sqlite3.Connection, named: str) -> str:
    """The id of a session; what is no name of one is an id, also of one that was removed."""
    rows = connection.execute("SELECT id, uid FROM sessions WHERE name = ? ORDER BY id", (named,)).fetchall()
    if len(rows) > 1:
        shown = ", ".join(f"{id_} of uid {uid}" for id_, uid in rows)
        raise errors.InvalidRequest(
            f"several sessions have the name {named!r}; give the id of one: {shown}", field="session"
        )
    return str(rows[0][0]) if rows else named


def export(
    connection: sqlite3.Connection, state: Path, key: NodeKey, chosen: Chosen, output: Path
) -> Exported:
    """Write a bundle of these calls, whole or not at all.

    Raises InvalidRequest, HostFailed; JournalCorrupt where a record cannot be read, or the index of sessions
    has left one out.
    """
    if not chosen.calls:
        raise errors.InvalidRequest("there is no call to export", field="calls")
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                done = _Writer(connection, Evidence(state), file, chosen).write(key)
                file.flush()
                os.fsync(fd)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise errors.HostFailed(
            f"the bundle {output} cannot be written: {error.strerror or error}"
        ) from error
    return done


class _Writer:
    def __init__(
        self, connection: sqlite3.Connection, evidence: Evidence, file: io.BufferedWriter, chosen: Chosen
    ) -> None:
        self._connection = connection
        self._chosen = chosen
        self._numbers = {n for n, _ in chosen.calls}
        self._evidence = evidence
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  # closed in write
        self._files = 0

    def write(self, key: NodeKey) -> Exported:
        calls, sessions, head = self._chosen.calls, self._chosen.sessions, self._chosen.head
        first, now = calls[0][0], time.time_ns() // 1000
        manifest: dict[str, Any] = {"v": 1, "type": "bundle", "first": first}
        manifest |= {"head": json.loads(key.sign(head, now)), "calls": [id_ for _, id_ in calls]}
        manifest |= {"sessions": sessions} if sessions else {}
        self._add("manifest.json", canonical.canonical(manifest))
        self._add("key.pem", key.pem())
        self._add_records(first, head)
        headers = [self._header(n) for n, _ in calls]
        self._add_policies(headers)
        for header in headers:
            self._add_call(header)
        for digest in dict.fromkeys(digest for header in headers for digest in _blobs(header)):
            self._add_file(f"blobs/{digest.removeprefix('sha256:')}", self._evidence.blob(digest))
        self._tar.close()
        return Exported(len(calls), head.n - first + 1, self._files, head)

    def _add(self, name: str, data: bytes) -> None:
        self._member(name, len(data), io.BytesIO(data))

    def _member(self, name: str, size: int, source: Any) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o600
        try:
            self._tar.addfile(member, source)
        except ValueError as error:  # ustar has room for 8 GiB
            raise errors.InvalidRequest(f"{name} is too large for a bundle: {size} bytes") from error
        self._files += 1

    def _add_records(self, first: int, head: Head) -> None:
        size = self._connection.execute(
            "SELECT sum(length(header) + 1) FROM records WHERE n BETWEEN ? AND ?", (first, head.n)
        ).fetchone()[0]
        self._member("records.jsonl", size, _Lines(self._headers(first, head.n)))

    def _headers(self, first: int, last: int) -> Iterator[bytes]:
        for at in range(first, last + 1, _STEP):
            rows = self._connection.execute(
                "SELECT n, header FROM records WHERE n BETWEEN ? AND ? ORDER BY n",
                (at, min(last, at + _STEP - 1)),
            ).fetchall()
            for n, header in rows:
                if self._chosen.sessions and n not in self._numbers:
                    self._belongs_to_none(n, header)
                yield header + b"\n"

    def _belongs_to_none(self, n: int, header: bytes) -> None:
        if (session := session_of(header)) in self._chosen.sessions:
            raise errors.JournalCorrupt(
                f"the index of sessions has left out record {n} of session {session}; stop the daemon and "
                "make it again with `sandboxd journal reindex`",
                session=session,
            )

    def _header(self, n: int) -> dict[str, Any]:
        data = self._connection.execute("SELECT header FROM records WHERE n = ?", (n,)).fetchone()[0]
        try:
            header: dict[str, Any] = json.loads(data)
        except (ValueError, RecursionError):
            raise errors.JournalCorrupt(
                f"record {n} was damaged: nothing vouches for it or for what is before it; calls after it "
                "can be exported by their ids"
            ) from None
        return header

    def _add_policies(self, headers: Sequence[dict[str, Any]]) -> None:
        for digest in dict.fromkeys(header["policy"] for header in headers):
            row = self._connection.execute("SELECT data FROM contents WHERE digest = ?", (digest,)).fetchone()
            if row:
                self._add(f"policies/{digest.removeprefix('sha256:')}.json", row[0])

    def _add_call(self, header: dict[str, Any]) -> None:
        id_ = header["id"]
        row = self._connection.execute("SELECT doc FROM invocations WHERE id = ?", (id_,)).fetchone()
        if row is None or row[0] is None:
            return  # it was pruned: its header is all that is left
        self._add(f"calls/{id_}/body.json", row[0])
        for what, path, _ in self._evidence.named(header):
            if what in {"stdout", "stderr"}:
                self._add_file(f"calls/{id_}/{what}", path)
        for what, path, size, _ in self._evidence.events(header):
            self._add_file(f"calls/{id_}/{what}", path, size)

    def _add_file(self, name: str, path: Path, most: int | None = None) -> None:
        try:
            with opened(path) as file:
                size = os.fstat(file.fileno()).st_size
                self._member(name, size if most is None else min(size, most), file)
        except FileNotFoundError:
            return  # whoever checks the bundle is told that it is not there


def _blobs(header: dict[str, Any]) -> list[str]:
    """Artifacts, and those inputs that were kept as blobs."""
    return [*(header.get("artifacts") or ()), *(header.get("inputs") or ())]


class _Lines:
    """Lines as a file, as far as ``tarfile`` reads one."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (line := next(self._lines, b"")):
            self._rest += line
        data, self._rest = self._rest[:size], self._rest[size:]
        return data
