"""The receipt of a slot: each declared control as asked, and as the kernel says it is.

Everything is read by the daemon from outside, from ``/proc`` of the *parked tool process* and from
cgroup files, just before the command is handed over: no process of the container has a say in it,
and no instruction of the tool has run yet. A control that is not as asked makes the call fail.
Source of the formats: proc_pid_status(5), proc_pid_mountinfo(5), namespaces(7), cgroup documentation.
"""

# ruff: noqa: PTH115  -- the links of /proc/PID/ns are texts, not paths

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.engine.bundle import INIT_PATH, MASKED, READ_ONLY, shm_size
from sandboxd.engine.oci import rlimits
from sandboxd.init import INIT
from sandboxd.kernel.mounts import MountEntry, parse_mountinfo
from sandboxd.models import Control, Receipt
from sandboxd.policy import seccomp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.engine.base import Slot
    from sandboxd.plan import Limits

__all__ = ["check", "read_receipt"]

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
RLIMIT_LINES = {  # names of /proc/PID/limits
    1: "Max file size",
    4: "Max core file size",
    7: "Max open files",
    8: "Max locked memory",
    12: "Max msgqueue size",
    13: "Max nice priority",
    14: "Max realtime priority",
}
DEV_FILES = {"null", "zero", "full", "random", "urandom", "tty", "console", "ptmx"}


def check(receipt: Receipt) -> None:
    """Raise ControlNotEnforced for the first control that is not as asked."""
    for control in receipt.controls:
        if not control.enforced:
            raise errors.ControlNotEnforced(
                f"{control.name}: asked for {control.asked}, but {control.read_from} says "
                f"{control.in_force}; the call was not started",
                control=control.name,
                asked=control.asked,
                in_force=control.in_force,
            )


def read_receipt(slot: Slot, limits: Limits) -> Receipt:
    """Read back every control of a slot whose cgroup has ``limits`` (those of the plan) in it.

    Raises ControlNotEnforced when the tool process cannot be read, which means that it is not there.
    """
    try:
        process = _Process(slot.tool_pid)
        controls = [
            *_process_controls(slot, process),
            *_namespace_controls(slot, process),
            *_mount_controls(slot, process),
            *_rlimit_controls(limits, process),
            *_cgroup_controls(slot, limits),
        ]
    except OSError as error:
        raise errors.ControlNotEnforced(
            f"the parked tool process cannot be read: {error}", control="process"
        ) from error
    return Receipt(
        engine=slot.engine, runtime=slot.runtime, controls=controls, read_at=time.time_ns() // 1000
    )


