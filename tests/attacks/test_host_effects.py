"""What a tool does in its container must not be felt outside of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
SIGSEGV = 11

HUGE_PAGES = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
def said(result):
    return ctypes.get_errno() if result in (-1, 2**64 - 1) else "taken"
size = ctypes.c_size_t(2 << 20)
print(said(libc.mmap(None, size, 3, 0x40022, -1, ctypes.c_long(0))))
print(said(libc.syscall(319, b"x", 4)))
print(said(libc.shmget(0, size, 0o4600)))
print(said(libc.mmap(None, size, 3, 0x22, -1, ctypes.c_long(0))))
"""

TERMINALS = """
import os
count = 0
try:
    while True:
        os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
        count += 1
except OSError:
    print(count)
"""

WATCHER = """
import ctypes, os, time
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(os.O_NONBLOCK)
for name in ("null", "zero", "full", "random", "urandom"):
    assert libc.inotify_add_watch(watch, f"/dev/{name}".encode(), 0x20) > 0  # IN_OPEN
    os.utime(f"/dev/{name}")
open("/dev/zero").close()
print(len(os.read(watch, 65536)), flush=True)
time.sleep(1.5)
try:
    print(len(os.read(watch, 65536)))
except BlockingIOError:
    print(0)
"""


@pytest.fixture
def core_handler(tmp_path: Path) -> Iterator[Path]:
    """A handler of core dumps, as systemd and apport install one; its file names the users it ran for."""
    seen, handler = tmp_path / "seen", tmp_path / "handler"
    handler.write_text(f'#!/bin/sh\necho "$1" >> {seen}\nexec cat > /dev/null\n')
    handler.chmod(0o755)
    before = CORE_PATTERN.read_text()
    CORE_PATTERN.write_text(f"|{handler} %u")
    try:
        yield seen
    finally:
        CORE_PATTERN.write_text(before)


def test_a_crash_starts_no_program_on_the_host(daemon: Daemon, core_handler: Path) -> None:
    done = daemon.run("sh", "-c", "ulimit -c; kill -SEGV $$")
    assert done.outcome is not None
    assert done.outcome.signal == SIGSEGV
    time.sleep(0.3)
    users = core_handler.read_text().split() if core_handler.exists() else []
    assert [user for user in users if int(user) > 2**30] == []  # another program's crash is not ours


def test_no_huge_page_is_taken_past_the_memory_limit(daemon: Daemon) -> None:
    done = daemon.run("python3", "-c", HUGE_PAGES, policy="host")
    assert done.stdout is not None
    assert done.stdout.text == "1\n1\n1\ntaken\n"  # EPERM
    assert {denial.name for denial in done.denials} == {"mmap", "memfd_create", "shmget"}


def test_one_container_leaves_terminals_for_others(daemon: Daemon) -> None:
    done = daemon.run("python3", "-c", TERMINALS, policy="host")
    assert done.stdout is not None
    assert int(done.stdout.text or 0) in range(8, 65)


def test_a_tool_cannot_watch_the_hosts_devices(daemon: Daemon) -> None:
    before = [Path("/dev", name).stat().st_mtime_ns for name in ("zero", "full", "random")]
    client = daemon.client()
    call = client.start(["python3", "-c", WATCHER], policy="host")
    while client.get(call.id).state != "ended":
        for name in ("zero", "full", "random"):
            Path("/dev", name).open("rb").close()
        time.sleep(0.05)
    done = client.get(call.id)
    assert done.stdout is not None
    assert done.stdout.text is not None
    own, others = done.stdout.text.split()
    assert int(own) > 0
    assert others == "0"
    assert [Path("/dev", name).stat().st_mtime_ns for name in ("zero", "full", "random")] == before
