"""The system calls that a process of ``sandboxd.egress`` keeps."""

from __future__ import annotations

import socket
from functools import lru_cache

from sandboxd.policy.rule import INT, ArgTest, Rule
from sandboxd.policy.seccomp import compile_filter

__all__ = ["filter_program"]

TYPE_MASK = 0xF
FIONBIO = 0x5421  # asm-generic/ioctls.h
CALLS = """
    read write readv writev pread64 recvfrom recvmsg recvmmsg sendto sendmsg sendmmsg splice pipe2
    accept4 connect getsockname getpeername getsockopt setsockopt shutdown close fstat newfstatat lseek fcntl
    epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll pselect6 select
    mmap munmap mremap mprotect madvise brk futex sched_yield getrandom rseq
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time uname getpid gettid
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall exit exit_group
"""


def _rules() -> tuple[Rule, ...]:
    internet = tuple(
        Rule(
            "socket",
            "allow",
            when=(
                ArgTest(0, "eq", family, INT),
                ArgTest(1, "masked_eq", kind, TYPE_MASK),
                ArgTest(2, "eq", protocol, INT),
            ),
        )
        for family in (socket.AF_INET, socket.AF_INET6)
        for kind, its in ((socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP))
        for protocol in (0, its)
    )
    not_to_block = Rule("ioctl", "allow", when=(ArgTest(1, "eq", FIONBIO, INT),))
    return (*(Rule(name, "allow") for name in CALLS.split()), not_to_block, *internet)


@lru_cache(maxsize=1)
def filter_program() -> bytes:
    """The filter, as a ``struct sock_filter[]``. What is not in it answers ENOSYS."""
    return compile_filter(_rules()).bpf
