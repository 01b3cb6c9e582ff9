"""Runs inside a container: what a tool without a capability may still try against PID 1, kernel and host."""

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import stat

from attempt import LIBC, attempt, checked, read, syscall, tell, write

AT_FDCWD = -100
NEW = {
    "mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000,
    "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000,
}  # fmt: skip
MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB = 0x40000, 4, 0o4000
TIOCSTI, TIOCLINUX, TIOCSETD = 0x5412, 0x541C, 0x5423
BUFFER = ctypes.create_string_buffer(4096)


def open_to(path, flags=os.O_RDONLY):
    return lambda: attempt(lambda: os.close(os.open(path, flags | os.O_NONBLOCK)))


def call(name, *args):
    return lambda: attempt(syscall, name, *args)


def try_(function, *args):
    return lambda: attempt(function, *args)


def put(path, text):
    return lambda: attempt(write, path, text)


def got(path):
    """``done`` if anything can be read at a path."""

    def one():
        with open(path, "rb") as file:
            if not file.read(1):
                raise OSError(61, "ENODATA")

    return lambda: attempt(one)


def terminal(request, argument):
    """An ioctl on a terminal of the tool's own."""

    def one():
        master, slave = os.openpty()
        try:
            fcntl.ioctl(slave, request, argument)
        finally:
            os.close(master)
            os.close(slave)

    return lambda: attempt(one)


def anonymous_huge():
    return attempt(lambda: mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB))


