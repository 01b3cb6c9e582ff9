"""Calls with servers in their containers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from daemons import Daemon, start_daemon, until
from ported import LASTING, POLICY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def exposing(leak_session: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with the policy ``exposing``."""
    with start_daemon(tmp_path_factory.mktemp("exposing")) as daemon:
        (daemon.policies / "exposing.yaml").write_text(POLICY)
        (daemon.policies / "lasting.yaml").write_text(LASTING)
        until(lambda: "lasting" in [each.name for each in daemon.client().policies()], "they are in force")
        yield daemon


@pytest.fixture
def serving(exposing: Daemon) -> Iterator[Callable[..., str]]:
    """Starts a call that runs this code, and returns its id once it has said ``ready``."""
    with contextlib.ExitStack() as stack:

        def start(code: str, policy: str = "exposing", daemon: Daemon = exposing, **fields: object) -> str:
            client = daemon.client()
            call = client.start(["python3", "-c", code], policy=policy, **fields)  # type: ignore[arg-type]
            stack.callback(client.cancel, call.id)

            def ready() -> bool:
                found = client.get(call.id)
                assert found.outcome is None, (found.outcome, found.stderr)
                return b"ready" in b"".join(client.stdout(call.id))

            until(ready, "the server listens", seconds=20)
            return call.id

        yield start
