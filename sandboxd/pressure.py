"""Whether the host has room for more: its free memory, and how long its tasks wait for memory."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from sandboxd.config import Pressure

__all__ = ["HostPressure"]

PSI = Path("/proc/pressure/memory")
FRESH = 0.25  # seconds that a reading is good for
_SOME = re.compile(r"^some avg10=([0-9.]+) ", re.MULTILINE)


class HostPressure:
    """Reads what the kernel says, a few times a second at most. ``psi``: proc(5), Linux 4.20."""

    def __init__(self, limits: Pressure, psi: Path = PSI) -> None:
        self._limits = limits
        self._psi = psi
        self._read_at = float("-inf")
        self._high = False

    def high(self) -> bool:
        """Whether nothing more should start."""
        now = time.monotonic()
        if now - self._read_at >= FRESH:
            memory = psutil.virtual_memory()
            short = memory.available * 100 < memory.total * self._limits.available
            self._high = short or self.stalled() > self._limits.stalled
            self._read_at = now
        return self._high

    def stalled(self) -> float:
        """Percent of the last ten seconds in which some task waited for memory; 0 where nobody counts it."""
        with contextlib.suppress(OSError):  # no PSI in this kernel, or it is switched off (EOPNOTSUPP)
            found = _SOME.search(self._psi.read_text(encoding="ascii"))
            return float(found[1]) if found else 0.0
        return 0.0
