"""The part of the cgroup hierarchies that a daemon has, where its slots have theirs; v1, v2 and hybrid hosts.

Theory of operation. A daemon has one *tree*, a directory ``sandboxd-NAME`` below its own cgroup in every
hierarchy that is used, so that whatever limits the daemon limits its slots too. A slot has one directory
in the tree. Nothing else writes there: no agent, no runtime hook.

On v2, a cgroup whose controllers are passed down may hold no process ("no internal processes"). So the
daemon moves itself to a leaf ``daemon`` beside the tree, which needs its own cgroup to be delegated to it
and to hold nothing else (a systemd unit with ``Delegate=yes``, a container whose entry point it is).
Started from a login session, which other processes share, the tree goes to the root of the visible
hierarchy instead, as other container engines do. ``CgroupTree.place`` says which.
"""

from __future__ import annotations

# ruff: noqa: PTH102, PTH103, PTH106, PTH110, PTH119, PTH120  -- building a Path costs more than these calls
import contextlib
import errno
import os
import re
from typing import TYPE_CHECKING, Literal, Self

from sandboxd import errors
from sandboxd.kernel import cgroupfs
from sandboxd.kernel.cgroup import Cgroup
from sandboxd.kernel.cgroup_v1 import FilesV1
from sandboxd.kernel.cgroup_v2 import FilesV2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.kernel.cgroupfs import CgroupLimits, Hierarchy, Host, Interface

