"""Artifacts and output that were damaged on the disk: whoever asks for them is told, or cut off."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import socket
from typing import TYPE_CHECKING

import anyio
import pytest

from sandboxd import contents, errors
from sandboxd.contents import Contents
from sandboxd.digests import MOST, SMALL, Digests, identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from daemons import Daemon

SIZES = {"small": 4, "large": 3 << 20}
BLOCK = 65_536


def damaged(path: Path, how: str) -> None:
    """Do to a file what a disk, or somebody, may do to it."""
    size = path.stat().st_size
    match how:
        case "cut":
            with path.open("r+b") as file:
                file.truncate(size - 1)
        case "longer":
            with path.open("ab") as file:
                file.write(b"x")
        case "changed":
            with path.open("r+b") as file:
                file.seek(size - 1)
                last = file.read(1)
                file.seek(size - 1)
                file.write(bytes([last[0] ^ 1]))
        case "gone":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
        case "link":
            path.unlink()
            path.symlink_to("/etc/passwd")


class Answer:
    """What came over a connection until its end, which has to come."""

    def __init__(self, daemon: Daemon, target: str, **headers: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(daemon.socket))
            given = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n{given}\r\n".encode())
            data = b""
            self.status = 0
            while piece := sock.recv(BLOCK):
                data += piece
                if b"\r\n\r\n" in data and not self.status:
                    head, _, data = data.partition(b"\r\n\r\n")
                    self.head = head.lower()
                    self.status = int(head.split()[1])
                if self.status and b"content-length: %d\r\n" % len(data) in self.head + b"\r\n":
                    break  # it is whole, and the connection stays
        self.body = data

    @property
    def is_whole(self) -> bool:
        """Whether a client takes it for whole."""
        for line in self.head.split(b"\r\n"):
            if line.startswith(b"content-length: "):
                return len(self.body) == int(line.partition(b" ")[2])
        return self.body.endswith(b"0\r\n\r\n")


def made(daemon: Daemon) -> tuple[str, dict[str, str]]:
    """A call with output and a file of each size, and the digests of these."""
    files = "; ".join(f"head -c {size} /dev/urandom > {name}" for name, size in SIZES.items())
    call = daemon.run("sh", "-c", f"{files}; echo 1234; seq 10000 >&2", policy="files")
    digests = {one.path: one.digest for one in call.artifacts}
    assert set(digests) == set(SIZES)
    return call.id, digests


def blob(daemon: Daemon, digest: str) -> Path:
    bare = digest.removeprefix("sha256:")
    return daemon.state / "blobs" / "sha256" / bare[:2] / bare


def test_the_head_of_an_artifact_says_how_large_it_is(daemon: Daemon) -> None:
    id_, digests = made(daemon)
    for name, digest in digests.items():
        for target in (f"/v1/artifacts/{digest}", f"/v1/invocations/{id_}/artifacts/{name}"):
            connection = http.client.HTTPConnection("localhost", timeout=20)
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(str(daemon.socket))
            with contextlib.closing(connection):
                for _ in range(2):  # the connection goes on
                    connection.request("HEAD", target)
                    answer = connection.getresponse()
                    assert (answer.status, answer.read()) == (200, b"")
                    found = (answer.headers["content-length"], answer.headers["etag"])
                    assert found == (str(SIZES[name]), f'"{digest}"')
    assert Answer(daemon, f"/v1/artifacts/{digests['small']}").is_whole


def check_artifact(daemon: Daemon, target: str, name: str, digest: str, how: str) -> None:
    answer = Answer(daemon, target)
    if name == "large" and how == "changed":  # what cannot be told before the head
        part = Answer(daemon, target, Range="bytes=0-1")
        assert (part.status, json.loads(part.body)["code"]) == (500, "journal_corrupt")
        assert answer.status == 200
        assert not answer.is_whole
        assert len(answer.body) < SIZES[name]
        return
    assert answer.status == 500, how
    problem = json.loads(answer.body)
    assert problem["code"] == "journal_corrupt"
    assert problem["details"] == {"digest": digest}
    assert digest in problem["detail"]
    assert str(daemon.state) not in answer.body.decode()
    assert Answer(daemon, target, Range="bytes=0-1").status == 500


def test_damaged_artifacts(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    for how in ("cut", "longer", "changed", "gone", "directory", "link"):
        call, digests = made(daemon)
        for name, digest in digests.items():
            damaged(blob(daemon, digest), how)
            for target in (f"/v1/artifacts/{digest}", f"/v1/invocations/{call}/artifacts/{name}"):
                check_artifact(daemon, target, name, digest, how)
            with (
                pytest.raises((errors.SandboxdError, http.client.HTTPException)),
                daemon.client().artifact(call, name) as pieces,
            ):
                b"".join(pieces)
    assert "Traceback" not in daemon.log.read_text()
    assert daemon.client().health().status == "ready"


def test_damaged_output(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    for how in ("cut", "longer", "changed", "gone"):
        call, _ = made(daemon)
        for stream in ("stdout", "stderr"):
            damaged(daemon.state / "calls" / call / stream, how)
            check_output(daemon, call, stream)
        answer = Answer(daemon, f"/v1/invocations/{call}")
        if how == "longer":  # it is told with what it wrote
            assert (answer.status, json.loads(answer.body)["stdout"]["text"]) == (200, "1234\n")
        else:
            assert (answer.status, json.loads(answer.body)["code"]) == (500, "journal_corrupt")
    assert "Traceback" not in daemon.log.read_text()
    assert daemon.run("true").outcome is not None


def check_output(daemon: Daemon, call: str, stream: str) -> None:
    target = f"/v1/invocations/{call}/{stream}"
    assert not Answer(daemon, f"{target}?follow=1").is_whole  # its head goes ahead
    for query in ("", "?offset=2"):
        answer = Answer(daemon, target + query)
        assert (answer.status, json.loads(answer.body)["code"]) == (500, "journal_corrupt")
        assert f"the {stream} of call {call}" in json.loads(answer.body)["detail"]


async def read_all(one: Contents, path: Path, digest: str, size: int, **part: int) -> bytes:
    return b"".join([piece async for piece in one.read(path, digest, size, what="the content", **part)])


@pytest.mark.parametrize("size", [0, 1, contents.PIECE, SMALL, SMALL + 1, 3 << 20])
@pytest.mark.anyio
async def test_a_content_and_its_parts(tmp_path: Path, size: int) -> None:
    path = tmp_path / "content"
    data = (b"0123456789" * (size // 10 + 1))[:size]
    path.write_bytes(data)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    one = Contents(Digests())
    for start, length in ((0, 0), (0, 1), (size // 2, 7), (size // 3, size), (size, 1), (0, size)):
        found = await read_all(one, path, digest, size, start=start, length=length)
        assert found == data[start : start + length]
    assert await read_all(one, path, digest, size) == data
    other = "sha256:" + hashlib.sha256(data + b"x").hexdigest()
    seen = bytearray()
    with pytest.raises(errors.JournalCorrupt, match=f"{other} is damaged") as raised:
        await read_into(seen, Contents(Digests()).read(path, other, size, what="the content"))
    assert raised.value.details == {"digest": other}
    assert len(seen) < max(size, 1)
    assert bool(seen) is (size > SMALL)
    for each in (Contents(Digests()), one):  # also where the file was read before, as what it is
        with pytest.raises(errors.JournalCorrupt, match=f"{other} is damaged"):
            assert await read_all(each, path, other, size, start=size // 2, length=1) is None


async def read_into(
    seen: bytearray, pieces: AsyncIterator[bytes], change: Callable[[], None] | None = None
) -> None:
    async for piece in pieces:
        seen += piece
        if change is not None:
            change()


@pytest.mark.anyio
async def test_a_content_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path, size = tmp_path / "content", 4 << 20
    path.write_bytes(bytes(size))
    digest = "sha256:" + hashlib.sha256(bytes(size)).hexdigest()

    def cut() -> None:
        os.truncate(path, 2 << 20)

    def write() -> None:
        with path.open("r+b") as file:
            file.write(b"x")

    for change, words in ((cut, "lost its end"), (write, "was changed while it was read")):
        path.write_bytes(bytes(size))
        seen = bytearray()
        with pytest.raises(errors.JournalCorrupt, match=words):
            await read_into(seen, Contents(Digests()).read(path, digest, size, what="it", start=1), change)
        assert len(seen) < size - 1
    path.write_bytes(bytes(size))
    with pytest.raises(errors.JournalCorrupt, match="lost its end"):
        await read_into(bytearray(), Contents(Digests()).read(path, digest, size, what="it"), cut)


class Read:
    """Counts the bytes that are read of files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.pread = os.pread
        monkeypatch.setattr(os, "pread", self)

    def __call__(self, fd: int, size: int, at: int) -> bytes:
        data = self.pread(fd, size, at)
        self.count += len(data)
        return data

    def taken(self) -> int:
        """How many since this was asked last."""
        count, self.count = self.count, 0
        return count


