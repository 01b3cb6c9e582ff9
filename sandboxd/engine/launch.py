"""The OCI runtime at work on one container: in its cgroup ahead of time, let go, waited for."""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import TYPE_CHECKING, Self

from sandboxd import errors
from sandboxd.init import LAUNCH

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

__all__ = ["Launch"]

MAX_SAID = 2000  # bytes of what a runtime says that are passed on


class Launch:
    """A context manager; leaving it ends a runtime that has not ended by itself.

    The container's PID 1 answers while the runtime still tidies up, so its end is waited for last, and
    through a pidfd: ``subprocess`` waits with a timeout by looking again after 1, 2, 4, 8 and 16 ms.
    """

    def __init__(self, name: str, command: Sequence[str], *, control: int, places: Sequence[str]) -> None:
        """Have ``command`` ready, with ``control`` as its descriptor 3, in the cgroups that ``places`` name.

        ``name`` is for messages. Raises OSError.
        """
        self._name = name
        self._until = 0.0
        # Runtimes give stdio to the container's root by fchown, so it must be nobody else's: not /dev/null.
        self._said = os.memfd_create("runtime", os.MFD_CLOEXEC)
        wait, self._go = os.pipe()
        try:
            self._process = subprocess.Popen(
                [str(LAUNCH), "run", str(wait), str(control), *places, "--", *command],
                stdin=self._said,
                stdout=self._said,
                stderr=self._said,
                pass_fds=[wait, control],
                # Nothing of ours: with NOTIFY_SOCKET a runtime waits for the container to say READY.
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )
        except BaseException:
            os.close(self._said)
            os.close(self._go)
            raise
        finally:
            os.close(wait)

    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def go(self, timeout: float) -> None:
        """Let the command run, for at most ``timeout`` seconds. Raises OSError when the process is gone."""
        self._until = time.monotonic() + timeout
        os.write(self._go, b"\n")
        self._drop_go()

    def finish(self) -> None:
        """Wait until the runtime has ended. Raises EngineFailed when it failed, or takes too long."""
        if self._process.returncode is None and not self._ends_in_time():
            raise errors.EngineFailed(f"{self._name} could not make a container: it does not come to an end")
        status = self._process.wait()
        if status != 0:
            text = os.pread(self._said, MAX_SAID, 0).decode(errors="replace").strip()
            raise errors.EngineFailed(f"{self._name} could not make a container (status {status}): {text}")

    def _ends_in_time(self) -> bool:
        pidfd = os.pidfd_open(self._process.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return bool(poll.poll(max(0.0, self._until - time.monotonic()) * 1000))
        finally:
            os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        os.close(self._said)
        self._drop_go()

    def _drop_go(self) -> None:
        if self._go >= 0:
            os.close(self._go)
            self._go = -1
