"""Directories that callers have passed, until a request names them: each once, by a text nobody guesses."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from sandboxd.workspace.checkout import Owner

__all__ = ["Handed", "Handles"]

MOST = 16
"""Handles of one uid that wait."""


@dataclass
class Handed:
    """A directory and who passed it. A context manager that closes the descriptor."""

    directory: int
    owner: Owner

    def __enter__(self) -> int:
        return self.directory

    def __exit__(self, *_: object) -> None:
        os.close(self.directory)


@dataclass
class Handles:
    """For one event loop."""

    _waiting: dict[str, Handed] = field(default_factory=dict)

    def add(self, handed: Handed) -> str:
        """A handle for a directory. Raises QueueFull where its uid has too many; then it is closed."""
        if sum(one.owner.uid == handed.owner.uid for one in self._waiting.values()) >= MOST:
            with handed:
                raise errors.QueueFull(
                    f"{MOST} directories of yours wait for a request that names them", retry_after=1
                )
        handle = secrets.token_urlsafe(24)
        self._waiting[handle] = handed
        return handle

    def take(self, handle: str, uid: int) -> Handed:
        """The directory, yours to close now. Raises NotFound for another uid's handle, or a used one."""
        found = self._waiting.get(handle)
        if found is None or found.owner.uid != uid:
            raise errors.NotFound(
                "no directory waits under this handle; it is used once, by who passed the directory, "
                "while the connection is open that passed it",
                field="checkout",
            )
        return self._waiting.pop(handle)

    def drop(self, handle: str) -> None:
        """Let go of a directory that nobody has taken."""
        found = self._waiting.pop(handle, None)
        if found is not None:
            with found:
                return
