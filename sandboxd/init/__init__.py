"""The programs in C, and the other end of PID 1's protocol.

``init.c`` is PID 1 of every container, ``container.c`` the built-in runtime; ``launch.c`` starts others.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CONTAINER", "INIT", "LAUNCH"]

CONTAINER = Path(__file__).with_name("sandboxd-container")
INIT = Path(__file__).with_name("sandboxd-init")
LAUNCH = Path(__file__).with_name("sandboxd-launch")
