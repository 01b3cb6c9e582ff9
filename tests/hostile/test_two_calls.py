"""Two calls never meet: not at the same time, and not one after the other in the same id range."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE

from sandboxd.models import Cause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon
    from programs import Programs

    from sandboxd.models import Invocation

import contextlib

LEAVE = """
echo secret > /workspace/left; echo secret > /tmp/left; echo secret > /dev/shm/left; mkfifo /tmp/fifo
./meet leave &
sleep 100 &
echo ready
wait
"""
LOOK = """
cat /workspace/left /tmp/left /dev/shm/left 2>/dev/null
ls -A /workspace /tmp /dev/shm | grep left
./meet look
cat /proc/net/unix | grep -c meet
cat /proc/sysvipc/shm /proc/sysvipc/sem /proc/sysvipc/msg | grep -vc key
ps -eo args 2>/dev/null | grep -c '[s]leep 100'
hostname
"""
NOTHING = "shm ENOENT\nposix shm ENOENT\nmqueue ENOENT\nabstract ECONNREFUSED\n0\n0\n0\nsandbox\n"


def text(found: Invocation) -> str:
    assert found.outcome is not None
    assert found.outcome.cause is Cause.EXITED, found.outcome
    assert found.stdout is not None
    return found.stdout.text or ""


@contextlib.contextmanager
def resident(daemon: Daemon, programs: Programs) -> Iterator[str]:
    """A call that has put something everywhere and stays; gives its id."""
    client = daemon.client()
    call = client.start(["sh", "-c", LEAVE], inputs=programs.input("meet"), limits={"wall": "30s"})
    output = b""
    with client.stdout(call.id, follow=True) as chunks:
        for chunk in chunks:
            output += chunk
            if output.count(b"\n") >= 2:  # the shell and ./meet are ready
                break
    try:
        yield call.id
    finally:
        client.cancel(call.id)
        client.wait(call.id, timeout=10 * PATIENCE)


def test_two_calls_at_once(daemon: Daemon, programs: Programs) -> None:
    with resident(daemon, programs) as call:
        beside = daemon.run("sh", "-c", LOOK, inputs=programs.input("meet"))
        assert text(beside) == NOTHING
        assert daemon.client().get(call).state == "running"


def test_two_calls_one_after_the_other(daemon: Daemon, programs: Programs) -> None:
    with resident(daemon, programs) as call:
        pass
    ids = receipt(daemon, call)["user_namespace_uids"]
    for _ in range(20):  # until the same ids are used again
        found = daemon.run("sh", "-c", LOOK, inputs=programs.input("meet"))
        assert text(found) == NOTHING
        if receipt(daemon, found.id)["user_namespace_uids"] == ids:
            return
    pytest.fail("no later call had the ids of the first")


def receipt(daemon: Daemon, call: str) -> dict[str, str]:
    found = daemon.client().get(call)
    assert found.receipt is not None
    return {control.name: control.in_force for control in found.receipt.controls}


def test_calls_at_once_have_ids_and_namespaces_of_their_own(daemon: Daemon) -> None:
    client = daemon.client()
    calls = [client.start(["sleep", "0.5"]) for _ in range(4)]
    for call in calls:
        client.wait(call.id, timeout=20 * PATIENCE)
    receipts = [receipt(daemon, call.id) for call in calls]
    for name in ("user_namespace_uids", "pid_namespace", "ipc_namespace", "mnt_namespace", "uts_namespace"):
        assert len({one[name] for one in receipts}) == len(calls), name
    for one in receipts:
        assert re.fullmatch(r"0 \d+ 65536", one["user_namespace_uids"])


def test_pids_of_another_call_cannot_be_named(daemon: Daemon, programs: Programs) -> None:
    with resident(daemon, programs):
        code = "for p in $(seq 2 400); do [ $p = $$ ] || ! kill -9 $p 2>/dev/null || echo killed $p; done"
        assert text(daemon.run("bash", "-c", code)) == ""


def test_keys_and_counters_are_not_shared(
    probe: Callable[..., tuple[dict[str, str], Invocation]], daemon: Daemon, programs: Programs
) -> None:
    with resident(daemon, programs):
        results, _ = probe("meet", "look")
        assert results == {
            "shm": "ENOENT",
            "posix shm": "ENOENT",
            "mqueue": "ENOENT",
            "abstract": "ECONNREFUSED",
        }


def test_a_call_does_not_wait_for_another(daemon: Daemon) -> None:
    client = daemon.client()
    slow = client.start(["sleep", "20"])
    began = time.monotonic()
    assert text(daemon.run("echo", "quick")) == "quick\n"
    assert time.monotonic() - began < 3 * PATIENCE
    client.cancel(slow.id)
    client.wait(slow.id, timeout=10 * PATIENCE)


WATCH = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
watch = libc.inotify_init1(os.O_NONBLOCK)
assert libc.inotify_add_watch(watch, b"/usr/bin", 0x20) > 0  # IN_OPEN
print("watching", flush=True)
time.sleep(1)
try:
    print(len(os.read(watch, 65536)))
except BlockingIOError:
    print("nobody")
os.close(os.open("/usr/bin/env", os.O_RDONLY))
print("oneself" if os.read(watch, 65536) else "")
"""


def test_who_opens_a_file_of_the_image_is_not_told(daemon: Daemon) -> None:
    client = daemon.client()
    call = client.start(["python3", "-c", WATCH], policy="python")
    with client.stdout(call.id, follow=True) as chunks:
        assert next(iter(chunks)).startswith(b"watching")
    assert text(daemon.run("sh", "-c", "cat /usr/bin/env | wc -c", policy="python")).strip() != "0"
    assert text(client.wait(call.id)).split() == ["watching", "nobody", "oneself"]
