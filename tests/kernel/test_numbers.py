"""Numbers, flags and layouts in the code, compared with the kernel's own headers for both machines.

A C program says what the headers say. Each machine's compiler makes it with that machine's headers, and the
one for the other machine is run by qemu.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from sandboxd.api import identity
from sandboxd.egress import jail, nameserver, refused
from sandboxd.kernel import (
    descriptors,
    files,
    filesync,
    filters,
    inside,
    mounts,
    notify,
    orphans,
    rights,
    uts,
)
from sandboxd.maker import server
from sandboxd.network import filter as egress_filter
from sandboxd.network import mark, namespace
from sandboxd.policy import abi, bpf, syscalls
from sandboxd.receipt import parked, reading

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HERE = platform.machine()
MACHINES = ("x86_64", "aarch64")
# MS_* and the new mount API of the C library clash with linux/mount.h
HEADERS = """
#define _GNU_SOURCE
#include <asm/unistd.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/memfd.h>
#include <linux/mount.h>
#include <linux/nsfs.h>
#include <linux/openat2.h>
#include <linux/personality.h>
#include <linux/prctl.h>
#include <linux/ptrace.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ipv6_route.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_log.h>
#include <linux/netlink.h>
#include <linux/route.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <asm/ioctls.h>
#include <asm/mman.h>
#include <asm/resource.h>
#include <asm/socket.h>
#include <linux/shm.h>
#include <linux/wait.h>
#include <stddef.h>
#include <stdio.h>
"""
IOCB = (
    "data", "key", "rw_flags", "lio_opcode", "reqprio", "fildes", "buf", "nbytes", "offset", "reserved2",
    "flags", "resfd",
)  # fmt: skip


def layout(text: str, names: tuple[str, ...], prefix: str) -> dict[str, int]:
    """The C expressions of the offsets of a structure's fields, by the format of ``struct``."""
    found, at = {}, 0
    for letter, name in zip(text.lstrip("=<"), names, strict=True):
        found[f"offsetof(struct {prefix}, {name})"] = at
        at += struct.calcsize(f"={letter}")
    return {**found, f"sizeof(struct {prefix})": at}


def named(module: object, *names: str, **renamed: str) -> dict[str, int]:
    """Constants of a module by their names in the headers."""
    return {renamed.get(name, name): getattr(module, name) for name in names}


