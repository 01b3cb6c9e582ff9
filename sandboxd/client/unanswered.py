"""The requests of a batch to which no answer has come yet, over however many daemons. Standard library only.

Each request has a key, its own or one that is made here, so that it can be sent again and runs once. Those
of ours are tied: their calls end with the caller, as calls without a key do.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from sandboxd import errors
from sandboxd.client import wire

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Unanswered"]

AGAIN = errors.Draining.code
"""What a daemon says of a request that the next one is to be asked."""


class Unanswered:
    """What is left of a batch, by the caller's numbers."""

    def __init__(self, requests: Sequence[Any], parallel: int | None) -> None:
        name = os.urandom(16).hex()
        self._more = {} if parallel is None else {"parallel": parallel}
        self._left: dict[int, Any] = {}
        self._own: set[int] = set()
        for index, request in enumerate(requests):
            self._left[index] = request
            if isinstance(request, dict) and request.get("key") is None:
                self._left[index] = request | {"key": f"{name}.{index}"}
                self._own.add(index)
        self._asked: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._left)

    def exchange(self) -> wire.Exchange:
        """Ask for what is left."""
        self._asked = list(self._left)
        body: dict[str, Any] = {"requests": list(self._left.values()), **self._more}
        body["tied"] = [at for at, index in enumerate(self._asked) if index in self._own]
        return wire.Exchange("POST", wire.target("batches"), json.dumps(body).encode(), waits=True)

    def told(self, at: int, code: str | None) -> int | None:
        """The caller's number of what is answered; None for one that the next daemon is to be asked.

        ``at`` is its number in the last exchange, ``code`` that of its problem. Raises Unavailable
        (reason ``protocol``) for one that was not asked.
        """
        index = self._asked[at] if 0 <= at < len(self._asked) else None
        if index is None or index not in self._left:
            raise wire.protocol_error("a result of no request")
        if code == AGAIN:
            return None
        del self._left[index]
        return index

    def cut(self) -> errors.SandboxdError:
        """Why an answer that ended as it should has not answered everything."""
        return errors.Draining(f"the daemon stops; {len(self._left)} requests are not answered")
