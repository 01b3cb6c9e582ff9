"""The cgroup of a slot: limited, read, killed and removed; ``cgroup_tree.py`` makes it.

Processes join by writing ``0`` to each of ``Cgroup.procs_files``, before they execute anything, so that
nothing of a slot is ever outside its limits.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.kernel import cgroupfs, pidfd
from sandboxd.kernel.cgroup_part import Part
from sandboxd.kernel.cgroupfs import CgroupLimits, CgroupUsage, Interface

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Cgroup", "CgroupLimits", "CgroupUsage"]

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
