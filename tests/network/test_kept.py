"""The network of a container that its session keeps: each call's own, and nobody's between them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from networked import FETCH, FOUND, add_policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation, SessionInfo

POLICY = """\
version: 1
name: kept
extends: net
isolation: session
network: {budget: {connections: 3}}
"""
HASTE = "RES_OPTIONS='timeout:1 attempts:1' "  # who asks for a name between two calls has no answer
# writes a line for each try: what came of it
LOOP = """
import socket, time, sys
with open('/tmp/tries', 'w', buffering=1) as file:
    while True:
        try:
            with socket.create_connection(('www.example.test', 80), timeout=2) as s:
                s.sendall(b'GET / HTTP/1.0\\r\\nHost: www.example.test\\r\\n\\r\\n')
                word = 'got' if s.recv(100) else 'cut'
        except OSError as error:
            word = type(error).__name__
        print(time.time(), word, file=file)
        time.sleep(0.2)
"""
HELD = """
import socket, time
s = socket.create_connection(('echo.example.test', 7), timeout=20)
open('/tmp/held', 'w').write('open')
s.settimeout(20)
try:
    word = repr(s.recv(10))
except OSError as error:
    word = type(error).__name__
open('/tmp/held', 'w').write(word)
"""


@pytest.fixture
def session(networked: Daemon) -> Iterator[SessionInfo]:
    add_policy(networked, "kept", POLICY)
    made = networked.client().create_session()
    yield made
    networked.client().delete_session(made.id)


def run(daemon: Daemon, session: SessionInfo, *argv: str) -> Invocation:
    return daemon.run(*argv, policy="kept", session=session.id)


def out(call: Invocation) -> str:
    assert call.stdout is not None
    assert call.outcome is not None
    assert call.outcome.exit_code == 0, (call.outcome, call.stderr)
    return call.stdout.text or ""


def test_each_call_has_a_network_and_a_budget_of_its_own(networked: Daemon, session: SessionInfo) -> None:
    for _ in range(3):
        call = run(networked, session, "python3", "-c", FETCH)
        assert out(call) == FOUND
        assert call.usage is not None
        assert call.usage.connections == 1
        assert call.limits_reached == []
    more = run(
        networked,
        session,
        "python3",
        "-c",
        f"for _ in range(5):\n    {FETCH.replace('; ', chr(10) + '    ')}",
    )
    assert more.usage is not None
    assert more.usage.connections == 3
    assert [one.limit for one in more.limits_reached] == ["network.budget.connections"]
    assert out(run(networked, session, "python3", "-c", FETCH)) == FOUND


def test_nothing_is_reached_between_two_calls(networked: Daemon, session: SessionInfo) -> None:
    run(networked, session, "sh", "-c", f'{HASTE} python3 -c "{LOOP}" >/dev/null 2>&1 & sleep 0.6')
    began = time.time()
    time.sleep(4)
    ended = time.time()
    call = run(networked, session, "cat", "/tmp/tries")
    between = [
        word
        for at, word in (line.split() for line in out(call).splitlines())
        if began + 0.3 < float(at) < ended - 0.3
    ]
    assert between, out(call)
    assert "got" not in between


def test_what_was_left_uses_the_budget_of_the_call_that_runs(networked: Daemon, session: SessionInfo) -> None:
    run(networked, session, "sh", "-c", f'{HASTE} python3 -c "{LOOP}" >/dev/null 2>&1 &')
    call = run(networked, session, "sleep", "3")
    assert call.usage is not None
    assert call.usage.connections == 3
    assert [one.limit for one in call.limits_reached] == ["network.budget.connections"]
    with networked.client().events(call.id) as events:
        assert any(event.network is not None for event in events)


def test_a_connection_ends_with_the_call_that_it_was_made_in(networked: Daemon, session: SessionInfo) -> None:
    run(networked, session, "sh", "-c", f'python3 -c "{HELD}" >/dev/null 2>&1 & sleep 1; cat /tmp/held')
    time.sleep(0.5)
    assert out(run(networked, session, "cat", "/tmp/held")) in {"b''", "ConnectionResetError"}
