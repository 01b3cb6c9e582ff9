"""What a warm interpreter executes while it waits; it runs inside the container, never in the daemon.

Theory of operation.  The interpreter is started as ``python3 /proc/self/fd/5`` with this file, named
``sitecustomize``, in a zip that ``PYTHONPATH`` names (descriptor 4). So it runs while the interpreter
starts, before its own main begins: it imports the modules, says on descriptor 3 that it is ready, and
waits for a command. Then it compiles the script, writes the code to descriptor 5, and returns; and
CPython's own main runs that code as ``__main__``, with no frame of ours above it, its own tracebacks
and its own exit. Three things of main would differ (the first entry of ``sys.path``, ``__file__`` and
``__loader__``); each is set right by an object that main asks for on its way and that takes itself away.

Whatever it is not sure of becomes an ``execve`` of the command, as if nothing had been warm; so does whatever
goes wrong. ``wait`` returns only when main will run the command: else main would run the empty descriptor 5.
"""

import os
import sys

PAIR, OWN, CODE = 3, 4, 5
EXEC_WARM = 4  # a frame of init.c: the daemon thinks that this can be served warm
OWN_PATH, CODE_PATH = f"/proc/self/fd/{OWN}", f"/proc/self/fd/{CODE}"
PRELOAD = ()
STARTED = b"\0"  # on standard output: what comes after it is the modules' own
# Those whose main was compared, call by call. For each LOAD_CONST, GET_ITER and SET_UPDATE, of opcode.opmap,
# which is a module of its own
VERSIONS = {
    (3, 11): (0x64, 0x44, 0xA3),
    (3, 12): (0x64, 0x44, 0xA3),
    (3, 13): (0x53, 0x13, 0x6B),
    (3, 14): (0x52, 0x10, 0x6D),
}
LARGEST = 16 << 20  # bytes of a script; above, it is hardly one, and need not be read to find that out
BARE = set()  # the modules of an interpreter that has just started
LC_CTYPE = os.environb.get(b"LC_CTYPE")  # set by Python itself where the locale is C (PEP 538)


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
        return "no interpreter that can be kept warm: it has to be CPython 3.11 to 3.14"
    if sys.getfilesystemencoding() != "utf-8":
        return "its file system encoding is not UTF-8"
    sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # the image's own, which ours stood before
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    if sys.modules["site"].ENABLE_USER_SITE and sys.modules["_frozen_importlib"]._find_spec(
        "usercustomize", None
    ):
        return "the image has a usercustomize, which runs after this"
    BARE.update(sys.modules)
    _flush()
    os.write(1, STARTED)
    mask = os.umask(0o77)
    os.umask(mask)
    ours = [os.fstat(fd)[1:3] for fd in (0, 1, 2, PAIR, CODE)]
    failed = []
    for name in PRELOAD:
        try:
            __import__(name)
        except BaseException as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    os.umask(mask)  # the policy's, whatever they did
    _flush()
    if ours != [os.fstat(fd)[1:3] for fd in (0, 1, 2, PAIR, CODE)]:
        failed.append("one of its modules replaced a descriptor of the interpreter")
    return "; ".join(failed)


