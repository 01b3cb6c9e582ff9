"""Policies that follow their files.

Theory of operation. ``PolicyStore.current`` is one immutable ``PolicySet``; a reload makes another
and swaps the reference, so a call that has its policy keeps it and later calls get the new one. The
directories are watched with inotify, and looked at every few seconds besides, because inotify does
not see every change: a directory that appears later, a network file system, the target of a symbolic
link. Either way it is the fingerprint of the files that decides whether there is anything to load.

An edit that is wrong keeps the last good policy of that name, if the floors of now still allow it,
and its problems stay in ``problems`` until the file is good or gone. A floor that is wrong keeps
everything as it was.
"""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
from anyio import to_thread
from watchfiles import awatch

from sandboxd.policy.load import PolicySet, load_policies, policy_files, rebuild

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sandboxd.models import PolicyProblem
    from sandboxd.policy import Policy

__all__ = ["PolicyStore"]

POLL = 2.0  # seconds: how late a change may be seen that inotify does not report
DEBOUNCE = 100  # milliseconds: an editor's rename and write become one reload
Fingerprint = tuple[tuple[str, int, int, int, int], ...]

log = structlog.get_logger(__name__)


class PolicyStore:
    """Holds the current policies. ``current`` may be read from any thread at any time."""

    def __init__(
        self, dirs: Sequence[Path], floor: Path | None = None, *, host_network: bool = False
    ) -> None:
        """Load the policies at once. Raises OSError if a directory cannot be listed.

        ``host_network``: whether they may have the host's.
        """
        self._dirs = tuple(dirs)
        self._floor = floor
        self._host_network = host_network
        self._lock = threading.Lock()
        self._seen = self._fingerprint()
        self._current = self._load()

    @property
    def current(self) -> PolicySet:
        """The policies of now; hold on to the set to see one moment throughout."""
        return self._current

    def get(self, name: str) -> Policy:
        """The policy of a name as it now is. Raises as ``PolicySet.get``."""
        return self._current.get(name)

    @property
    def problems(self) -> tuple[PolicyProblem, ...]:
        """What is wrong with the files as they are now."""
        return self._current.problems

    def reload(self) -> PolicySet:
        """Read all files again and swap. Raises OSError if a directory cannot be listed; nothing changes."""
        with self._lock:
            # taken before the files are read: a change in between is seen as one more change
            seen = self._fingerprint()
            self._current = _keep_good(self._current, self._load())
            self._seen = seen
            return self._current

    def _load(self) -> PolicySet:
        return load_policies(self._dirs, self._floor, host_network=self._host_network)

    async def watch(self) -> None:
        """Reload whenever a file changes, until cancelled."""
        while True:
            present = [path for path in self._watched() if path.is_dir()]
            await (self._follow(present) if present else asyncio.sleep(POLL))
            await self._reload_if_changed()

    async def _follow(self, present: list[Path]) -> None:
        """Return when the set of directories, or inotify, is no longer what it was."""
        changes = awatch(
            *present,
            debounce=DEBOUNCE,
            step=20,
            recursive=False,
            rust_timeout=int(POLL * 1000),
            yield_on_timeout=True,
            ignore_permission_denied=True,
            watch_filter=None,
        )
        try:
            # closed here and not by the collector: it holds inotify's descriptor and a thread
            async with aclosing(changes):
                async for _ in changes:
                    await self._reload_if_changed()
                    if present != [path for path in self._watched() if path.is_dir()]:
                        return
        except (OSError, RuntimeError) as error:
            # a directory went away while it was being watched, or the host's inotify watches are used up
            log.warning("policies.watch_failed", error=str(error))
            await asyncio.sleep(POLL)

    def _watched(self) -> list[Path]:
        return [*self._dirs, *([self._floor.parent] if self._floor else [])]

    async def _reload_if_changed(self) -> None:
        try:
            # anyio's threads are waited for when this is cancelled, so nothing is read after the end
            if await to_thread.run_sync(self._fingerprint) == self._seen:
                return
            loaded = await to_thread.run_sync(self.reload)
        except OSError as error:
            log.error("policies.reload_failed", error=str(error))  # noqa: TRY400, the error is all there is to say
            return
        log.info("policies.reloaded", policies=len(loaded.policies), problems=len(loaded.problems))
        for problem in loaded.problems:
            log.error("policies.problem", problem=str(problem), code=problem.code)

    def _fingerprint(self) -> Fingerprint:
        files = policy_files(self._dirs)
        if self._floor is not None:
            files.append(self._floor)
        found = []
        for path in files:
            try:
                state = os.stat(path)  # noqa: PTH116, follows links: the target is what is loaded
            except OSError:
                found.append((str(path), 0, 0, 0, 0))
                continue
            found.append((str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
        return tuple(found)


def _keep_good(old: PolicySet, new: PolicySet) -> PolicySet:
    """The new set, with the last good policy of every name whose file is wrong now."""
    if new.floor_failed and old.policies:
        return replace(old, problems=new.problems)
    broken = [name for name in new.files if name not in new.policies and name in old.policies]
    if not broken:
        return new
    kept: dict[str, Policy] = {}
    problems = list(new.problems)
    for name in broken:
        policy, exceeds = rebuild(old.policies[name], new)
        if policy is not None:
            kept[name] = policy
        problems += [problem for problem in exceeds if problem not in problems]
    return replace(new, policies={**new.policies, **kept}, problems=tuple(problems))
