"""The process that tells a caller's socket that a call has ended: the caller's own user, and nothing else.

The daemon opens no path that a caller names. This program is started for it, with nothing but a pipe in and a
pipe out, becomes the caller's uid, gid and groups before it looks at a path, and sends datagrams. Standard
library only: it is started by its file. Input, one line of JSON: ``{uid, gid, groups, messages: [{unix,
line}]}``; output, one line: for each message null, or why it was not sent.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE = 1, 38, 4
SECONDS = 1.0  # for one datagram, where the receiver's buffer is full


def become(uid: int, gid: int, groups: list[int]) -> None:
    """Give up what the daemon may and the caller may not. Raises OSError."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    libc = ctypes.CDLL(None, use_errno=True)
    # a change of user takes the first of them away, so it comes after
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))


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


def main() -> None:
    """Do what standard input says."""
    asked = json.loads(sys.stdin.readline())
    become(asked["uid"], asked["gid"], asked["groups"])
    results = [send(each["unix"], each["line"]) for each in asked["messages"]]
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
