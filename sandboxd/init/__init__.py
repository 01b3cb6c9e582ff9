"""PID 1 of every container (``init.c``), the launcher (``launch.c``), and the other end of their protocol."""

from __future__ import annotations

from pathlib import Path

__all__ = ["INIT", "LAUNCH"]

INIT = Path(__file__).with_name("sandboxd-init")
LAUNCH = Path(__file__).with_name("sandboxd-launch")