TRIES = {
    **{
        f"kill 1 {one.name}": try_(os.kill, 1, one)
        for one in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT)
    },
    "kill everybody": try_(os.kill, -1, signal.SIGKILL),
    "tgkill 1": call("tgkill", 1, 1, 9),
    "pidfd of 1": lambda: attempt(lambda: signal.pidfd_send_signal(os.pidfd_open(1), signal.SIGKILL)),
    "ptrace 1": call("ptrace", 16, 1, 0, 0),
    "ptrace seize 1": call("ptrace", 0x4206, 1, 0, 0),
    "read memory of 1": call("process_vm_readv", 1, 0, 0, 0, 0, 0),
    "prlimit 1": try_(resource.prlimit, 1, resource.RLIMIT_NOFILE, (1, 1)),
    "priority of 1": try_(os.setpriority, os.PRIO_PROCESS, 1, 19),
    "affinity of 1": try_(os.sched_setaffinity, 1, {0}),
    **{
        f"proc 1 {name}": open_to(f"/proc/1/{name}")
        for name in ("root", "root/etc/shadow", "environ", "mem", "fd/3", "cwd", "exe", "ns/net", "maps")
    },
    **{f"new namespace, {name}": call("unshare", flag) for name, flag in NEW.items()},
    "new namespace by clone": call("clone", NEW["user"] | 17, 0, 0, 0, 0),
    "new namespace by clone3": call("clone3", BUFFER, 88),
    "set namespace": lambda: attempt(syscall, "setns", os.open("/proc/self/ns/net", os.O_RDONLY), NEW["net"]),
    "mount": call("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, 0),
    "remount": call("mount", b"", b"/", b"", 0x20, 0),
    "bind": call("mount", b"/proc", b"/tmp", b"", 0x1000, 0),
    "unmount": call("umount2", b"/proc/sys", 2),
    "fsopen": call("fsopen", b"tmpfs", 0),
    "open_tree": call("open_tree", AT_FDCWD, b"/", 1),
    "mount_setattr": call("mount_setattr", AT_FDCWD, b"/", 0, BUFFER, 32),
    "pivot_root": call("pivot_root", b".", b"."),
    "chroot": try_(os.chroot, "/tmp"),
    "open by handle": call("open_by_handle_at", AT_FDCWD, BUFFER, 0),
    "keyring, add": call("add_key", b"user", b"a", b"b", 1, -4),
    "keyring, join": call("keyctl", 1, 0, 0, 0, 0),
    "keyring, request": call("request_key", b"user", b"a", 0, -4),
    "io_uring": call("io_uring_setup", 1, BUFFER),
    "bpf": call("bpf", 5, BUFFER, 128),
    "perf": call("perf_event_open", BUFFER, 0, -1, -1, 0),
    "userfaultfd": call("userfaultfd", 1),
    "module": call("init_module", BUFFER, 16, b""),
    "kexec": call("kexec_load", 0, 0, 0, 0),
    "reboot": call("reboot", 0xFEE1DEAD, 672274793, 0, 0),
    "swapon": call("swapon", b"/tmp/x", 0),
    "syslog": call("syslog", 3, BUFFER, 4096),
    "set the clock": call("clock_settime", 0, BUFFER),
    "huge pages, anonymous": anonymous_huge,
    "huge pages, memfd": call("memfd_create", b"x", MFD_HUGETLB),
    "huge pages, system v": call("shmget", 0, 2 << 20, SHM_HUGETLB | 0o1600),
    "packet socket": try_(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
    "raw socket": try_(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1),
    "vsock": try_(socket.socket, 40, socket.SOCK_STREAM),
    "alg socket": try_(socket.socket, 38, socket.SOCK_SEQPACKET),
    "audit netlink": try_(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 9),
    "netfilter netlink": try_(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 12),
    "device, character": try_(os.mknod, "/workspace/c", 0o666 | stat.S_IFCHR, os.makedev(1, 1)),
    "device, block": try_(os.mknod, "/tmp/b", 0o666 | stat.S_IFBLK, os.makedev(254, 0)),
    **{
        f"dev {name}": open_to(f"/dev/{name}")
        for name in ("mem", "kmsg", "kvm", "fuse", "net/tun", "vda", "sda", "loop0", "loop-control")
    },
    "chmod of a device": try_(os.chmod, "/dev/null", 0o600),
    "removing a device": try_(os.unlink, "/dev/null"),
    "writing to init": open_to("/dev/.sandboxd", os.O_WRONLY),
    "removing init": try_(os.unlink, "/dev/.sandboxd"),
    "terminal, input of others": terminal(TIOCSTI, b"x"),
    "terminal, console": terminal(TIOCLINUX, b"\2"),
    "terminal, discipline": terminal(TIOCSETD, b"\3\0\0\0"),
    "setuid": try_(os.setuid, 0),
    "setgroups": try_(os.setgroups, [0]),
    "capset": call(
        "capset",
        ctypes.create_string_buffer(b"\x22\x05\x08\x20" + bytes(4)),
        ctypes.create_string_buffer(b"\xff" * 24),
    ),
    "ambient capability": lambda: attempt(lambda: checked(LIBC.prctl(47, 2, 0, 0, 0))),
    "core_pattern": put("/proc/sys/kernel/core_pattern", "|/bin/sh"),
    "sysrq": put("/proc/sysrq-trigger", "h"),
    "user namespaces of the kernel": put("/proc/sys/user/max_user_namespaces", "10"),
    "ip_forward": put("/proc/sys/net/ipv4/ip_forward", "1"),
    "oom score": put("/proc/self/oom_score_adj", "-1000"),
    "uevent helper": open_to("/sys/kernel/uevent_helper", os.O_WRONLY),
    "cgroups": open_to("/sys/fs/cgroup"),
    **{
        f"proc {name}": got(f"/proc/{name}")
        for name in ("kcore", "kmsg", "kallsyms", "keys", "timer_list", "slabinfo", "1/pagemap")
    },
    "socket of docker": open_to("/run/docker.sock", os.O_RDWR),
    "above the root": open_to("/../../../../proc/1/root/etc/hostname"),
    "shadow": got("/etc/shadow"),
    "a new file in the root": open_to("/new", os.O_WRONLY | os.O_CREAT),
    "a new file in dev": open_to("/dev/new", os.O_WRONLY | os.O_CREAT),
    "hosts": open_to("/etc/hosts", os.O_WRONLY | os.O_CREAT),
    "ids of its own": lambda: sorted(set(read("/proc/self/status").split("Uid:")[1].split("\n")[0].split())),
}

if __name__ == "__main__":
    tell(TRIES)
