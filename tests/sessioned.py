"""What tests of sessions share: a daemon with policies for them, and how calls in one are asked and read."""

from __future__ import annotations

import http.client
import json
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from acting import acting_as
from daemons import needs_containers, start_daemon, until

from sandboxd import errors
from sandboxd.journal import schema
from sandboxd.workspace import tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation, SessionInfo

CONFIG = """
callers:
  - {match: {uid: 0}, role: operator}
  - {match: {uid: 4242}, role: agent, policies: [kept], sessions: {count: 3, size: 8MiB}}
  - {match: {uid: 4243}, role: agent, policies: [kept]}
"""
POLICIES = {
    "kept": "version: 1\nname: kept\nextends: default\nlimits:\n  wall: 20s\n",
    "success": "version: 1\nname: success\nextends: kept\ncommit: success\n",
    "always": "version: 1\nname: always\nextends: kept\ncommit: always\nlimits: {wall: 1s}\n",
    "again": (
        "version: 1\nname: again\nextends: always\nlimits: {wall: 1s}\n"
        "retry: {backoff: 1ms..2ms, wall_time: {times: 2, raise: {wall: 3s}}}\n"
    ),
    "never": "version: 1\nname: never\nextends: kept\ncommit: never\n",
    "root": "version: 1\nname: root\nextends: kept\nprocess: {user: 0}\n",
    "snakes": "version: 1\nname: snakes\nextends: kept\nimage: python\n",
}


def give_policies(daemon: Daemon) -> None:
    """Write them, and wait until they are in force."""
    for name, text in POLICIES.items():
        (daemon.policies / f"{name}.yaml").write_text(text)
    end = time.monotonic() + 10
    while set(POLICIES) - {one.name for one in daemon.client().policies()}:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    with start_daemon(tmp_path_factory.mktemp("sessions"), config=CONFIG) as one:
        give_policies(one)
        yield one


@pytest.fixture
def session(daemon: Daemon) -> Iterator[SessionInfo]:
    made = daemon.client().create_session()
    yield made
    try:
        daemon.client().delete_session(made.id)
    except errors.NotFound:
        return


@contextmanager
def by(uid: int, daemon: Daemon) -> Iterator[None]:
    """Be somebody else for a while: the kernel tells the daemon who connects."""
    daemon.admit_everybody()  # again: other runs of pytest close the directory of all
    with acting_as(uid):
        yield


def sh(
    daemon: Daemon, session: SessionInfo | str, code: str, policy: str = "kept", **fields: object
) -> Invocation:
    named = session if isinstance(session, str) else session.id
    return daemon.client().run(["sh", "-c", code], policy=policy, session=named, **fields)  # type: ignore[arg-type]


def said(found: Invocation) -> str:
    assert found.outcome is not None
    assert found.stdout is not None
    assert found.stderr is not None
    assert found.outcome.cause == "exited", found.outcome
    assert not found.stderr.text, found.stderr.text
    return found.stdout.text or ""


def layers(daemon: Daemon) -> set[str]:
    """The layers on disk, once each that there is is there."""
    with acting_as(0):  # nobody else may look
        until(lambda: not _packs(daemon), "every layer is on disk as files")
        return {one.name for one in (daemon.state / "sessions" / "layers").iterdir()} - {"empty"}


def _packs(daemon: Daemon) -> list[tuple[str, bytes]]:
    connection = schema.connect_reader(daemon.state / "journal.sqlite3")
    try:
        return tables.packs(connection, after="", limit=1)
    finally:
        connection.close()


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    daemon: Daemon, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> Answer:
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(daemon.socket))
    try:
        connection.request(method, f"/v1/sessions/{path}", body, headers or {})
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()