@pytest.mark.anyio
async def test_a_large_content_is_compared_before_its_first_part_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "content", os.urandom(5 << 20)
    path.write_bytes(data)
    size, digest = len(data), "sha256:" + hashlib.sha256(data).hexdigest()
    read, one = Read(monkeypatch), Contents(Digests())
    assert await read_all(one, path, digest, size, start=9, length=0) == b""
    assert read.taken() == 0
    assert await read_all(one, path, digest, size, start=9, length=3) == data[9:12]
    assert read.taken() == size + 3
    assert await read_all(one, path, digest, size, start=size - 1, length=3) == data[-1:]
    assert read.taken() == 1
    path.rename(tmp_path / "elsewhere")
    path.write_bytes(data)  # another file of the same bytes
    assert await read_all(one, path, digest, size, length=1) == data[:1]
    assert read.taken() == size + 1
    other = Contents(Digests())
    assert await read_all(other, path, digest, size) == data
    read.taken()
    assert await read_all(other, path, digest, size, length=1) == data[:1]  # it was whole before
    assert read.taken() == 1


@pytest.mark.parametrize("at", [0, 1 << 20, (5 << 20) - 1])
@pytest.mark.anyio
async def test_no_part_of_a_changed_content_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Wherever it was changed, before or after a part was given, with its length and time as they were."""
    path, data = tmp_path / "content", os.urandom(5 << 20)
    path.write_bytes(data)
    size, digest = len(data), "sha256:" + hashlib.sha256(data).hexdigest()
    known, new = Contents(Digests()), Contents(Digests())
    assert await read_all(known, path, digest, size, start=5, length=1) == data[5:6]
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    read = Read(monkeypatch)
    for one in (known, new):
        for start in (0, 1 << 20, 3 << 20):
            with pytest.raises(
                errors.JournalCorrupt, match="is damaged: what is there has the digest"
            ) as raised:
                assert await read_all(one, path, digest, size, start=start, length=9) is None
            assert raised.value.details == {"digest": digest}
    assert read.taken() == 2 * size  # who asks again and again costs nothing


@pytest.mark.anyio
async def test_who_asks_for_parts_of_the_same_content_waits_for_one_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "content", os.urandom(9 << 20)
    path.write_bytes(data)
    size, digest = len(data), "sha256:" + hashlib.sha256(data).hexdigest()
    read, one = Read(monkeypatch), Contents(Digests())
    got: dict[int, bytes] = {}

    async def part(number: int) -> None:
        got[number] = await read_all(one, path, digest, size, start=number, length=2)

    async with anyio.create_task_group() as group:
        for number in range(16):
            group.start_soon(part, number)
    assert got == {number: data[number : number + 2] for number in range(16)}
    assert read.taken() == size + 32
    with anyio.move_on_after(0.001):  # who goes away meanwhile keeps nobody else from it
        await read_all(again := Contents(Digests()), path, digest, size, length=1)
    assert await read_all(again, path, digest, size, length=1) == data[:1]


def test_so_many_digests_are_known_and_none_of_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SMALL + 1))
    asked: list[str] = []

    def read() -> str:
        asked.append(f"sha256:{len(asked)}")
        return asked[-1]

    known = Digests(most=2)
    with path.open("r+b") as file:
        fd = file.fileno()
        assert [known.of(fd, SMALL + 1, read) for _ in range(3)] == ["sha256:0"] * 3
        assert known.of(fd, SMALL, read) == "sha256:1"  # of another length than it has: it was swapped
        assert known.of(fd, SMALL + 1, read) == "sha256:0"
        for number in range(2):
            at = (0, number, SMALL + 1, 0, 0)
            known.add(at, at, "sha256:x")
        assert known.of(fd, SMALL + 1, read) == "sha256:2"
        now = identity(fd)
        os.write(fd, b"x")
        assert known.find(identity(fd)) is None
        known.add(now, identity(fd), "sha256:y")  # it changed while it was read
        assert known.find(identity(fd)) is None
        os.ftruncate(fd, SMALL)
        known.add(identity(fd), identity(fd), "sha256:z")
        assert known.find(identity(fd)) is None  # a small one is read each time
    assert MOST < 1 << 16  # some hundred bytes each
