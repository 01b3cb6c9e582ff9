"""The built-in runtime's process by itself: what it does before its plan, and with plans that are wrong."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers

from sandboxd import errors
from sandboxd.engine.builtin import BuiltInContainer, container_plan
from sandboxd.engine.probe import probe_shape
from sandboxd.init import LAUNCH
from sandboxd.kernel import mounts
from sandboxd.kernel.orphans import reap
from sandboxd.kernel.userns import UserNamespaces

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = 0x7F00_0000  # of ids that no daemon of the tests uses


@dataclass
class Waiting:
    """A process that waits for its plan."""

    container: BuiltInContainer
    pid: int
    pidfd: int

    def begin(self, plan: bytes, fds: list[int]) -> str:
        """Send a plan, and return what the process said before it ended."""
        socket.send_fds(self.container._plan, [plan], fds)
        assert self.ended()
        with pytest.raises(errors.EngineFailed) as failed:
            self.container.started()
        return str(failed.value)

    def ended(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(10_000))


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Waiting]:
    needs_containers()
    for path in (tmp_path, *tmp_path.parents):  # a container's root is nobody here
        if path.stat().st_mode & 0o001 == 0:
            path.chmod(path.stat().st_mode | 0o011)
    namespaces = UserNamespaces(LAUNCH, BASE, 1)
    ours, theirs = socket.socketpair()
    cgroup = SimpleNamespace(procs_files=(), name="a-name")
    with ours, theirs, namespaces.borrowed() as ids:
        directory = tmp_path / "slot"
        directory.mkdir(mode=0o711)
        with BuiltInContainer(directory, ids, cgroup, theirs.fileno()) as container:  # type: ignore[arg-type]
            pid, pidfd = container.started()
            one = Waiting(container, pid, pidfd)
            yield one
        assert one.ended()
        reap(pidfd)
        os.close(pidfd)
    namespaces.close()


def test_it_waits_in_namespaces_of_its_own_and_ends_with_its_connection(waiting: Waiting) -> None:
    for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
        theirs = Path(f"/proc/{waiting.pid}/ns/{kind}").readlink()
        assert theirs != Path(f"/proc/self/ns/{kind}").readlink(), kind
    status = Path(f"/proc/{waiting.pid}/status").read_text()
    assert f"Uid:\t{BASE}\t{BASE}\t{BASE}\t{BASE}" in status
    assert status.partition("NSpid:")[2].splitlines()[0].split()[-1] == "1"
    assert waiting.container.alive()


def test_a_process_that_was_killed_is_known_to_be_gone(waiting: Waiting) -> None:
    signal.pidfd_send_signal(waiting.pidfd, signal.SIGKILL)
    assert waiting.ended()
    assert not waiting.container.alive()


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (b"no such word\0", "no such word: Protocol error"),
        (b"hostname\0", "plan: Protocol error"),
        (b"root\0", "root: Protocol error"),  # without a descriptor
        (b"hostname\0one\0tmpfs\0/tmp", "plan: Protocol error"),
        (b"hostname\0one", "root: Bad file descriptor"),
        (b"x" * 100_000, "Protocol error"),
    ],
)
def test_a_wrong_plan_is_refused(waiting: Waiting, plan: bytes, said: str) -> None:
    assert said in waiting.begin(plan, [])


def test_a_descriptor_that_is_no_mount_is_refused(waiting: Waiting) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        assert "root: Invalid argument" in waiting.begin(container_plan(probe_shape(), ["/"]), [null])
    finally:
        os.close(null)


def test_a_read_only_root_without_a_mount_point_is_refused(waiting: Waiting) -> None:
    root = mounts.new_mount("tmpfs", {"mode": "0755", "uid": str(BASE), "gid": str(BASE)})
    try:
        mounts.set_attributes(root, read_only=True, userns=None)
        assert "/proc: Read-only file system" in waiting.begin(container_plan(probe_shape(), ["/"]), [root])
    finally:
        os.close(root)


def test_no_link_of_an_image_leads_out_of_it(waiting: Waiting, tmp_path: Path) -> None:
    """A mount point that is a link to a directory of the host is looked up in the image."""
    (tmp_path / "outside").mkdir(mode=0o777)
    root = mounts.new_mount("tmpfs", {"mode": "0755", "uid": str(BASE), "gid": str(BASE)})
    try:
        os.symlink(tmp_path / "outside", "proc", dir_fd=root)
        mounts.set_attributes(root, read_only=True, userns=None)
        assert "/proc: " in waiting.begin(container_plan(probe_shape(), ["/"]), [root])
        assert list((tmp_path / "outside").iterdir()) == []
    finally:
        os.close(root)


def test_nothing_is_left_open_without_descriptors_for_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
                stack.callback(os.close, taken[-1])
        for left in range(3):  # there is room for fewer than the three that it opens first
            spare = [os.dup2(0, number) for number in taken[-left:]] if left else []
            for number in spare:
                os.close(number)
            with pytest.raises(OSError, match="Too many open files"):
                BuiltInContainer(tmp_path, None, None, 0)  # type: ignore[arg-type]
            assert [os.dup(0) for _ in spare] == sorted(spare)
