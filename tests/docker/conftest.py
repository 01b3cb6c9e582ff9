"""A Docker Engine for the session, and a daemon on it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from daemons import Daemon, needs_containers, start_daemon
from docker_policies import add_policies
from dockerd import Dockerd, own_engine
from podman import Podman

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from leaks import Session


EVERYWHERE = {"test_calls.py", "test_engines.py"}
MORE = os.environ.get("SANDBOXD_TEST_RUNTIMES", "").split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave all but the calls themselves on Podman to scripts/nightly, which names it."""
    if "podman" in MORE:
        return
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        (left if "[podman" in item.name and item.path.name not in EVERYWHERE else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(scope="session", params=["docker", "podman"])
def kind(request: pytest.FixtureRequest, need: Callable[[object, str], None]) -> type[Dockerd]:
    """What makes the containers: a test of it runs with each."""
    needs_containers()
    need(shutil.which("dockerd"), "docker.io")  # has the client of both
    if request.param == "podman":
        need(shutil.which("podman"), "podman")
        return Podman
    return Dockerd


@pytest.fixture(scope="session")
def dockerd(kind: type[Dockerd], leak_session: Session) -> Iterator[Dockerd]:
    """The session's engines, one after the other."""
    with own_engine(kind=kind) as engine:
        yield engine


@pytest.fixture(scope="session")
def docker_daemon(dockerd: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on the session's engine."""
    directory = tmp_path_factory.mktemp("docker")
    with start_daemon(directory, config=config_of(dockerd)) as daemon:
        add_policies(daemon)
        yield daemon


def config_of(dockerd: Dockerd, more: str = "", *, engine: str = "docker") -> str:
    """The configuration of a daemon on an engine."""
    if "docker:" not in more:
        more += f"docker: {{socket: {dockerd.socket}}}\n"
    return f"engine: {engine}\n{more}"


@pytest.fixture
def start_on(tmp_path: Path, daemon_factory: Callable[..., Daemon]) -> Callable[..., Daemon]:
    """Starts a daemon of a test's own on an engine, with the policies."""

    def start(
        dockerd: Dockerd, more: str = "", *, name: str = "own", engine: str = "docker", **policies: str
    ) -> Daemon:
        daemon = daemon_factory(config=config_of(dockerd, more, engine=engine), name=name)
        add_policies(daemon, **policies)
        return daemon

    return start
