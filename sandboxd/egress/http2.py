"""HTTP/2 between a container and a server (placeholder)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sandboxd.egress.site import Site
    from sandboxd.egress.streams import Stream

__all__ = ["Http2"]


class Http2:
    def __init__(
        self,
        client: Stream,
        site: Site,
        connect: Callable[[], Awaitable[Stream]],
        first: Stream | None = None,
    ) -> None: ...

    async def run(self) -> None:
        raise NotImplementedError
