"""The named groups that policies are built of, and the three bases built of groups. Data only.

Each rule stands here with its reason. Where a rule tests an argument, the mask says how many bits of
it the kernel looks at, so that what the filter saw is what the kernel does.
"""

from __future__ import annotations

from sandboxd.policy.rule import INT, ArgTest, Entry, Group, Rule
from sandboxd.policy.unreachable import PROBED

__all__ = ["BASES", "CONSTANTS", "FAMILIES", "GROUPS", "NAMESPACE_FLAGS", "REFUSED_IOCTLS", "START"]

START = "@start"

# linux/sched.h; CLONE_NEWTIME shares its bit with the exit signal and is no flag of clone(2)
NAMESPACE_FLAGS = {
    "CLONE_NEWNS": 0x00020000, "CLONE_NEWCGROUP": 0x02000000, "CLONE_NEWUTS": 0x04000000,
    "CLONE_NEWIPC": 0x08000000, "CLONE_NEWUSER": 0x10000000, "CLONE_NEWPID": 0x20000000,
    "CLONE_NEWNET": 0x40000000,
}  # fmt: skip
REFUSED_IOCTLS = {  # asm-generic/ioctls.h
    "TIOCSTI": 0x5412, "TIOCLINUX": 0x541C, "TIOCCONS": 0x541D, "TIOCSETD": 0x5423,
}  # fmt: skip
TIOCSCTTY = 0x540E
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
STREAM, DGRAM, RAW, SEQPACKET = 1, 2, 3, 5
TYPE_MASK = 0xF  # SOCK_TYPE_MASK: above it are SOCK_CLOEXEC and SOCK_NONBLOCK
NETLINK_ROUTE, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_MPTCP = 0, 6, 17, 262
S_IFMT = 0xF000
MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB = 0x40000, 0x4, 0o4000  # asm-generic/mman.h, memfd.h, shm.h
ADDR_NO_RANDOMIZE = 0x0040000
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8

PRCTL_START = {  # linux/prctl.h
    "PR_SET_PDEATHSIG": 1, "PR_GET_PDEATHSIG": 2, "PR_GET_DUMPABLE": 3, "PR_SET_DUMPABLE": 4,
    "PR_GET_KEEPCAPS": 7, "PR_SET_NAME": 15, "PR_GET_NAME": 16, "PR_GET_SECCOMP": 21,
    "PR_CAPBSET_READ": 23, "PR_GET_TSC": 25, "PR_GET_SECUREBITS": 27, "PR_SET_TIMERSLACK": 29,
    "PR_GET_TIMERSLACK": 30, "PR_SET_CHILD_SUBREAPER": 36, "PR_GET_CHILD_SUBREAPER": 37,
    "PR_SET_NO_NEW_PRIVS": 38, "PR_GET_NO_NEW_PRIVS": 39, "PR_GET_TID_ADDRESS": 40,
    "PR_SET_THP_DISABLE": 41, "PR_GET_THP_DISABLE": 42, "PR_SVE_SET_VL": 50, "PR_SVE_GET_VL": 51,
    "PR_GET_SPECULATION_CTRL": 52, "PR_PAC_RESET_KEYS": 54, "PR_SET_TAGGED_ADDR_CTRL": 55,
    "PR_GET_TAGGED_ADDR_CTRL": 56, "PR_SET_MDWE": 65, "PR_GET_MDWE": 66,
    "PR_GET_AUXV": 0x41555856, "PR_SET_VMA": 0x53564D41,
}  # fmt: skip
PRCTL_CAP_AMBIENT, CAP_AMBIENT_IS_SET, PR_SET_SECCOMP, PR_SET_PTRACER = 47, 1, 22, 0x59616D61

