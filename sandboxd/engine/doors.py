"""The network of a container that an engine has made, for every engine: by the pid of its PID 1."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

from sandboxd.network.chain import write_chain
from sandboxd.network.namespace import open_doors, reference
from sandboxd.reach import Reach

if TYPE_CHECKING:
    from contextlib import ExitStack

    from sandboxd.network.namespace import Doors, InForce
    from sandboxd.plan import Shape
    from sandboxd.reach import NetworkRules

__all__ = ["doors_of", "reference_of"]


@lru_cache(maxsize=256)
def _chain(rules: NetworkRules) -> str:
    return write_chain(Reach(rules))


def reference_of(shape: Shape) -> InForce:
    """What the network namespace of such a container has. Raises OSError."""
    assert shape.network is not None  # noqa: S101
    return reference(_chain(shape.network))


def doors_of(shape: Shape, init_pid: int, stack: ExitStack) -> Doors | None:
    """Make a container's network as its shape says; ``stack`` closes the sockets. Raises OSError."""
    if shape.network is None:
        return None
    namespace = os.open(f"/proc/{init_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        doors = open_doors(namespace, _chain(shape.network))
    finally:
        os.close(namespace)
    stack.callback(doors.close)
    return doors