@dataclass(frozen=True)
class _Process:
    pid: int

    def read(self, name: str) -> str:
        fd = os.open(f"/proc/{self.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while data := os.read(fd, 65536):
                parts.append(data)
        finally:
            os.close(fd)
        return b"".join(parts).decode(errors="surrogateescape")

    def status(self) -> dict[str, str]:
        lines = (line.partition(":") for line in self.read("status").splitlines())
        return {key: value.strip() for key, _, value in lines}

    def namespace(self, kind: str) -> str:
        return os.readlink(f"/proc/{self.pid}/ns/{kind}")


def _equal(name: str, asked: str, in_force: str, read_from: str) -> Control:
    return Control(name=name, asked=asked, in_force=in_force, read_from=read_from, enforced=asked == in_force)


def _process_controls(slot: Slot, process: _Process) -> Iterator[Control]:
    status = process.status()
    tool = slot.shape.process
    program = seccomp.compile_filter(slot.shape.syscalls)
    yield Control(
        name="seccomp",
        asked=f"mode 2, 1 filter ({program.digest[:19]})",
        in_force=f"mode {status['Seccomp']}, {status.get('Seccomp_filters', '?')} filter",
        read_from="status: Seccomp, Seccomp_filters",
        enforced=status["Seccomp"] == "2" and status.get("Seccomp_filters", "1") == "1",
    )
    yield _equal("no_new_privs", "1", status["NoNewPrivs"], "status: NoNewPrivs")
    sets = {status[key].lstrip("0") or "0" for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    yield _equal(
        "capabilities",
        "none in any set",
        "none in any set" if sets == {"0"} else " ".join(sorted(sets)),
        "status: CapInh CapPrm CapEff CapBnd CapAmb",
    )
    uid, gid = slot.id_base + tool.uid, slot.id_base + tool.gid
    yield _equal("user", " ".join([str(uid)] * 4), " ".join(status["Uid"].split()), "status: Uid")
    yield _equal("group", " ".join([str(gid)] * 4), " ".join(status["Gid"].split()), "status: Gid")
    yield _equal("supplementary_groups", "none", status["Groups"] or "none", "status: Groups")
    yield _equal("init", *(_same_file(INIT, f"/proc/{slot.init_pid}/exe")), "exe of PID 1")
    parent = status["PPid"]
    yield _equal("parent", str(slot.init_pid), parent, "status: PPid")


def _same_file(wanted: os.PathLike[str], found: str) -> tuple[str, str]:
    one, other = Path(wanted).stat(), Path(found).stat()
    return (
        f"inode {one.st_ino}",
        f"inode {other.st_ino}" if one.st_dev == other.st_dev else "another file system",
    )


def _namespace_controls(slot: Slot, process: _Process) -> Iterator[Control]:
    for kind in NAMESPACES:
        ours, theirs = os.readlink(f"/proc/self/ns/{kind}"), process.namespace(kind)
        yield Control(
            name=f"{kind}_namespace",
            asked=f"not the host's {ours}",
            in_force=theirs,
            read_from=f"ns/{kind}",
            enforced=ours != theirs,
        )
    if slot.shape.process.user_namespace == "slot":
        asked = f"0 {slot.id_base} 65536"
        for kind in ("uid_map", "gid_map"):
            yield _equal(f"user_namespace_{kind[:3]}s", asked, " ".join(process.read(kind).split()), kind)
    else:
        yield Control(
            name="user_namespace_uids",
            asked="none: the policy shares the host's",
            in_force=" ".join(process.read("uid_map").split()),
            read_from="uid_map",
        )
    interfaces = sorted(line.partition(":")[0].strip() for line in process.read("net/dev").splitlines()[2:])
    yield _equal("network", "lo", " ".join(interfaces) or "lo", "net/dev")
    routes = len(process.read("net/route").splitlines()) - 1
    yield _equal("network_routes", "0", str(max(routes, 0)), "net/route")


def _mount_controls(slot: Slot, process: _Process) -> Iterator[Control]:
    shape = slot.shape
    entries = parse_mountinfo(process.read("mountinfo"))
    at: dict[str, MountEntry] = {entry.target: entry for entry in entries}
    root = at.get("/")
    writable = {"/tmp", "/workspace", "/dev/shm", "/dev/pts"}  # noqa: S108  (paths inside the container)
    mode = "read-only" if root and "ro" in root.options else "writable"
    yield _equal("root", "read-only" if shape.root.mode == "read-only" else "writable", mode, "mountinfo: /")
    if shape.root.mode == "overlay" and root:
        yield _equal("root_overlay", "overlay", root.kind, "mountinfo: /")
    masks = {path for path in (*MASKED, *READ_ONLY) if os.path.exists(path)}  # noqa: PTH110
    loose = [
        entry.target
        for entry in entries
        if not {"nosuid", "nodev"} <= entry.options
        and entry.target not in masks
        and not _is_device(entry.target)
    ]
    yield _equal("nosuid_nodev", "every mount", ", ".join(loose) or "every mount", "mountinfo")
    limits = shape.limits
    for name, target, size, inodes in (
        ("workspace", "/workspace", limits.workspace_size, limits.workspace_inodes),
        ("tmp", "/tmp", limits.tmp_size, limits.tmp_inodes),  # noqa: S108
        ("shm", "/dev/shm", shm_size(shape), limits.tmp_inodes),  # noqa: S108
    ):
        yield _equal(
            name,
            f"tmpfs of {_pages(size)} bytes, {inodes} inodes",
            _tmpfs(at.get(target)),
            f"mountinfo: {target}",
        )
    lent = {mount.target for mount in shape.mounts}
    for target in sorted(lent):
        yield _equal(
            f"mount {target}",
            "read-only",
            "read-only" if target in at and "ro" in at[target].options else "absent or writable",
            f"mountinfo: {target}",
        )
    open_masks = sorted(path for path in masks if path not in at or not _is_closed(path, at[path]))
    yield _equal(
        "masked_paths", "masked or read-only", ", ".join(open_masks) or "masked or read-only", "mountinfo"
    )
    host = (
        {"/etc", "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}
        if shape.image.name == "host"
        else set()
    )
    extra = sorted(
        entry.target
        for entry in entries
        if entry.target not in {"/", "/proc", "/dev", INIT_PATH, *writable, *lent, *masks}
        and not _is_device(entry.target)
        and not any(entry.target == top or entry.target.startswith(top + "/") for top in host)
    )
    yield _equal("mounts", "nothing else", ", ".join(extra) or "nothing else", "mountinfo")


def _is_device(target: str) -> bool:
    return target in {"/dev", "/dev/pts"} or (target.startswith("/dev/") and target[5:] in DEV_FILES)


def _is_closed(path: str, entry: MountEntry) -> bool:
    """A masked path shows an empty read-only tmpfs or a device; a read-only one is ``ro``."""
    if path in READ_ONLY:
        return "ro" in entry.options
    return entry.kind != "proc"


def _pages(size: int) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    return -(-size // page) * page


def _tmpfs(entry: MountEntry | None) -> str:
    if entry is None or entry.kind != "tmpfs":
        return "no tmpfs"
    size = entry.super_options.get("size", "0k")
    scale = {"k": 2**10, "m": 2**20, "g": 2**30}.get(size[-1:], 1)
    number = int(size[:-1]) * scale if size[-1:] in "kmg" else int(size)
    return f"tmpfs of {number} bytes, {entry.super_options.get('nr_inodes', 'unlimited')} inodes"


def _rlimit_controls(limits: Limits, process: _Process) -> Iterator[Control]:
    lines = process.read("limits").splitlines()[1:]
    found = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    for limit in rlimits(limits):
        name = RLIMIT_LINES[limit.resource]
        yield _equal(
            "rlimit_" + name[4:].replace(" ", "_"),
            f"{limit.soft} {limit.hard}",
            " ".join(found[name]),
            f"limits: {name}; the kernel does not tell when it is reached",
        )


def _cgroup_controls(slot: Slot, limits: Limits) -> Iterator[Control]:
    inside = slot.cgroup.contains(slot.tool_pid) and slot.cgroup.contains(slot.init_pid)
    yield _equal("cgroup", "the slot's own", "the slot's own" if inside else "another", "cgroup")
    found = slot.cgroup.read_limits()
    asked = {"memory": str(_floor_page(limits.memory)), "pids": str(limits.pids), "cpu": str(limits.cpus)}
    for name, value in asked.items():
        in_force, file = found[name]
        yield _equal(name, value, in_force, file)
    swap, file = found["swap"]
    yield Control(name="swap", asked="0", in_force=swap, read_from=file, enforced=swap in {"0", "none"})
    if limits.io_read is not None or limits.io_write is not None:
        in_force, file = found["io"]
        wanted = f"rbps={limits.io_read or 'max'} wbps={limits.io_write or 'max'}"
        yield Control(name="io", asked=wanted, in_force=in_force, read_from=file, enforced=wanted in in_force)


def _floor_page(size: int) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    return size // page * page
