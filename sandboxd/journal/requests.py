"""What was asked, as the journal keeps it: all of a request, so that it can be run later or again.

A request's document is its canonical JSON without its key and with its contents (of inputs, tar and
standard input) named by digest; its digest is that of the request. Contents are kept by digest too: the
smallest in the row itself, up to ``INLINE`` bytes of a request, all others in the store of blobs.

What a row names must not be collected: the table ``request_blobs`` has a row for each digest of a blob and
each call that named it, ``SELECT 1 FROM request_blobs WHERE digest = ?``, and goes with the call's row in
``requests``. A blob is stored, durably, before the acceptance that names it: one that was made a moment ago
may have no row yet.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sandboxd import canonical, errors
from sandboxd.models import Bytes, CallbackState, Request

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping

    from sandboxd.blobs import BlobStore
    from sandboxd.models import Callback

__all__ = [
    "INLINE",
    "OPEN_CALLS",
    "UNKNOWN_CALLS",
    "Asked",
    "Kept",
    "Open",
    "Owed",
    "callback_of",
    "describe",
    "differences",
    "open_calls",
    "owed",
    "problem_of",
    "read",
    "rebuild",
    "write",
]

INLINE = 256 * 1024
MAX_SHOWN = 200  # characters of a value that is shown, as JSON
MAX_DIFFERENCES = 20
OPEN_CALLS = (
    "SELECT id, uid, gid, groups, tied, started, memory, cpus, priority, serial, deadline, resting, 1"
    " FROM queue ORDER BY id"
)
UNKNOWN_CALLS = (  # accepted by a version that kept no request
    "SELECT id, uid FROM invocations INDEXED BY invocations_open"
    " WHERE state != 'ended' AND id NOT IN (SELECT id FROM queue) ORDER BY id"
)
_HEAD = struct.Struct("<32sQ")
_HIDDEN = frozenset({"env", "inputs", "tar", "stdin"})
"""Fields whose values are nobody's to show: variables may be secrets, and contents are long."""


@dataclass(frozen=True)
class Asked:
    """A request by its document; ``inline`` contents are in its row, ``large`` ones in the blob store."""

    doc: bytes
    inline: Mapping[str, bytes]
    large: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """The digest of all that the request asks for, its key aside."""
        return canonical.digest_bytes(self.doc)

    def store(self, blobs: BlobStore) -> None:
        """Store what is large, durably. Blocks. Raises HostFailed."""
        for data in self.large.values():
            blobs.add(data, durable=True)


@dataclass(frozen=True)
class Owed:
    """Who has to be told of a call's end: a socket of the caller's, or a program of the configuration's."""

    id: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    unix: str | None = None
    program: str | None = None
    tries: int = 0
    ended: bool = False


class Open(NamedTuple):
    """What the queue has to know of a call without an outcome, and what became of it so far.

    ``deadline`` is in microseconds since the epoch; ``started``: how many attempts were given a container;
    ``resting``: the last of them has ended and another follows. ``tied``: its caller waited for it. ``known``
    is false for a call whose request is not in the journal.
    """

    id: str
    uid: int
    gid: int = 0
    groups: str = "[]"
    """A list of numbers, as JSON."""
    tied: int = 1
    started: int = 0
    memory: int = 0
    cpus: int = 0
    priority: int = 0
    serial: str | None = None
    deadline: int | None = None
    resting: int = 0
    known: int = 0


