"""The files of sessions for who is outside of them."""

from __future__ import annotations

from sandboxd.sessionfiles.service import SessionFiles

__all__ = ["SessionFiles"]
