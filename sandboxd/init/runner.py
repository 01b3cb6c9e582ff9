"""What a warm interpreter executes while it waits; it runs inside the container, never in the daemon.

Theory of operation.  The interpreter is started as ``python3 /proc/self/fd/5`` with this file, named
``sitecustomize``, in a zip that ``PYTHONPATH`` names (descriptor 4). So it runs while the interpreter
starts, before its own main begins: it imports the modules, says on descriptor 3 that it is ready, and
waits for a command. Then it compiles the script, writes the code to descriptor 5, and returns; and
CPython's own main runs that code as ``__main__``, with no frame of ours above it, its own tracebacks
and its own exit. Three things of main would differ (the first entry of ``sys.path``, ``__file__`` and
``__loader__``); each is set right by an object that main asks for on its way and that takes itself away.

Whatever it is not sure of becomes an ``execve`` of the command, as if nothing had been warm.
"""

from __future__ import annotations

import os
import sys

PAIR, OWN, CODE = 3, 4, 5
EXEC_WARM = 4  # a frame of init.c: the daemon thinks that this can be served warm
OWN_PATH, CODE_PATH = f"/proc/self/fd/{OWN}", f"/proc/self/fd/{CODE}"
PRELOAD: tuple[str, ...] = ()
VERSIONS = {(3, 11)}  # whose main was compared, call by call


def _answer(number: int) -> None:
    os.write(PAIR, number.to_bytes(4, sys.byteorder))
    os._exit(127)


def _prepare() -> str:
    """Leave no trace of the start, import what shall be there; returns what went wrong."""
    import zipimport

    sys.path[:] = [entry for entry in sys.path if entry != OWN_PATH]
    sys.path_importer_cache.pop(OWN_PATH, None)
    zipimport._zip_directory_cache.pop(OWN_PATH, None)
    os.close(OWN)
    os.environ.pop("PYTHONPATH")
    if sys.implementation.name != "cpython" or sys.version_info[:2] not in VERSIONS:
        return "no interpreter that can be kept warm: it has to be CPython 3.11"
    sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # the image's own, which ours stood before
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    mask = os.umask(0o77)
    os.umask(mask)
    failed = []
    for name in PRELOAD:
        try:
            __import__(name)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    os.umask(mask)  # the policy's, whatever they did
    return "; ".join(failed)


def _receive():
    """The next command: kind, working directory, argv, environment, descriptors."""
    import _socket

    pair = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, PAIR)
    head, rights, _, _ = pair.recvmsg(12, _socket.CMSG_SPACE(12), _socket.MSG_CMSG_CLOEXEC)
    size = int.from_bytes(head[:4], sys.byteorder)
    kind = int.from_bytes(head[4:6], sys.byteorder)
    parts = []
    while size > 0:
        part = pair.recv(min(size, 1 << 20))
        if not part:
            os._exit(125)
        parts.append(part)
        size -= len(part)
    pair.detach()
    if not rights:
        os._exit(125)
    data = rights[0][2]
    fds = [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, len(data), 4)]
    payload = b"".join(parts)
    argc = int.from_bytes(payload[:4], sys.byteorder)
    cwd, *strings = payload[16:].split(b"\0")[:-1]
    return kind, cwd, strings[:argc], strings[argc:], fds


def _execute(argv, env) -> None:
    """Become the command by execve, with what Python changed for itself put back."""
    import _signal

    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)
    os.set_inheritable(PAIR, False)
    os.closerange(PAIR + 1, 1 << 20)
    variables = dict(item.split(b"=", 1) for item in env)
    found = 2  # ENOENT
    names = [argv[0]]
    if b"/" not in argv[0] and argv[0]:
        places = variables.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin").split(b":")
        names = [(place or b".") + b"/" + argv[0] for place in places]
    for name in names:
        try:
            os.execve(name, argv, variables)
        except OSError as error:
            if error.errno == 13:
                found = 13
            elif error.errno not in {2, 20} or len(names) == 1:
                _answer(error.errno)
    _answer(found)


def _source(argv):
    """What main would compile, and under which name; None where main would do something else."""
    import stat

    what = argv[1] if len(argv) > 1 else b"-"
    if what == b"-c":
        return argv[2].decode(), "<string>", "-c"
    if what == b"-":
        parts = []
        while part := os.read(0, 1 << 16):
            parts.append(part)
        return b"".join(parts), "<stdin>", os.fsdecode(what) if len(argv) > 1 else ""
    path = os.fsdecode(what)
    full = path if path.startswith("/") else f"{os.getcwd()}/{path}"
    with open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or path.endswith(".pyc"):
            return None
        return file.read(), full, path


def _compile(source, name):
    """The code; None for what main has to say something about, such as a syntax error or a warning."""
    data = source if isinstance(source, bytes) else source.encode()
    # not a program as text: a NUL; compiled code; the end of a zip, which main would run instead
    if b"\0" in data or data[2:4] == b"\r\n" or b"PK\5\6" in data:
        return None
    heard = []
    ear = type(sys.implementation)(write=heard.append, flush=lambda: None)
    stderr, sys.stderr = sys.stderr, ear
    try:
        code = compile(source, name, "exec", 0, True)
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
        return None
    finally:
        sys.stderr = stderr
    return None if heard else code