FOR_BOTH = {
    **layout(filesync.IOCB.format, tuple(f"aio_{name}" for name in IOCB), "iocb"),
    **layout(filesync.EVENT.format, ("data", "obj", "res", "res2"), "io_event"),
    **layout(
        notify.NOTIF.format.replace("6Q", ""), ("id", "pid", "flags", "data.nr", "data.arch",
                                                "data.instruction_pointer"), "seccomp_notif",
    ),
    **layout(notify.RESPONSE.format, ("id", "val", "error", "flags"), "seccomp_notif_resp"),
    **layout(bpf.INSTRUCTION.format, ("code", "jt", "jf", "k"), "sock_filter"),
    "sizeof(struct seccomp_notif)": notify.NOTIF.size,
    "offsetof(struct seccomp_notif, data.args)": notify.NOTIF.size - 6 * 8,
    "offsetof(struct seccomp_data, nr)": bpf.NR,
    "offsetof(struct seccomp_data, arch)": bpf.ARCH,
    "offsetof(struct seccomp_data, args)": bpf.ARGS,
    "sizeof(struct open_how)": ctypes.sizeof(files._OpenHow),
    "offsetof(struct open_how, resolve)": files._OpenHow.resolve.offset,
    "sizeof(struct mount_attr)": 32,
    "offsetof(struct mount_attr, attr_clr)": 8,
    "offsetof(struct mount_attr, propagation)": 16,
    "offsetof(struct mount_attr, userns_fd)": 24,
    "SECCOMP_IOCTL_NOTIF_RECV": notify.NOTIF_RECV,
    "SECCOMP_IOCTL_NOTIF_SEND": notify.NOTIF_SEND,
    "SECCOMP_RET_ALLOW": bpf.ALLOW,
    "SECCOMP_RET_USER_NOTIF": bpf.NOTIFY,
    "SECCOMP_RET_ERRNO": bpf.ERRNO,
    "AUDIT_ARCH_X86_64": abi.ARCHES["x86_64"],
    "AUDIT_ARCH_AARCH64": abi.ARCHES["aarch64"],
    "__NR_openat2": files._SYS_OPENAT2,
    **{f"__NR_{name}": getattr(mounts, f"SYS_{name.upper()}") for name in (
        "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "mount_setattr")},
    **named(notify, "SECCOMP_GET_NOTIF_SIZES"),
    **named(filesync, "IOCB_CMD_FDSYNC", "IOCB_FLAG_RESFD"),
    **named(files, "RESOLVE_NO_XDEV", "RESOLVE_NO_MAGICLINKS", "RESOLVE_NO_SYMLINKS", "RESOLVE_BENEATH"),
    **named(parked, "RESOLVE_IN_ROOT"),
    **named(mounts, "CLONE_NEWNS", "MS_REC", "MS_SLAVE", "AT_EMPTY_PATH", "OPEN_TREE_CLONE",
            "OPEN_TREE_CLOEXEC", "MOVE_MOUNT_F_EMPTY_PATH", "FSOPEN_CLOEXEC", "FSMOUNT_CLOEXEC",
            "FSCONFIG_SET_STRING", "FSCONFIG_CMD_CREATE", "MOUNT_ATTR_RDONLY", "MOUNT_ATTR_NOSUID",
            "MOUNT_ATTR_NODEV", "MOUNT_ATTR_NOEXEC", "MOUNT_ATTR_IDMAP"),
    **named(filters, "PTRACE_DETACH", "PTRACE_SEIZE", "PTRACE_INTERRUPT", "PTRACE_SECCOMP_GET_FILTER", "WALL",
            WALL="__WALL"),
    **named(orphans, "PR_SET_CHILD_SUBREAPER", "WNOTHREAD", WNOTHREAD="__WNOTHREAD"),
    **named(uts, "CLONE_NEWUTS"),
    **named(reading, "RTF_REJECT", "RTF_LOCAL", "NS_GET_USERNS"),
    **named(identity, "SO_PEERGROUPS"),
    **named(server, "PR_SET_PDEATHSIG", "PR_SET_NAME"),
    **named(descriptors, "SO_SNDBUFFORCE"),
    **named(jail, "PR_SET_PDEATHSIG", "PR_SET_DUMPABLE", "PR_CAPBSET_DROP", "PR_SET_NO_NEW_PRIVS",
            "SECCOMP_MODE_FILTER", "CLONE_NEWNS", "CLONE_NEWIPC", "CLONE_NEWUTS"),
    **named(inside, "CLONE_FS", "CLONE_NEWNET"),
    **named(nameserver, "IPV6_PKTINFO"),
    **named(egress_filter, "FIONBIO"),
    **named(namespace, "IP_TRANSPARENT", "IPV6_TRANSPARENT", "IPV6_RECVPKTINFO", "NETLINK_ROUTE",
            "NETLINK_NETFILTER", "NLM_F_REQUEST", "NLM_F_ACK", "NLMSG_ERROR", "RT_TABLE_LOCAL",
            "NFULA_CFG_CMD", "NFULA_CFG_MODE", "NFULA_CFG_QTHRESH", "NFULNL_CFG_CMD_BIND",
            "NFULNL_COPY_PACKET"),
    **named(mark, "NETLINK_NETFILTER", "NLM_F_REQUEST", "NFTA_GEN_ID"),
    "NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN": mark.NFT_MSG_NEWGEN,
    "NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN": mark.NFT_MSG_GETGEN,
    "NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG": namespace.NFULNL_MSG_CONFIG,
    "NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET": refused.NFULNL_MSG_PACKET,
    **named(refused, "NFULA_PAYLOAD"),
    **syscalls.NAMESPACE_FLAGS,
    **syscalls.REFUSED_IOCTLS,
    **named(syscalls, "TIOCSCTTY", "MAP_HUGETLB", "MFD_HUGETLB", "SHM_HUGETLB", "ADDR_NO_RANDOMIZE", "S_IFMT",
            "SECCOMP_SET_MODE_FILTER", "SECCOMP_FILTER_FLAG_NEW_LISTENER", "PR_SET_SECCOMP",
            "PR_SET_PTRACER"),
    "RLIMIT_FSIZE": 1, "RLIMIT_CORE": 4, "RLIMIT_NOFILE": 7, "RLIMIT_MEMLOCK": 8, "RLIMIT_SIGPENDING": 11,
    "RLIMIT_MSGQUEUE": 12, "RLIMIT_NICE": 13, "RLIMIT_RTPRIO": 14,
}  # fmt: skip


def said(machine: str, directory: Path, expressions: Mapping[str, int]) -> dict[str, int]:
    """What the headers of a machine say of each expression; a system call that they lack is left out."""
    compiler = "cc" if machine == HERE else f"{machine}-linux-gnu-gcc"
    runner = [] if machine == HERE else [shutil.which(f"qemu-{machine}") or f"qemu-{machine}-static"]
    lines = []
    for expression in expressions:
        line = f'printf("%s=%llu\\n", "{expression}", (unsigned long long)({expression}));'
        lines.append(f"#ifdef {expression}\n{line}\n#endif" if expression.startswith("__NR_") else line)
    source, program = directory / "numbers.c", directory / f"numbers-{machine}"
    source.write_text(f"{HEADERS}\nint main(void)\n{{\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    try:
        built = subprocess.run(
            [compiler, "-static", "-o", program, source], capture_output=True, text=True, check=False
        )
        assert built.returncode == 0, built.stderr
        output = subprocess.run(
            [*runner, program], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            pytest.fail(f"{error.filename} is not installed: scripts/setup --tests")
        pytest.skip(f"{error.filename} is not installed")
    return {name: int(value) for name, _, value in (line.partition("=") for line in output.splitlines())}


LATER_THAN_THE_HEADERS = {"PR_SET_MDWE", "PR_GET_MDWE", "PR_GET_AUXV"}  # of Linux 6.1


@pytest.mark.parametrize("machine", MACHINES)
def test_flags_and_layouts_are_those_of_the_headers(machine: str, tmp_path: Path) -> None:
    prctl = {
        name: value for name, value in syscalls.PRCTL_START.items() if name not in LATER_THAN_THE_HEADERS
    }
    wanted = FOR_BOTH | prctl
    assert said(machine, tmp_path, wanted) == wanted


@pytest.mark.parametrize("machine", MACHINES)
def test_system_calls_have_the_numbers_of_the_headers(machine: str, tmp_path: Path) -> None:
    numbers = {f"__NR_{name}": number for name, number in abi.arch_of(machine).numbers.items()}
    found = said(machine, tmp_path, numbers)
    assert len(found) > 290
    assert found == {name: numbers[name] for name in found}
    # and one that the headers have not is none that they give to another, or is newer than they are
    unknown = set(numbers.values()) - set(found.values())
    assert all(number > max(found.values()) for number in unknown - set(abi.LATER_X86_64.values())), unknown
    calls = ("io_setup", "io_destroy", "io_getevents", "io_submit")
    assert filesync.NUMBERS[machine] == tuple(found[f"__NR_{name}"] for name in calls)
    assert notify.SYS_SECCOMP[machine] == found["__NR_seccomp"]
    assert rights.SETGROUPS[machine] == found["__NR_setgroups"]


def test_numbers_are_kept_for_both_machines() -> None:
    kept = (filesync.NUMBERS, notify.SYS_SECCOMP, rights.SETGROUPS, abi.ARCHES)
    assert all(set(one) == set(MACHINES) for one in kept)
