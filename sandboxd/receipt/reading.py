"""The receipt of a slot: each declared control as asked, and as the kernel says it is.

Everything is read by the daemon from outside, from ``/proc`` of the *parked tool process* and from
cgroup files, just before the command is handed over: no process of the container has a say in it,
and no instruction of the tool has run yet. A control that is not as asked makes the call fail.
Source of the formats: proc_pid_status(5), proc_pid_mountinfo(5), namespaces(7), cgroup documentation.
"""

# ruff: noqa: PTH115  -- the links of /proc/PID/ns are texts, not paths

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import canonical, errors
from sandboxd.engine import doors
from sandboxd.engine.oci import OOM_SCORE_ADJ, rlimits
from sandboxd.init import INIT
from sandboxd.kernel import filters, uts
from sandboxd.kernel.cgroup_v1 import socket_limit
from sandboxd.models import Control, Receipt
from sandboxd.network.namespace import in_force
from sandboxd.policy.fixed import HOST_NETWORK
from sandboxd.receipt.mounted import mount_controls
from sandboxd.receipt.parked import Parked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sandboxd.engine.base import Slot
    from sandboxd.plan import Limits

__all__ = ["check", "expose_control", "limit_controls", "read_receipt"]

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
RLIMIT_LINES = {  # names of /proc/PID/limits
    1: "Max file size",
    4: "Max core file size",
    7: "Max open files",
    8: "Max locked memory",
    11: "Max pending signals",
    12: "Max msgqueue size",
    13: "Max nice priority",
    14: "Max realtime priority",
}
LOOPBACK = ("0" * 31 + "1", "80")  # ::1/128 in /proc/net/ipv6_route
EVERYWHERE = ("0" * 32, "00")  # ::/0
RTF_REJECT, RTF_LOCAL = 0x0200, 0x80000000  # linux/route.h, linux/ipv6_route.h
KEEPS = 1 << 5 | 1 << 6 | 1 << 7  # KILL, SETGID, SETUID: capabilities(7)
NS_GET_USERNS = 0xB701  # linux/nsfs.h
GONE = {errno.ESRCH, errno.ECHILD, errno.ETIMEDOUT, errno.ENOENT}
"""What ``read_filter`` says of the process, and not of the host."""


def check(receipt: Receipt) -> None:
    """Raise ControlNotEnforced for the first control that is not as asked; ``details`` names all of them."""
    wrong = [control for control in receipt.controls if not control.enforced]
    if not wrong:
        return
    first, more = wrong[0], f" ({len(wrong) - 1} more are not as asked)" if len(wrong) > 1 else ""
    raise errors.ControlNotEnforced(
        f"{first.name}: asked for {first.asked}, but {first.read_from} says {first.in_force}; the call was "
        f"not started{more}",
        control=first.name,
        asked=first.asked,
        in_force=first.in_force,
        controls=[control.name for control in wrong],
    )


def read_receipt(slot: Slot, limits: Limits) -> Receipt:
    """Read back every control of a slot whose cgroup has ``limits`` (those of the plan) in it.

    Blocks for some ms. Raises ControlNotEnforced when the tool process cannot be read: it is not there.
    """
    try:
        with Parked(slot.tool_pid) as process:
            controls = [
                *_process_controls(slot, process),
                *_namespace_controls(slot, process),
                *mount_controls(slot, process),
                *_rlimit_controls(limits, process),
                *_cgroup_controls(slot, limits),
            ]
    except (OSError, KeyError, ValueError) as error:  # lines are missing of a process that is about to end
        raise errors.ControlNotEnforced(
            f"the parked tool process cannot be read: {error!r}", control="process"
        ) from error
    return Receipt(
        engine=slot.engine,
        runtime=slot.runtime,
        controls=controls,
        read_at=time.time_ns() // 1000,
        warnings=[HOST_NETWORK] if slot.shape.host_network else [],
    )


def _equal(name: str, asked: str, in_force: str, read_from: str) -> Control:
    return Control(name=name, asked=asked, in_force=in_force, read_from=read_from, enforced=asked == in_force)


def _process_controls(slot: Slot, process: Parked) -> Iterator[Control]:
    status = process.status()
    tool = slot.shape.process
    yield _seccomp(slot, status)
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
    if slot.shape.kept:
        yield _kept(slot)
    yield _equal("parent", str(slot.init_pid), status["PPid"], "status: PPid")
    yield _equal("umask", f"{tool.umask:04o}", status["Umask"], "status: Umask")
    yield _equal("oom_score_adj", str(OOM_SCORE_ADJ), process.read("oom_score_adj").strip(), "oom_score_adj")


