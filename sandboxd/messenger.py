"""The process that tells somebody that a call has ended: as the user that it tells it for, and as no other.

The daemon opens no path that a caller names, and runs no program of the operator's as itself. This is started
for both, with nothing but pipes. Without an argument it becomes a caller before it looks at a path, and sends
datagrams. Standard library only: it is started by its file. Input, one line of JSON: ``{uid, gid, groups,
messages: [{unix, line}]}``; output, one line: for each message null, or why it was not sent.

With the number of a descriptor as its argument it reads ``{uid, gid, argv, env}`` from there to the end,
gives up all that it may, and runs the program in a pid namespace of its own, below a process that reaps for
it: when that ends, so does whatever the program started, and when this is killed, so does that. Its standard
input, output and error are the program's. It exits with the program's status, 128 and a signal's number, or,
where the program cannot be started, with ``FAILED`` and a line on standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sys

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
LAST_CAPABILITY = 63
SECONDS = 1.0  # for one datagram, where the receiver's buffer is full
FAILED = 125
DESCRIPTORS = 256  # that a program may have open


def become(uid: int, gid: int, groups: list[int]) -> None:
    """Give up what the daemon may and that user may not. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # a change of user takes the first of them away, so it comes after
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        check(libc.prctl(option, value, 0, 0, 0))


def check(result: int) -> None:
    """Raise OSError for a call that failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def bound(limits: dict[int, int]) -> None:
    """Lower resource limits."""
    for limit, value in limits.items():
        most = resource.getrlimit(limit)[1]
        lowered = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (lowered, lowered))


def send(path: str, line: str) -> str | None:
    """Send one datagram; why it was not sent, if it was not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(SECONDS)
        try:
            sock.sendto(line.encode(), os.fsencode(path))
        except TimeoutError:
            return "ETIMEDOUT"
        except OSError as error:
            return os.strerror(error.errno or 0)
    return None


def send_all() -> None:
    """Do what standard input says."""
    asked = json.loads(sys.stdin.readline())
    become(asked["uid"], asked["gid"], asked["groups"])
    bound({resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0})
    results = [send(each["unix"], each["line"]) for each in asked["messages"]]
    sys.stdout.write(json.dumps(results) + "\n")


def execute(source: int) -> int:
    """Run the program that is said there; its status. Raises OSError, ValueError."""
    with os.fdopen(source, encoding="utf-8") as file:
        text = file.read()
    if not text:
        raise ValueError("nobody said what to run")  # whoever started it has ended
    asked = json.loads(text)
    libc = ctypes.CDLL(None, use_errno=True)
    check(libc.unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID))
    become(asked["uid"], asked["gid"], [])
    bound({resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: DESCRIPTORS})
    os.umask(0o077)
    first = os.fork()
    if first:
        for descriptor in (0, 1, 2):  # they are the program's: who reads its output waits for its end
            os.close(descriptor)
        return status(os.waitpid(first, 0)[1])
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    program = os.fork()
    if not program:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and the program would too
            signal.signal(number, signal.SIG_DFL)
        os.execve(asked["argv"][0], asked["argv"], asked["env"])  # noqa: S606  # the operator's, word for word
    while True:
        pid, ended = os.wait()
        if pid == program:
            os._exit(status(ended))


def status(ended: int) -> int:
    """A status of ``wait`` as shells have it."""
    code = os.waitstatus_to_exitcode(ended)
    return code if code >= 0 else 128 - code


def main() -> None:
    """Do what is asked."""
    if len(sys.argv) == 1:
        send_all()
        return
    try:
        ended = execute(int(sys.argv[1]))
    except (OSError, ValueError) as error:
        os.write(2, f"{error}\n".encode())
        ended = FAILED
    os._exit(ended)


if __name__ == "__main__":
    main()
