"""Commands that cannot be executed, arguments and environments of every size, and signals at any moment."""

from __future__ import annotations

import io
import os
import signal
import struct
import tarfile
import time
from typing import TYPE_CHECKING, Any

import pytest
from daemons import PATIENCE

from sandboxd import errors
from sandboxd.models import Bytes, Cause, Input

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd.models import Invocation

# An ELF header of a machine that this is not: e_machine is EM_S390.
FOREIGN = b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HHI", 2, 22, 1) + bytes(48)


def file(path: str, content: bytes, mode: int = 0o755) -> Input:
    return Input(path=path, content=Bytes.of(content), mode=mode)


UNEXECUTABLE = {
    "a tool that is not there": (["no-such-tool"], "ENOENT", 127),
    "a path that is not there": (["/usr/bin/no-such-tool"], "ENOENT", 127),
    "a file in the way": (["/usr/bin/env/x"], "ENOTDIR", 127),
    "not executable": (["./plain"], "EACCES", 126),
    "a directory": (["/usr"], "EACCES", 126),
    "a device": (["/dev/null"], "EACCES", 126),
    "another architecture": (["./foreign"], "ENOEXEC", 126),
    "no format": (["./garbage"], "ENOEXEC", 126),
    "a script without its first line": (["./script"], "ENOEXEC", 126),
    "an interpreter that is not there": (["./orphan"], "ENOENT", 127),
    "an interpreter that is itself": (["./self"], "ELOOP", 126),
    "a loop of links": (["./link"], "ELOOP", 126),
    "a name too long": (["x" * 300], "ENAMETOOLONG", 126),
    "noexec": (["/dev/shm/x"], "ENOENT", 127),
}  # fmt: skip


@pytest.mark.parametrize("what", UNEXECUTABLE)
def test_what_cannot_be_executed(daemon: Daemon, what: str) -> None:
    argv, number, status = UNEXECUTABLE[what]
    inputs = [
        file("plain", b"#!/bin/sh\n", 0o644), file("foreign", FOREIGN), file("garbage", bytes(range(64))),
        file("script", b"echo x\n"), file("orphan", b"#!/no/such/interpreter\n"), file("self", b"#!./self\n"),
    ]  # fmt: skip
    if what == "a loop of links":
        found = daemon.run(*argv, tar=looping_tar())
    else:
        found = daemon.run(*argv, inputs=inputs)
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.errno) == (Cause.EXEC_FAILED, number), found.outcome
    assert found.outcome.exit_status() == status
    assert found.outcome.exit_code is None
    assert found.stdout is not None
    assert found.stdout.size == 0


def looping_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "link"
        archive.addfile(link)
    return out.getvalue()


@pytest.mark.parametrize(
    ("cwd", "number"), [("/no/such/place", "ENOENT"), ("/etc/passwd", "ENOTDIR"), ("/root", "EACCES")]
)
def test_a_directory_that_cannot_be_entered(daemon: Daemon, cwd: str, number: str) -> None:
    found = daemon.run("true", cwd=cwd)
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.errno) == (Cause.EXEC_FAILED, number)
    assert "directory" in found.outcome.message, found.outcome.message


def text(found: Invocation) -> str:
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, (found.outcome, found.stderr)
    assert found.stdout is not None
    return found.stdout.text or ""


def test_arguments_that_are_not_text(daemon: Daemon) -> None:
    odd = [b"\xff\xfe", b"", b"\n", b"a b", b"*", b"$(id)", b"-e", b"\xc3\x28"]
    found = daemon.client().run([b"printf", rb"%s\0", *odd])
    assert found.stdout is not None
    assert found.stdout.decode() == b"".join(item + b"\0" for item in odd)
    assert [item if isinstance(item, str) else item.decode() for item in found.argv[2:4]] == [
        b"\xff\xfe",
        b"",
    ]


def test_arguments_and_environment_as_large_as_the_kernel_takes(daemon: Daemon) -> None:
    big = "x" * 131_000
    found = daemon.run("sh", "-c", "echo ${#1} ${#VALUE}", "sh", big, env={"VALUE": "y" * 130_000})
    assert text(found) == "131000 130000\n"
    many = [str(number) for number in range(4000)]
    assert text(daemon.run("sh", "-c", "echo $#", "sh", *many)) == "4000\n"
    env = {f"NAME_{number}": "v" * 100 for number in range(1000)}
    assert int(text(daemon.run("sh", "-c", "env | grep -c ^NAME_", env=env))) == 1000


def test_arguments_larger_than_the_kernel_takes(daemon: Daemon) -> None:
    found = daemon.run("true", *["x" * 131_000] * 30)
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.errno) == (Cause.EXEC_FAILED, "E2BIG")


