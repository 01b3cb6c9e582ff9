"""A key stands for one request of one caller, and for all of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from acting import acting_as
from daemons import until

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

NOBODY = 65_534
CALLERS = "callers:\n  - {match: {uid: 0}, role: agent}\n  - {match: {uid: 65534}, role: agent}\n"


@pytest.mark.parametrize(
    "changed",
    [
        {"stdin": b"2"},
        {"inputs": {"a": b"2"}},
        {"inputs": {"b": b"1"}},
        {"env": {"A": "2"}},
        {"labels": {"x": "y"}},
        {"limits": {"cpus": 0.5}},
    ],
    ids=repr,
)
def test_a_key_with_another_request_is_a_conflict(daemon: Daemon, changed: dict[str, Any]) -> None:
    client = daemon.client()
    key = os.urandom(8).hex()
    asked: dict[str, Any] = {"stdin": b"1", "inputs": {"a": b"1"}, "env": {"A": "1"}}
    first = client.run(["true"], key=key, **asked)
    assert client.run(["true"], key=key, **asked).id == first.id
    with pytest.raises(errors.KeyConflict):
        client.run(["true"], key=key, **{**asked, **changed})


def test_another_caller_reaches_nothing_by_key_or_id(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=CALLERS)
    own = daemon.client().start(["sleep", "30"], key="k", stdin="stream")
    daemon.admit_everybody()
    with acting_as(NOBODY):
        client = daemon.client()
        other = client.run(["echo", "other"], key="k")
        for ask in (client.get, client.cancel, lambda id_: client.signal(id_, 15)):
            with pytest.raises(errors.NotFound):
                ask(own.id)
        with pytest.raises(errors.NotFound):
            client.write_stdin(own.id, b"x")
        assert [call.id for call in client.list().invocations] == [other.id]
    assert other.stdout is not None
    assert other.stdout.text == "other\n"
    until(lambda: daemon.client().get(own.id).state == "running", "it goes on")
    daemon.client().cancel(own.id)
