"""Checking an evidence bundle, on any host, without a daemon: see ``bundle`` for its form.

Theory of operation: the file may be hostile. It is read once, front to back, in bounded pieces; nothing is
unpacked or named on disk, and what ``export`` does not write is refused: other members, kinds, names, sizes.
From a signature that holds, the digests of the chain vouch for headers, and those for all else.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from sandboxd import canonical, errors
from sandboxd.journal import signing
from sandboxd.journal.chain import Broken, Head, follow
from sandboxd.journal.evidence import EMPTY, EVENTS

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["BundleReport", "check"]

_BLOCK = 512
_CHUNK = 1 << 20
_MAX_MANIFEST = 128 << 20  # a million calls' ids
_MAX_HEADER = 4 << 20
_MAX_CALLS = 1_000_000
_MAX_VALUES = 100_000  # of a header
_MAX_DAMAGE = 1000
_END = 2 * _BLOCK
_MAX_PADDING = 20 * _BLOCK  # tarfile fills up to a record of 20 blocks
_ID = r"[0-9a-zA-Z_-]{1,64}"
_POLICY = re.compile(r"policies/([0-9a-f]{64})\.json")
_CALL = re.compile(rf"calls/({_ID})/(body\.json|stdout|stderr|events|details)")
_BLOB = re.compile(r"blobs/([0-9a-f]{64})")


@dataclass
class BundleReport:
    """What checking a bundle found; ``problem`` and ``damaged`` say what differs."""

    head: Head = field(default_factory=lambda: Head(0, ""))
    key: str = ""
    """The id of the key that signed the head."""
    at: int = 0
    """When it was signed, by the node's clock."""
    records: int = 0
    calls: int = 0
    sessions: list[str] = field(default_factory=list)
    """Sessions of which the bundle has all calls whose records it has: those from the first record on."""
    pruned: int = 0
    """Calls whose body had been pruned: their headers still hold."""
    files: int = 0
    """Bodies, streams, policies and artifacts that have their digests."""
    absent: list[str] = field(default_factory=list)
    """What records name and the node no longer had, or never kept: policies and inputs."""
    gone: list[str] = field(default_factory=list)
    """What is not there of pruned calls: bodies, streams, artifacts; at most 1,000. A bundle from which
    somebody took all of a call's files looks the same."""
    problem: str | None = None
    damaged: list[str] = field(default_factory=list)
    """Files that differ from what their record says, or are not there; at most 1,000."""

    @property
    def ok(self) -> bool:
        """Whether all of it holds."""
        return self.problem is None and not self.damaged


def check(path: Path, keys: Collection[str] = ()) -> BundleReport:
    """Check a bundle. ``keys``: ids of keys that are believed; without any, the bundle's own is, which the
    reader has to know by its id. Raises InvalidRequest where the file cannot be read.
    """
    report = BundleReport()
    try:
        with path.open("rb") as file:
            _Check(file, report, keys).run()
    except OSError as error:
        raise errors.InvalidRequest(f"{path} cannot be read: {error.strerror}", field="bundle") from None
    except Broken as broken:
        report.problem = str(broken)
    return report


@dataclass
class _Expected:
    """What the record of one call says of its files, by name, and what of them came."""

    n: int
    body: str
    streams: dict[str, str]
    blobs: tuple[str, ...]
    seen: set[str] = field(default_factory=set)