def _seccomp(slot: Slot, status: dict[str, str]) -> Control:
    """The policy's filter and no other: by its content where the kernel shows it, else by who installed it.

    Where it is not shown, PID 1's identity (``init``) vouches for the content: that binary installs
    what it was sent, or parks nothing.
    """
    wanted = slot.shape.program.bpf
    asked = f"mode 2, 1 filter, {canonical.digest_bytes(wanted)[:19]}"
    count = status.get("Seccomp_filters", "1")  # before Linux 5.9 nobody tells
    in_force, read_from = f"mode {status['Seccomp']}, {count} filter", "status: Seccomp, Seccomp_filters"
    shown = True
    if in_force == "mode 2, 1 filter":
        try:
            found = filters.read_filter(slot.tool_pid, hostile=slot.warm or slot.shared)
        except OSError as error:
            if error.errno in GONE:
                raise
            read_from += f"; content: exe of PID 1, since ptrace said {errno.errorcode.get(error.errno or 0)}"
            return Control(name="seccomp", asked=asked, in_force=in_force, read_from=read_from)
        in_force += f", {canonical.digest_bytes(found)[:19]}"
        read_from += "; ptrace: PTRACE_SECCOMP_GET_FILTER"
        shown = found == wanted
    return Control(
        name="seccomp",
        asked=asked,
        in_force=in_force,
        read_from=read_from,
        enforced=shown and asked == in_force,
    )


def _kept(slot: Slot) -> Control:
    """The container outlives the command, and PID 1 has what it takes to make another, and nothing else."""
    with Parked(slot.init_pid) as init:
        status = init.status()
    asked = f"session: PID 1 has {KEEPS:#x} and no filter"
    has = " ".join(sorted({status[key].lstrip("0") or "0" for key in ("CapPrm", "CapEff")}))
    bounding = "" if int(status["CapBnd"], 16) == 0 else f", and may have {status['CapBnd']}"
    filtered = "no filter" if status["Seccomp"] == "0" else f"a filter of mode {status['Seccomp']}"
    return _equal(
        "isolation",
        asked,
        f"session: PID 1 has 0x{has}{bounding} and {filtered}",
        "status of PID 1: Cap*, Seccomp",
    )


def _same_file(wanted: os.PathLike[str], found: str) -> tuple[str, str]:
    one, other = Path(wanted).stat(), Path(found).stat()
    return (
        f"inode {one.st_ino}",
        f"inode {other.st_ino}" if one.st_dev == other.st_dev else "another file system",
    )


def _namespace_controls(slot: Slot, process: Parked) -> Iterator[Control]:
    for kind in NAMESPACES:
        if kind == "net" and slot.shape.host_network:
            continue
        ours, theirs = os.readlink(f"/proc/self/ns/{kind}"), process.link(f"ns/{kind}")
        asked = f"not the host's {ours}"
        owned = True
        if slot.user_namespace is not None:
            asked += ", owned by the slot's user namespace"
            owned = _owner(process, kind) == slot.user_namespace
        yield Control(
            name=f"{kind}_namespace",
            asked=asked,
            in_force=theirs + ("" if owned else ", owned by another user namespace"),
            read_from=f"ns/{kind}; NS_GET_USERNS",
            enforced=ours != theirs and owned,
        )
    if slot.shape.process.user_namespace != "none":
        theirs = process.link("ns/user")
        asked = f"user:[{slot.user_namespace}]"
        yield _equal("user_namespace", asked, theirs, "ns/user")
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
    yield from _network_controls(slot, process)
    yield _equal("hostname", slot.shape.process.hostname, uts.hostname_of(process.open("ns/uts")), "ns/uts")


def _network_controls(slot: Slot, process: Parked) -> Iterator[Control]:
    if slot.shape.host_network:
        ours, theirs = os.readlink("/proc/self/ns/net"), process.link("ns/net")
        yield _equal(
            "network",
            f"NONE OF ITS OWN: the host's {ours}",
            f"NONE OF ITS OWN: the host's {theirs}",
            "ns/net",
        )
        return
    interfaces = sorted(line.partition(":")[0].strip() for line in process.read("net/dev").splitlines()[2:])
    yield _equal("network", "lo", " ".join(interfaces) or "lo", "net/dev")
    networked = slot.shape.network is not None
    routes = str(_routes(process, own=networked))
    yield _equal("network_routes", "0", routes, "net/route, net/ipv6_route")
    if networked:
        yield from _filter_controls(slot, process)
    if slot.shape.expose:
        yield expose_control(slot.shape.expose, slot.init_pid, process)