CONSTANTS: dict[tuple[str, int], dict[int, str]] = {
    ("socket", 0): {0: "AF_UNSPEC", 1: "AF_UNIX", 2: "AF_INET", 10: "AF_INET6", 15: "AF_KEY",
                    16: "AF_NETLINK", 17: "AF_PACKET", 21: "AF_RDS", 29: "AF_CAN", 30: "AF_TIPC",
                    31: "AF_BLUETOOTH", 38: "AF_ALG", 40: "AF_VSOCK", 44: "AF_XDP"},
    ("socket", 1): {1: "SOCK_STREAM", 2: "SOCK_DGRAM", 3: "SOCK_RAW", 4: "SOCK_RDM",
                    5: "SOCK_SEQPACKET", 6: "SOCK_DCCP", 10: "SOCK_PACKET"},
    ("ioctl", 1): {number: name for name, number in REFUSED_IOCTLS.items()},
    ("prctl", 0): {number: name for name, number in PRCTL_START.items()} | {
        8: "PR_SET_KEEPCAPS", 22: "PR_SET_SECCOMP", 24: "PR_CAPBSET_DROP", 26: "PR_SET_TSC",
        28: "PR_SET_SECUREBITS", 35: "PR_SET_MM", 47: "PR_CAP_AMBIENT", 53: "PR_SET_SPECULATION_CTRL",
        57: "PR_SET_IO_FLUSHER", 59: "PR_SET_SYSCALL_USER_DISPATCH", 62: "PR_SCHED_CORE",
        67: "PR_SET_MEMORY_MERGE", 0x59616D61: "PR_SET_PTRACER"},
}  # fmt: skip
"""Names of argument values, for reports, by call and argument."""


def _allow(names: str, reason: str) -> tuple[Entry, ...]:
    return tuple(Entry(Rule(name, "allow"), reason) for name in names.split())


def _when(name: str, reason: str, *alternatives: tuple[ArgTest, ...]) -> tuple[Entry, ...]:
    return tuple(Entry(Rule(name, "allow", when=tests), reason) for tests in alternatives)


def _errno(name: str, errno: str, reason: str, *tests: ArgTest) -> tuple[Entry, ...]:
    return (Entry(Rule(name, "errno", errno, tests), reason),)


def _int(index: int, value: int) -> ArgTest:
    return ArgTest(index, "eq", value, INT)


def _bits(index: int, mask: int, value: int) -> ArgTest:
    return ArgTest(index, "masked_eq", value, mask)


def _inet(family: str) -> tuple[tuple[ArgTest, ...], ...]:
    pairs = ((STREAM, 0), (STREAM, IPPROTO_TCP), (DGRAM, 0), (DGRAM, IPPROTO_UDP))
    return tuple(
        (_int(0, FAMILIES[family]), _bits(1, TYPE_MASK, kind), _int(2, protocol)) for kind, protocol in pairs
    )


def _group(name: str, reason: str, *entries: tuple[Entry, ...], includes: tuple[str, ...] = ()) -> Group:
    return Group(name, reason, tuple(entry for some in entries for entry in some), includes)


_UNIX = tuple(
    (_int(0, FAMILIES["AF_UNIX"]), _bits(1, TYPE_MASK, kind)) for kind in (STREAM, DGRAM, SEQPACKET)
)
_PLAIN_FILES = {"regular": 0x8000, "unset, which means regular": 0, "FIFO": 0x1000, "socket": 0xC000}