__all__ = ["CgroupTree"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
PREFIX = "sandboxd-"
LEAF = "daemon"


class CgroupTree:
    """A daemon's own part of the cgroup hierarchies."""

    def __init__(self, name: str, host: Host, places: dict[str, str], processes: Sequence[int]) -> None:
        self.name = name
        self.version: Literal[1, 2] = host.version
        self.controllers: frozenset[str] = host.controllers
        self._host = host
        self._places = places
        """Hierarchy's mount point to the directory of the cgroup that holds the tree, for all mounted."""
        self._made: set[str] = set()
        self._strays: set[str] = set()
        self._moved_from: str | None = None
        self._processes = processes

    @classmethod
    def open(cls, name: str, processes: Sequence[int] = (0,)) -> Self:
        """Detect the host's hierarchies and make the tree; ``name`` tells daemons apart.

        ``processes`` are those of the daemon, 0 for the caller, which move to the leaf where one is needed.

        Raises HostUnsupported when a controller is missing or the hierarchies cannot be written.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a cgroup")
        host = cgroupfs.detect()
        places = {hierarchy.mount: hierarchy.path_of(hierarchy.own) for hierarchy in host.mounted}
        tree = cls(name, host, places, processes)
        try:
            if host.version == 2:
                tree._delegate(host.used[0])
            for hierarchy in host.used:
                os.makedirs(tree._top(hierarchy), exist_ok=True)
            if host.version == 2:
                _enable(tree._top(host.used[0]), tree.controllers)
        except OSError as error:
            tree.close()
            raise errors.HostUnsupported(
                f"cannot make a cgroup: {error.strerror} ({error.filename}); sandboxd needs root and a "
                "writable cgroup hierarchy, under systemd a unit with Delegate=yes",
                file=error.filename,
            ) from error
        return tree

    @property
    def place(self) -> str:
        """The directory that holds the tree, in the first hierarchy that is used."""
        return self._places[self._host.used[0].mount]

    def _top(self, hierarchy: Hierarchy) -> str:
        return f"{self._places[hierarchy.mount]}/{PREFIX}{self.name}"

    def _delegate(self, hierarchy: Hierarchy) -> None:
        """Find where controllers can be passed down, moving this process to a leaf where it is in the way."""
        own = hierarchy.path_of(hierarchy.own)
        base = os.path.dirname(own) if os.path.basename(own) == LEAF and own != hierarchy.mount else own
        self._places[hierarchy.mount] = base
        self._keep_delegated(base)
        # Only the real root has no cgroup.type; processes may stay there.
        if not os.path.exists(f"{base}/cgroup.type") or self._enabled(base):
            _enable(base, self.controllers)
            return
        if own == base:
            os.makedirs(f"{base}/{LEAF}", exist_ok=True)
            self._move(f"{base}/{LEAF}")
            self._moved_from = base
        try:
            _enable(base, self.controllers)
        except OSError as error:
            self._move_back()
            # EBUSY: others live beside us, as in a login session. ENOENT: a controller stops above us.
            if error.errno not in {errno.EBUSY, errno.ENOENT} or base == hierarchy.mount:
                raise
            self._places[hierarchy.mount] = hierarchy.mount
            self.controllers = self._host.controllers
            _enable(hierarchy.mount, self.controllers)

    def _keep_delegated(self, directory: str) -> None:
        """Do without an optional controller that stops above a cgroup which was given all that are needed."""
        given = frozenset((cgroupfs.read_or_none(f"{directory}/cgroup.controllers") or "").split())
        if given.issuperset(cgroupfs.REQUIRED_V2):
            self.controllers &= given

    def _enabled(self, directory: str) -> bool:
        passed = cgroupfs.read_or_none(f"{directory}/cgroup.subtree_control") or ""
        return self.controllers <= frozenset(passed.split())

    def _move(self, directory: str) -> None:
        for process in self._processes:
            cgroupfs.write(f"{directory}/cgroup.procs", str(process))

    def _move_back(self) -> None:
        if self._moved_from is None:
            return
        base, self._moved_from = self._moved_from, None
        # Another tree of this process may still need it; then the leaf is where we stay.
        with contextlib.suppress(OSError):
            cgroupfs.write(f"{base}/cgroup.subtree_control", " ".join(f"-{c}" for c in self.controllers))
        with contextlib.suppress(OSError):
            self._move(base)
            os.rmdir(f"{base}/{LEAF}")

    def create(self, slot: str, limits: CgroupLimits) -> Cgroup:
        """A new cgroup with its limits in force.

        Raises ControlNotEnforced when a limit is not taken, HostFailed when the cgroup cannot be made or
        exists, and then leaves nothing behind.
        """
        if not NAME.fullmatch(slot):
            raise ValueError(f"{slot!r} cannot name a cgroup")
        cgroup = self._cgroup(slot, {h.mount: f"{self._top(h)}/{slot}" for h in self._host.mounted})
        made: list[str] = []
        try:
            for hierarchy in self._host.used:
                path = f"{self._top(hierarchy)}/{slot}"
                os.mkdir(path)
                made.append(path)
            cgroup.set(limits)
        except (OSError, errors.AttemptFailed) as error:
            for path in made:
                os.rmdir(path)
            if isinstance(error, OSError):
                raise errors.HostFailed(f"cannot make cgroup {slot}: {error.strerror}") from error
            raise
        self._made.add(slot)
        return cgroup

    def _cgroup(self, slot: str, directories: dict[str, str]) -> Cgroup:
        by_controller: dict[str, str] = {}
        members: dict[str, str] = {}
        joined: list[str] = []
        used: set[str] = set()
        for hierarchy in self._host.mounted:
            path = directories.get(hierarchy.mount)
            if path is None:
                continue
            keys = hierarchy.controllers if hierarchy.version == 1 else frozenset({""})
            by_controller.update(dict.fromkeys(keys, path))
            members.update(dict.fromkeys(keys, hierarchy.name_of(path)))
            if hierarchy in self._host.used:
                used |= keys
                joined.append(f"{path}/cgroup.procs")
        relative = f"{PREFIX}{self.name}/{slot}"
        files: Interface
        if self.version == 2:
            top = by_controller.get("", self._top(self._host.used[0]))
            files = FilesV2(top)
            relative = top[len(self._host.used[0].mount) :]
        else:
            files = FilesV1(by_controller)
        return Cgroup(
            slot,
            relative_path=relative,
            directories=directories,
            members=members,
            used=frozenset(used),
            procs_files=tuple(joined),
            files=files,
            made=self._made,
        )

    def of_process(self, slot: str, pid: int) -> Cgroup:
        """The cgroup of a process that somebody else placed, and will remove. Raises HostFailed.

        It is below the root in each hierarchy that is used. Whether it is the container's alone is for the
        caller to see, by its processes, before anything in it is changed or killed.
        """
        found = cgroupfs.parse_self_cgroup(cgroupfs.read(f"/proc/{pid}/cgroup"))
        directories: dict[str, str] = {}
        for hierarchy in self._host.mounted:
            keys = hierarchy.controllers if hierarchy.version == 1 else frozenset({""})
            place = next((found[key] for key in sorted(keys) if key in found), None)
            if place is None:
                continue
            path = hierarchy.path_of(place)
            if place != "/" and hierarchy.name_of(path) == place:
                directories[hierarchy.mount] = path
            elif hierarchy in self._host.used:
                raise errors.HostFailed(f"process {pid} has no cgroup of its own in {hierarchy.mount}")
        return self._cgroup(slot, directories)

    def leftovers(self) -> list[Cgroup]:
        """Cgroups of an earlier daemon of the same name, wherever in the hierarchies it lived.

        Those that this tree made are left out. Blocks while it walks the hierarchies: for the start of a
        daemon, not for the hot path.
        """
        found: dict[tuple[str, int], dict[str, str]] = {}
        for hierarchy in self._host.mounted:
            seen: dict[str, int] = {}
            for top in cgroupfs.named(hierarchy.mount, f"{PREFIX}{self.name}"):
                if top != self._top(hierarchy):
                    self._strays.add(top)
                with contextlib.suppress(OSError), os.scandir(top) as entries:
                    for entry in entries:
                        if not entry.is_dir(follow_symlinks=False) or entry.name in self._made:
                            continue
                        nth = seen[entry.name] = seen.get(entry.name, -1) + 1
                        found.setdefault((entry.name, nth), {})[hierarchy.mount] = entry.path
        return [self._cgroup(slot, directories) for (slot, _), directories in sorted(found.items())]

    def close(self) -> None:
        """Remove the tree's own directories; one that still holds a slot is left. Safe twice."""
        for hierarchy in self._host.mounted:
            self._strays.add(self._top(hierarchy))
        for path in self._strays:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        self._strays.clear()
        self._move_back()


def _enable(directory: str, controllers: frozenset[str]) -> None:
    """Pass controllers down to the children of a v2 cgroup. Raises OSError."""
    passed = frozenset((cgroupfs.read_or_none(f"{directory}/cgroup.subtree_control") or "").split())
    missing = sorted(controllers - passed)
    if missing:
        cgroupfs.write(f"{directory}/cgroup.subtree_control", " ".join(f"+{name}" for name in missing))
