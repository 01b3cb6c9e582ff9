"""The receipt: which lines there are, and for each of them that a program inside cannot get around it."""

from __future__ import annotations

import ctypes
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.conformance.case import controls, program, said
from sandboxd.conformance.expected import RECEIPT
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.proofs import PROOFS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Control

MIB = 2**20


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


def expected(subject: Subject, policy: str) -> set[str]:
    there = {"always", f"policy {policy}", *subject.traits}
    return {name for name, when in RECEIPT.items() if when in there}


@pytest.mark.parametrize(
    "policy",
    [
        "plain",
        "proof",
        "exposed",
        pytest.param("overlay", marks=needs("a writable root")),
        pytest.param("io", marks=needs("a limit of io")),
    ],
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


@needs("a writable root")
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
    elsewhere = {"root_overlay", "io", "network_filter", "network_sysctls", "trust", "expose", "isolation"}
    elsewhere |= {line for line, when in RECEIPT.items() if when == "policy secrets"}
    assert set(PROOFS) | elsewhere == set(RECEIPT)
