"""What takes a control away from a container that is up: done to it as the host's root, from outside.

The other half is ``withholding.py`` and ``withheld_container.py``: what a runtime leaves out while it makes
the container. ``LIVE`` says for each meddling which control the receipt then has to deny.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from withholding import leave

from sandboxd.engine.oci import rlimits
from sandboxd.kernel import mounts
from sandboxd.kernel.inside import in_network_namespace
from sandboxd.kernel.nft import run_nft
from sandboxd.policy.trust import TRUSTED

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.base import Slot

SYS_FSPICK, FSPICK_EMPTY_PATH, RECONFIGURE = 433, 0x8, 7  # linux/mount.h
CAP_SYS_RESOURCE = 24
SYS_SETNS = {"x86_64": 308, "aarch64": 268}[os.uname().machine]


def _reconfigure(fd: int, key: str, value: str) -> None:
    """Remount a file system by a descriptor of its root: no path of it is in our namespace."""
    context = mounts._call("fspick", SYS_FSPICK, fd, b"", FSPICK_EMPTY_PATH)
    try:
        set_string = mounts.FSCONFIG_SET_STRING
        mounts._call(key, mounts.SYS_FSCONFIG, context, set_string, key.encode(), value.encode(), 0)
        mounts._call("reconfigure", mounts.SYS_FSCONFIG, context, RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def _remounted(target: str, key: str, value: str) -> Callable[[Slot], None]:
    def meddle(slot: Slot) -> None:
        fd = os.open(f"/proc/{slot.tool_pid}/root{target}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _reconfigure(fd, key, value)
        finally:
            os.close(fd)

    return meddle


def _larger_overlay(slot: Slot) -> None:
    assert slot.upper_fd is not None
    _reconfigure(slot.upper_fd, "size", "1g")


def _covered(target: str, source: str | None) -> Callable[[Slot], None]:
    """A mount more, of a path of the host or of a new tmpfs, by a process that enters the container's."""
    command = [sys.executable, __file__, target, *([source] if source else [])]
    return lambda slot: subprocess.run([*command, str(slot.tool_pid)], check=True).check_returncode()


def _cover(target: str, *rest: str) -> None:
    *source, pid = rest
    mount = mounts.clone_tree(Path(source[0])) if source else mounts.new_mount("tmpfs", {"size": "64k"})
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    mounts._call("setns", SYS_SETNS, namespace, mounts.CLONE_NEWNS)
    mounts.attach(mount, Path(target))


def _entered(*command: str) -> Callable[[Slot], None]:
    """A command of the host's in the container's network and UTS namespaces."""
    return lambda slot: subprocess.run(
        ["nsenter", "-t", str(slot.init_pid), "--net", "--uts", *command], check=True
    ).check_returncode()


def _inside(work: Callable[[], object]) -> Callable[[Slot], None]:
    """Work of ours in the container's network namespace."""

    def meddle(slot: Slot) -> None:
        namespace = os.open(f"/proc/{slot.init_pid}/ns/net", os.O_RDONLY)
        try:
            in_network_namespace(namespace, work)
        finally:
            os.close(namespace)

    return meddle


def _lower_ports() -> None:
    Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text("0")


def _rlimit(name: str, number: int) -> Callable[[Slot], None]:
    """Another soft value where it can be told from the hard one, else another one of both."""

    def meddle(slot: Slot) -> None:
        [asked] = [limit for limit in rlimits(slot.shape.limits) if limit.resource == number]
        soft, hard = asked.soft, asked.hard
        value = f"{soft - 1}:{hard}" if soft > 0 else "1:1"
        # Whoever has the same ids may lower them; root needs CAP_SYS_RESOURCE, and to raise them everybody.
        command = ["prlimit", "--pid", str(slot.tool_pid), f"--{name}={value}"]
        if soft == 0:
            subprocess.run(command, check=True)
        else:
            uid, gid = slot.id_base + slot.shape.process.uid, slot.id_base + slot.shape.process.gid
            subprocess.run(command, check=True, user=uid, group=gid, extra_groups=[])

    return meddle


def may_raise_rlimits() -> bool:
    """Whether this process has CAP_SYS_RESOURCE."""
    sets = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(sets["CapEff"], 16) & 1 << CAP_SYS_RESOURCE)


def _limit(control: str) -> Callable[[Slot], None]:
    """A limit of the cgroup, raised."""

    def meddle(slot: Slot) -> None:
        _, name = slot.cgroup.read_limits()[control]
        if "{" in name:  # the two files of blkio
            for way in ("read", "write"):
                file = Path(name.replace("{read,write}", way))
                file.write_text(f"{file.read_text().split()[0]} 0")
            return
        file = Path(name if "/" in name else _file_of(slot, name))
        value = RAISED[file.name]
        with_swap = file.with_name("memory.memsw.limit_in_bytes")
        if file.name == "memory.limit_in_bytes" and with_swap.exists():  # never less than without
            with_swap.write_text(str(2**31))
        file.write_text(f"{file.read_text().split()[0]} {value}" if file.name == "io.max" else value)

    return meddle


