"""A caller that asks for calls with keys for as long as its stdin is open, and writes down what it was told.

Becomes a user of its own: ``crash_caller.py SOCKET UID SEED KIND…``. Each line on stdout is a JSON object:
``ask`` is a key that is about to be asked for the first time, ``told`` what was answered to it, each time;
``fault`` an error that says that the daemon could not; ``wrong`` what must not be. It asks again, with the
same key, until it is told. Of the container that its second session keeps, ``checkpoint`` and ``ended`` have
the digest of the checkpoint that was made of it ``after`` a key; ``ending`` says that its end is about to be
asked for.
"""

from __future__ import annotations

import grp  # noqa: F401  (the client imports it when it has to, which this user may not)
import json
import os
import random
import select
import sys
import time
from contextlib import suppress
from typing import Any

from sandboxd import Client, errors, models

QUIET = "echo {key} > /count/runs"
SESSION = "log"  # each caller has one of this name
KEPT = "kept"  # and one whose calls share a container
KINDS: dict[str, str] = {
    "quiet": QUIET,
    "loud": QUIET + "; echo out of {key}; echo err >&2; head -c 200000 /dev/zero | tr '\\0' x",
    "files": QUIET + "; mkdir out; echo file of {key} > out/a; head -c 100000 /dev/zero > out/b; echo done",
    # every other time with a second name of the file: such a layer is made as files at once
    "session": QUIET
    + "; echo {key} >> log; n=$(wc -l < log); [ $((n % 2)) = 0 ] || ln -f log again; echo $n",
    "patient": QUIET + "; echo {key}",
    "fails": QUIET + "; echo no >&2; exit 3",
    # what runs on holds its output, and the container has a process beside the next call's
    "kept": QUIET
    + "; echo {key} >> log; [ -e /tmp/up ] || {{ echo > /tmp/up; sleep 1000 & }}; sha256sum < log",
}


def say(**what: object) -> None:
    sys.stdout.write(json.dumps({"at": time.monotonic_ns(), **what}) + "\n")
    sys.stdout.flush()


def told(found: models.Invocation) -> dict[str, Any]:
    """What of an answer has to stay as it is for ever."""
    outcome = found.outcome
    return {
        "id": found.id,
        "state": found.state.value,
        "outcome": None if outcome is None else outcome.model_dump(mode="json", exclude_none=True),
        "ended": found.times.ended,
        "streams": [[s.digest, s.size] for s in (found.stdout, found.stderr) if s is not None],
        "attempts": found.attempts,
        "artifacts": [[a.path, a.digest] for a in found.artifacts],
        "checkpoints": [found.session, found.checkpoint_before, found.checkpoint_after],
        "container": None if found.container is None else found.container.model_dump(mode="json"),
    }


