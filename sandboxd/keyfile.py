"""Files of the daemon's keys: where one is, and how it is made."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["find", "make"]


def find(
    configured: Path | None, own: Path, environ: Mapping[str, str], credential: str
) -> tuple[Path, bool]:
    """Where the configuration says, else systemd's credential of that name (systemd.exec(5)), else ``own``.

    And whether it is that one.
    """
    if configured is not None:
        return configured, False
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if directory and (Path(directory) / credential).exists():
        return Path(directory) / credential, False
    return own, True


def make(path: Path, data: bytes, *, written: Callable[[], None]) -> None:
    """Make a file that root alone reads, durably and whole, unless it is there. Raises OSError.

    ``written`` is called before it has its name.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        written()
        os.link(temporary, path)  # never in the place of one that came meanwhile
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