_ALL = (
    _group(
        START,
        "what the parked process needs until execve and every libc needs before main",
        _allow("read write recvmsg sendmsg poll ppoll",
               "the parked process hands over the listener and waits for its command"),
        _allow("dup dup2 dup3 close close_range fcntl", "it puts the command's descriptors in their places"),
        _allow("chdir fchdir umask setsid setpgid rt_sigprocmask rt_sigaction rt_sigreturn",
               "it takes the command's directory, mask, session and signals"),
        _when("ioctl", "it takes the terminal, if the command has one", (_int(1, TIOCSCTTY),)),
        _allow("execve execveat exit exit_group", "it becomes the command, or says why it could not"),
        _when("mmap", "all but huge pages of the host's pool, which no memory limit counts",
              (_bits(3, MAP_HUGETLB, 0),)),
        _allow("brk munmap mprotect arch_prctl set_tid_address set_robust_list rseq getrandom",
               "the start of every C library, static or dynamic"),
        _when("prlimit64", "libc reads the stack's limit; pid 0 is the caller, others are nobody's business",
              (_int(0, 0),)),
        _allow("restart_syscall", "the kernel makes a stopped process call it"),
        _when("prctl", "options that name, harden or ask the calling process; none that widens it",
              *((_int(0, option),) for option in PRCTL_START.values())),
        _when("prctl", "libcap asks whether a capability is ambient",
              (_int(0, PRCTL_CAP_AMBIENT), _int(1, CAP_AMBIENT_IS_SET))),
        *(_errno(name, "ENOSYS", reason) for name, reason in PROBED.items()),
    ),
    _group(
        "@process",
        "making processes and waiting for them",
        _allow("fork vfork", "children in the same namespaces"),
        _when("clone", "processes and threads, but no new namespace; the kernel reads the low 32 bits",
              (_bits(0, sum(NAMESPACE_FLAGS.values()), 0),)),
        _allow("wait4 waitid getpid getppid gettid getpgid getpgrp getsid pidfd_open",
               "a shell's job control and every subprocess library"),
    ),
    _group(
        "@thread",
        "waiting on and scheduling threads",
        _allow("futex futex_waitv futex_wake futex_wait futex_requeue get_robust_list", "locks"),
        _allow("sched_yield membarrier", "spinning locks and runtimes with their own memory barriers"),
    ),
    _group(
        "@signal",
        "sending, blocking and waiting for signals",
        _allow("kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal",
               "the pid namespace bounds who can be reached"),
        _allow("rt_sigpending rt_sigtimedwait rt_sigsuspend pause sigaltstack signalfd signalfd4",
               "handlers and loops"),
    ),
    _group(
        "@time",
        "reading clocks and setting one's own timers; no clock can be set",
        _allow("time gettimeofday clock_gettime clock_getres times", "clocks, where the vDSO has none"),
        _allow("nanosleep clock_nanosleep alarm getitimer setitimer", "sleeping and timing out"),
        _allow("timer_create timer_settime timer_gettime timer_getoverrun timer_delete "
               "timerfd_create timerfd_settime timerfd_gettime", "timers of runtimes and event loops"),
    ),
    _group(
        "@file",
        "opening, reading and writing files, and looking at directories",
        _allow("open openat openat2 creat lseek pread64 pwrite64 readv writev preadv pwritev preadv2 "
               "pwritev2",
               "mounts and modes decide what can be opened and written"),
        _allow("stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat statfs "
               "fstatfs getdents getdents64 getcwd", "looking"),
        _allow("getxattr lgetxattr fgetxattr getxattrat listxattr llistxattr flistxattr listxattrat "
               "file_getattr", "ls and cp look at attributes"),
        _allow("flock fadvise64 readahead cachestat", "locks on and hints about open files"),
    ),
    _group(
        "@file-write",
        "changing files, names and modes where mounts and ownership permit it",
        _allow("truncate ftruncate fallocate fsync fdatasync sync_file_range", "contents"),
        _allow("rename renameat renameat2 mkdir mkdirat rmdir link linkat symlink symlinkat unlink unlinkat",
               "names"),
        _allow("chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat "
               "utimensat",
               "modes, owners and times of one's own files"),
        _allow("copy_file_range sendfile", "cp, cat and shutil copy inside the kernel"),
    ),
    _group(
        "@xattr",
        "changing extended attributes and flags of one's own files: cp -a, tar and package tools",
        _allow("setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat "
               "file_setattr", "namespaces other than user.* need capabilities that no tool has"),
    ),
    _group(
        "@special-file",
        "mkfifo and bound sockets",
        *(_when(call, f"a {what}; devices need a capability too", (_bits(index, S_IFMT, mode),))
          for call, index in (("mknod", 1), ("mknodat", 2)) for what, mode in _PLAIN_FILES.items()),
    ),
    _group(
        "@sync",
        "writing back whole file systems, which loads the host's disks; fsync is in @file-write",
        _allow("sync syncfs", "package tools and databases"),
    ),
    _group(
        "@file-watch",
        "watching files for changes",
        _allow("inotify_init inotify_init1 inotify_add_watch inotify_rm_watch", "tail -f, build watchers"),
    ),
    _group(
        "@numa",
        "placing memory on nodes: in no base, as it loads other tenants' nodes. Stands before @memory, "
        "whose answer to set_mempolicy it lifts",
        _allow("mbind set_mempolicy set_mempolicy_home_node migrate_pages move_pages",
               "databases and numeric code on large machines"),
    ),
    _group(
        "@memory",
        "a process's own memory, beyond what its start needs",
        _allow("mremap madvise mincore msync mlock mlock2 munlock mlockall munlockall mseal",
               "allocators and runtimes; locked pages count against memory and RLIMIT_MEMLOCK"),
        _allow("pkey_mprotect pkey_alloc pkey_free map_shadow_stack", "hardening of a process by itself"),
        _when("memfd_create", "files without a name; they count against memory, but for huge pages",
              (_bits(1, MFD_HUGETLB, 0),)),
        _allow("get_mempolicy", "numeric libraries ask for the machine's shape"),
        _errno("set_mempolicy", "ENOSYS", "libnuma tries it as soon as it is loaded, by ps and top too"),
    ),
    _group(
        "@pipe",
        "pipes",
        _allow("pipe pipe2", "every shell pipeline"),
    ),
    _group(
        "@splice",
        "moving pages between pipes and files",
        _allow("splice tee", "cat, pv and proxies"),
    ),
    _group(
        "@vmsplice",
        "lending user memory to a pipe: in no base, as the kernel has often got it wrong; programs fall back",
        _allow("vmsplice", "the fastest way into a pipe"),
    ),
    _group(
        "@event",
        "waiting for many descriptors",
        _allow("select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait "
               "epoll_pwait2 eventfd eventfd2", "event loops"),
    ),
    _group(
        "@terminal",
        "ioctl: terminals, and controls of any open descriptor",
        _when("ioctl", "all but typing into a terminal (TIOCSTI, TIOCLINUX), taking the console (TIOCCONS) "
              "and loading line disciplines (TIOCSETD); the kernel reads the low 32 bits",
              tuple(ArgTest(1, "ne", command, INT) for command in REFUSED_IOCTLS.values())),
    ),
    _group(
        "@identity",
        "asking who one is",
        _allow("getuid geteuid getgid getegid getresuid getresgid getgroups capget", "libc, shells, id"),
    ),
    _group(
        "@setuid",
        "changing one's ids: without capabilities only among those that one has",
        _allow("setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups",
               "package tools and tar drop privileges before they work"),
    ),
    _group(
        "@system-info",
        "asking about the machine, and about one's own limits and use",
        _allow("uname sysinfo getcpu getrlimit getrusage getpriority ioprio_get", "values of the container"),
        _allow("sched_getaffinity sched_getparam sched_getscheduler sched_getattr sched_get_priority_max "
               "sched_get_priority_min sched_rr_get_interval", "runtimes size their thread pools"),
        *(_when("personality", f"{what}; others weaken address randomisation or change old calls",
                (_int(0, value),)) for what, value in (("plain Linux", 0), ("a question", 0xFFFFFFFF))),
    ),
    _group(
        "@resources",
        "lowering one's limits and priorities",
        _allow("setrlimit setpriority ioprio_set sched_setaffinity sched_setparam sched_setscheduler "
               "sched_setattr process_mrelease", "cgroups bound what any of these can take"),
    ),
    _group(
        "@ipc",
        "System V and POSIX messages, semaphores and shared memory, in the container's own namespace",
        _when("shmget", "shared memory, but no huge pages", (_bits(2, SHM_HUGETLB, 0),)),
        _allow("shmat shmdt shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl",
               "databases and multiprocessing"),
        _allow("mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr", "POSIX queues"),
    ),
    _group(
        "@local-socket",
        "Unix sockets, and what works on a socket once it is open",
        _when("socket", "Unix sockets, within the container's network namespace", *_UNIX),
        _when("socketpair", "pairs are Unix sockets; no other family has a use for them", *_UNIX),
        _allow("connect getsockname getpeername getsockopt setsockopt shutdown sendto recvfrom sendmmsg "
               "recvmmsg", "connecting and talking; the family was decided when the socket was made"),
    ),
    _group(
        "@network-client",
        "internet sockets; where they may connect to is the policy's network section",
        _when("socket", "TCP and UDP, no raw, packet or other protocol",
              *_inet("AF_INET"), *_inet("AF_INET6")),
        *(_when("socket", "getaddrinfo asks for local addresses; a raw netlink socket is a plain one",
                (_int(0, FAMILIES["AF_NETLINK"]), _bits(1, TYPE_MASK, kind), _int(2, NETLINK_ROUTE)))
          for kind in (RAW, DGRAM)),
        *(_errno("socket", "EPROTONOSUPPORT", "runtimes try MPTCP before TCP, as a kernel without it answers",
                 _int(0, FAMILIES[family]), _bits(1, TYPE_MASK, STREAM), _int(2, IPPROTO_MPTCP))
          for family in ("AF_INET", "AF_INET6")),
        includes=("@local-socket",),
    ),
    _group(
        "@network-server",
        "naming sockets and accepting connections, Unix sockets included",
        _allow("bind listen accept accept4", "servers inside the container"),
        includes=("@local-socket",),
    ),
    _group(
        "@sandbox",
        "restricting oneself further: a tool may bring a sandbox of its own",
        _allow("landlock_create_ruleset landlock_add_rule landlock_restrict_self", "it only takes away"),
        _allow("capset", "gpg and daemons drop what they have; without a capability there is none to gain"),
        _when("prctl", "filters stack, and the strictest answer wins", (_int(0, PR_SET_SECCOMP),)),
        _when("seccomp", "filters and questions, but no second listener: the kernel has room for one, ours",
              (ArgTest(0, "ne", SECCOMP_SET_MODE_FILTER, INT),),
              (_int(0, SECCOMP_SET_MODE_FILTER), _bits(1, SECCOMP_FILTER_FLAG_NEW_LISTENER, 0))),
    ),
    _group(
        "@aio",
        "kernel asynchronous I/O: in no base, as it is old, rarely used, and has a history of bugs",
        _allow("io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents", "databases"),
    ),
    _group(
        "@debug",
        "debuggers and tracers: in no base, as they rewrite other processes of the call, filters or not",
        _allow("ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd process_madvise",
               "gdb, strace, py-spy"),
        _when("personality", "gdb turns address randomisation off", (_int(0, ADDR_NO_RANDOMIZE),)),
        _when("prctl", "a process names its debugger", (_int(0, PR_SET_PTRACER),)),
    ),
)  # fmt: skip

GROUPS = {group.name: group for group in _ALL}

_STRICT = (START, "@process", "@thread", "@signal", "@time", "@file", "@file-write", "@memory", "@pipe",
           "@event", "@terminal", "@identity", "@system-info", "@local-socket")  # fmt: skip
_DEFAULT = (*_STRICT, "@xattr", "@special-file", "@sync", "@file-watch", "@splice", "@resources", "@ipc",
            "@network-client", "@network-server", "@sandbox")  # fmt: skip
BASES = {"strict": _STRICT, "default": _DEFAULT, "build": (*_DEFAULT, "@setuid")}
"""Groups of each base. strict: C programs, a shell, CPython. default: everyday
tools. build: package tools too."""
