"""The receipt: which lines there are, and for each of them that a program inside cannot get around it."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.conformance.case import program, said
from sandboxd.conformance.expected import RECEIPT
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.subject import LENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Control, Invocation

MIB = 2**20
Proof = Callable[[str, Any], object]
"""Whether what is in force, as the receipt has it, is what the program found."""

NOWHERE = {"EACCES", "EPERM", "EROFS", "ENOENT"}
UNREACHABLE = {"ENETUNREACH", "EADDRNOTAVAIL", "EAFNOSUPPORT"}


def namespace(*refused: str) -> Proof:
    return lambda in_force, seen: in_force == seen[0] and seen[1] in refused


def tmpfs(size: int, inodes: int) -> Proof:
    """Full at exactly its size, with some names fewer than inodes: the root is one, inputs are others."""

    def proof(in_force: str, seen: Any) -> bool:
        (filled, full), (names, no_more) = seen
        exact = in_force == f"tmpfs of {size} bytes, {inodes} inodes"
        fits = size - MIB // 4 < filled <= size and inodes - 10 < names < inodes
        return exact and fits and full == no_more == "ENOSPC"

    return proof


def rlimit(*tried: object) -> Proof:
    return lambda in_force, seen: seen[0] == in_force and seen[1] == "EPERM" and seen[2] in tried


def counted(least: int, errno: str) -> Proof:
    """As many as the soft limit says, or some fewer that were there before; then the errno."""

    def proof(in_force: str, seen: Any) -> bool:
        said, raising, (count, ended) = seen
        most = int(in_force.partition(" ")[0])
        return (said, raising, ended) == (in_force, "EPERM", errno) and bool(least <= count <= most)

    return proof


DEVICES = {"null", "zero", "full", "random", "urandom", "tty"}
KNOWN_DEVICES = DEVICES | {"pts", "shm", "ptmx", "fd", "stdin", "stdout", "stderr", "core", ".sandboxd"}
KNOWN_MOUNTS = {
    "/", "/dev", "/dev/pts", "/dev/shm", "/dev/.sandboxd", "/lent", "/proc", "/tmp", "/workspace",
    *(f"/dev/{name}" for name in DEVICES),
}  # fmt: skip


# How to read a line: the control, then what is in force and what the program of the same name in
# programs/proof.py found when it tried.
PROOFS: dict[str, Proof] = {
    "seccomp": lambda _, seen: seen == "EPERM",
    "no_new_privs": lambda _, seen: seen == [1, "EINVAL"],
    "capabilities": lambda _, seen: seen == [True, "EPERM"],
    "user": lambda _, seen: seen == [1234, 1234, 1234, "EPERM"],
    "group": lambda _, seen: seen == [4321, 4321, 4321, "EPERM"],
    "supplementary_groups": lambda _, seen: seen == [[], "EPERM"],
    "umask": lambda in_force, seen: (in_force, seen) == ("0027", "0640"),
    "oom_score_adj": lambda in_force, seen: seen == [in_force, "EACCES"],
    "init": lambda _, seen: seen[:2] == ["EPERM", False] and seen[2] in NOWHERE | {"ETXTBSY"},
    "parent": lambda _, seen: seen == 1,
    "mnt_namespace": namespace("EPERM"),
    "pid_namespace": lambda in_force, seen: seen == [in_force, True, "ESRCH"],
    "net_namespace": namespace("ECONNREFUSED"),
    "ipc_namespace": namespace("ENOENT"),
    "uts_namespace": namespace("EPERM"),
    "cgroup_namespace": lambda in_force, seen: seen == [in_force, False],
    "user_namespace": namespace("EPERM"),
    "user_namespace_uids": lambda in_force, seen: seen[1] in NOWHERE and ids_as_said(in_force, seen[0]),
    "user_namespace_gids": lambda in_force, seen: seen[1] in NOWHERE and ids_as_said(in_force, seen[0]),
    "network": lambda in_force, seen: seen == [in_force.split(), "EPERM"] and in_force == "lo",
    "network_routes": lambda _, seen: set(seen) <= UNREACHABLE,
    "hostname": lambda in_force, seen: (in_force, seen[0]) == ("proving", "proving") and seen[1] in NOWHERE,
    "root": lambda in_force, seen: in_force == "read-only" and set(seen) == {"EROFS"},
    "nosuid_nodev": lambda _, seen: seen == [["1234", "1234"], [], "EPERM"],
    "workspace": tmpfs(8 * MIB, 200),
    "tmp": tmpfs(4 * MIB, 100),
    "shm": tmpfs(4 * MIB, 100),
    "mount /": lambda in_force, seen: seen == in_force,
    "mount /workspace": lambda in_force, seen: seen == in_force,
    "mount /dev/.sandboxd": lambda in_force, seen: seen == in_force,
    "mount /lent": lambda in_force, seen: seen == [in_force, LENT],
    "mounts_read_only": lambda _, seen: set(seen) <= {"EROFS", "EACCES"} and "EROFS" in seen,
    "proc": lambda _, seen: seen == [True, False],
    "devices": lambda in_force, seen: seen[:2] == [True, "ENOSPC"] and harmless(in_force, seen[2]),
    "masked_paths": lambda _, seen: seen[0] == [] and set(seen[1:]) <= NOWHERE,
    "mounts": lambda _, seen: set(seen) <= KNOWN_MOUNTS and {"/", "/workspace", "/tmp", "/lent"} <= set(seen),
    "rlimit_core_file_size": rlimit([-11, []]),
    "rlimit_open_files": counted(40, "EMFILE"),
    "rlimit_file_size": rlimit("EFBIG"),
    "rlimit_locked_memory": rlimit("ENOMEM"),
    "rlimit_msgqueue_size": lambda in_force, seen: seen[0] == in_force and seen[2][1] == "EMFILE",
    "rlimit_pending_signals": counted(1, "EAGAIN"),
    "rlimit_nice_priority": rlimit("EPERM", "EACCES"),
    "rlimit_realtime_priority": rlimit("EPERM"),
    "processes": lambda _, seen: seen == "ESRCH",
    "cgroup": lambda _, seen: set(seen) == {"/"},
    "memory": lambda in_force, seen: int(in_force) == 96 * MIB and seen == -9,
    "swap": lambda in_force, seen: in_force in {"0", "none"} and seen == -9,
    "pids": lambda in_force, seen: in_force == "24" and 20 <= seen[0] < 24 and seen[1] == "EAGAIN",
    "cpu": lambda in_force, seen: in_force == "500" and seen < 0.75,
    "sockets": lambda _, seen: 0 < seen < 96 * MIB,
}


def harmless(in_force: str, names: list[str]) -> bool:
    return set(in_force.split()) == DEVICES and DEVICES <= set(names) <= KNOWN_DEVICES


def ids_as_said(in_force: str, seen: str) -> bool:
    """A map reads alike inside and outside but for its middle: ids of the reader's own namespace."""
    inside, _, count = seen.split()
    return (inside, count) == tuple(in_force.split()[::2])


