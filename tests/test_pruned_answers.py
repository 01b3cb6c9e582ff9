"""A call that was pruned and is asked for again by its key: how it ended is told, on every way."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from daemons import RUN_IN_SANDBOX, until

from sandboxd import AsyncClient, errors
from sandboxd.client import transport, wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import Event

ARGV = ["sh", "-c", "echo out; exit 3"]


def prune(daemon: Daemon) -> None:
    daemon.client().prune(age=0)


@pytest.fixture
def pruned(daemon_factory: Callable[..., Daemon]) -> Daemon:
    """A daemon whose call with the key ``k`` was pruned."""
    daemon = daemon_factory()
    daemon.run(*ARGV, key="k")
    prune(daemon)
    return daemon


def test_the_command_line_exits_as_the_call_did_and_says_what_is_gone(pruned: Daemon, tmp_path: Path) -> None:
    done = pruned.cli("--key", "k", "--artifacts", str(tmp_path / "to"), "--", *ARGV, timeout=30)
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"went away" not in done.stderr
    assert b"removed by retention" in done.stderr
    done = pruned.cli("--json", "--key", "k", "--", *ARGV, timeout=30)
    assert done.returncode == 3
    assert json.loads(done.stdout)["pruned"]
    assert b"removed by retention" in done.stderr


def test_events_are_its_end_alone(pruned: Daemon) -> None:
    with pruned.client().stream(ARGV, key="k") as events:
        [ended] = list(events)

    async def streamed() -> list[Event]:
        async with await AsyncClient(pruned.socket).stream(ARGV, key="k") as found:
            return [event async for event in found]

    for event in (ended, *anyio.run(streamed)):
        assert (event.type, event.seq) == ("ended", 1)
        assert event.invocation is not None
        assert event.invocation.pruned is not None
        assert event.invocation.outcome is not None
        assert event.invocation.outcome.exit_code == 3
    with pytest.raises(errors.Pruned):  # who asks for the events themselves is told that they are gone
        list(pruned.client().events(pruned.client().run(ARGV, key="k").id))


def test_events_that_cannot_be_read_are_a_problem_and_no_daemon_that_went_away(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory()
    call = daemon.run("sh", "-c", "head -c 1000000 /dev/zero", key="k", policy="loud")
    shutil.rmtree(daemon.state / "calls" / call.id)
    argv = ["sh", "-c", "head -c 1000000 /dev/zero"]
    body = json.dumps({"argv": argv, "key": "k", "policy": "loud"}).encode()
    exchange = wire.Exchange("POST", "/v1/invocations", body, {"Accept": "application/x-ndjson"})
    with pytest.raises(errors.SandboxdError) as caught:
        transport.exchange([str(daemon.socket)], exchange, connect_timeout=5, timeout=30)
    assert caught.value.code == "not_found"
    done = daemon.cli("--key", "k", "--policy", "loud", "--", *argv, timeout=30)
    assert done.returncode == 125
    assert b"went away" not in done.stderr


def test_who_reads_slowly_while_it_is_pruned_is_told_how_it_ended(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory()
    argv = ["sh", "-c", "head -c 50000000 /dev/zero; exit 4"]
    command: list[Any] = [RUN_IN_SANDBOX, "--socket", daemon.socket, "--policy", "loud", "--", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\0"
        client = daemon.client()
        until(lambda: client.list(cause="exited", policy="loud").invocations, "it has ended", 60)
        prune(daemon)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 4, said
    assert b"removed by retention" in said
