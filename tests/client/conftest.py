"""The server that the clients are tested against."""

from __future__ import annotations

from api_server import api

__all__ = ["api"]
