"""The programs in C, and the other end of PID 1's protocol.

``init.c`` is PID 1 of every container, ``container.c`` the built-in runtime; ``launch.c`` starts others. The
package carries each compiled for every machine that it was built for, in a directory named as ``uname -m``.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from sandboxd import errors

__all__ = ["CONTAINER", "INIT", "LAUNCH", "SOURCES", "require_programs"]

SOURCES = Path(__file__).parent
MACHINES = ("x86_64", "aarch64")

CONTAINER = SOURCES / platform.machine() / "sandboxd-container"
INIT = SOURCES / platform.machine() / "sandboxd-init"
LAUNCH = SOURCES / platform.machine() / "sandboxd-launch"


def require_programs() -> None:
    """Raises HostUnsupported where the programs are not for this machine, or are missing."""
    machine = platform.machine()
    if machine not in MACHINES or sys.maxsize < 2**32:
        bits = 32 if sys.maxsize < 2**32 else 64
        raise errors.HostUnsupported(
            f"sandboxd runs on {' and '.join(MACHINES)}, and this is a {bits}-bit Python on {machine}"
        )
    missing = [program.name for program in (CONTAINER, INIT, LAUNCH) if not os.access(program, os.X_OK)]
    if missing:
        raise errors.HostUnsupported(
            f"this installation has no {', '.join(missing)} for {machine}: it was built on another machine, "
            "without a compiler for this one; install a release, or build it here"
        )
