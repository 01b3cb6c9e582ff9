"""Being another user for a while: the kernel tells the daemon the effective uid of who connects."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["acting_as"]


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """For the time of the block."""
    before = os.geteuid()
    os.seteuid(0)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.seteuid(before)