def describe(request: Request) -> Asked:
    """A request as it is kept. Its time grows with the request's bytes."""
    asked = request.model_dump(
        mode="json",
        exclude={
            "key": True,
            "inputs": {"__all__": {"content"}},
            "tar": True,
            "stdin": isinstance(request.stdin, Bytes),
        },
        exclude_none=True,
    )
    if not asked.get("priority"):
        asked.pop("priority", None)  # 0 is what none means
    # by digest: as JSON it is tens of MiB that the event loop would wait for
    inputs = [item.content.decode() for item in request.inputs]
    given = [
        None if request.tar is None else request.tar.decode(),
        request.stdin.decode() if isinstance(request.stdin, Bytes) else None,
    ]
    contents = {canonical.digest_bytes(data): data for data in [*inputs, *given] if data is not None}
    digests = {data: digest for digest, data in contents.items()}
    asked["contents"] = [digests[data] for data in inputs]
    asked["given"] = [None if data is None else digests[data] for data in given]
    if "cpus" in (limits := asked.get("limits", {})):
        limits["cpus"] = str(limits["cpus"])  # canonical JSON of a float depends on how it was written
    inline: dict[str, bytes] = {}
    left = INLINE
    for digest, data in sorted(contents.items(), key=lambda item: len(item[1])):
        if len(data) > left:
            break
        inline[digest] = data
        left -= len(data)
    large = {digest: data for digest, data in contents.items() if digest not in inline}
    return Asked(canonical.canonical(asked), inline, large)


def write(connection: sqlite3.Connection, asked: Asked, call: Open, callback: Callback | None = None) -> None:
    """Add the rows of a request to a transaction."""
    packed = b"".join(
        _HEAD.pack(bytes.fromhex(digest.removeprefix("sha256:")), len(data)) + data
        for digest, data in asked.inline.items()
    )
    connection.execute(
        "INSERT INTO requests (id, doc, contents) VALUES (?, ?, ?)", (call.id, asked.doc, packed)
    )
    connection.execute(
        "INSERT INTO queue (id, uid, gid, groups, tied, started, memory, cpus, priority, serial, deadline,"
        " resting) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        call[:12],
    )
    if callback is not None:
        connection.execute(
            "INSERT INTO callbacks (id, uid, gid, groups, unix, program) VALUES (?, ?, ?, ?, ?, ?)",
            (call.id, call.uid, call.gid, call.groups, callback.unix or "", callback.exec),
        )
    if asked.large:
        connection.executemany(
            "INSERT INTO request_blobs (digest, id, size) VALUES (?, ?, ?)",
            [(digest, call.id, len(data)) for digest, data in asked.large.items()],
        )


def open_calls(connection: sqlite3.Connection) -> list[Open]:
    """The calls without an outcome, oldest first."""
    unknown = [Open(*row) for row in connection.execute(UNKNOWN_CALLS)]
    return [*unknown, *map(Open._make, connection.execute(OPEN_CALLS))]


def owed(connection: sqlite3.Connection) -> list[Owed]:
    """Who has to be told of an end, whether it has come or not."""
    rows = connection.execute(
        "SELECT c.id, c.uid, c.gid, c.groups, c.unix, c.program, c.tries, i.state = 'ended'"
        " FROM callbacks c JOIN invocations i ON i.id = c.id WHERE c.done IS NULL ORDER BY c.id"
    )
    return [
        Owed(id_, uid, gid, tuple(json.loads(groups)), unix or None, program, tries, bool(ended))
        for id_, uid, gid, groups, unix, program, tries, ended in rows
    ]


def callback_of(connection: sqlite3.Connection, id_: str) -> CallbackState | None:
    """What became of a call's callback, if it has one."""
    row = connection.execute(
        "SELECT unix, program, tries, done, problem FROM callbacks WHERE id = ?", (id_,)
    ).fetchone()
    if row is None:
        return None
    unix, program, tries, done, problem = row
    state: Literal["owed", "told", "given_up"] = "owed" if done is None else "given_up" if problem else "told"
    return CallbackState(unix=unix or None, exec=program, state=state, tries=tries, at=done, problem=problem)


class Kept(NamedTuple):
    """What is kept of a call's request; ``digest`` is what was noted of ``doc`` with the acceptance."""

    id: str
    doc: bytes
    contents: bytes
    key: str | None
    digest: str


def read(connection: sqlite3.Connection, id_: str) -> Kept | None:
    """What is kept of a call's request."""
    row = connection.execute(
        "SELECT r.id, r.doc, coalesce(r.contents, x''), i.key, i.request_digest"
        " FROM requests r JOIN invocations i ON i.id = r.id WHERE r.id = ?",
        (id_,),
    ).fetchone()
    return None if row is None else Kept(*row)