def _flush() -> None:
    """What was printed so far is none of the call's."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()


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
    if not argv[0]:
        _answer(found)
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


def _source(argv, taken):
    """What main would compile, and under which name; None where main would do something else.

    What is read of standard input is appended to ``taken`` at once.
    """
    import stat

    what = argv[1] if len(argv) > 1 else b"-"
    if what == b"-c":
        return argv[2].decode(), "<string>", "-c"
    if what == b"-":
        # EFBIG where the limit on files (RLIMIT_FSIZE) might be below what has to be given back
        os.ftruncate(CODE, 1 << 40)
        _fill(b"")
        while part := os.read(0, 1 << 16):
            taken.append(part)
        return b"".join(taken), "<stdin>", os.fsdecode(what) if len(argv) > 1 else ""
    path = os.fsdecode(what)
    full = path if path.startswith("/") else f"{os.getcwd()}/{path}"
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST or path.endswith(".pyc"):
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
    return None if heard or _reordered(code) else code


def _reordered(code) -> bool:
    """Whether main would see a set in another order: marshal, through which main gets the code, sorts them."""
    import marshal

    # LOAD_CONST before GET_ITER or SET_UPDATE; a set that is only looked into has no order
    operations = code.co_code[::2]
    constant, *users = VERSIONS[sys.version_info[:2]]
    ordered = any(bytes((constant, user)) in operations for user in users)
    for value in code.co_consts:
        if isinstance(value, type(code)):
            if _reordered(value):
                return True
        elif ordered and isinstance(value, frozenset):
            if sys.flags.hash_randomization and all(isinstance(each, (str, bytes)) for each in value):
                continue  # they come in another order each time
            if list(marshal.loads(marshal.dumps(value))) != list(value):
                return True
    return False


def _fill(data) -> None:
    """Have the file of descriptor 5 contain this alone."""
    os.ftruncate(CODE, 0)
    os.lseek(CODE, 0, os.SEEK_SET)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(CODE, rest) :]
    os.lseek(CODE, 0, os.SEEK_SET)


def _give_back(taken) -> None:
    """Put what was read of standard input where the command finds it: in a pipe, or a file if it is large."""
    import fcntl

    while part := os.read(0, 1 << 16):  # there is more only if reading it is what failed
        taken.append(part)
    data = b"".join(taken)
    read, write = os.pipe()
    try:
        fcntl.fcntl(write, 1031, 1 << 20)  # F_SETPIPE_SZ
    except OSError:
        pass
    os.set_blocking(write, False)
    try:
        whole = os.write(write, data) == len(data)
    except BlockingIOError:
        whole = False
    os.close(write)
    if not whole:
        _fill(data)
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
    _fill(external.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
    ours, system, close, path = external.SourcelessFileLoader, sys, os.close, CODE_PATH

    # the names of this module are gone when it is called
    def loader(main: str, _path: str):
        external.SourcelessFileLoader = ours
        close(5)
        if not system.flags.safe_path:
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


def _run_module(module: str, runpy, here: str) -> None:
    """Have main run ``-m module``: it takes descriptor 5 for a directory, and asks runpy to run that."""
    os.close(CODE)
    sys.path_importer_cache[CODE_PATH] = object()
    real = runpy._run_module_as_main
    # main calls it with two arguments of its own: they go to a slot that is written before it is read
    code = real.__code__
    code = code.replace(co_argcount=0, co_kwonlyargcount=2, co_flags=code.co_flags | 0x04)
    run = type(real)(code, real.__globals__, real.__name__)
    run.__kwdefaults__ = {"mod_name": module, "alter_argv": True}

    system, path = sys, CODE_PATH

    def once(_name: str):  # of the first attribute that main asks of runpy
        system.modules["runpy"] = runpy
        system.path_importer_cache.pop(path, None)
        if system.flags.safe_path:
            del system.path[0]
        else:
            system.path[0] = here
        return run

    stand_in = type(sys)("runpy")
    stand_in.__getattr__ = once
    sys.modules["runpy"] = stand_in


def _shadowed(directory: str) -> bool:
    """Whether a fresh start would import a module from there that is loaded already from somewhere else."""
    import _imp

    if sys.flags.safe_path:
        return False
    loaded = sys.modules.keys() - BARE - set(sys.builtin_module_names)
    loaded = {name for name in loaded if "." not in name and not _imp.is_frozen(name)}
    for entry in os.listdir(directory or ".") if loaded else ():
        name, dot, suffix = entry.partition(".")
        if name not in loaded:
            continue
        if suffix.endswith(("py", "pyc", "so")):
            return True
        # a directory without __init__ gives way to a module further down sys.path
        if not dot and any(each.startswith("__init__.") for each in os.listdir(f"{directory or '.'}/{name}")):
            return True
    return False


def _serve(argv, env, taken) -> bool:
    """Arrange everything so that main, when this returns, runs the command; False where it could not."""
    import stat

    kinds = [os.fstat(fd).st_mode for fd in range(3)]
    if not (stat.S_ISFIFO(kinds[1]) and stat.S_ISFIFO(kinds[2])):
        return False
    if not (stat.S_ISFIFO(kinds[0]) or stat.S_ISCHR(kinds[0])):
        return False
    site = sys.modules["site"]
    if site.ENABLE_USER_SITE and site.USER_SITE not in sys.path and os.path.isdir(site.USER_SITE):
        return False  # it came with the call
    module = os.fsdecode(argv[2]) if len(argv) > 2 and argv[1] == b"-m" else None
    if module is not None:
        import runpy

        here = os.getcwd()
        loaded = sys.modules.get(module)
        if loaded is not None and not hasattr(loaded, "__path__"):
            return False  # runpy may have to warn that it is there already
        if f"{module}.__main__" in sys.modules or _shadowed(here):
            return False
    else:
        script = len(argv) > 1 and argv[1] not in {b"-c", b"-"}
        first = os.path.dirname(os.path.realpath(os.fsdecode(argv[1]))) if script else ""
        kept = len(argv) > 1 and argv[1] == b"-c" and sys.version_info >= (3, 13)
        if kept:
            import linecache  # where main has tracebacks find the lines of the command
        if _shadowed(first):
            return False
        # "-" reads its program away, so nothing may stand in the way of it any more
        found = _source(argv, taken)
        compiled = _compile(found[0], found[1]) if found else None
        if compiled is None:
            return False
        name, argv0 = found[1], found[2]
        if kept:
            key = compiled if sys.version_info >= (3, 14) else name
            linecache._register_code(key, found[0] + "\n", name)
    if stat.S_ISFIFO(kinds[0]):
        _stdin()
    import posix

    pairs = [item.split(b"=", 1) for item in env]
    if LC_CTYPE is not None:
        pairs.append((b"LC_CTYPE", LC_CTYPE))
    os.environ.clear()
    posix.environ.clear()
    for key, value in pairs:
        os.environb[key] = value
        posix.environ[key] = value
    sys.orig_argv[:] = map(os.fsdecode, argv)
    if module is not None:
        sys.argv[:] = ["-m", *map(os.fsdecode, argv[3:])]
        _run_module(module, runpy, here)
        return True
    rest = argv[3:] if argv0 == "-c" else argv[2:]
    sys.argv[:] = [argv0, *map(os.fsdecode, rest)]
    _run_code(compiled, first, name)
    return True


def wait():
    """Wait for the command; returns what handled SIGINT once main is going to run it, and never otherwise."""
    import _signal

    try:
        reason = _prepare()
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
    try:
        # until the command runs, a signal ends it as it would end a program that is being started
        interrupt = _signal.getsignal(_signal.SIGINT)
        if callable(interrupt):
            _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        said = f"not ready: {reason}" if reason else "ready"
        os.write(PAIR, said.encode(errors="replace")[:200])
        kind, cwd, argv, env, fds = _receive()
    except BaseException:
        os._exit(125)
    try:
        for number, fd in enumerate(fds):
            if fd == number:
                os.set_inheritable(fd, True)
            else:
                os.dup2(fd, number)
                os.close(fd)
        try:
            os.chdir(cwd)
        except OSError as error:
            _answer(error.errno)
        taken = []
        try:
            warm = kind == EXEC_WARM and not reason and _serve(argv, env, taken)
        except BaseException:
            warm = False  # if it is the command's own fault, a fresh interpreter says so
        if not warm:
            if taken:
                _give_back(taken)
            _execute(argv, env)
        os.close(PAIR)
    except BaseException:
        try:
            _answer(5)  # EIO
        finally:
            os._exit(125)
    return interrupt


interrupt = wait()
if callable(interrupt):
    import _signal

    _signal.signal(_signal.SIGINT, interrupt)
absent = "sitecustomize" not in sys.modules
for each in [name for name in globals() if not name.startswith("__") and name != "absent"]:
    del globals()[each]
del each
if absent:
    raise ImportError("none", name="sitecustomize")  # what site expects where the image has none
