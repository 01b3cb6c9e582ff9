"""A daemon whose containers may reach some of a small internet."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from networked import fill, start_networked
from world import FILES_NAME, World, start_world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation


@pytest.fixture(scope="session")
def world(
    leak_session: object, tmp_path_factory: pytest.TempPathFactory, need: Callable[[object, str], None]
) -> Iterator[World]:
    """The hosts that there are outside."""
    need(shutil.which("ip"), "iproute2")
    need(shutil.which("openssl"), "openssl")
    with start_world(tmp_path_factory.mktemp("world")) as found:
        fill(found)
        yield found


@pytest.fixture(scope="session")
def networked(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that asks the DNS of the world."""
    authority = world.certificate(FILES_NAME)
    with start_networked(tmp_path_factory.mktemp("networked"), authorities=f"{authority}.crt") as daemon:
        yield daemon


@pytest.fixture
def python(networked: Daemon) -> Callable[..., Invocation]:
    """Run a piece of Python under the policy ``net``."""

    def run(code: str, policy: str = "net", **options: object) -> Invocation:
        return networked.run("python3", "-c", code, policy=policy, **options)

    return run
