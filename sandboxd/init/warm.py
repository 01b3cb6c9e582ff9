"""Warm interpreters as the daemon sees them: how one is started, and which commands it may run.

``runner.py`` is what the interpreter executes meanwhile, inside the container.
"""

from __future__ import annotations

import io
import os
import zipfile
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd.init.protocol import Control
    from sandboxd.plan import Warm

__all__ = ["READY", "serves", "start"]

READY = "ready"
NOT_READY = "not ready: "
RUNNER = Path(__file__).with_name("runner.py")
PRELOAD = "PRELOAD = ()"
STARTED = b"\0"  # what runner.py prints before it imports the modules
SAYING = 512  # bytes of what an interpreter printed that are told

REPORTING = ("PYTHONVERBOSE", "PYTHONPROFILEIMPORTTIME")
"""Variables that make the interpreter report on its own start, which each call would then have to print."""

ACTING = frozenset({"LANG", "LANGUAGE", "TZ", "TZDIR", "LOCPATH", "HOME", "PATH", "PYTHONPATH", "DISPLAY"})
"""Variables that were read when the interpreter started, or when a library was loaded."""
ACTING_PREFIXES = (
    "PYTHON",  # the interpreter itself
    "LC_",
    "LD_",
    "GLIBC_",
    "MALLOC_",
    "OMP_",  # threads of numeric libraries
    "GOMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "GOTO_",
    "BLIS_",
    "NUMEXPR_",
    "NPY_",
    "NUMPY_",
    "PANDAS_",
    "MPL",
    "OPENSSL_",
    "SSL_",
)


def serves(warm: Warm, argv: Sequence[bytes], env: Mapping[str, str]) -> bool:
    """Whether the interpreter would run this command as one that starts for it; in doubt, not.

    It says nothing about the script itself: the interpreter looks at that, and executes what it cannot
    run in the ordinary way.
    """
    if argv[0] != warm.command.encode():
        return False
    started = dict(warm.env)
    differing = {name for name in started.keys() | env.keys() if started.get(name) != env.get(name)}
    if any(name in ACTING or name.startswith(ACTING_PREFIXES) for name in differing):
        return False
    try:
        words = [word.decode() for word in argv]
    except UnicodeDecodeError:
        return False
    match words[1:]:
        case [] | ["-", *_]:
            return True
        case ["-c", _, *_]:
            return True
        case ["-m", module, *_]:
            return all(part.isidentifier() for part in module.split("."))
        case [script, *_]:
            return script != "" and not script.startswith("-")
    return False


@lru_cache(maxsize=64)
def _runner(preload: tuple[str, ...]) -> bytes:
    """A zip with ``runner.py`` under the name that Python imports while it starts."""
    text = RUNNER.read_text(encoding="utf-8").replace(PRELOAD, f"PRELOAD = {preload!r}")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("sitecustomize.py", text)
    return packed.getvalue()


def start(control: Control, warm: Warm, timeout: float) -> str:
    """Have the parked process become the interpreter; returns ``READY``, or what it says is wrong.

    Then it waits all the same, and executes every command in the ordinary way. Raises EngineFailed when
    it ended, does not answer or says anything else: the slot is of no use.
    """
    env = dict(warm.env)
    for name in ("PYTHONPATH", *REPORTING):
        if env.get(name):
            return f"the policy sets {name}"
    env.pop("PYTHONPATH", None)
    with ExitStack() as stack:

        def kept(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        stdin = kept(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        heard, printed = map(kept, os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        os.set_blocking(printed, True)
        runner = kept(os.memfd_create("runner", os.MFD_CLOEXEC))
        os.write(runner, _runner(warm.preload))
        code = kept(os.memfd_create("code", os.MFD_CLOEXEC))
        variables = [f"{name}={value}".encode() for name, value in env.items()]
        variables.append(b"PYTHONPATH=/proc/self/fd/4")
        argv = [warm.command.encode(), b"/proc/self/fd/5"]
        said = control.warm(argv, variables, [stdin, printed, printed, runner, code], timeout)
        try:
            first, _, then = os.read(heard, SAYING).partition(STARTED)
        except BlockingIOError:
            first, then = b"", b""
        if not said:
            last = (first + then).decode(errors="replace").strip()
            raise errors.EngineFailed(f"the interpreter ended before it was ready{last and ': ' + last}")
    if said != READY and not said.startswith(NOT_READY):
        raise errors.EngineFailed(f"one of its modules spoke in the interpreter's stead: {said!r}")
    if said == READY and first:
        return f"each start prints something: {first.decode(errors='replace')}"
    return said.removeprefix(NOT_READY)
