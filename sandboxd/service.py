"""Everything that the API offers: the calls, and what can be read beside them.

Implements ``api.service.Service``. Policies and images are looked at in worker threads, since both
are files.
"""

from __future__ import annotations

import json
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors, models
from sandboxd.call import off_the_loop
from sandboxd.calls import Again, Calls
from sandboxd.journal.records import Refusal
from sandboxd.metrics import Numbers, exposition
from sandboxd.policy import check_text, explain
from sandboxd.pool import Fate, HandOver
from sandboxd.replay import compared, prepared, replayable
from sandboxd.room import Room
from sandboxd.sessionfiles import SessionFiles
from sandboxd.sessionreplay import KEPT, line_of, replayed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from sandboxd.api.identity import Caller
    from sandboxd.archive import Archive
    from sandboxd.config import Config
    from sandboxd.images import ImageStore
    from sandboxd.journal.search import Query
    from sandboxd.policy import Policy
    from sandboxd.reload import PolicyStore
    from sandboxd.sessions import Sessions

__all__ = ["DaemonService"]

MOST_FILES = 1000
"""Files that a call changed in its session, and that are compared."""

log = structlog.get_logger("sandboxd.secrets")


class DaemonService(Calls):
    """The daemon, as its API sees it. ``config`` and ``runtime`` are for reading."""

    def __init__(
        self,
        config: Config,
        *,
        version: str,
        engine_name: str,
        runtime: str,
        policies: PolicyStore,
        images: ImageStore,
        sessions: Sessions,
        archive: Archive,
        **parts: Any,
    ) -> None:
        """``parts`` are the others of ``Calls``."""
        super().__init__(state=config.state, policies=policies, images=images, sessions=sessions, **parts)
        self._policies = policies
        self._images = images
        self.config = config
        self.files = SessionFiles(
            sessions,
            config.state / "sessions",
            room=Room(config.http.spool, "bodies of files for sessions"),
            body_time=config.http.body_time,
            digests=self.digests,
        )
        self._lines = anyio.CapacityLimiter(1)
        self._archive = archive
        archive.references.append(self.released)
        self._version = version
        self._engine_name = engine_name
        self._runtime = runtime

    def _info(self, policy: Policy, *, resolved: bool) -> models.PolicyInfo:
        problems = [problem for problem in self._policies.problems if problem.file == policy.file]
        return models.PolicyInfo(
            name=policy.name,
            digest=policy.digest,
            description=policy.description,
            file=policy.file,
            image=policy.image,
            resolved=policy.spec.resolved() if resolved else None,
            problems=problems,
        )

    async def policies(self, caller: Caller) -> list[models.PolicyInfo]:
        """The policies that the caller may use."""
        current = self._policies.current
        return [
            self._info(current.get(name), resolved=False) for name in current.names() if caller.may_use(name)
        ]

    async def policy(self, caller: Caller, name: str) -> models.PolicyInfo:
        """One policy with its resolved form. Raises NotFound, NotPermitted."""
        return self._info(self._planner.policy_for(caller, name), resolved=True)

    async def check_policy(self, caller: Caller, text: str, name: str | None) -> list[models.PolicyProblem]:
        """All that is wrong with the text of a policy file; nothing is stored."""
        del caller
        file = f"{name or 'policy'}.yaml"
        return list(await anyio.to_thread.run_sync(check_text, text, file, self._policies.current))

    async def plan(self, caller: Caller, request: models.Request) -> models.PlanDocument:
        """What would run, exactly, and where each value came from; nothing runs."""
        await self._planner.know_image(caller, request)
        policy, made = await off_the_loop(request, self._planner.plan_for, caller, request)
        return models.PlanDocument(digest=made.digest, plan=made.to_json(), explain=explain(policy, made))

    async def images(self, caller: Caller) -> list[models.ImageInfo]:
        """The images of the store, with the policies that use them."""
        del caller
        found = await anyio.to_thread.run_sync(self._images.list)
        current = self._policies.current
        users: dict[str, list[str]] = {}
        for name in current.names():
            users.setdefault(current.get(name).image, []).append(f"policy {name}")
        return [
            info.model_copy(update={"used_by": users.get(info.name, []) + users.get(info.digest, [])})
            for info in found
        ]

    def slots(self, caller: Caller) -> list[models.SlotInfo]:
        """The containers that the daemon holds, of all callers. Raises NotPermitted."""
        _operators_only(caller)
        return self._pool.slots()

    async def metrics(self, caller: Caller) -> bytes:
        """What the daemon counts, in the text format of Prometheus. Raises NotPermitted."""
        _operators_only(caller)
        numbers = Numbers(
            slots=self._pool.slots(),
            made=self._pool.made,
            handed_over={kind: self._pool.handed_over[kind] for kind in get_args(HandOver)},
            fates={fate: self._pool.fates[fate] for fate in get_args(Fate)},
            calls={cause: self.ended[cause] for cause in models.Cause},
            running=self._scheduler.running,
            queued=self._scheduler.queued,
            memory_used=self._scheduler.memory_used,
            memory=self._scheduler.memory,
        )
        return await anyio.to_thread.run_sync(exposition, numbers)

    def may_store(self, caller: Caller) -> None:
        """Raise NotPermitted for who may not deal with secrets."""
        _operators_only(caller)

    async def secrets(self, caller: Caller) -> list[models.SecretInfo]:
        """The stored secrets. Raises NotPermitted."""
        _operators_only(caller)
        return await anyio.to_thread.run_sync(self._secrets.list)

    async def secret(self, caller: Caller, name: str) -> models.SecretInfo:
        """One of them. Raises NotPermitted, NotFound."""
        _operators_only(caller)
        return self._secrets.get(name)

    async def set_secret(self, caller: Caller, name: str, value: bytes) -> models.SecretInfo:
        """Store one. Raises what ``SecretStore.set`` does, and NotPermitted."""
        return await self._changed("set", caller, self._secrets.set, name, value)

    async def rotate_secret(self, caller: Caller, name: str, value: bytes) -> models.SecretInfo:
        """Give one a new value. Raises what ``SecretStore.rotate`` does, and NotPermitted."""
        return await self._changed("rotated", caller, self._secrets.rotate, name, value)

    async def remove_secret(self, caller: Caller, name: str) -> None:
        """Forget one. Raises NotPermitted, NotFound."""
        _operators_only(caller)
        await anyio.to_thread.run_sync(self._secrets.remove, name)
        log.info("secret removed", name=name, uid=caller.uid)

    async def _changed(
        self,
        what: str,
        caller: Caller,
        change: Callable[[str, bytes], models.SecretInfo],
        name: str,
        value: bytes,
    ) -> models.SecretInfo:
        _operators_only(caller)
        info = await anyio.to_thread.run_sync(change, name, value)
        log.info("secret stored", how=what, name=name, version=info.version, uid=caller.uid)
        return info

    async def search(self, caller: Caller, query: Query) -> models.SearchResults:
        """A page of the caller's calls that fit; an operator's are all. Raises InvalidRequest."""
        if not caller.sees_all:
            if query.uid not in {None, caller.uid}:
                raise errors.NotPermitted("only operators search the calls of others", uid=query.uid)
            query = replace(query, uid=caller.uid)
        return await self._archive.search(caller.uid, query)

    async def replay(self, caller: Caller, id: str, policy: str | None) -> models.Replay:  # noqa: A002
        """Run a recorded call again, and say what differs. Its going away cancels it.

        Raises NotFound, StateConflict, Pruned, NotPermitted, PolicyInvalid, and what ``submit`` does.
        """
        recorded = await self.get(caller, id)
        replayable(recorded)
        async with self._fork_of(caller, recorded, policy) as session:
            return await self.rerun(caller, recorded, policy, session)

    async def replay_session(
        self, caller: Caller, named: str, policy: str | None, *, keep: bool
    ) -> AsyncGenerator[models.ReplayEvent]:
        """Run the calls of a session again, and say of each what differs as it ends.

        Raises NotFound, StateConflict, Pruned, NotPermitted before the first of them runs.
        """
        if policy is not None:
            self._planner.policy_for(caller, policy)
        async with self._lines:  # each looks at all records
            line = await line_of(self._journal, self.sessions, caller, named)
        return replayed(self, self.sessions, caller, line, policy=policy, keep=keep)

    async def rerun(
        self, caller: Caller, recorded: models.Invocation, policy: str | None, session: str | None
    ) -> models.Replay:
        """Run a recorded call again in a session that stands as its own did. Raises as ``replay``."""
        replayable(recorded)
        request = await self._journal.request(recorded.id)
        under = await self._recorded_policy(caller, recorded, strict=policy is None)
        asked = prepared(request, recorded, policy or recorded.policy.name)
        again = None if policy is not None else Again(under, recorded.image.digest)
        asked = asked.model_copy(update={"session": session})
        accepted = await self.submit(caller, asked, tied=True, again=again)
        try:
            done = await self.wait(caller, accepted.id)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.cancel(caller, accepted.id)
            raise
        files = [await self._files_of(caller, one) for one in (recorded, done)]
        return compared(recorded, done, request, under, files=(files[0], files[1]))

    async def _files_of(self, caller: Caller, call: models.Invocation) -> models.SessionDiff | None:
        """What a call changed in its session; None where that is not to be had."""
        if call.session is None or call.checkpoint_before is None:
            return None
        try:
            return await self.files.diff(
                caller,
                call.session,
                since=call.checkpoint_before,
                to=call.checkpoint_after,
                text=False,
                limit=MOST_FILES,
                sound=True,
            )
        except errors.Refused as error:
            log.info("files of a call are not compared", id=call.id, reason=str(error))
            return None

    async def _recorded_policy(
        self, caller: Caller, recorded: models.Invocation, *, strict: bool
    ) -> Policy | None:
        """The policy that a call ran under; None where it is not to be had, unless ``strict``."""
        name, digest = recorded.policy.name, recorded.policy.digest
        try:
            found = await self._archive.recorded_policy(name, digest)
        except (errors.NotFound, errors.PolicyInvalid):
            if strict:
                raise
            return None
        if strict:
            in_force = self._policies.current.policies.get(name)
            if not caller.may_use(name):
                raise errors.NotPermitted(f"policy {name!r} is not yours to use")
            if not caller.sees_all and (in_force is None or in_force.digest != digest):
                raise errors.NotPermitted(
                    f"policy {name!r} has changed since; only operators run a call again as it was then. "
                    "Name a policy to run it under that",
                )
        return found

    @asynccontextmanager
    async def _fork_of(
        self, caller: Caller, recorded: models.Invocation, policy: str | None
    ) -> AsyncIterator[str | None]:
        """A session that stands where the call's did before it, for as long as this lasts."""
        if recorded.session is None:
            yield None
            return
        if recorded.checkpoint_before is None:
            raise errors.NotFound(f"call {recorded.id!r} does not say where its session stood")
        fork = models.SessionFork(checkpoint=recorded.checkpoint_before, policy=policy, ttl=KEPT)
        await self.sessions.check(caller, recorded.session, recorded.checkpoint_before)
        found = await self.sessions.fork(caller, recorded.session, fork)
        try:
            yield found.id
        finally:
            with anyio.CancelScope(shield=True):
                await self.sessions.delete(caller, found.id)

    async def lineage(self, caller: Caller, digest: str) -> models.Lineage:
        """The caller's calls that released a content, or all for an operator. Raises NotFound."""
        return await self._archive.lineage(digest, None if caller.sees_all else caller.uid)

    async def prune(self, caller: Caller, *, age: int | None, size: int | None) -> models.Pruning:
        """Remove the oldest bodies, output and artifacts now. Raises NotPermitted."""
        _operators_only(caller)
        done = await self._archive.prune(age, size)
        await self._archive.sweep()
        return done

    async def refused(self, caller: Caller, error: errors.Refused, summary: dict[str, Any]) -> None:
        """Keep a refusal for the operator; a journal that cannot be written does not hide the refusal."""
        at = time.time_ns() // 1000
        request = json.dumps(summary, ensure_ascii=True, default=str)
        with suppress(errors.SandboxdError):
            await self._journal.refused(Refusal(at, caller.uid, error.code, str(error), request))

    def health(self) -> models.Health:
        """Whether the daemon takes calls, and what is wrong with the policy files."""
        return models.Health(
            status="draining" if self.draining else "ready",
            version=self._version,
            engine=self._engine_name,
            runtime=self._runtime,
            running=self._scheduler.running,
            queued=self._scheduler.queued,
            problems=list(self._policies.problems),
        )


def _operators_only(caller: Caller) -> None:
    if not caller.sees_all:
        raise errors.NotPermitted("only operators see what the daemon holds for all callers")
