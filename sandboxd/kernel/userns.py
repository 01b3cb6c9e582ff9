"""User namespaces with a range of host ids each, for containers and for the id-mapped mounts they see.

A namespace is made once per range and kept as a descriptor: a container joins it, an id-mapped mount
borrows its map. Nothing of one container is left in it for the next: it holds the maps, the counters
of what exists now, and ``max_user_namespaces = 0``, which closes the door to user namespaces below. Each
belongs to the first uid of its range, since the kernel counts what a namespace uses (inotify instances,
pending signals) for its owner too: owned by root, one container could use up root's share.
Two live containers never share a range.
"""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["RANGE", "Extent", "IdRange", "UserNamespaces", "map_namespace"]

RANGE = 65_536
Extent = tuple[int, int, int]
"""The first id inside, the first on the host, and how many; a map has at most 340 of them."""


@dataclass(frozen=True)
class IdRange:
    """One range of host ids and the user namespace that maps container ids 0..65535 to it."""

    base: int
    namespace: int

    @property
    def size(self) -> int:
        """Ids in the range."""
        return RANGE

    @property
    def path(self) -> str:
        """The namespace as a path, valid while this daemon lives."""
        return f"/proc/{os.getpid()}/fd/{self.namespace}"


class UserNamespaces:
    """The ranges from ``base`` on. A context manager; thread-safe."""

    def __init__(self, launcher: Path, base: int, count: int) -> None:
        self._launcher = launcher
        self._free = list(range(base + (count - 1) * RANGE, base - 1, -RANGE))
        self._made: dict[int, IdRange] = {}
        self._retired: set[int] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close every namespace; those that containers still use live as long as the containers."""
        with self._lock:
            for made in self._made.values():
                os.close(made.namespace)
            self._made.clear()

    def take(self) -> IdRange:
        """A range that no live container has. Raises HostFailed when there is none, or no namespace."""
        with self._lock:
            if not self._free:
                raise errors.HostFailed("every id range is in use; raise ids.count in the configuration")
            base = self._free.pop()
            made = self._made.get(base)
        if made is None:
            try:
                made = IdRange(base, self._make(base))
            except (OSError, subprocess.SubprocessError) as error:
                with self._lock:
                    self._free.append(base)
                raise errors.HostFailed(f"no user namespace could be made: {error}") from error
            with self._lock:
                self._made[base] = made
        return made

    def give_back(self, taken: IdRange) -> None:
        """Return a range; every process that had ids of it must be dead, or it must have been retired."""
        with self._lock:
            if taken.base not in self._retired:
                self._free.append(taken.base)

    def retire(self, taken: IdRange) -> None:
        """Never hand this range out again: processes that may still live have ids of it."""
        with self._lock:
            self._retired.add(taken.base)

    @contextmanager
    def borrowed(self) -> Iterator[IdRange]:
        """A range for the time of a ``with`` block."""
        taken = self.take()
        try:
            yield taken
        finally:
            self.give_back(taken)

    def _make(self, base: int) -> int:
        return map_namespace(self._launcher, base, [(0, base, RANGE)], [(0, base, RANGE)])


def map_namespace(launcher: Path, owner: int, uids: Sequence[Extent], gids: Sequence[Extent]) -> int:
    """A user namespace that belongs to a host uid and maps ids as user_namespaces(7) has it.

    For an id-mapped mount, inside is what the disk says, and the host's what it shows. Returns a descriptor,
    with which the namespace lives. Raises OSError, subprocess.SubprocessError.
    """
    with subprocess.Popen(
        [launcher, "userns", str(owner)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as helper:
        assert helper.stdin is not None  # noqa: S101  (Popen was asked for pipes)
        assert helper.stdout is not None  # noqa: S101
        _step(helper.stdout.read(1))
        for kind, ids in (("uid_map", uids), ("gid_map", gids)):
            Path(f"/proc/{helper.pid}/{kind}").write_text("".join("{} {} {}\n".format(*one) for one in ids))
        helper.stdin.write(b"\n")
        _step(helper.stdout.read(1))
        namespace = os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        helper.stdin.close()
    return namespace


def _step(answer: bytes | None) -> None:
    if answer != b"\n":
        raise OSError("the kernel refused a user namespace (sysctl user.max_user_namespaces?)")