def expose_control(ports: tuple[int, ...], init_pid: int, process: Parked) -> Control:
    """The caller is let in by PID 1's network namespace, which has to be that of the tool."""
    tools, entered = process.link("ns/net"), os.readlink(f"/proc/{init_pid}/ns/net")
    said = f"{', '.join(map(str, ports))} to the caller, in {{}}"
    return _equal("expose", said.format(tools), said.format(entered), "ns/net; ns/net of PID 1")


def _filter_controls(slot: Slot, process: Parked) -> Iterator[Control]:
    wanted, namespace = doors.reference_of(slot.shape), process.open("ns/net")
    try:
        found = in_force(namespace)
    finally:
        os.close(namespace)
    asked, has = canonical.digest_bytes(wanted.filter.encode()), canonical.digest_bytes(found.filter.encode())
    yield _equal("network_filter", asked, has, "nftables: list ruleset")
    yield _equal("network_sysctls", wanted.sysctls, found.sysctls, "sys/net")


def _routes(process: Parked, *, own: bool) -> int:
    """How many routes there are but those that the kernel gives ``lo``: to itself, and to nowhere.

    ``own``: where every address is the namespace's own, none of IPv6 is counted that ends there.
    """
    found = len(process.read("net/route").splitlines()) - 1
    try:
        lines = process.read("net/ipv6_route").splitlines()
    except FileNotFoundError:  # a kernel without IPv6
        lines = []
    for line in lines:
        target, length, *_, flags, device = line.split()
        ends = device == "lo" and (
            (target, length) == LOOPBACK
            or (own and (target, length) == EVERYWHERE and bool(int(flags, 16) & RTF_LOCAL))
        )
        found += not (ends or int(flags, 16) & RTF_REJECT)
    return max(found, 0)


def _owner(process: Parked, kind: str) -> int | None:
    """The inode of the user namespace that owns a namespace of the process, ioctl_ns(2)."""
    namespace = process.open(f"ns/{kind}")
    try:
        owner = fcntl.ioctl(namespace, NS_GET_USERNS)
    except PermissionError:  # it is owned by one above ours
        return None
    finally:
        os.close(namespace)
    try:
        return os.fstat(owner).st_ino
    finally:
        os.close(owner)


def _rlimit_controls(limits: Limits, process: Parked) -> Iterator[Control]:
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
    yield from _members(slot)
    yield from limit_controls(slot.cgroup.read_limits(), limits)


def _members(slot: Slot) -> Iterator[Control]:
    known, found = sorted({slot.init_pid, slot.tool_pid}), slot.cgroup.processes()
    if slot.shared:
        left = len(set(found) - set(known))
        yield Control(
            name="processes",
            asked=f"{known}, and what earlier calls left",
            in_force=f"{sorted(set(known) & set(found))}, and {left} others",
            read_from="cgroup.procs",
            enforced=set(known) <= set(found),
        )
    else:
        yield _equal("processes", f"{known}", f"{found}", "cgroup.procs")
    inside = slot.cgroup.contains(slot.tool_pid) and slot.cgroup.contains(slot.init_pid)
    yield _equal("cgroup", "the slot's own", "the slot's own" if inside else "another", "cgroup")


def limit_controls(found: Mapping[str, tuple[str, str]], limits: Limits) -> Iterator[Control]:
    """The controls of what a cgroup has in force (``Cgroup.read_limits``)."""
    asked = {"memory": str(_floor_page(limits.memory)), "pids": str(limits.pids), "cpu": str(limits.cpus)}
    for name, value in asked.items():
        in_force, file = found[name]
        yield _equal(name, value, in_force, file)
    swap, file = found["swap"]
    yield Control(name="swap", asked="0", in_force=swap, read_from=file, enforced=swap in {"0", "none"})
    if "sockets" in found:  # cgroup v1; v2 counts the buffers of sockets as memory
        in_force, file = found["sockets"]
        yield _equal("sockets", str(socket_limit(limits.memory)), in_force, file)
    if limits.io_read is not None or limits.io_write is not None:
        in_force, file = found["io"]
        rates = {"rbps": limits.io_read, "wbps": limits.io_write}
        asked_rates = [f"{way}={rate}" for way, rate in rates.items() if rate is not None]
        enforced = set(asked_rates) <= set(in_force.split())
        yield Control(
            name="io", asked=" ".join(asked_rates), in_force=in_force, read_from=file, enforced=enforced
        )


def _floor_page(size: int) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    return size // page * page
