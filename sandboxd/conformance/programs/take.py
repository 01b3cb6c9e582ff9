"""Runs inside a container: takes one thing until there is no more of it, and says how much there was."""

import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time

from attempt import child, fill, fill_names, forks, hog, tell, until_refused

MIB = 1 << 20


def shared():
    held = []
    while True:
        held.append(mmap.mmap(-1, MIB))
        held[-1].write(bytes(MIB))


def in_memory_files():
    fd = os.memfd_create("hog")
    while True:
        os.write(fd, bytes(MIB))


def files_and_memory():
    """What is written to a tmpfs counts as memory."""
    for directory in ("/workspace", "/tmp", "/dev/shm"):
        fill_and_keep(directory)
    hog()


def fill_and_keep(directory):
    with open(f"{directory}/kept", "wb") as file:
        try:
            while True:
                file.write(bytes(65536))
                file.flush()
        except OSError:
            os.truncate(file.fileno(), file.tell() // 65536 * 65536)


def buffers():
    """Memory that belongs to no process: what is written to sockets and not read."""
    held = []
    while True:
        try:
            one, other = socket.socketpair()
        except OSError:
            if os.fork() != 0:
                signal.pause()
            continue
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        held += [one, other]
        try:
            while True:
                one.send(bytes(65536))
        except BlockingIOError:
            continue


def spin():
    while True:
        pass


def threads():
    def one():
        thread = threading.Thread(target=time.sleep, args=(60,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(11, "no thread") from error

    return until_refused(one)


def descriptors():
    return until_refused(lambda: os.dup(0))


def large_file():
    """The kernel's signal ends it, which Python would ignore."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with open("large", "wb") as file:
        while True:
            file.write(bytes(65536))


THINGS = {
    "memory": hog,
    "shared memory": shared,
    "files in memory": in_memory_files,
    "files and memory": files_and_memory,
    "buffers": buffers,
    "a child's memory": lambda: child(hog),
    "cpu": spin,
    "cpu of children": lambda: [os.fork() for _ in range(2)] and spin(),
    "processes": forks,
    "threads": threads,
    "descriptors": descriptors,
    "a large file": large_file,
    "workspace": lambda: fill("/workspace"),
    "names": lambda: fill_names("/workspace"),
    "tmp": lambda: fill("/tmp"),
    "names in tmp": lambda: fill_names("/tmp"),
    "shm": lambda: fill("/dev/shm"),
}

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    thing = " ".join(sys.argv[1:])
    tell({thing: THINGS[thing]})
    sys.stdout.flush()
    os._exit(0)  # threads of this program would hold it up
