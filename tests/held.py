"""What a daemon holds while it lives, beside what the host sees of it.

A daemon lives in a mount namespace of its own, and what it forgot there goes with it; so do the namespaces
and descriptors that it kept. So they are compared while it lives: those of the session's daemon between its
start and its end (``leaks.py``), and by the hostile suite between any two of its tests.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from daemons import Daemon

GRACE_SECONDS = 5.0  # the end of a call is a matter of some steps
NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user")


def namespaces_of(pid: int) -> frozenset[str]:
    """The namespaces of a process, as ``net:[4026531840]``; fewer when it ends meanwhile."""
    found = set()
    for kind in NAMESPACES:
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))  # noqa: PTH115  (a text)
    return frozenset(found)


@dataclass(frozen=True)
class Held:
    """What a daemon has in its own mount namespace, and in other namespaces, and of which kind."""

    mounts: frozenset[str]
    namespaces: frozenset[str]

    @classmethod
    def by(cls, processes: Sequence[int], waiting: Collection[str]) -> Self:
        """What a daemon holds, but for what is there to wait for a call.

        ``processes`` are all of its own, the first of which has started the others.

        ``waiting`` names the berths and the containers that wait, as their cgroups are named: each berth is
        a process in namespaces of its own (``engine/berth.py``). A user namespace stays for as long as the
        daemon (SECURITY.md, "One user namespace, many calls"), as a descriptor; other kinds never do.
        """
        pid = processes[0]
        own = frozenset({pid, *_below(pid)})
        ours = namespaces_of(os.getpid()) | namespaces_of(pid)
        held = {
            f"{name} of process {one}, {_text(f'/proc/{one}/comm').strip()}"
            for one in own
            if not _any(waiting, _text(f"/proc/{one}/cgroup"))
            for name in namespaces_of(one) - ours
        }
        for link in (link for one in processes for link in _links(one)):
            if link.startswith(tuple(f"{kind}:[" for kind in NAMESPACES if kind != "user")):
                held.add(f"{link} as a descriptor of the daemon")
        # those of the host come and go in the daemon's namespace too
        host = set(_places("self"))
        mounts = {line for line in _places(pid) if line not in host and not _any(waiting, line)}
        return cls(frozenset(mounts), frozenset(held))

    def new_since(self, before: Held) -> str:
        """What is here and was not there, or an empty text."""
        lines = [f"  mount: {line}" for line in sorted(self.mounts - before.mounts)]
        return "\n".join(lines + [f"  {line}" for line in sorted(self.namespaces - before.namespaces)])


def waiting_in(daemon: Daemon) -> set[str]:
    """The names of what waits for a call: berths, and with SANDBOXD_TEST_POOL whole containers."""
    from daemons import berths_of, pooled_slots  # noqa: PLC0415  -- a plugin, imported by pytest first

    return {*berths_of(daemon).values(), *pooled_slots(daemon)}


def _below(pid: int) -> Iterator[int]:
    """The children of a process, theirs, and so on."""
    for task in _listed(f"/proc/{pid}/task"):
        for child in _text(f"/proc/{pid}/task/{task}/children").split():
            yield int(child)
            yield from _below(int(child))


def _places(pid: int | str) -> Iterator[str]:
    """The mounts of a process without their numbers, which differ between namespaces."""
    for line in _text(f"/proc/{pid}/mountinfo").splitlines():
        parts = line.split(" ")
        yield f"{parts[4]} (root {parts[3]}, {line.partition(' - ')[2]})"


def _links(pid: int | str) -> Iterator[str]:
    """What the descriptors of a process are, as texts."""
    for entry in _listed(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            yield os.readlink(f"/proc/{pid}/fd/{entry}")  # noqa: PTH115


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)  # noqa: PTH208
    except OSError:
        return []


def descriptors_of(processes: Sequence[int]) -> Counter[str]:
    """How many descriptors of each kind a daemon has, but for those that it keeps once it has them.

    These are one user namespace for each range of ids that was ever in use at once, and the connections of
    the journal's readers, of which there are two.
    """
    links = (re.sub(r"\d+", "N", link) for pid in processes for link in _links(pid))
    return Counter(link for link in links if not link.startswith("user:[") and "/journal.sqlite" not in link)


def check_held(daemon: Daemon, before: Held) -> None:
    """Fail when a daemon holds after some grace what it did not hold before."""
    limit = time.monotonic() + GRACE_SECONDS
    while found := Held.by(daemon.processes, waiting_in(daemon)).new_since(before):
        if time.monotonic() > limit:
            pytest.fail(f"the daemon holds what no call has any more:\n{found}", pytrace=False)
        time.sleep(0.05)


def _any(names: Collection[str], text: str) -> bool:
    return any(name in text for name in names)


def _text(path: str) -> str:
    """A file of a process that may end at any time."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
