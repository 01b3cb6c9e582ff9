"""Runs inside a container: leaves something in every place that could last, or looks for it."""

import contextlib
import fcntl
import os
import signal
import socket
import sys

from attempt import LIBC, attempt, checked, syscall, tell

KEY = 0x5EED
IPC_CREAT = 0o1000
NAME = "conformance"


def queue(flags):
    return checked(LIBC.mq_open(f"/{NAME}".encode(), flags, 0o666, None))


def connect():
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(f"\0{NAME}")


def lock():
    fcntl.flock(os.open("/usr/bin/env", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def leave():
    held = socket.socket(socket.AF_UNIX)
    held.bind(f"\0{NAME}")
    held.listen()
    syscall("shmget", KEY, 4096, IPC_CREAT | 0o666)
    syscall("semget", KEY, 1, IPC_CREAT | 0o666)
    syscall("msgget", KEY, IPC_CREAT | 0o666)
    queue(os.O_CREAT | os.O_RDWR)
    lock()
    for place in ("/workspace", "/tmp", "/dev/shm"):
        with open(f"{place}/{NAME}", "w") as file:
            file.write("secret")
    for _ in range(3):  # in sessions of their own, deaf to everything
        if os.fork() == 0:
            os.setsid()
            for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
                with contextlib.suppress(OSError):
                    signal.signal(number, signal.SIG_IGN)
            while True:
                signal.pause()
    print("left", flush=True)
    if sys.argv[2:] == ["stay"]:
        signal.pause()
    os._exit(0)


LOOK = {
    "abstract socket": lambda: attempt(connect),
    "shared memory": lambda: attempt(syscall, "shmget", KEY, 0, 0),
    "semaphores": lambda: attempt(syscall, "semget", KEY, 0, 0),
    "message queue": lambda: attempt(syscall, "msgget", KEY, 0),
    "posix message queue": lambda: attempt(queue, os.O_RDWR),
    "lock on a file of the image": lambda: attempt(lock),
    "files": lambda: [place for place in ("/workspace", "/tmp", "/dev/shm") if NAME in os.listdir(place)],
    "processes": lambda: sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) != [os.getpid()],
    "everybody": lambda: attempt(os.kill, -1, 0),
}

if __name__ == "__main__":
    if sys.argv[1] == "leave":
        leave()
    tell(LOOK)