RAISED = {
    "memory.max": str(2**30),
    "memory.limit_in_bytes": str(2**30),
    "memory.kmem.tcp.limit_in_bytes": str(2**30),
    "pids.max": "5000",
    "cpu.max": "400000 100000",
    "cpu.cfs_quota_us": "400000",
    "io.max": "rbps=max wbps=max",
}


def _swap(slot: Slot) -> None:
    value, name = slot.cgroup.read_limits()["swap"]
    assert value == "0"
    file = Path(name)
    with_swap = int(file.read_text()) if file.name.startswith("memory.memsw") else 0
    file.write_text(str(with_swap + 2**20))


def _file_of(slot: Slot, name: str) -> Path:
    """A file of the slot's cgroup, in whichever hierarchy it is."""
    directories = [Path(file).parent for file in slot.cgroup.procs_files]
    return next(file for directory in directories if (file := directory / name).exists())


def _joined(slot: Slot) -> None:
    """A process more in the cgroup; the container's end is its own."""
    script = "sleep 60 >/dev/null 2>&1 & echo $!"
    pid = subprocess.run(["/bin/sh", "-c", script], check=True, stdout=subprocess.PIPE).stdout
    for file in slot.cgroup.procs_files:
        Path(file).write_bytes(pid)


def _left(slot: Slot) -> None:
    for file in slot.cgroup.procs_files:
        leave(Path(file).parent, slot.tool_pid)


def _oom_score_adj(slot: Slot) -> None:
    Path(f"/proc/{slot.tool_pid}/oom_score_adj").write_text("600")


def _killed(slot: Slot) -> None:
    os.kill(slot.tool_pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while Path(f"/proc/{slot.tool_pid}").exists():  # PID 1 reaps it
        assert time.monotonic() < end
        time.sleep(0.001)


RLIMITS = {  # by the name of a receipt: prlimit(1)'s, and the number, getrlimit(2)
    "rlimit_core_file_size": ("core", 4),
    "rlimit_open_files": ("nofile", 7),
    "rlimit_file_size": ("fsize", 1),
    "rlimit_locked_memory": ("memlock", 8),
    "rlimit_msgqueue_size": ("msgqueue", 12),
    "rlimit_pending_signals": ("sigpending", 11),
    "rlimit_nice_priority": ("nice", 13),
    "rlimit_realtime_priority": ("rtprio", 14),
}
ZERO = {"rlimit_nice_priority", "rlimit_realtime_priority"}  # these can only be raised

LIVE: dict[str, tuple[Callable[[Slot], None], str]] = {
    **{control: (_rlimit(*which), control) for control, which in RLIMITS.items()},
    **{control: (_limit(control), control) for control in ("memory", "sockets", "pids", "cpu", "io")},
    "swap": (_swap, "swap"),
    "joined": (_joined, "processes"),
    "left": (_left, "cgroup"),
    "interface": (_entered("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"), "network"),
    "route": (_entered("ip", "route", "add", "192.0.2.0/24", "dev", "lo"), "network_routes"),
    "route6": (_entered("ip", "-6", "route", "add", "local", "2001:db8::/32", "dev", "lo"), "network_routes"),
    "filter": (_inside(lambda: run_nft("flush chain inet sandboxd output")), "network_filter"),
    "sysctl": (_inside(_lower_ports), "network_sysctls"),
    "hostname": (_entered("hostname", "other"), "hostname"),
    "tmp_size": (_remounted("/tmp", "size", "1g"), "tmp"),
    "tmp_inodes": (_remounted("/tmp", "nr_inodes", "1000000"), "tmp"),
    "shm_size": (_remounted("/dev/shm", "size", "1g"), "shm"),
    "workspace_size": (_remounted("/workspace", "size", "1g"), "workspace"),
    "proc_shows_all": (_remounted("/proc", "hidepid", "0"), "proc"),
    "overlay_size": (_larger_overlay, "root_overlay"),
    "secrets_size": (_remounted("/run/secrets", "size", "1m"), "secrets"),
    "mounted": (_covered("/usr", None), "mounts"),
    "device": (_covered("/dev/full", "/dev/kmsg"), "devices"),
    "bundle": (_covered(TRUSTED, "/etc/hostname"), "trust"),
    "oom_score_adj": (_oom_score_adj, "oom_score_adj"),
    "killed": (_killed, "process"),
}

if __name__ == "__main__":
    _cover(*sys.argv[1:])
