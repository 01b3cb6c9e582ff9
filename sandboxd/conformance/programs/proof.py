"""Runs inside a container: for each line of a receipt, a try at what the line says is not possible."""

import ctypes
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time

from attempt import (
    LIBC,
    attempt,
    checked,
    child,
    fill,
    fill_names,
    forks,
    hog,
    read,
    syscall,
    tell,
    until_refused,
    write,
)

PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
CLONE_NEWUSER = 0x10000000


def link(kind):
    return os.readlink(f"/proc/self/ns/{kind}")


def status(key):
    lines = dict(line.split(":", 1) for line in read("/proc/self/status").splitlines())
    return lines[key].strip()


def mountinfo():
    """Target, options of the mount, and kind, of each mount."""
    lines = [line.split(" ") for line in read("/proc/self/mountinfo").splitlines()]
    return [(parts[4], parts[5].split(","), parts[parts.index("-") + 1]) for parts in lines]


def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.settimeout(2)
        one.connect(address)


def listener_of_the_host():
    """The suite listens there, on the host's loopback."""
    return attempt(connect, socket.AF_INET, ("127.0.0.1", int(sys.argv[1])))


def queue_of_the_host():
    """The suite has made it, in the host's IPC namespace; it has no flag, so it is not made here."""
    return attempt(syscall, "msgget", int(sys.argv[2]), 0)


def setuid_copy():
    with open("/workspace/copy", "wb") as copy, open("/usr/bin/id", "rb") as original:
        copy.write(original.read())
    os.chown("/workspace/copy", -1, -1)
    os.chmod("/workspace/copy", 0o6755)
    found = [
        subprocess.run(["/workspace/copy", option], capture_output=True, text=True).stdout.strip()
        for option in ("-u", "-ru")
    ]
    os.unlink("/workspace/copy")
    return found


def loose_mounts():
    return [
        target
        for target, options, _ in mountinfo()
        if not {"nosuid", "nodev"} <= set(options) and not target.startswith(("/dev", "/proc/"))
    ]


def identity(target):
    found = os.stat(target)
    return f"{found.st_dev:x}:{found.st_ino}"


def new_file(path):
    return attempt(lambda: os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)))


def mode_of_a_new_file():
    os.close(os.open("/workspace/masked", os.O_WRONLY | os.O_CREAT, 0o666))
    mode = stat.S_IMODE(os.stat("/workspace/masked").st_mode)
    os.unlink("/workspace/masked")
    return f"{mode:04o}"


def readable(path):
    """Whether anything can be read at a path."""
    try:
        if os.path.isdir(path):
            return bool(os.listdir(path))
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def core_of_a_crash():
    ended = child(lambda: os.kill(os.getpid(), signal.SIGSEGV))
    return [ended, [name for name in os.listdir("/workspace") if name.startswith("core")]]


def raised(kind):
    """What comes of raising a hard limit, and what the limits are."""
    soft, hard = resource.getrlimit(kind)
    said = attempt(resource.setrlimit, kind, (soft, hard + 1))
    return [f"{soft} {hard}", said]


def too_large_a_file():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open("/tmp/large", "wb") as file:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        file.seek(limit - 1)
        said = attempt(lambda: os.pwrite(file.fileno(), b"xx", limit))
    os.unlink("/tmp/large")
    return said


def locked():
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    memory = ctypes.create_string_buffer(limit * 2 + 8192)
    return attempt(lambda: checked(LIBC.mlock(memory, ctypes.c_size_t(limit * 2))))


