"""Cgroups of slots: made, limited, read, killed and removed; v1, v2 and hybrid hosts.

Theory of operation. A daemon has one *tree*, a directory ``sandboxd-NAME`` below its own cgroup in every
hierarchy that is used, so that whatever limits the daemon limits its slots too. A slot has one directory
in the tree. Nothing else writes there: no agent, no runtime hook.

On v2, a cgroup whose controllers are passed down may hold no process ("no internal processes"). So the
daemon moves itself to a leaf ``daemon`` beside the tree, which needs its own cgroup to be delegated to it
and to hold nothing else (a systemd unit with ``Delegate=yes``, a container whose entry point it is).
Started from a login session, which other processes share, the tree goes to the root of the visible
hierarchy instead, as other container engines do. ``CgroupTree.place`` says which.

Processes join by writing ``0`` to each of ``Cgroup.procs_files``, before they execute anything, so that
nothing of a slot is ever outside its limits.
"""

from __future__ import annotations

# ruff: noqa: PTH102, PTH103, PTH106, PTH110, PTH119, PTH120  -- building a Path costs more than these calls
import contextlib
import errno
import os
import re
import time
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from sandboxd import errors
from sandboxd.kernel import cgroupfs, pidfd
from sandboxd.kernel.cgroup_part import Part
from sandboxd.kernel.cgroup_v1 import FilesV1
from sandboxd.kernel.cgroup_v2 import FilesV2
from sandboxd.kernel.cgroupfs import CgroupLimits, CgroupUsage, Hierarchy, Host, Interface

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Cgroup", "CgroupLimits", "CgroupTree", "CgroupUsage"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
PREFIX = "sandboxd-"
LEAF = "daemon"
KILL_SECONDS = 30.0  # a dying 3 GB process takes 0.2 s; beyond this the kernel is stuck
REMOVE_SECONDS = 2.0
POLL_SECONDS = 0.001
FORKS_ALLOWED_PASSES = 3


