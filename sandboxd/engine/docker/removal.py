"""Containers are removed, or remembered until they can be.

The engine removes a container by itself when its PID 1 ends. It may fail at that, as we may, when the
engine is away; nobody else looks after it then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from sandboxd import errors
from sandboxd.engine.docker.endpoint import MissingInEngine

if TYPE_CHECKING:
    from sandboxd.engine.docker.endpoint import DockerEndpoint

__all__ = ["Removal"]

PATIENCE = 10.0  # seconds that the engine has for one that it removes by itself
POLL = 0.05  # seconds
REMAINS = 256  # containers that could not be removed and are tried again

log = structlog.get_logger(__name__)


class Removal:
    """Removes the containers of one daemon. Thread-safe."""

    def __init__(self, endpoint: DockerEndpoint) -> None:
        self._endpoint = endpoint
        self._remains: set[str] = set()

    def remove(self, container: str, *, patience: float = PATIENCE) -> None:
        """Remove a container, by its id or name, or try it again later. Blocks for up to ``patience``."""
        limit = time.monotonic() + patience
        while True:
            try:
                with self._endpoint.asking("remove a container") as client:
                    client.remove_container(container, v=True, force=True)
            except MissingInEngine:
                return
            except errors.EngineFailed as error:
                if "already in progress" in str(error) and time.monotonic() < limit:
                    time.sleep(POLL)
                    continue
                self.remember(container)
                log.warning("a container is not removed yet", container=container[:12], reason=str(error))
            return

    def remember(self, container: str) -> None:
        """Try to remove it again, before the next one is made."""
        if len(self._remains) < REMAINS:
            self._remains.add(container)

    def try_again(self) -> None:
        """Remove what could not be removed before, until one cannot be again."""
        for container in list(self._remains):
            self._remains.discard(container)
            self.remove(container, patience=0)
            if container in self._remains:
                return
