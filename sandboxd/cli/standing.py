"""What ``run-in-sandbox --workspace`` runs in: a session on a directory, or of a copy of it, for one call.

Theory of operation.  Without a key the session is removed once the call has been reported. With one, its
name is made of the key, the directory and what is to come of the call: whoever asks again names the same
session, so that to the daemon it is the same request, and finds the recorded call, and its session with what
it changed. That is removed when all that was asked for has been done, and only then: that it has gone means
that it was. What ends before that leaves it for an hour. Two that ask at once report one after the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sandboxd import errors, units
from sandboxd.cli.checkout import SHOWN, cannot_open, line_of, not_sent, remove, told
from sandboxd.client.agreement import forget
from sandboxd.client.sync import Client

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from sandboxd import models

__all__ = ["Standing", "standing"]

KEPT = "1h"
"""How long a session of one call outlives this process, if that dies before it has removed it."""


@contextmanager
def standing(options: argparse.Namespace, say: Callable[[str], None]) -> Iterator[Standing]:
    """A session for one call, and removed afterwards unless that is to be done again.

    ``options`` are those of the command. Raises as the client does.
    """
    client = Client(options.socket)
    place = Standing(client, options, say)
    try:
        yield place
    finally:
        place.leave()


class Standing:
    """One such session."""

    def __init__(self, client: Client, options: argparse.Namespace, say: Callable[[str], None]) -> None:
        """Make it, or find it: use ``standing``."""
        self._client = client
        self._directory: str = options.workspace
        self._keyed = options.key is not None
        self._pull: bool = options.pull
        self._say = say
        self._is_made = True
        self._stays: str | None = "what was not brought yet" if self._keyed else None
        """What it is not removed for."""
        name = _name(options) if self._keyed else None
        self._is_gone = name is not None and self._has_gone(options.key, name)
        """Whether the key's call is there, and its session was removed."""
        if self._is_gone:
            self.named, self._is_made, self._stays = name or "", False, ""
            return
        self._info = self._made(options, name)
        self._since = self._info.head.id
        if options.upload and (self._is_made or self._is_untouched()):
            self._send()
        elif not self._is_made:
            self._since = self._uploaded() if options.upload else "origin"
        self.named = self._info.name or self._info.id
        """What the request calls it."""

    def _has_gone(self, key: str, name: str) -> bool:
        try:
            self._client.session(name)
        except errors.NotFound:
            return bool(self._client.list(key=key).invocations)
        return False

    def _made(self, options: argparse.Namespace, name: str | None) -> models.SessionInfo:
        lent = None if options.upload else self._directory
        while True:
            try:
                self._is_made = True
                return self._client.create_session(name, policy=options.policy, idle=KEPT, directory=lent)
            except errors.SessionExists as error:
                self._is_made = False
                with suppress(errors.NotFound):  # whoever made it was done just now
                    return self._standing(str(error.details.get("id") or name))
            except OSError as error:
                raise cannot_open(self._directory, "workspace", error) from error

    def _standing(self, session: str) -> models.SessionInfo:
        """One, on its directory again if the daemon was restarted meanwhile. Raises NotFound."""
        found = self._client.session(session)
        return self._client.lend(session, self._directory) if found.checkout == "missing" else found

    def _is_untouched(self) -> bool:
        """Whether who made it died before all of it was sent: then no call can have been asked for."""
        one = self._info
        return one.calls + one.in_flight == 0 and len(self._client.checkpoints(one.id).checkpoints) == 1

    def _uploaded(self) -> str:
        """The checkpoint that the call began with: what was sent, if anything was."""
        first = self._client.checkpoints(self._info.id).checkpoints[::-1][:2]
        return next((one.id for one in reversed(first) if one.call is None), self._info.head.id)

    def _send(self) -> None:
        try:
            try:
                found = self._client.push(self._info.id, self._directory)
            except OSError as error:
                raise cannot_open(self._directory, "directory", error) from error
            not_sent(found, self._say)
            self._info = self._client.session(self._info.id)
            self._since = self._info.head.id
        except BaseException:
            if self._is_made:
                self._remove()
            raise

    def refused(self, error: errors.SandboxdError | None) -> None:
        """There was no call, or it is not known how it ended; ``error`` says why, if anything does."""
        if not self._keyed or not isinstance(error, errors.Refused):
            return
        differs = error.details.get("differs") if isinstance(error, errors.KeyConflict) else None
        if any(isinstance(one, dict) and one.get("field") == "session" for one in differs or ()):
            self._say(
                "its session stands for --workspace, --upload and --pull: as before, or with another key"
            )
        self._stays = ""
        if self._is_made:
            with suppress(errors.SandboxdError):
                now = self._client.session(self._info.id)
                if now.calls + now.in_flight == 0:  # else somebody asked with the key just now
                    self._stays = None

    def report(self, invocation: dict[str, Any]) -> bool:
        """Say what a call changed, and bring it if asked; whether all that was to be brought is there."""
        with self._turn():
            done = self._report(invocation)
            if self._stays is None:  # before the next has its turn
                self._remove()
                self._stays = ""
            return done

    def _report(self, invocation: dict[str, Any]) -> bool:
        if self._is_gone:
            return self._tell_gone(invocation)
        try:
            self._standing(self._info.id)
        except errors.NotFound:
            if not self._keyed:
                raise
            return self._tell_gone(invocation)
        if self._keyed and invocation.get("session") != self._info.id:  # of another that had this name
            return self._tell_gone(invocation)
        with suppress(errors.StateConflict):  # there is none but under few policies
            self._client.end_session(self._info.id)
        if self._pull:
            pulled = self._client.pull(self._info.id, self._directory)
            told(pulled, self._say)
            self._stays = "what was refused" if pulled.refused else None
            return not pulled.refused
        self._tell_changes()
        self._stays = None
        return True

    def _tell_gone(self, invocation: dict[str, Any]) -> bool:
        self._stays = "" if self._is_gone else None
        self._say(f"this call ran before, and what it changed was {'brought' if self._pull else 'told'} then")
        ended = (invocation.get("times") or {}).get("ended") or 0
        if not self._pull or time.time_ns() // 1000 < ended + units.parse_duration(KEPT):
            return True
        self._say(f"unless that was not done for {KEPT}: then it is lost, as its session has gone")
        return False

    def _tell_changes(self) -> None:
        found = self._client.diff_session(self._info.id, self._since, limit=SHOWN)
        for one in found.changes:
            self._say(line_of(one))
        if found.truncated:
            self._say("… and more")
        if found.changes:
            self._say("these changes are not in the directory; --pull brings them")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """No other that asked with a key reports meanwhile."""
        try:
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise cannot_open(self._directory, "workspace", error) from error
        try:
            if self._keyed:
                with suppress(OSError):  # on a file system without locks
                    fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def leave(self) -> None:
        """Remove it, unless it is to stay."""
        if self._stays is None:
            self._remove()
        elif self._stays:
            self._say(
                f"session {self._info.id} stays for {KEPT} with {self._stays}: "
                f"sandboxd session pull {self._info.id} DIR"
            )

    def _remove(self) -> None:
        remove(self._client, self._info.id)
        forget(self._info.id)


def _name(options: argparse.Namespace) -> str:
    parts = (
        options.key,
        os.path.realpath(options.workspace),
        "upload" if options.upload else "lend",
        "pull" if options.pull else "tell",
    )
    return f"workspace-{hashlib.sha256(os.fsencode(chr(0).join(parts))).hexdigest()[:40]}"
