"""A daemon on a disk that is full or breaks: calls end with typed errors, and it goes on when mended."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from crash_caller import told
from daemons import needs_containers, start_daemon, until
from disks import GROWING, mounted

from sandboxd import errors
from sandboxd.journal import schema, signing, verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon
    from disks import Disk

    from sandboxd.models import Invocation

LONG = int(os.environ.get("SANDBOXD_CRASHES", "0")) >= 100
WORK = "echo some output; mkdir out; head -c 200000 /dev/zero | tr '\\0' x | tee out/file"


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Disk]]:
    needs_containers()
    directory = tmp_path_factory.mktemp("bad")
    with mounted(directory / "fs") as disk, start_daemon(directory, state=disk.at / "state") as daemon:
        yield daemon, disk


def work(daemon: Daemon, key: str) -> Invocation | None:
    """A call with output and an artifact; None where it was refused, or its outcome is not recorded."""
    try:
        return daemon.client().run(["sh", "-c", WORK], policy="files", key=key)
    except errors.HostFailed:
        return None


def works_again(daemon: Daemon, key: str) -> None:
    def exited() -> bool:
        status = daemon.process.poll()
        assert status is None, f"the daemon ended with {status}:\n{daemon.log.read_text()[-3000:]}"
        found = work(daemon, key)
        return found is not None and found.outcome is not None and found.outcome.cause == "exited"

    until(exited, "it works again", 30)


def whole(daemon: Daemon) -> None:
    connection = schema.connect_reader(daemon.state / "journal.sqlite3")
    try:
        keys = {signing.key_id(key) for key in signing.known(daemon.state)}
        report = verify.verify(connection, keys=keys)
    finally:
        connection.close()
    assert report.ok, report.problem


@pytest.mark.parametrize(
    ("on", "path", "do"),
    [
        (GROWING, "", "ENOSPC"),
        (GROWING, "journal", "ENOSPC"),
        (GROWING, "/calls/", "ENOSPC"),
        (GROWING, "/blobs/", "ENOSPC"),
        (["write"], "/calls/", "EIO"),
        (["write"], "/blobs/", "EIO"),
        (["fsync"], "/calls/", "EIO"),
        (["fsync"], "/blobs/", "EIO"),
        (["fsyncdir"], "/(calls|blobs)", "EIO"),
        (["fsync"], "journal", "EIO"),
        (["link", "rename"], "/blobs/", "EIO"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("after", [1, 2, 3] if LONG else [1])
def test_a_fault_is_told_and_survived(
    bad: tuple[Daemon, Disk], on: list[str], path: str, do: str, after: int
) -> None:
    daemon, disk = bad
    name = f"{on[0]} {path} {do} {after}"
    works_again(daemon, f"before {name}")
    disk.fail(*on, path=path, do=do, after=after, times=5)
    try:
        found = work(daemon, name)
    finally:
        disk.mend()
    if found is not None:
        assert found.outcome is not None
        if found.outcome.cause == "failed":
            assert found.outcome.error is not None
            assert found.outcome.error.code == "host", found.outcome
        else:
            assert found.outcome.cause == "exited"
    works_again(daemon, f"after {name}")
    if found is not None:
        again = work(daemon, name)
        assert again is not None
        assert told(again) == told(found)
        if found.outcome is not None and found.outcome.cause == "exited":
            with daemon.client().stdout(found.id) as chunks:
                assert sum(map(len, chunks)) == 200_012
            with daemon.client().artifact(found.id, "out/file") as chunks:
                assert sum(map(len, chunks)) == 200_000
    whole(daemon)
    assert list((disk.behind / "state" / "blobs" / "tmp").iterdir()) == []


@pytest.mark.parametrize("path", ["/blobs/", "/calls/"])
def test_what_cannot_be_read_is_an_error_of_that_reader(bad: tuple[Daemon, Disk], path: str) -> None:
    daemon, disk = bad
    works_again(daemon, f"read {path}")
    found = work(daemon, f"read {path}")
    assert found is not None
    client = daemon.client()

    def read() -> int:
        if path == "/blobs/":
            with client.artifact(found.id, "out/file") as chunks:
                return sum(map(len, chunks))
        with client.stdout(found.id) as chunks:
            return sum(map(len, chunks))

    size = read()
    disk.fail("read", path=path, do="EIO")
    try:
        with pytest.raises((errors.Unavailable, errors.HostFailed)):
            read()
        assert client.health().status == "ready"
        assert daemon.run("true").outcome is not None
    finally:
        disk.mend()
    assert read() == size
