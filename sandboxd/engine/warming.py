"""Which shapes have an interpreter that could not be made to wait, and until when none is tried again."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd.plan import Shape

__all__ = ["Warming"]

PAUSE = 60.0  # seconds: what was wrong with one slot is mostly wrong with the next
MAX_REMEMBERED = 1024

log = logging.getLogger("sandboxd.engine")


class Warming:
    """Tells the operator, and keeps a policy that cannot be warm from costing two slots for each call."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def due(self, shape: Shape) -> bool:
        """Whether to start this shape's interpreter."""
        return self._until.get(shape.digest, 0.0) <= time.monotonic()

    def failed(self, shape: Shape, reason: str) -> None:
        """Remember and say it. ``reason`` is the image's own words."""
        if len(self._until) >= MAX_REMEMBERED:
            self._until.clear()
        self._until[shape.digest] = time.monotonic() + PAUSE
        log.warning(
            "policy %s: no warm interpreter for %.0f s, its calls start one of their own: %r",
            shape.policy,
            PAUSE,
            reason,
        )
