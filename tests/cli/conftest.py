"""The server that the command line is tested against."""

from __future__ import annotations

from api_server import api

__all__ = ["api"]