def _give_back(data) -> None:
    """Put what was read of standard input where the command finds it: in a pipe, or a file if it is large."""
    import fcntl

    read, write = os.pipe()
    try:
        fcntl.fcntl(write, 1031, 1 << 20)  # F_SETPIPE_SZ
    except OSError:
        pass
    os.set_blocking(write, False)
    try:
        whole = not data or os.write(write, data) == len(data)
    except BlockingIOError:
        whole = False
    os.close(write)
    if not whole:
        os.write(CODE, data)
        os.lseek(CODE, 0, os.SEEK_SET)
    os.dup2(read if whole else CODE, 0)


def _stdin() -> None:
    """Make ``sys.stdin`` anew, as main makes it for a pipe."""
    import io

    old = sys.stdin
    raw = open(0, "rb", -1, closefd=False)
    raw.raw.name = "<stdin>"
    new = io.TextIOWrapper(raw, old.encoding, old.errors, "\n", old.line_buffering, old.write_through)
    new.mode = "r"
    sys.stdin = sys.__stdin__ = new


def _run_code(code, first: str, name: str) -> None:
    """Have main run ``code``: it takes descriptor 5 for compiled code, whose loader it asks for."""
    import marshal

    external = sys.modules["_frozen_importlib_external"]
    header = external.MAGIC_NUMBER + bytes(12)
    data = memoryview(header + marshal.dumps(code))
    while data:
        data = data[os.write(CODE, data) :]
    ours, system, close, path = external.SourcelessFileLoader, sys, os.close, CODE_PATH

    # the names of this module are gone when it is called
    def loader(main: str, _path: str):
        external.SourcelessFileLoader = ours
        close(5)
        system.path[0] = first
        system.path_importer_cache.pop(path, None)
        module = system.modules["__main__"].__dict__
        module["__file__"] = name
        if name == "<stdin>":
            return module["__loader__"]
        if name == "<string>":
            del module["__file__"], module["__cached__"]
            return module["__loader__"]
        system.path_importer_cache[name] = None
        return external.SourceFileLoader(main, name)

    external.SourcelessFileLoader = loader


def _run_module(module: str) -> None:
    """Have main run ``-m module``: it takes descriptor 5 for a directory, and asks runpy to run that."""
    import runpy

    os.close(CODE)
    sys.path_importer_cache[CODE_PATH] = object()
    real = runpy._run_module_as_main
    # main calls it with two arguments of its own: they go to a slot that is written before it is read
    code = real.__code__
    code = code.replace(co_argcount=0, co_kwonlyargcount=2, co_flags=code.co_flags | 0x04)
    run = type(real)(code, real.__globals__, real.__name__)
    run.__kwdefaults__ = {"mod_name": module, "alter_argv": True}

    system, path, here = sys, CODE_PATH, os.getcwd()

    def once(_name: str):  # of the first attribute that main asks of runpy
        system.modules["runpy"] = runpy
        system.path_importer_cache.pop(path, None)
        system.path[0] = here
        return run

    stand_in = type(sys)("runpy")
    stand_in.__getattr__ = once
    sys.modules["runpy"] = stand_in


def _serve(argv, env) -> bool:
    """Arrange everything so that main, when this returns, runs the command; False where it could not."""
    import stat

    kinds = [os.fstat(fd).st_mode for fd in range(3)]
    if not (stat.S_ISFIFO(kinds[1]) and stat.S_ISFIFO(kinds[2])):
        return False
    if not (stat.S_ISFIFO(kinds[0]) or stat.S_ISCHR(kinds[0])):
        return False
    module = argv[2] if len(argv) > 2 and argv[1] == b"-m" else None
    compiled = None
    if module is None:
        # "-" reads its program away, so nothing may stand in the way of it any more
        found = _source(argv)
        compiled = _compile(found[0], found[1]) if found else None
        if compiled is None:
            if found and found[1] == "<stdin>":
                _give_back(found[0])
            return False
        name, argv0 = found[1], found[2]
    if stat.S_ISFIFO(kinds[0]):
        _stdin()
    import posix

    pairs = [item.split(b"=", 1) for item in env]
    os.environ.clear()
    posix.environ.clear()
    for key, value in pairs:
        os.environb[key] = value
        posix.environ[key] = value
    sys.orig_argv[:] = map(os.fsdecode, argv)
    if module is not None:
        sys.argv[:] = ["-m", *map(os.fsdecode, argv[3:])]
        _run_module(os.fsdecode(module))
        return True
    rest = argv[3:] if argv0 == "-c" else argv[2:]
    sys.argv[:] = [argv0, *map(os.fsdecode, rest)]
    script = name not in {"<string>", "<stdin>"}
    _run_code(compiled, os.path.dirname(os.path.realpath(argv0)) if script else "", name)
    return True


def wait() -> None:
    reason = _prepare()
    said = f"not ready: {reason}" if reason else "ready"
    os.write(PAIR, said.encode(errors="replace")[:200])
    kind, cwd, argv, env, fds = _receive()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    try:
        os.chdir(cwd)
    except OSError as error:
        _answer(error.errno)
    try:
        warm = kind == EXEC_WARM and not reason and _serve(argv, env)
    except OSError:
        warm = False
    if not warm:
        _execute(argv, env)
    os.close(PAIR)


wait()
absent = "sitecustomize" not in sys.modules
for each in [name for name in globals() if not name.startswith("__") and name != "absent"]:
    del globals()[each]
del each
if absent:
    raise ImportError("none", name="sitecustomize")  # what site expects where the image has none
