"""The blocking client: a file for each subject of its methods."""

from __future__ import annotations

from sandboxd.client.sync.client import Client
from sandboxd.client.sync.stream import Stream

__all__ = ["Client", "Stream"]