class Cgroup:
    """The cgroup of one slot. Methods block for one or a few small reads unless they say otherwise."""

    def __init__(
        self,
        name: str,
        *,
        relative_path: str,
        directories: dict[str, str],
        members: dict[str, str],
        used: frozenset[str],
        procs_files: tuple[str, ...],
        files: Interface,
        made: set[str],
    ) -> None:
        self.name = name
        self.relative_path = relative_path
        """For ``linux.cgroupsPath`` of an OCI runtime. Absolute on v2. Relative on v1, where runc takes it
        from *its own* cgroup in each hierarchy: start the runtime from the daemon's cgroup, not from
        inside the slot's."""
        self.procs_files = procs_files
        """Writing ``0`` to each puts the writer in."""
        self.peak_is_resettable = True
        """False after ``reset_peak`` found that the peak will be that of the cgroup's whole life."""
        self._directories = directories
        """Hierarchy's mount point to our directory in it: those that exist or that a runtime may make."""
        self._members = members
        """Controllers as /proc/PID/cgroup lists them ("" for v2) to the cgroup's name there."""
        self._used = used
        """Those of the hierarchies that we put processes into; a runtime may use more."""
        self._files = files
        self._made = made
        """Names of those that the tree made, for as long as they are there."""
        self._denied_before_kill: int | None = None

    def __getstate__(self) -> dict[str, object]:
        """For the slot's way to another process: without the tree's list, which stays with the tree."""
        return {**self.__dict__, "_made": set()}

    @property
    def peak_fd(self) -> int | None:
        """What ``reset_peak`` keeps open until ``close``, if anything; to be set after a way by pickle."""
        return self._files.peak_fd

    @peak_fd.setter
    def peak_fd(self, fd: int | None) -> None:
        self._files.peak_fd = fd

    def close(self) -> None:
        """Let go of that. Safe to call twice."""
        self._files.close()

    def set(self, limits: CgroupLimits) -> None:
        """Write every limit. Raises ControlNotEnforced with the control's name; the rest stays written."""
        self._files.set(limits)

    def read_limits(self) -> dict[str, tuple[str, str]]:
        """What the kernel has now: ``memory, swap, pids, cpu, io`` to (value, file it was read from).

        Memory and swap are decimal bytes (memory rounded down to pages by v1), cpu thousandths of a CPU,
        io ``MAJ:MIN rbps=N wbps=N`` joined by ``"; "``; ``max`` stands for no limit. ``io`` is absent
        where the host has no controller for it.
        """
        return self._files.read_limits()

    def join(self, pid: int) -> None:
        """Put a process in. On v1 that waits for a grace period of the kernel. Raises HostFailed."""
        for path in self.procs_files:
            try:
                cgroupfs.write(path, str(pid))
            except OSError as error:
                raise errors.HostFailed(f"{path}: {error.strerror}", file=path) from error

    def contains(self, pid: int) -> bool:
        """Whether a process is in this cgroup (or below) in every hierarchy we use; False if it is gone."""
        try:
            found = cgroupfs.parse_self_cgroup(cgroupfs.read(f"/proc/{pid}/cgroup"))
        except errors.HostFailed:
            return False
        return all(
            f"{found.get(controller, '')}/".startswith(f"{self._members[controller]}/")
            for controller in self._used
        )

    def processes(self) -> list[int]:
        """Process ids, as this daemon's pid namespace numbers them, in any hierarchy, sub-cgroups included.

        A process of another pid namespace branch reads as 0 and is left out.
        """
        found: set[int] = set()
        for directory in self._directories.values():
            for path in cgroupfs.subtree(directory):
                text = cgroupfs.read_or_none(f"{path}/cgroup.procs") or ""
                found.update(int(line) for line in text.split())
        found.discard(0)
        return sorted(found)

    def usage(self) -> CgroupUsage:
        """All counters. Raises HostFailed when the cgroup is gone."""
        return self._files.usage()

    def cpu_total(self) -> int:
        """Microseconds of CPU used so far, in one read."""
        return self._files.cpu_total()

    def memory(self) -> int:
        """Bytes that it holds now, in one read. Raises HostFailed when the cgroup is gone."""
        return self._files.memory()

    def oom_kills(self) -> int:
        """How many processes the kernel killed for memory."""
        return self._files.oom_kills()

    def memory_limit_hits(self) -> int:
        """How often usage met the memory limit; most hits end in reclaim, not in a kill."""
        return self._files.memory_limit_hits()

    def pids_denied(self) -> int:
        """How many forks failed at the pids limit, those after ``kill`` began left out."""
        return self._files.pids_denied() if self._denied_before_kill is None else self._denied_before_kill

    def reset_peak(self) -> None:
        """Let ``memory_peak`` count from now; ``peak_is_resettable`` turns False where that cannot be."""
        self.peak_is_resettable = self._files.reset_peak()

    def thaw_and_unthrottle(self) -> None:
        """Thaw every process and lift the CPU quota: else who was killed takes seconds, or for ever."""
        self._files.thaw_and_unthrottle()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """No process runs within the block. Entering blocks for some ms, and raises HostFailed."""
        try:
            self._files.freeze()
            yield
        finally:
            self._files.thaw()

    def part(self, name: str) -> Part:
        """Make a cgroup within this one, whose processes can be told from the others. Raises HostFailed."""
        return Part(self._files.part(name))

    def kill_at_once(self) -> None:
        """Kill every process in one step, on v2; then let all run, to their end. Does not wait for it.

        The quota is lifted after the signal: whoever is ended for its CPU time does not get more of it. On v1
        whoever calls has killed PID 1 before.
        """
        self._files.kill_all()
        self._files.thaw_and_unthrottle()

    def kill(self, spare: int | None = None) -> None:
        """End every process but ``spare`` and return when no other is left (zombies do not count).

        Blocks: some ms, up to 30 s for a stuck kernel, then raises HostFailed. Signals go through pidfds
        that were checked against the cgroup after they were opened, so a reused pid is never hit.
        """
        limit, passes = time.monotonic() + KILL_SECONDS, 0
        while True:
            pids = [pid for pid in self.processes() if pid != spare]
            if not pids:
                return
            if time.monotonic() > limit:
                raise errors.HostFailed(f"processes of {self.name} do not die", processes=pids[:16])
            if passes == FORKS_ALLOWED_PASSES:  # it forks faster than we kill
                with contextlib.suppress(errors.HostFailed):
                    self._denied_before_kill = self._files.pids_denied()
                self._files.forbid_forks()
            if passes or spare is not None or not self._files.kill_all():
                for pid in pids:
                    pidfd.kill_if(pid, partial(self._has, pid))
            if not passes:
                self.thaw_and_unthrottle()
            passes += 1
            time.sleep(POLL_SECONDS)

    def _has(self, pid: int) -> bool:
        # A process can be between two of the hierarchies while it joins: one that names us is enough.
        found = cgroupfs.parse_self_cgroup(cgroupfs.read_or_none(f"/proc/{pid}/cgroup") or "")
        return any(f"{found.get(key, '')}/".startswith(f"{name}/") for key, name in self._members.items())

    def remove(self) -> None:
        """Remove the cgroup from every hierarchy, also those that only a runtime used. Safe twice.

        Blocks up to 2 s for tasks that are on their way out; then, or while a process lives in it,
        raises HostFailed.
        """
        self._files.close()
        limit = time.monotonic() + REMOVE_SECONDS
        for directory in self._directories.values():
            while not cgroupfs.remove_tree(directory):
                if time.monotonic() > limit or self.processes():
                    raise errors.HostFailed(
                        f"cgroup {directory} is busy", file=directory, processes=self.processes()[:16]
                    )
                time.sleep(POLL_SECONDS)
        self._made.discard(self.name)


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
