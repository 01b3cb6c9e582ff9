"""What tests of containers that sessions keep share: policies for them, and how calls in one are asked."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from daemons import start_daemon, until
from sessioned import sh

from sandboxd.init import INIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation, SessionInfo

CONFIG = """
budget: {memory: 2GiB, slots: 12}
callers:
  - {match: {uid: 0}, role: operator}
  - match: {uid: 4242}
    role: agent
    policies: [live, plain]
    concurrent: 2
    sessions: {containers: 1, container_idle: 2s, size: 4MiB}
  - match: {uid: 4243}
    role: agent
    policies: [live, plain, other, nothing]
    sessions: {container_life: 3s, size: 4MiB}
"""
POLICIES = {
    "live": (
        "version: 1\nname: live\nextends: default\nisolation: session\n"
        "limits: {wall: 10s, memory: 64MiB, workspace: {size: 16MiB, inodes: 4k},"
        " tmp: {size: 8MiB, inodes: 1k}}\n"
        'artifacts: [{path: "out/*", max_size: 1MiB}]\n'
    ),
    "other": "version: 1\nname: other\nextends: live\nlimits: {wall: 9s}\n",
    "snakes": "version: 1\nname: snakes\nextends: python\nisolation: session\n",
    "plain": "version: 1\nname: plain\nextends: default\n",
    "nothing": "version: 1\nname: nothing\nextends: live\ncommit: never\n",
    "root": "version: 1\nname: root\nextends: live\nprocess: {user: 0}\n",
    "huge": "version: 1\nname: huge\nextends: live\nlimits: {memory: 1500MiB}\n",
    "killed": (
        "version: 1\nname: killed\nextends: live\n"
        "limits: {stdout: {size: 64KiB, on_limit: kill}, stderr: {size: 64KiB, on_limit: kill}}\n"
    ),
}


@contextmanager
def living(directory: Path, state: Path | None = None) -> Iterator[Daemon]:
    """A daemon with these policies in force."""
    with start_daemon(directory, config=CONFIG, state=state) as daemon:
        for name, text in POLICIES.items():
            (daemon.policies / f"{name}.yaml").write_text(text)
        until(lambda: set(POLICIES) <= {one.name for one in daemon.client().policies()}, "they are in force")
        yield daemon


def live(
    daemon: Daemon, session: SessionInfo | str, code: str, policy: str = "live", **fields: object
) -> Invocation:
    """A call in the container of a session."""
    return sh(daemon, session, code, policy=policy, **fields)


def first_process(daemon: Daemon) -> int:
    """PID 1 of the one container that there is, as the host numbers it."""
    ours, found = INIT.stat().st_ino, []
    for child in psutil.Process(daemon.engine).children():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child.pid}/exe").stat().st_ino == ours:
                found.append(child.pid)
    assert len(found) == 1, found
    return found[0]


def kill_first(daemon: Daemon) -> None:
    """End PID 1 of the one container that there is, and so all that is in it; it is dead then."""
    process = os.pidfd_open(first_process(daemon))
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], 30)[0]
    finally:
        os.close(process)
