"""A process that cannot be killed must not become the neighbour of a later call's processes."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers

from sandboxd import errors
from sandboxd.engine.berth import Berths
from sandboxd.engine.runtime import find_runtimes
from sandboxd.init import LAUNCH
from sandboxd.kernel import cgroup as cgroups
from sandboxd.kernel.cgroup import CgroupLimits
from sandboxd.kernel.cgroup_tree import CgroupTree
from sandboxd.kernel.userns import RANGE, UserNamespaces

if TYPE_CHECKING:
    from pathlib import Path

BASE = 1_610_612_736
FUSE_INIT = 26
NONE = CgroupLimits(memory=None, pids=None, cpus=None)


def _stuck(directory: Path, procs: tuple[str, ...], stack: ExitStack) -> subprocess.Popen[bytes]:
    """A process in uninterruptible sleep: it asks a FUSE file system that takes its request for ever."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
    subprocess.run(
        ["mount", "-i", "-t", "fuse", "-o", options, "stuck", directory], check=True, pass_fds=[fuse]
    )
    stack.callback(lambda: subprocess.run(["umount", "-l", directory], check=True))
    started: list[subprocess.Popen[bytes]] = []
    stack.callback(lambda: [each.wait() for each in started])
    stack.callback(os.close, fuse)  # lets go of what waits

    def serve() -> None:
        with suppress(OSError):
            while True:
                _, code, unique = struct.unpack_from("<IIQ", os.read(fuse, 1 << 20))
                if code == FUSE_INIT:
                    out = struct.pack("<IIIIHHIIHHI", 7, 23, 0, 0, 0, 0, 4096, 0, 0, 0, 0).ljust(64, b"\0")
                    os.write(fuse, struct.pack("<IiQ", 16 + len(out), 0, unique) + out)
                else:
                    return  # taken, and never answered

    server = threading.Thread(target=serve)
    server.start()
    joining = "; ".join(f"echo 0 > {file}" for file in procs)
    process = subprocess.Popen(["sh", "-c", f"{joining}; exec stat {directory}/x"], stderr=subprocess.DEVNULL)
    started.append(process)
    server.join(20)
    return process


def test_the_ids_of_what_does_not_die_are_not_given_to_another_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_containers()
    monkeypatch.setattr(cgroups, "KILL_SECONDS", 0.5)
    mount = tmp_path / "fuse"
    for directory in (mount, tmp_path / "run"):
        directory.mkdir()
    with ExitStack() as stack:
        tree = CgroupTree.open("stuck")
        stack.callback(tree.close)
        namespaces = UserNamespaces(LAUNCH, BASE, 2)
        stack.callback(namespaces.close)
        berths = Berths(tmp_path / "run", find_runtimes("auto")[0], tree, namespaces)
        slot = tree.create("slot", NONE)
        stack.callback(slot.remove)
        process = _stuck(mount, slot.procs_files, stack)
        with pytest.raises(errors.HostFailed, match="do not die"), namespaces.borrowed() as ids:  # noqa: PT012
            stuck_with = ids
            berths._end_cgroup(slot, ids)  # what destroy and a failed create both call
        assert process.poll() is None
        with namespaces.borrowed() as next_one:
            assert next_one.base == BASE + RANGE
            assert next_one.base != stuck_with.base
            with pytest.raises(errors.HostFailed, match="id range"):
                namespaces.take()
        process.send_signal(signal.SIGKILL)
