"""Named places in the steps that make something durable, at which a test lets the daemon die or fail.

Theory of operation.  ``failpoint("name")`` stands before or after each such step. It does nothing, and costs
a call of a function, unless ``SANDBOXD_FAILPOINTS`` named a directory when the daemon started: whoever can
set that can do anything to the daemon already, and nothing that a caller sends reaches it. In the directory
``hits`` gets the name of each place that is reached, once per process. A file ``<name>`` says what happens
there: ``KILL`` (as by kill -9), ``STOP`` (SIGSTOP), or the name of an errno, such as ``ENOSPC``, that the
step then fails with for as long as the file is there. ``KILL 3`` waits for the third time. A place that
stands after its step is only to die at. Names are literals: a test finds them in the source, and fails for
one that no test reaches.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

__all__ = ["VARIABLE", "failpoint"]

VARIABLE = "SANDBOXD_FAILPOINTS"
_SIGNALS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}


class _Failpoints:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: set[str] = set()
        self._waited: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reach(self, name: str) -> None:
        with self._lock:
            self._note(name)
            file = self._directory / name
            try:
                action, _, number = file.read_text().strip().partition(" ")
            except FileNotFoundError:
                return
            self._waited[name] += 1
            if self._waited[name] < int(number or 1):
                return
            if action in _SIGNALS:
                with suppress(FileNotFoundError):  # so that the next daemon gets further
                    file.unlink()
                os.kill(os.getpid(), _SIGNALS[action])
                return
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code))

    def _note(self, name: str) -> None:
        if name not in self._seen:
            self._seen.add(name)
            with (self._directory / "hits").open("a") as file:
                file.write(f"{name}\n")


_failpoints = _Failpoints(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None


def failpoint(name: str) -> None:
    """Do what a test asked for at this place, which is mostly nothing. Raises OSError where it asked so."""
    if _failpoints is not None:
        _failpoints.reach(name)