@pytest.fixture(scope="module")
def host_marks() -> Iterator[list[str]]:
    """A port, a key of a message queue and a pid of this host, which no container may reach."""
    libc = ctypes.CDLL(None, use_errno=True)
    key = int.from_bytes(os.urandom(3), "big") | 1
    queue = libc.msgget(key, 0o1666)
    assert queue >= 0, os.strerror(ctypes.get_errno())
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield [str(server.getsockname()[1]), str(key), str(os.getpid())]
    libc.msgctl(queue, 0, None)


def controls(found: Invocation) -> dict[str, Control]:
    assert found.receipt is not None, found.outcome
    return {control.name: control for control in found.receipt.controls}


def expected(subject: Subject, policy: str) -> set[str]:
    there = {"always", f"policy {policy}", *subject.traits}
    return {name for name, when in RECEIPT.items() if when in there}


@pytest.mark.parametrize(
    "policy", ["plain", "proof", "overlay", pytest.param("io", marks=needs("a limit of io"))]
)
def test_the_lines_of_a_receipt(subject: Subject, policy: str) -> None:
    found = controls(subject.run("true", policy=policy))
    assert set(found) == expected(subject, policy)
    for control in found.values():
        assert control.enforced, control
        assert control.asked, control
        assert control.in_force, control
        assert control.read_from, control


@pytest.fixture(scope="module")
def proof(subject: Subject, host_marks: list[str]) -> tuple[dict[str, Control], dict[str, Any]]:
    argv = ["python3", "proof.py", *host_marks, *sorted(PROOFS)]
    found = subject.run(*argv, policy="proof", **program("proof"))
    return controls(found), said(found)


@pytest.mark.parametrize("line", sorted(RECEIPT))
def test_a_line_is_true(
    subject: Subject, proof: tuple[dict[str, Control], dict[str, Any]], line: str
) -> None:
    if line not in expected(subject, "proof"):
        assert line not in proof[0]
        return  # its proof is a test of its own below, or it is not there on this host
    control, seen = proof[0][line], proof[1][line]
    assert PROOFS[line](control.in_force, seen), f"in force: {control.in_force}; the program found: {seen}"


def test_the_overlay_is_as_large_as_the_receipt_says(subject: Subject, host_marks: list[str]) -> None:
    found = subject.run(
        "python3", "proof.py", *host_marks, "root_overlay", policy="overlay", **program("proof")
    )
    (size, full), (names, no_more) = said(found)["root_overlay"]
    assert controls(found)["root_overlay"].in_force == f"overlay of {8 * MIB} bytes, 300 inodes"
    assert (full, no_more) == ("ENOSPC", "ENOSPC")
    assert 7 * MIB < size <= 8 * MIB
    assert 250 < names < 300


DIRECT = """
import mmap, os, time
fd = os.open("/usr/bin/python3", os.O_RDONLY | os.O_DIRECT)
buffer, size, began = mmap.mmap(-1, 1 << 20), 0, time.monotonic()
while size < 12 << 20:
    got = os.preadv(fd, [buffer], size % (4 << 20))
    size += got
print(size / (time.monotonic() - began))
"""


@needs("a limit of io")
def test_reading_from_disk_is_no_faster_than_the_receipt_says(subject: Subject) -> None:
    found = subject.run("python3", "-c", DIRECT, policy="io")
    assert controls(found)["io"].enforced
    assert found.stdout is not None
    rate = float(found.stdout.text or "inf")
    assert rate < 2 * 4 * MIB, (rate, found.stderr)


def test_a_denied_call_is_in_the_result(subject: Subject) -> None:
    code = "import sys; from attempt import *\nfor _ in range(3): attempt(syscall, 'keyctl', 0, -3, 0)"
    found = subject.run("python3", "-c", code, policy="python", **program("proof"))
    (denial,) = found.denials
    assert (denial.kind, denial.name, denial.count, denial.errno) == ("syscall", "keyctl", 3, "EPERM")


def test_every_line_has_a_proof() -> None:
    elsewhere = {"root_overlay", "io"}
    assert set(PROOFS) | elsewhere == set(RECEIPT)