def test_arguments_larger_than_any_kernel_takes_are_refused(daemon: Daemon) -> None:
    with pytest.raises(errors.TooLarge, match="argv and env"):
        daemon.run("true", *["x" * 131_000] * 60)


def test_requests_with_too_much_of_anything_are_refused(daemon: Daemon) -> None:
    client = daemon.client()
    refused: list[dict[str, Any]] = [
        {"argv": ["x" * 131_072]},
        {"argv": ["true"] * 4097},
        {"argv": []},
        {"argv": [""]},
        {"argv": ["a\0b"]},
        {"argv": ["true"], "env": {"A=B": "x"}},
        {"argv": ["true"], "env": {"": "x"}},
        {"argv": ["true"], "env": {"A": "x\0y"}},
        {"argv": ["true"], "env": {f"N{n}": "" for n in range(1025)}},
        {"argv": ["true"], "cwd": "relative"},
        {"argv": ["true"], "cwd": "/" + "x" * 4096},
        {"argv": ["true"], "labels": {f"l{n}": "" for n in range(65)}},
        {"argv": ["true"], "policy": "../default"},
    ]
    for fields in refused:
        argv = fields.pop("argv")
        with pytest.raises(errors.Refused):
            client.run(argv, **fields)


@pytest.mark.parametrize(
    "number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM, signal.SIGPIPE, signal.SIGRTMIN + 1]
)
def test_a_signal_is_named(daemon: Daemon, number: int) -> None:
    found = daemon.run("sh", "-c", f"kill -{number} $$; sleep 5")
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.signal) == (Cause.SIGNALLED, number)
    assert found.outcome.exit_status() == 128 + number


def test_a_status_of_137_is_no_verdict_by_itself(daemon: Daemon) -> None:
    found = daemon.run("sh", "-c", "exit 137")
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 137)


def test_calls_that_are_cancelled_at_any_moment(daemon: Daemon) -> None:
    client = daemon.client()
    for step in range(25):
        call = client.start(["sh", "-c", "sleep 5"])
        time.sleep(step * 0.004)
        client.cancel(call.id)
        ended = client.wait(call.id, timeout=10 * PATIENCE)
        assert ended.outcome is not None
        assert ended.outcome.cause is Cause.CANCELLED, (step, ended.outcome)


@pytest.mark.parametrize("deadline", ["1us", "1ms", "10ms", "20ms", "40ms"])
def test_deadlines_that_have_hardly_begun(daemon: Daemon, deadline: str) -> None:
    found = daemon.run("sleep", "5", deadline=deadline)
    assert found.outcome is not None
    assert found.outcome.cause is Cause.WALL_TIME, found.outcome


def test_the_shortest_limits(daemon: Daemon) -> None:
    found = daemon.run("sleep", "5", limits={"wall": "1us", "cpu_time": "1us"})
    assert found.outcome is not None
    assert found.outcome.cause in {Cause.WALL_TIME, Cause.CPU_TIME}
    found = daemon.run("sh", "-c", "true | true", limits={"pids": 1})
    assert found.outcome is not None
    assert found.outcome.cause in {Cause.EXITED, Cause.EXEC_FAILED, Cause.SIGNALLED}
    found = daemon.run("head", "-c", "10", "/dev/zero", limits={"stdout": 0})
    assert found.stdout is not None
    assert (found.stdout.size, found.stdout.dropped) == (0, 10)


@pytest.mark.parametrize("size", ["0", "4KiB", "64KiB", "1MiB", "2MiB"])
def test_hardly_any_memory(daemon: Daemon, size: str) -> None:
    """Whatever happens, it is a verdict or a refusal that says what is wrong, never an internal error."""
    try:
        found = daemon.run("true", limits={"memory": size})
    except errors.Refused:
        return
    assert found.outcome is not None
    if found.outcome.cause is Cause.FAILED:
        assert found.outcome.error is not None
        assert found.outcome.error.code != "internal", found.outcome
    else:
        assert found.outcome.cause in {Cause.EXITED, Cause.MEMORY}


def test_standard_input_that_nobody_reads(daemon: Daemon) -> None:
    data = os.urandom(1 << 20)
    found = daemon.run("true", stdin=data * 3)
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 0)
    found = daemon.run("sh", "-c", "exec <&-; sleep 0.2; echo on", stdin=data * 3)
    assert text(found) == "on\n"
    found = daemon.run("sleep", "5", stdin=data * 3, limits={"wall": "300ms"})
    assert found.outcome is not None
    assert found.outcome.cause is Cause.WALL_TIME