def queued_signals():
    """How many signals can wait for this process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
    return until_refused(lambda: checked(LIBC.sigqueue(os.getpid(), signal.SIGRTMIN, ctypes.c_void_p(0))))


def message_queue():
    class Attributes(ctypes.Structure):
        _fields_ = [
            ("flags", ctypes.c_long),
            ("most", ctypes.c_long),
            ("size", ctypes.c_long),
            ("now", ctypes.c_long * 5),
        ]

    made = []

    def one():
        attributes = Attributes(0, 10, 8192)
        name = f"/proof{len(made)}".encode()
        made.append(checked(LIBC.mq_open(name, os.O_RDWR | os.O_CREAT, 0o600, ctypes.byref(attributes))))

    return until_refused(one)


def descriptors():
    made = []
    try:
        return until_refused(lambda: made.append(os.open("/dev/null", os.O_RDONLY)))
    finally:
        for fd in made:
            os.close(fd)


def share_of_a_cpu():
    """CPU time for each second that passes, of a loop that would take all."""
    began, used = time.monotonic(), time.process_time()
    while time.monotonic() - began < 1:
        pass
    return (time.process_time() - used) / (time.monotonic() - began)


def socket_buffers():
    """Bytes that connections on the loopback take when nobody reads."""
    server = socket.create_server(("127.0.0.1", 0))
    held, size = [], 0
    try:
        for _ in range(20):
            sender = socket.create_connection(server.getsockname(), timeout=1)
            held += [sender, server.accept()[0]]
            sender.setblocking(False)
            try:
                while True:
                    size += sender.send(bytes(1 << 16))
            except BlockingIOError:
                continue
    except OSError:
        pass
    finally:
        for one in held:
            one.close()
    return size


def inside():
    """Whether the paths of the cgroups show nothing above this container."""
    return [line.split(":", 2)[2] for line in read("/proc/self/cgroup").splitlines()]


def spoken_devices():
    with open("/dev/zero", "rb") as zero, open("/dev/full", "wb", buffering=0) as full:
        return [zero.read(2) == b"\0\0", attempt(full.write, b"x"), sorted(os.listdir("/dev"))]


TRIES = {
    "seccomp": lambda: attempt(syscall, "keyctl", 0, -3, 0),
    "no_new_privs": lambda: [
        LIBC.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
        attempt(lambda: checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0))),
    ],
    "capabilities": lambda: [
        {status(key) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16},
        attempt(os.chown, "/workspace", os.getuid() + 1, -1),
    ],
    "user": lambda: [*os.getresuid(), attempt(os.setuid, 0)],
    "group": lambda: [*os.getresgid(), attempt(os.setgid, 0)],
    "supplementary_groups": lambda: [os.getgroups(), attempt(os.setgroups, [0])],
    "umask": mode_of_a_new_file,
    "oom_score_adj": lambda: [
        read("/proc/self/oom_score_adj").strip(),
        attempt(write, "/proc/self/oom_score_adj", "-1000"),
    ],
    "init": lambda: [
        attempt(os.kill, 1, signal.SIGKILL),
        os.path.exists("/proc/1"),
        attempt(write, "/dev/.sandboxd", "x"),
    ],
    "parent": os.getppid,
    "mnt_namespace": lambda: [link("mnt"), attempt(syscall, "mount", b"x", b"/tmp", b"tmpfs", 0, 0)],
    "pid_namespace": lambda: [link("pid"), os.getpid() < 100, attempt(os.kill, int(sys.argv[3]), 0)],
    "net_namespace": lambda: [link("net"), listener_of_the_host()],
    "ipc_namespace": lambda: [link("ipc"), queue_of_the_host()],
    "uts_namespace": lambda: [link("uts"), attempt(socket.sethostname, "other")],
    "cgroup_namespace": lambda: [link("cgroup"), os.path.exists("/sys/fs/cgroup/cgroup.procs")],
    "user_namespace": lambda: [link("user"), attempt(syscall, "unshare", CLONE_NEWUSER)],
    "user_namespace_uids": lambda: [
        " ".join(read("/proc/self/uid_map").split()),
        attempt(write, "/proc/self/uid_map", "0 0 1"),
    ],
    "user_namespace_gids": lambda: [
        " ".join(read("/proc/self/gid_map").split()),
        attempt(write, "/proc/self/gid_map", "0 0 1"),
    ],
    "network": lambda: [
        [name for _, name in socket.if_nameindex()],
        attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
    ],
    "network_routes": lambda: [
        attempt(connect, socket.AF_INET, ("192.0.2.1", 80)),
        attempt(connect, socket.AF_INET6, ("2001:db8::1", 80)),
    ],
    "hostname": lambda: [socket.gethostname(), attempt(write, "/proc/sys/kernel/hostname", "other")],
    "root": lambda: [new_file("/usr/new"), new_file("/new")],
    "root_overlay": lambda: [fill("/var/tmp"), fill_names("/var/tmp")],
    "nosuid_nodev": lambda: [
        setuid_copy(),
        loose_mounts(),
        attempt(os.mknod, "/workspace/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3)),
    ],
    "workspace": lambda: [fill("/workspace"), fill_names("/workspace")],
    "tmp": lambda: [fill("/tmp"), fill_names("/tmp")],
    "shm": lambda: [fill("/dev/shm"), fill_names("/dev/shm")],
    "mount /": lambda: identity("/"),
    "mount /workspace": lambda: identity("/workspace"),
    "mount /dev/.sandboxd": lambda: identity("/dev/.sandboxd"),
    "mount /lent": lambda: [identity("/lent"), read("/lent/file")],
    "mounts_read_only": lambda: [
        new_file("/lent/new"),
        attempt(write, "/lent/file", "x"),
        attempt(os.unlink, "/lent/file"),
    ],
    "proc": lambda: [
        sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [os.getpid()],
        os.path.exists("/proc/1/root"),
    ],
    "devices": spoken_devices,
    "masked_paths": lambda: [
        [
            path
            for path in (
                "/proc/kcore",
                "/proc/keys",
                "/proc/kallsyms",
                "/proc/timer_list",
                "/proc/acpi",
                "/proc/scsi",
            )
            if readable(path)
        ],
        attempt(write, "/proc/sysrq-trigger", "h"),
        attempt(write, "/proc/sys/kernel/core_pattern", "|/bin/sh"),
    ],
    "mounts": lambda: sorted({target for target, _, _ in mountinfo() if not target.startswith("/proc/")}),
    "rlimit_core_file_size": lambda: [*raised(resource.RLIMIT_CORE), core_of_a_crash()],
    "rlimit_open_files": lambda: [*raised(resource.RLIMIT_NOFILE), descriptors()],
    "rlimit_file_size": lambda: [*raised(resource.RLIMIT_FSIZE), too_large_a_file()],
    "rlimit_locked_memory": lambda: [*raised(resource.RLIMIT_MEMLOCK), locked()],
    "rlimit_msgqueue_size": lambda: [*raised(resource.RLIMIT_MSGQUEUE), message_queue()],
    "rlimit_pending_signals": lambda: [*raised(resource.RLIMIT_SIGPENDING), queued_signals()],
    "rlimit_nice_priority": lambda: [*raised(resource.RLIMIT_NICE), attempt(os.nice, -1)],
    "rlimit_realtime_priority": lambda: [
        *raised(resource.RLIMIT_RTPRIO),
        attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)),
    ],
    "processes": lambda: attempt(os.kill, -1, 0),
    "cgroup": inside,
    "memory": lambda: child(hog),
    "swap": lambda: child(hog),
    "pids": forks,
    "cpu": share_of_a_cpu,
    "sockets": socket_buffers,
}

if __name__ == "__main__":
    wanted = sys.argv[4:]
    tell({name: function for name, function in TRIES.items() if not wanted or name in wanted})
