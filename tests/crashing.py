"""A daemon that is killed again and again under load, and what has to hold whenever it is back.

Theory of operation.  Callers of several uids (``crash_caller``) ask with keys and write down what they are
told. Each command first writes its key into a FIFO that its policy mounts: that is the count of executions
that no record of the daemon can hide. ``check`` compares the three: what callers were told, what the daemon
says now, and what was executed.
"""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from crash_caller import KINDS, told
from crashed_sessions import CrashedSessions
from daemons import PATIENCE, Daemon, slots_of, start_daemon, until

from sandboxd import canonical, errors, models
from sandboxd.failpoint import VARIABLE
from sandboxd.journal import schema, signing, verify

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from sandboxd import Client

__all__ = ["Crashing", "names_in_source"]

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
UIDS = (64_001, 64_002, 64_003)
LOG_OF_DAEMON = 4000  # characters that are shown of it
RECENT = 20  # answers that are compared again whenever the daemon is back
MANY = int(os.environ.get("SANDBOXD_CRASH_CHECKS", "150"))  # answers and records that are at the end


def names_in_source() -> set[str]:
    """Every failpoint that there is, by its name. A name that is no literal, or stands twice, is an error."""
    found: Counter[str] = Counter()
    for path in (ROOT / "sandboxd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "failpoint":
                (name,) = node.args
                assert isinstance(name, ast.Constant), (
                    f"{path}:{node.lineno}: a failpoint's name is a literal"
                )
                found[str(name.value)] += 1
    assert [name for name, count in found.items() if count > 1] == []
    return set(found)


def _is_ended(client: Client, id_: str) -> bool:
    return client.get(id_).state is models.State.ENDED


class Crashing:
    """Owns the daemon, its callers and the counter. A context manager."""

    def __init__(self, directory: Path, *, seed: int, state: Path | None = None, config: str = "") -> None:
        self._directory = directory
        self._seed = seed
        self.random = random.Random(seed)
        self.state = state or directory / "state"
        self._config = config
        self._stack = ExitStack()
        self._callers: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []
        self._counting = threading.Event()
        self.failpoints = directory / "failpoints"
        self.executed: Counter[str] = Counter()
        self._so_far: Counter[str] | None = None
        self.daemon: Daemon | None = None
        self._running = ExitStack()
        self.starts: list[int] = []
        """When daemons were started, in microseconds since the epoch."""
        self.kinds = sorted(KINDS)
        """What callers ask for."""
        self.faults = {"interrupted"}
        """Codes of the faults of ours that calls may end with."""

    def __enter__(self) -> Self:
        for path in (self.failpoints, self._directory / "count", self._directory / "rules"):
            path.mkdir()
        (self._directory / "count").chmod(0o755)
        fifo = self._directory / "count" / "runs"
        os.mkfifo(fifo)
        fifo.chmod(0o622)
        (self._directory / "rules" / "counted.yaml").write_text(
            "version: 1\nname: counted\nextends: default\n"
            "limits:\n  wall: 20s\n  memory: 64MiB\n  pids: 32\n"
            "  workspace: {size: 8MiB, inodes: 1k}\n  tmp: {size: 8MiB, inodes: 1k}\n"
            f"mounts:\n  - {{source: {self._directory / 'count'}, target: /count}}\n"
            'artifacts:\n  - {path: "out/*"}\n'
        )
        (self._directory / "rules" / "patient.yaml").write_text(
            "version: 1\nname: patient\nextends: counted\n"
            "retry: {failed: 100, backoff: 1ms..20ms, on: [interrupted]}\n"
        )
        (self._directory / "rules" / "kept.yaml").write_text(
            "version: 1\nname: kept\nextends: counted\nisolation: session\n"
        )
        fd = os.open(fifo, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._stack.callback(os.close, fd)
        counter = threading.Thread(target=self._count, args=(fd,))
        counter.start()
        self._stack.callback(counter.join)
        self._stack.callback(self._counting.set)
        self._stack.callback(self.leave)
        self._stack.callback(self.stop_callers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _count(self, fd: int) -> None:
        """Count the keys that come through the FIFO, which takes a line whole: pipe(7), PIPE_BUF."""
        rest = b""
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                if self._counting.wait(0.02):
                    return
                continue
            *lines, rest = (rest + data).split(b"\n")
            self.executed.update(line.decode() for line in lines)

    def arm(self, name: str, action: str) -> None:
        """Have the daemon do this at a failpoint: see ``sandboxd.failpoint``."""
        new = self.failpoints / f".{name}"
        new.write_text(action)
        new.replace(self.failpoints / name)

    def hits(self) -> set[str]:
        """The failpoints that were reached so far."""
        return set((self.failpoints / "hits").read_text().split())

    def start(self) -> bool:
        """Start the daemon; False when it dies before it is ready, as a failpoint may have asked."""
        self.starts.append(time.time_ns() // 1000)
        config = self._config + f"policies: [{self._directory / 'rules'}]\n"
        config += "callers:\n  - {match: {uid: 0}, role: operator}\n"
        config += "".join(
            f"  - {{match: {{uid: {uid}}}, role: agent, policies: [counted, patient, kept],"
            " sessions: {container_life: 2s}}\n"
            for uid in UIDS
        )
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(self.failpoints)
        try:
            starting = start_daemon(self._directory, config=config, state=self.state, ready=False)
            daemon = self._running.enter_context(starting)
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
        self.daemon = daemon
        end = time.monotonic() + 30 * PATIENCE
        while time.monotonic() < end:
            if daemon.process.poll() is not None:
                self._forget()
                return False
            try:
                daemon.client().health()
            except errors.Unavailable:
                time.sleep(0.02)
            else:
                daemon.admit_everybody()
                return True
        raise AssertionError(f"the daemon did not start:\n{self.said()}")

    def kill(self) -> None:
        """Kill -9."""
        if self.daemon is not None:
            self.daemon.process.kill()
            self._forget()

    def leave(self) -> None:
        """Have a daemon end by itself, which takes away what killed ones left."""
        for armed in self.failpoints.iterdir():
            if armed.name != "hits":
                armed.unlink()
        if self.daemon is not None or self.start():
            assert self.daemon is not None
            self.daemon.stop()
            self._forget()

    def _forget(self) -> None:
        if self.daemon is not None:
            self.daemon.process.wait(30)
            self._running.close()
            self._running = ExitStack()
            self.daemon = None

    def died(self, seconds: float) -> bool:
        """Wait for the daemon's death by kill -9; False when it lives on for so long."""
        assert self.daemon is not None
        try:
            status = self.daemon.process.wait(seconds * PATIENCE)
        except subprocess.TimeoutExpired:
            return False
        assert status == -signal.SIGKILL, f"it ended by itself, with {status}:\n{self.said()}"
        self._forget()
        return True

    def said(self) -> str:
        """The end of the daemon's log."""
        return (self._directory / "log").read_text()[-LOG_OF_DAEMON:]

    def start_callers(self) -> None:
        """Let callers ask, of each uid one."""
        number = len(self._logs)
        for uid in UIDS:
            path = self._directory / f"caller-{uid}-{number}"
            with path.open("wb") as log:
                caller = subprocess.Popen(
                    [
                        sys.executable,
                        ROOT / "tests" / "crash_caller.py",
                        self._directory / "s",
                        str(uid),
                        f"{self._seed}.{number}.{uid}",
                        *self.kinds,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                )
            self._callers.append(caller)
            self._logs.append(path)

    def stop_callers(self) -> None:
        """Let callers come to the end of what they are at."""
        for caller in self._callers:
            assert caller.stdin is not None
            caller.stdin.close()
        for caller in self._callers:
            try:
                caller.wait(60 * PATIENCE)  # some wait for a further attempt
            except subprocess.TimeoutExpired:
                caller.kill()
                caller.wait()
                raise
        self._callers.clear()

    def drop_callers(self) -> None:
        """Have callers die where they are."""
        for caller in self._callers:
            caller.kill()
            caller.communicate()
        self._callers.clear()

    def lines(self) -> list[dict[str, Any]]:
        """All that callers wrote down."""
        found: list[dict[str, Any]] = []
        for log in self._logs:
            for line in log.read_text().splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:  # one that is being written, or a traceback
                    assert line.startswith("{"), log.read_text()
        return found

    def answers(self, before: int = 1 << 62) -> dict[str, dict[str, Any]]:
        """What was told of each key, which is the same each time; ``before`` is on the monotonic clock."""
        found: dict[str, dict[str, Any]] = {}
        for line in self.lines():
            assert "wrong" not in line, line
            if line.pop("at") >= before:
                continue
            if "accepted" in line:
                found.setdefault(f"id of {line['accepted']}", {"id": line["id"]})
                assert found[f"id of {line['accepted']}"]["id"] == line["id"], line
            if "told" in line:
                key = line.pop("told")
                assert found.setdefault(key, line) == line, f"{key} was told two outcomes"
        for key in [key for key in found if key.startswith("id of ")]:
            accepted = found.pop(key)
            assert found.get(key.removeprefix("id of "), accepted)["id"] == accepted["id"]
        return found

    def check(self, *, whole: bool = False, before: int = 1 << 62) -> int:
        """What has to hold at any time; returns how many answers there are, of which some are asked again."""
        assert self.daemon is not None
        answers = self.answers(before)  # before the journal: meanwhile callers go on
        connection = schema.connect_reader(self.state / "journal.sqlite3")
        try:
            keys = {signing.key_id(key) for key in signing.known(self.state)}
            report = verify.verify(connection, keys=keys, deep=self.state if whole else None)
            rows = dict(connection.execute("SELECT key, id FROM invocations WHERE key IS NOT NULL"))
        finally:
            connection.close()
        assert report.ok, report.problem or report.damaged
        client = self.daemon.client()
        for key, answer in answers.items():
            assert rows.get(key) == answer["id"], f"{key} was told as {answer['id']}"
        for key in list(answers)[-RECENT:] + self._some(answers, MANY if whole else RECENT):
            answer = answers[key]
            assert told(client.get(answer["id"])) == answer, key
            if before == 1 << 62:  # else an earlier state, in which it waited, may have run it too
                self._check_runs(key, answer)
        return len(answers)

    def _rows(self) -> list[tuple[str, str, str]]:
        connection = schema.connect_reader(self.state / "journal.sqlite3")
        try:
            query = "SELECT id, key, state FROM invocations WHERE key IS NOT NULL"
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    def _some(self, found: Iterable[T], number: int) -> list[T]:
        found = list(found)
        return self.random.sample(found, min(len(found), number))

    def forget_runs(self) -> None:
        """Compare with what has run so far, and no more: daemons will start from before, and run it again."""
        time.sleep(0.2)  # what is in the FIFO is counted
        self._so_far = Counter(self.executed)

    def _check_runs(self, key: str, answer: dict[str, Any]) -> None:
        executed = self.executed if self._so_far is None else self._so_far
        attempts = max(1, answer["attempts"])
        assert executed[key] <= attempts, f"{key} was executed {executed[key]} times: {answer}"
        if answer["outcome"]["cause"] == "exited":
            until(lambda: executed[key] > 0, f"{key} was executed")
        else:
            assert answer["outcome"]["cause"] == "failed", answer
            assert answer["outcome"]["error"]["code"] in self.faults, answer

    def check_at_rest(self, *, before: int = 1 << 62) -> None:
        """What has to hold when nothing is asked: each call has its outcome, and what that names is there."""
        self.check(whole=True, before=before)
        assert self.daemon is not None
        client = self.daemon.client()
        until(
            lambda: all(row[2] == "ended" for row in self._rows()), "what waited or is tried again ends", 60
        )
        rows = self._rows()
        asked = {line["ask"] for line in self.lines() if "ask" in line}
        assert {key for _, key, _ in rows} <= asked
        ran = set() if before < 1 << 62 else set(self.executed)
        assert ran <= {key for _, key, _ in rows}, "a command ran that no record knows"
        for id_, key, _ in self._some(rows, MANY):
            ended = partial(_is_ended, client, id_)
            until(ended, "what the journal has as ended is told so")
            found = client.get(id_)
            if before == 1 << 62:  # else what came after is forgotten, and done again
                self._check_runs(key, told(found))
            self._check_content(client, found)
        sessions = CrashedSessions(
            client, self.state, lines=self.lines(), starts=self.starts, chance=self.random, most=MANY
        )
        sessions.check(UIDS)
        assert list((self.state / "blobs" / "tmp").iterdir()) == []
        daemon = self.daemon
        until(lambda: not slots_of(daemon), "no container is left")

    def _check_content(self, client: Client, found: models.Invocation) -> None:
        for name in ("stdout", "stderr"):
            content = getattr(found, name)
            with getattr(client, name)(found.id) as chunks:
                digest = canonical.digest_bytes(b"".join(chunks))
            assert content is None or digest == content.digest, (found.id, name)
        for artifact in found.artifacts:
            with client.artifact(found.id, artifact.path) as chunks:
                assert canonical.digest_bytes(b"".join(chunks)) == artifact.digest
        with client.events(found.id, follow=False) as stream:
            events = list(stream)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.type for event in events][-1:] == ["ended"], (found, events)