class Caller:
    def __init__(self, socket: str, seed: str, kinds: list[str]) -> None:
        self._kinds = kinds
        self._client = Client(socket, timeout=30)
        self._seed = seed
        self._random = random.Random(seed)
        self._asked: dict[str, dict[str, Any]] = {}
        self._kept: str | None = None
        """The last call in the container, where that has done what it was to do."""

    def new(self) -> None:
        key = f"{self._seed}.{len(self._asked)}"
        kind = self._random.choice(self._kinds)
        if self._kept is not None and self._random.random() < 0.3:
            kind = "kept"  # a daemon does not live for long, and a container is to have a few
        argv = ["sh", "-c", KINDS[kind].format(key=key)]
        self._asked[key] = {"argv": argv, "policy": "counted", "labels": {"kind": kind}}
        if kind == "session":
            self._asked[key]["session"] = SESSION
        if kind == "patient":
            self._asked[key]["policy"] = "patient"
        if kind == "kept":
            self._asked[key] |= {"policy": "kept", "session": KEPT}
        say(ask=key, kind=kind)
        found = self._until_told(key)
        if kind == "kept":
            exited = found is not None and found.outcome is not None and found.outcome.cause == "exited"
            self._kept = key if exited else None
            doing = self._random.random()
            if doing < 0.4:
                self.checkpoint()
            elif doing < 0.5:
                self.end()

    def checkpoint(self) -> None:
        """A checkpoint of what the container has, if it is there still."""
        if self._kept is None:
            return
        try:
            made = self._client.checkpoint_session(KEPT)
        except errors.StateConflict:
            pass  # it is not
        except (errors.Unavailable, errors.Draining, errors.AttemptFailed) as error:
            say(fault=f"checkpoint after {self._kept}", code=error.code)
        else:
            say(checkpoint=made.digest, after=self._kept)

    def end(self) -> None:
        """Its end, if it is there still; else it may be that a loss is acknowledged so."""
        if self._kept is None:
            return
        try:
            found = self._client.session(KEPT).container
            if found is None or found.state == "lost":
                return
            say(ending=self._kept)
            ended = self._client.end_session(KEPT)
        except (errors.StateConflict, errors.SessionBusy):
            pass  # it has come to its end by itself
        except (errors.Unavailable, errors.Draining, errors.AttemptFailed) as error:
            say(fault=f"end after {self._kept}", code=error.code)
        else:
            say(ended=ended.head.digest, after=self._kept, epoch=time.time_ns() // 1000)

    def again(self) -> None:
        self._until_told(self._random.choice(sorted(self._asked)))

    def another(self) -> None:
        """A key that stands for something else."""
        key = self._random.choice(sorted(self._asked))
        try:
            found = self._client.run(["true"], policy="counted", key=key)
        except errors.KeyConflict:
            pass
        except errors.SandboxdError as error:
            say(fault=key, code=error.code)
        else:
            say(wrong=f"the key {key} was taken for another request: {found.id}")

    def refused(self) -> None:
        with suppress(errors.SandboxdError):
            self._client.run(["true"], policy="no-such-policy")

    def _until_told(self, key: str) -> models.Invocation | None:
        while not closed(0):
            asked = self._asked[key]
            request = {name: value for name, value in asked.items() if name != "argv"}
            try:
                if self._random.random() < 0.3:
                    found = self._client.start(asked["argv"], key=key, **request)
                    say(accepted=key, id=found.id)
                    found = self._client.wait(found.id)
                else:
                    found = self._client.run(asked["argv"], key=key, **request)
            except errors.Unavailable:
                time.sleep(0.05)
            except (errors.Draining, errors.QueueFull, errors.AttemptFailed) as error:
                say(fault=key, code=error.code, message=str(error))
                time.sleep(0.1)
            except errors.SandboxdError as error:
                say(wrong=f"{key}: {error.code}: {error}")
                return None
            else:
                if found.outcome is None:
                    say(wrong=f"{key}: answered without an outcome, {found.state}")
                say(told=key, **told(found))
                return found
        return None

    def _make_session(self, name: str) -> None:
        while not closed(0):
            try:
                self._client.create_session(name)
            except errors.SessionExists:
                return
            except errors.Unavailable:
                time.sleep(0.05)
            else:
                return

    def run(self) -> None:
        self._make_session(SESSION)
        self._make_session(KEPT)
        while not closed(0):
            doing = self._random.random()
            if doing < 0.66 or not self._asked:
                self.new()
            elif doing < 0.68:
                self.checkpoint()
            elif doing < 0.7:
                self.end()
            elif doing < 0.85:
                self.again()
            elif doing < 0.92:
                self.another()
            else:
                self.refused()


def closed(timeout: float) -> bool:
    """Whether stdin has ended."""
    return bool(select.select([sys.stdin], [], [], timeout)[0])


if __name__ == "__main__":
    caller = Caller(sys.argv[1], sys.argv[3], sys.argv[4:])
    os.setgroups([])
    os.setregid(int(sys.argv[2]), int(sys.argv[2]))
    os.setreuid(int(sys.argv[2]), int(sys.argv[2]))
    caller.run()
