"""The asynchronous client, for asyncio and trio: a file for each subject of its methods."""

from __future__ import annotations

from sandboxd.client.aio.client import AsyncClient
from sandboxd.client.aio.stream import AsyncStream

__all__ = ["AsyncClient", "AsyncStream"]
