"""What the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Options", "SubjectFailed"]


class SubjectFailed(Exception):
    """Raised when there is no daemon to hold to anything; the message says why."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    engine: str = "oci"
    runtime: str = "auto"
    images: Path = Path("/var/lib/sandboxd/images")
    image: dict[str, str] = field(default_factory=lambda: {"base": "base", "python": "python"})
    socket: Path | None = None
    policies: Path | None = None
    """With ``socket``: a directory that the daemon reads policies from."""
    config: str = ""
    """Lines that are added to the configuration of the suite's daemon."""
    slow: float = 1.0
    label: str = ""
