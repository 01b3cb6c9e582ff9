"""The Docker Engine's socket: every request has a timeout, and every failure is one of our errors.

Theory of operation.  Requests block, so they are made in worker threads. One that gets no answer in its
time makes the engine *suspect*: until it answers a ping, which is given ``PING_TIMEOUT``, nothing else is
asked of it, so that an engine that hangs costs each call a moment and not the whole timeout. The client is
made anew after a failed connection: the engine may be another version when it comes back.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import docker.errors
import requests.exceptions
from docker.api.client import APIClient

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["MINIMUM_API", "DockerEndpoint", "MissingInEngine"]

MINIMUM_API = (1, 41)
"""Docker 20.10, the first that gives a container a cgroup namespace of its own."""
NEWEST_API = (1, 44)
"""The newest whose requests we know; an engine serves older ones too."""
PING_TIMEOUT = 2.0
MOST_CONNECTIONS = 64
MAX_SAID = 2000  # characters of what an engine says that are passed on


class MissingInEngine(errors.EngineFailed):
    """Raised when the engine has no such container or image."""


class DockerEndpoint:
    """An engine by its socket. Thread-safe; ``close`` lets go of its connections."""

    def __init__(self, socket: Path, *, timeout: float) -> None:
        """``timeout``: seconds without a byte of an answer."""
        self.socket = socket
        self._timeout = timeout
        self._lock = threading.Lock()
        self._known: APIClient | None = None
        self._suspect = False

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        with self._lock:
            known, self._known = self._known, None
        if known is not None:
            known.close()

    @contextmanager
    def asking(self, what: str) -> Iterator[APIClient]:
        """A client to ask for one thing; ``what`` is for messages. Raises EngineFailed, MissingInEngine."""
        try:
            if self._suspect:
                self._ping()
            yield self._client()
        except docker.errors.NotFound as error:
            raise MissingInEngine(f"{what}: {_said(error)}") from error
        except docker.errors.APIError as error:
            raise errors.EngineFailed(f"{what}: the Docker Engine says: {_said(error)}") from error
        except requests.exceptions.Timeout as error:
            self._suspect = True
            raise errors.EngineFailed(
                f"{what}: the Docker Engine at {self.socket} takes requests and does not answer"
            ) from error
        except (requests.exceptions.RequestException, docker.errors.DockerException, OSError) as error:
            self.close()
            raise errors.EngineFailed(
                f"{what}: the Docker Engine at {self.socket} cannot be reached; is it running? "
                f"({_short(error)})"
            ) from error
        except ValueError as error:
            raise errors.EngineFailed(
                f"{what}: no Docker Engine answers at {self.socket}: {error}"
            ) from error

    def _client(self) -> APIClient:
        with self._lock:
            if self._known is None:
                self._known = self._connect(self._timeout)
            return self._known

    def _connect(self, timeout: float) -> APIClient:
        client = self._make("1.24", timeout)  # what every engine answers to at this one path
        try:
            found = client.get(client.base_url + "/version", timeout=PING_TIMEOUT)
            found.raise_for_status()
            offered = _numbers(found.json()["ApiVersion"])
        finally:
            client.close()
        if offered < MINIMUM_API:
            raise errors.EngineFailed(
                f"the Docker Engine at {self.socket} speaks API {_dotted(offered)}; {_dotted(MINIMUM_API)} "
                "(Docker 20.10) or newer is needed"
            )
        return self._make(_dotted(min(offered, NEWEST_API)), timeout)

    def _make(self, version: str, timeout: float) -> APIClient:
        return APIClient(
            base_url=f"unix://{self.socket}",
            version=version,
            timeout=timeout,  # type: ignore[arg-type]  # requests takes a float
            max_pool_size=MOST_CONNECTIONS,
        )

    def _ping(self) -> None:
        client = self._make("1.24", PING_TIMEOUT)
        try:
            client.get(client.base_url + "/_ping", timeout=PING_TIMEOUT).raise_for_status()
        finally:
            client.close()
        self._suspect = False

    def info(self) -> dict[str, Any]:
        """What the engine says of itself. Raises EngineFailed."""
        with self.asking("info") as client:
            found: dict[str, Any] = client.info()
            return found

    def version(self) -> dict[str, Any]:
        """What the engine says of its parts. Raises EngineFailed."""
        with self.asking("version") as client:
            found: dict[str, Any] = client.version()
            return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _said(error: docker.errors.APIError) -> str:
    return str(error.explanation or error)[:MAX_SAID].strip()


def _short(error: BaseException) -> str:
    """The innermost reason: ``requests`` wraps it several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error)[:200]
