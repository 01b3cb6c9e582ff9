"""Artifacts and output that were damaged on the disk: whoever asks for them is told, or cut off."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from sandboxd import contents, errors

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


def check_artifact(daemon: Daemon, target: str, name: str, digest: str, how: str) -> None:
    answer = Answer(daemon, target)
    if name == "large" and how == "changed":  # what cannot be told before the head
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


async def read_all(path: Path, digest: str, size: int, **part: int) -> bytes:
    return b"".join([piece async for piece in contents.read(path, digest, size, what="the content", **part)])


@pytest.mark.parametrize("size", [0, 1, contents.PIECE, contents.SMALL, contents.SMALL + 1, 3 << 20])
@pytest.mark.anyio
async def test_a_content_and_its_parts(tmp_path: Path, size: int) -> None:
    path = tmp_path / "content"
    data = (b"0123456789" * (size // 10 + 1))[:size]
    path.write_bytes(data)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    assert await read_all(path, digest, size) == data
    for start, length in ((0, 0), (0, 1), (size // 2, 7), (size // 3, size), (size, 1), (0, size)):
        assert await read_all(path, digest, size, start=start, length=length) == data[start : start + length]
    other = "sha256:" + hashlib.sha256(data + b"x").hexdigest()
    seen = bytearray()
    with pytest.raises(errors.JournalCorrupt, match=f"{other} is damaged") as raised:
        await read_into(seen, contents.read(path, other, size, what="the content"))
    assert raised.value.details == {"digest": other}
    assert len(seen) < max(size, 1)
    assert bool(seen) is (size > contents.SMALL)


async def read_into(seen: bytearray, pieces: AsyncIterator[bytes], shorten: Path | None = None) -> None:
    async for piece in pieces:
        seen += piece
        if shorten is not None:
            os.truncate(shorten, 2 << 20)


@pytest.mark.anyio
async def test_a_content_that_loses_its_end_while_it_is_read(tmp_path: Path) -> None:
    path, size = tmp_path / "content", 4 << 20
    path.write_bytes(bytes(size))
    digest = "sha256:" + hashlib.sha256(bytes(size)).hexdigest()
    seen = bytearray()
    with pytest.raises(errors.JournalCorrupt, match="lost its end"):
        await read_into(seen, contents.read(path, digest, size, what="the content", start=1), shorten=path)
    assert len(seen) <= 2 << 20
