"""A slot on its way from the engine's process to the daemon's: what describes it, and its descriptors.

The image's hold and the slot's shape stay behind: the daemon has its own.
"""

from __future__ import annotations

import os
import pickle
import socket
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.engine.base import Slot
from sandboxd.init.protocol import Control
from sandboxd.network.namespace import Doors
from sandboxd.policy import seccomp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.kernel.notify import NotifyServer
    from sandboxd.plan import Shape

__all__ = ["pack", "unpack"]

PLAIN = (
    "id", "engine", "runtime", "init_pid", "tool_pid", "cgroup", "id_base", "user_namespace", "presented",
    "trusted", "spares_init", "warm",
)  # fmt: skip


def pack(slot: Slot, listener: int) -> tuple[bytes, list[int]]:
    """What ``unpack`` needs of a slot with its reading; the descriptors stay the caller's to close.

    ``listener`` is that of the tool's filter, which nobody serves meanwhile.
    """
    reading = slot.reading
    if reading is None:
        raise ValueError("a slot is handed over with its reading")
    optional = (slot.upper_fd, slot.secrets_fd, slot.cgroup.peak_fd)
    fds = [slot.init_pidfd, slot.control.fileno(), listener, slot.workspace_fd]
    fds += [fd for fd in optional if fd is not None]
    doors = () if slot.doors is None else slot.doors.descriptors
    fds += [*doors, *reading.descriptors]
    data = [getattr(slot, name) for name in PLAIN], [fd is not None for fd in optional], len(doors), reading
    return pickle.dumps(data, pickle.HIGHEST_PROTOCOL), fds


def unpack(data: bytes, fds: Sequence[int], shape: Shape, notify: NotifyServer) -> Slot:
    """The slot, which owns these descriptors; its filter is answered by ``notify`` from now on.

    Raises HostFailed where they did not come, and RuntimeError or OSError where ``notify`` takes no listener;
    then none of them is left open.
    """
    if not fds:
        raise errors.HostFailed("the daemon has no descriptors left for another container")
    plain, present, doors, reading = pickle.loads(data)  # noqa: S301  (of our own process)
    init_pidfd, control, listener, workspace, *others = fds
    with ExitStack() as stack:
        for fd in (init_pidfd, control, workspace, *others):
            stack.callback(os.close, fd)
        served = notify.add(listener, answer=seccomp.answer, on_denied=None)
        stack.pop_all()
    left = iter(others)
    upper, secrets, peak = (next(left) if there else None for there in present)
    slot = Slot(
        **dict(zip(PLAIN, plain, strict=True)),
        shape=shape,
        init_pidfd=init_pidfd,
        control=Control(socket.socket(fileno=control)),
        listener=served,
        workspace_fd=workspace,
        upper_fd=upper,
        secrets_fd=secrets,
        doors=Doors(*islice(left, doors)) if doors else None,
    )
    slot.cgroup.peak_fd = peak
    slot.reading = reading
    reading.adopt(slot, list(left))
    return slot
