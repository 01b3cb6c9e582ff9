"""What has to hold of sessions when daemons were killed again and again while calls ran in them.

Theory of operation.  A call in a session writes its key into a file there, ``log``. What that has at a
checkpoint is compared with the records of the calls: of each that is recorded as ended by itself, or, where
the session keeps a container, of each since the checkpoint that its container began with.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from crash_caller import KEPT, SESSION
from daemons import until

from sandboxd import Client, canonical, errors, models
from sandboxd.journal import schema
from sandboxd.workspace import layer, stacks, tables
from sandboxd.workspace.audit import examine
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["CrashedSessions"]

T = TypeVar("T")


@dataclass
class _Life:
    """A container: the calls that ended in it, and what ``log`` had come to with the last of them."""

    calls: list[models.Invocation]
    base: bytes
    """What the session's files had when it began."""
    log: bytes
    ends: dict[str, int]
    """How much of it was there after each call, by its key."""

    @property
    def since(self) -> str:
        return self.calls[0].id


class CrashedSessions:
    """Of a daemon that is asked for nothing meanwhile. ``starts``: when daemons were started."""

    def __init__(
        self,
        client: Client,
        state: Path,
        *,
        lines: list[dict[str, Any]],
        starts: list[int],
        chance: random.Random,
        most: int,
    ) -> None:
        """``lines`` are those that callers wrote; ``most`` of what costs a request each is looked at."""
        self._client = client
        self._state = state
        self._lines = lines
        self._starts = starts
        self._chance = chance
        self._most = most

    def check(self, uids: Iterable[int]) -> None:
        """Compare all of it."""
        calls = self._calls()
        for uid in uids:
            self._check_lines(uid, [one for one in calls if one.caller.uid == uid])
        for session in {one.session for one in calls if one.session and one.policy.name == "kept"}:
            self._check_kept(session, [one for one in calls if one.session == session])
        self._check_layers(calls)

    def _calls(self) -> list[models.Invocation]:
        connection = schema.connect_reader(self._state / "journal.sqlite3")
        try:
            query = "SELECT doc FROM invocations WHERE doc IS NOT NULL AND key IS NOT NULL ORDER BY id"
            found = connection.execute(query).fetchall()
        finally:
            connection.close()
        return [models.Invocation.model_validate_json(doc) for (doc,) in found]

    def _some(self, found: Iterable[T]) -> list[T]:
        found = list(found)
        return self._chance.sample(found, min(len(found), self._most))

    # Sessions of which each call has a container of its own.

    def _check_lines(self, uid: int, calls: list[models.Invocation]) -> None:
        """What a session's files hold is what the records of its calls say, in their order."""
        own = [one for one in calls if one.labels.get("kind") == "session" and _exited(one)]
        os.seteuid(uid)
        try:
            has = self._client.run(["cat", "log"], policy="counted", session=SESSION)
        except errors.NotFound:
            assert own == []
            return
        finally:
            os.seteuid(0)
        assert has.stdout is not None
        lines = (has.stdout.text or "").split()
        assert sorted(lines) == sorted(str(one.key) for one in own), f"session of {uid}"
        numbers = {canonical.digest_bytes(f"{number}\n".encode()) for number in range(1, len(own) + 1)}
        assert {one.stdout.digest for one in own if one.stdout is not None} == numbers

    def _check_layers(self, calls: list[models.Invocation]) -> None:
        """Each has what its calls did that are recorded as ended by themselves, and nothing else."""
        layers = self._state / "sessions" / "layers"
        until(self._all_written, "every layer is on disk as files", 10)
        connection = schema.connect_reader(self._state / "journal.sqlite3")
        try:
            query = "SELECT id, head FROM sessions WHERE name IS NOT ?"
            sessions = connection.execute(query, (KEPT,)).fetchall()
            kept = connection.execute(
                "SELECT layer, content, digest, call, session FROM checkpoints WHERE layer IS NOT NULL"
            ).fetchall()
            below = {
                id_: [layers / name for name in stacks.stack_of(connection, head).layers]
                for id_, head in sessions
            }
            audit = examine(connection, self._state)
        finally:
            connection.close()
        assert audit.damaged == []
        of_call = {call: digest for _, _, digest, call, session in kept if session in below}
        for id_, stack in below.items():
            done = [one for one in calls if one.session == id_ and _exited(one)]
            with View(stack) as view:
                log = view.find(b"log")
                content = b"" if log is None else b"".join(view.content(log))
            assert Counter(content.decode().split()) == Counter(one.key for one in done)
            assert all(of_call[one.id] == one.checkpoint_after for one in done)
        assert {one.id for one in calls if one.checkpoint_after != one.checkpoint_before} == set(of_call)
        for name, digest, *_ in self._some(kept):
            fd = os.open(layers / name, layer.DIRECTORY)
            try:
                assert layer.measure(fd).digest == digest
            finally:
                os.close(fd)

        def referenced() -> bool:
            connection = schema.connect_reader(self._state / "journal.sqlite3")
            try:
                known = tables.referenced(connection)
            finally:
                connection.close()
            return {one.name for one in layers.iterdir()} == known | {"empty"}

        until(referenced, "no layer is there that nothing refers to")

    def _all_written(self) -> bool:
        connection = schema.connect_reader(self._state / "journal.sqlite3")
        try:
            return not tables.packs(connection, after="", limit=1)
        finally:
            connection.close()

    # Sessions that keep a container.

    def _check_kept(self, session: str, calls: list[models.Invocation]) -> None:
        """Each call found what those before it in its container had left, and each container what was kept.

        Where its predecessor was lost, the first call says so; else that ended with all that it had.
        """
        lives = self._lives(session, [one for one in calls if _exited(one)])
        known = {key: life for life in lives for key in life.ends}
        answers = [line for line in self._lines if line.get("after") in known]
        ending = {line["ending"] for line in self._lines if "ending" in line}
        # where a daemon died meanwhile, what was asked to end may have been lost, and that was acknowledged
        sure = [
            line
            for line in answers
            if "checkpoint" in line or not self._restarted(known[line["after"]].calls[-1], line["epoch"])
        ]
        for line in self._some(sure):
            life = known[line["after"]]
            told = line.get("checkpoint") or line["ended"]
            assert self._log(session, told) == life.log[: life.ends[line["after"]]], line
        perhaps = ending - {line["after"] for line in sure if "ended" in line}
        before: _Life | None = None
        for life in lives:
            self._check_beginning(life, before, perhaps)
            before = life
        container = self._client.session(session).container
        if container is not None and container.state == "live":
            with suppress(errors.StateConflict):  # its time was over
                self._client.end_session(session)
            assert before is not None
            assert container.since == before.since
            assert self._log(session, self._client.session(session).head.digest) == before.log
        assert self._client.session(session).container is None or container is not None

    def _lives(self, session: str, calls: list[models.Invocation]) -> list[_Life]:
        found: list[_Life] = []
        for one in calls:
            assert one.container is not None
            assert one.container.ended is None
            assert one.checkpoint_before == one.checkpoint_after, "files are kept by checkpoints alone"
            assert one.stdout is not None
            if one.container.number == 1:
                assert one.container.since == one.id
                base = self._log(session, one.checkpoint_before)
                found.append(_Life([], base, base, {}))
            life = found[-1]
            life.calls.append(one)
            life.log += f"{one.key}\n".encode()
            life.ends[str(one.key)] = len(life.log)
            assert (one.container.since, one.container.number) == (life.since, len(life.calls))
            said = f"{hashlib.sha256(life.log).hexdigest()}  -\n"
            assert one.stdout.digest == canonical.digest_bytes(said.encode()), one.key
        return found

    def _check_beginning(self, life: _Life, before: _Life | None, perhaps: set[str]) -> None:
        first = life.calls[0]
        assert first.container is not None
        lost = first.container.lost
        if before is None:
            assert (life.base, lost) == (b"", None)
            return
        last = before.calls[-1]
        assert before.log.startswith(life.base)
        assert life.base.startswith(before.base)
        if lost is not None:
            assert (lost.since, lost.calls) == (before.since, len(before.calls))
            assert first.times.started is not None
            assert self._restarted(last, first.times.started), "it was lost, and the daemon lived on"
            assert first.outcome is not None
            assert "had lost the container" in first.outcome.message
        elif last.key not in perhaps:
            assert life.base == before.log, "it was lost, and nobody said so"

    def _restarted(self, since: models.Invocation, until_: int) -> bool:
        """Whether a daemon was started after a call had ended, and before a moment."""
        assert since.times.ended is not None
        return any(since.times.ended < start < until_ for start in self._starts)

    def _log(self, session: str, checkpoint: str | None) -> bytes:
        """What ``log`` has at a checkpoint, which is there."""
        found = self._client.session_files(session, checkpoint=checkpoint).files
        if "log" not in {one.path for one in found}:
            return b""
        with self._client.read_file(session, "log", checkpoint=checkpoint) as chunks:
            return b"".join(chunks)


def _exited(call: models.Invocation) -> bool:
    return call.outcome is not None and call.outcome.cause == "exited"
