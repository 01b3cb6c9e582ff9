"""Runs inside a container: tries things, and prints a JSON object that says how each of them ended."""

import contextlib
import ctypes
import errno
import json
import os
import signal
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NUMBERS = json.loads(os.environ.get("SYSCALLS", "{}"))


def checked(result):
    """The result of a C function, or OSError."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def syscall(name, *args):
    """A system call by its name; integers are passed as the 64 bits that they are."""
    passed = [ctypes.c_long(one) if isinstance(one, int) else one for one in args]
    return checked(LIBC.syscall(ctypes.c_long(NUMBERS[name]), *passed))


def attempt(function, *args):
    """``"done"``, or the name of the errno."""
    try:
        function(*args)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    except ValueError:  # resource.setrlimit says EPERM so
        return "EPERM"
    return "done"


def read(path):
    """The text of a file."""
    with open(path) as file:
        return file.read()


def write(path, text):
    """Put a text into a file that is there, with one system call."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def child(function, *args):
    """How a child ends that runs a function: its status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(function(*args) or 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until_refused(function):
    """How often something can be done, and the errno that ended it."""
    count = 0
    while count < 1_000_000:
        try:
            function()
        except OSError as error:
            return [count, errno.errorcode[error.errno]]
        count += 1
    return [count, "never"]


def fill(directory):
    """Bytes that a file of a directory takes, and the errno that ended it; it is removed again."""
    path, size = os.path.join(directory, "filling"), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while True:
            size += os.write(fd, bytes(65536))
    except OSError as error:
        return [os.fstat(fd).st_size, errno.errorcode[error.errno]]
    finally:
        os.close(fd)
        os.unlink(path)


def fill_names(directory):
    """Empty files that a directory takes, and the errno that ended it; they are removed again."""
    made = []

    def one():
        path = os.path.join(directory, f"name{len(made)}")
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        made.append(path)

    try:
        return until_refused(one)
    finally:
        for path in made:
            os.unlink(path)


def forks():
    """Children that can live at the same time, and the errno that ended it; they are killed again."""
    pids = []

    def one():
        pid = os.fork()
        if pid == 0:
            signal.pause()
        pids.append(pid)

    try:
        return until_refused(one)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def hog():
    """Take memory until there is none."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 12) * 256))


def tell(table):
    """Print what each function of a table comes to, as a JSON object."""
    found = {}
    for name, function in table.items():
        try:
            found[name] = function()
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno, str(error))
    json.dump(found, sys.stdout)