def problem_of(doc: bytes, contents: bytes | None, digest: str) -> str:
    """How a request differs from what was accepted, its blobs aside; empty where it does not."""
    if canonical.digest_bytes(doc) != digest:
        return "what was asked was changed: it no longer has the digest that it was accepted with"
    try:
        for named, data in _unpacked(contents or b""):
            if canonical.digest_bytes(data) != named:
                return f"what its request named as {named} is not what it was"
    except errors.JournalCorrupt as error:
        return str(error)
    return ""


def rebuild(kept: Kept, blobs: BlobStore) -> Request:
    """The request that was kept. Raises NotFound for a blob that is gone, JournalCorrupt."""
    id_, doc, contents, key, digest = kept
    if problem := problem_of(doc, contents, digest):
        raise errors.JournalCorrupt(f"call {id_}: {problem}", id=id_)
    held = dict(_unpacked(contents))

    def content(digest: str) -> dict[str, Any]:
        if digest in held:
            data = held[digest]
        else:
            with blobs.open(digest) as file:
                data = file.read()
        if canonical.digest_bytes(data) != digest:
            raise errors.JournalCorrupt(
                f"call {id_}: what its request named as {digest} is not what it was", id=id_
            )
        return Bytes.of(data).model_dump(exclude_none=True)

    try:
        asked = json.loads(doc)
        inputs, (tar, stdin) = asked.pop("contents"), asked.pop("given")
        for item, digest in zip(asked["inputs"], inputs, strict=True):
            item["content"] = content(digest)
        if tar is not None:
            asked["tar"] = content(tar)
        if stdin is not None:
            asked["stdin"] = content(stdin)
        if "cpus" in (limits := asked.get("limits", {})):
            limits["cpus"] = float(limits["cpus"])
        return Request.model_validate(asked | {"key": key})
    except (ValueError, KeyError, TypeError) as error:
        raise errors.JournalCorrupt(f"call {id_}: its request cannot be read", id=id_) from error


def _unpacked(contents: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(contents):
        if at + _HEAD.size > len(contents):
            raise errors.JournalCorrupt("the contents of a request in the journal are cut off")
        digest, size = _HEAD.unpack_from(contents, at)
        at += _HEAD.size
        yield f"sha256:{digest.hex()}", contents[at : at + size]
        at += size


def differences(before: bytes, now: bytes) -> list[dict[str, Any]]:
    """What two documents differ in: ``field``, ``before`` and ``now``, where these are short and may be told.

    Fields are named as in the request; ``env.NAME``, ``limits.NAME`` and ``labels.NAME`` one by one, and an
    input by its path.
    """
    old, new = _fields(json.loads(before)), _fields(json.loads(now))
    found: list[dict[str, Any]] = []
    for name in sorted(old.keys() | new.keys()):
        values = old.get(name), new.get(name)
        if values[0] == values[1] or len(found) == MAX_DIFFERENCES:
            continue
        hidden = name.split(".")[0] in _HIDDEN
        short = all(len(json.dumps(value)) <= MAX_SHOWN for value in values)
        found.append(
            {"field": name} | ({"before": values[0], "now": values[1]} if short and not hidden else {})
        )
    return found


def _fields(asked: dict[str, Any]) -> dict[str, Any]:
    contents, (tar, stdin) = asked.pop("contents"), asked.pop("given")
    fields: dict[str, Any] = {}
    for name, value in asked.items():
        if name in {"env", "limits", "labels"}:
            fields |= {f"{name}.{each}": one for each, one in value.items()}
        elif name == "inputs":
            given = zip(value, contents, strict=True)
            fields |= {
                f"inputs.{item['path']}": [at, item, digest] for at, (item, digest) in enumerate(given)
            }
        else:
            fields[name] = value
    fields |= {"tar": tar, "stdin": fields.get("stdin", stdin)}
    return fields