class _Check:
    def __init__(self, file: BinaryIO, report: BundleReport, keys: Collection[str]) -> None:
        self._file = file
        self._report = report
        self._keys = keys
        self._calls: dict[str, _Expected | None] = {}
        self._policies: dict[str, bool] = {}
        self._blobs: dict[str, bool] = {}
        self._inputs: set[str] = set()
        self._sessions: set[str] = set()

    def run(self) -> None:
        manifest = self._manifest()
        self._records(manifest)
        while (member := self._member()) is not None:
            self._one(*member)
        self._what_is_missing()

    def _manifest(self) -> dict[str, Any]:
        manifest = _object(self._whole("manifest.json", _MAX_MANIFEST), "manifest.json", _MAX_CALLS + 100)
        calls, first = manifest.get("calls"), manifest.get("first")
        sessions = manifest.setdefault("sessions", [])
        known = set(manifest) == {"v", "type", "first", "head", "calls", "sessions"}
        if not known or (manifest["v"], manifest["type"]) != (1, "bundle") or not isinstance(calls, list):
            raise _bad("manifest.json is not that of a bundle of this version")
        if type(first) is not int or not 1 <= first < 2**53 or not calls:
            raise _bad("manifest.json does not say where its records begin")
        if not isinstance(sessions, list) or not all(isinstance(one, str) for one in sessions):
            raise _bad("manifest.json does not name sessions")
        self._sessions.update(sessions)
        for id_ in calls:
            if not isinstance(id_, str) or not re.fullmatch(_ID, id_) or id_ in self._calls:
                raise _bad("manifest.json lists what is no call, or one twice")
            self._calls[id_] = None
        return manifest

    def _records(self, manifest: dict[str, Any]) -> None:
        """The chain from the first record to the signed head."""
        pem = self._whole("key.pem", 4096)
        try:
            signed = signing.SignedHead.parse(canonical.canonical(manifest.get("head")))
            if pem != signing.pem(signed.public):
                raise ValueError("key.pem is not the key that signed it")
            signed.check(self._keys or {signed.key})
        except (errors.InvalidRequest, ValueError, RecursionError) as error:
            raise Broken(0, f"the head of the bundle does not hold: {error}") from None
        self._report.head, self._report.key, self._report.at = signed.head, signed.key, signed.at
        name, left = self._named("records.jsonl")
        padding = -left % _BLOCK
        head: Head | None = None
        while left:
            line = self._file.readline(min(left, _MAX_HEADER) + 1)
            if not line.endswith(b"\n") or len(line) > left:
                raise _bad(f"{name} is cut off, or a line of it is too long")
            left -= len(line)
            head = self._record(head, line[:-1], manifest["first"])
        self._skip(padding)
        if head != signed.head:
            raise Broken(0, f"the records end with {head}, and {signed.head} was signed")
        missing = [id_ for id_, expected in self._calls.items() if expected is None]
        if missing:
            raise Broken(0, f"call {missing[0]} has no record in the bundle")
        self._report.calls = len(self._calls)
        self._report.sessions = sorted(self._sessions)

    def _record(self, head: Head | None, data: bytes, first: int) -> Head:
        header = _object(data, f"record {first + self._report.records}")
        if head is None:  # what is before it is not in the bundle
            head = Head(first - 1, str(header.get("prev")))
        id_, n, digest = header.get("id"), head.n + 1, canonical.digest_bytes(data)
        if not isinstance(id_, str):
            raise Broken(n, f"record {n} has no id")
        body = follow(head, n, id_, digest, data)
        if id_ in self._calls:
            self._expect(id_, n, body, header)
        elif isinstance(session := header.get("session"), str) and session in self._sessions:
            raise Broken(n, f"record {n} is of call {id_} of session {session}, which is not in the bundle")
        self._report.records += 1
        return Head(n, digest)

    def _expect(self, id_: str, n: int, body: str, header: dict[str, Any]) -> None:
        streams, named = {}, {}
        for name in ("stdout", "stderr"):
            stream = header.get(name)
            if stream is not None and not (
                isinstance(stream, dict) and isinstance(stream.get("digest"), str)
            ):
                raise Broken(n, f"record {n} does not say what its {name} was")
            if stream is not None and stream["digest"] != EMPTY:
                streams[name] = stream["digest"]
        streams |= _events(header, n)
        for what in ("artifacts", "inputs"):
            found = header.get(what) or []
            if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
                raise Broken(n, f"record {n} does not say what its {what} were")
            named[what] = tuple(found)
        if self._calls[id_] is not None:
            raise Broken(n, f"call {id_} has two records")
        self._calls[id_] = _Expected(n, body, streams, named["artifacts"])
        self._policies.setdefault(str(header.get("policy")), False)
        self._blobs.update(dict.fromkeys((*named["artifacts"], *named["inputs"]), False))
        self._inputs.update(named["inputs"])

    def _one(self, name: str, size: int) -> None:
        """A policy, a file of a call, or a blob: its name says what it has to be."""
        if (found := _POLICY.fullmatch(name)) or (found := _BLOB.fullmatch(name)):
            wanted = f"sha256:{found[1]}"
            known = self._policies if name.startswith("policies/") else self._blobs
            if known.get(wanted) is not False:
                raise _bad(f"{name!r} is named by no record of these calls, or is there twice")
            known[wanted] = True
        elif found := _CALL.fullmatch(name):
            expected = self._calls.get(found[1])
            what = found[2]
            if (
                expected is None
                or what in expected.seen
                or not (what in expected.streams or what == "body.json")
            ):
                raise _bad(f"{name!r} is named by no record of these calls, or is there twice")
            expected.seen.add(what)
            wanted = expected.body if what == "body.json" else expected.streams[what]
        else:
            raise _bad(f"{name!r} is no file of a bundle")
        digest = self._digest(size)
        if digest == wanted:
            self._report.files += 1
        else:
            self._damage(f"{name} was changed: it has the digest {digest}, its record says {wanted}")

    def _what_is_missing(self) -> None:
        for id_, expected in self._calls.items():
            if expected is None:
                continue
            if "body.json" not in expected.seen:
                self._report.pruned += 1
                if expected.seen:
                    self._damage(f"calls/{id_}/body.json is not there")
                else:
                    self._pruned(id_, expected)
                continue
            for name in expected.streams.keys() - expected.seen:
                self._damage(f"calls/{id_}/{name} is not there")
            for digest in expected.blobs:
                if not self._blobs[digest]:
                    self._damage(f"artifact {digest} of call {id_} is not there")
        self._report.absent += [f"policy {digest}" for digest, seen in self._policies.items() if not seen]
        self._report.absent += [f"input {one}" for one in sorted(self._inputs) if not self._blobs[one]]

    def _pruned(self, id_: str, expected: _Expected) -> None:
        blobs = [f"artifact {digest}" for digest in dict.fromkeys(expected.blobs) if not self._blobs[digest]]
        names = ("body", *sorted(expected.streams), *blobs)
        room = _MAX_DAMAGE - len(self._report.gone)
        self._report.gone += [f"{name} of call {id_}" for name in names[:room]]

    def _damage(self, what: str) -> None:
        if len(self._report.damaged) < _MAX_DAMAGE:
            self._report.damaged.append(what)

    def _member(self) -> tuple[str, int] | None:
        """The name and size of the next file; None at the end."""
        block = self._exactly(_BLOCK)
        if not block.strip(b"\0"):
            rest = self._file.read(_MAX_PADDING + 1)
            if len(rest) < _BLOCK or len(rest) > _MAX_PADDING or rest.strip(b"\0"):
                raise _bad("the file goes on after its end, or has none")
            return None
        name, size = block[:100].rstrip(b"\0"), block[124:136].rstrip(b"\0 ")
        checksum = block[148:156].rstrip(b"\0 ")
        if block[257:265] != b"ustar\x0000" or block[156:157] != b"0" or block[345:500].strip(b"\0"):
            raise _bad("a member is no regular file of a POSIX ustar archive")
        if not re.fullmatch(rb"[0-7]{1,12}", size) or not re.fullmatch(rb"[0-7]{1,8}", checksum):
            raise _bad("a member has no size or no checksum")
        if int(checksum, 8) != sum(block[:148]) + sum(block[156:]) + 8 * 32:
            raise _bad("the header of a member was changed")
        if not re.fullmatch(rb"[0-9A-Za-z_./-]{1,100}", name):
            raise _bad("a member has a name that no file of a bundle has")
        return name.decode(), int(size, 8)

    def _named(self, wanted: str) -> tuple[str, int]:
        member = self._member()
        if member is None or member[0] != wanted:
            raise _bad(f"{wanted} is not in its place")
        return member

    def _whole(self, name: str, most: int) -> bytes:
        _, size = self._named(name)
        if size > most:
            raise _bad(f"{name} has {size} bytes, which is more than {most}")
        data = self._exactly(size)
        self._skip(-size % _BLOCK)
        return data

    def _digest(self, size: int) -> str:
        digest, left = hashlib.sha256(), size
        while left:
            data = self._exactly(min(left, _CHUNK))
            digest.update(data)
            left -= len(data)
        self._skip(-size % _BLOCK)
        return "sha256:" + digest.hexdigest()

    def _skip(self, size: int) -> None:
        if self._exactly(size).strip(b"\0"):
            raise _bad("something is between its members")

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise _bad("it is cut off")
        return data


def _events(header: dict[str, Any], n: int) -> dict[str, str]:
    """The digests of the files of a call's events, by name; earlier versions named none."""
    said = header.get("events")
    if said is None:
        return {}
    parts = [said.get(name) for name in EVENTS] if isinstance(said, dict) else [None]
    if not all(isinstance(part, dict) and isinstance(part.get("digest"), str) for part in parts):
        raise Broken(n, f"record {n} does not say what its events were")
    return {name: said[name]["digest"] for name in EVENTS}


def _bad(what: str) -> Broken:
    return Broken(0, f"this is no bundle, or it was changed: {what}")


def _object(data: bytes, name: str, most: int = _MAX_VALUES) -> dict[str, Any]:
    if not canonical.few(data, most):  # hundreds of bytes each, once they are parsed
        raise _bad(f"{name} has more than {most} values")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _bad(f"{name} is no JSON object")
    return found
