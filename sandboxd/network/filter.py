"""The system calls that a process of ``sandboxd.egress`` keeps: it makes no socket, and connects none."""

from __future__ import annotations

from functools import lru_cache

from sandboxd.policy.rule import INT, ArgTest, Rule
from sandboxd.policy.seccomp import compile_filter

__all__ = ["filter_program"]

FIONBIO = 0x5421  # asm-generic/ioctls.h
MSG_FASTOPEN = 0x20000000  # connects as it sends
CALLS = """
    read write readv writev pread64 recvfrom recvmsg recvmmsg splice pipe2
    accept4 getsockname getpeername getsockopt setsockopt shutdown close fstat newfstatat lseek fcntl
    epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll pselect6 select
    mmap munmap mremap mprotect madvise brk futex sched_yield getrandom rseq
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time uname getpid gettid
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall exit exit_group
"""
SENDS = {"sendto": 3, "sendmsg": 2}
"""Those that send, each with the index of its flags."""


def _rules() -> tuple[Rule, ...]:
    sends = tuple(
        Rule(name, "allow", when=(ArgTest(flags, "masked_eq", 0, MSG_FASTOPEN),))
        for name, flags in SENDS.items()
    )
    not_to_block = Rule("ioctl", "allow", when=(ArgTest(1, "eq", FIONBIO, INT),))
    return (*(Rule(name, "allow") for name in CALLS.split()), not_to_block, *sends)


@lru_cache(maxsize=1)
def filter_program() -> bytes:
    """The filter, as a ``struct sock_filter[]``. What is not in it answers ENOSYS."""
    return compile_filter(_rules()).bpf
