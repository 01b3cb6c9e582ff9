"""Copies of the journal as an older version left it, made before it is migrated."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import structlog

from sandboxd import errors, systemd
from sandboxd.failpoint import failpoint
from sandboxd.journal.output import sync_directory

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["back_up", "still_starting"]

KEPT_BACKUPS = 2
PATIENCE = 120  # seconds that a service manager is asked to wait for the next sign of life
PAGES = 20_000  # of a backup that are copied between two of them

log = structlog.get_logger(__name__)


def still_starting() -> None:
    """A large journal takes a while: a service manager waits for as long as it is told that it goes on."""
    systemd.notify(f"EXTEND_TIMEOUT_USEC={PATIENCE * 10**6}")


def back_up(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """A copy of what an older version wrote, whole or not at all. Raises HostFailed."""
    directory = path.parent / "backups"
    target = directory / f"journal-schema-{version}.sqlite3"
    temporary = target.with_suffix(".tmp")
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        for suffix in ("", "-journal", "-wal", "-shm"):  # SQLite would take those of another try for its own
            temporary.with_name(f"{temporary.name}{suffix}").unlink(missing_ok=True)
        needed = path.stat().st_size + path.with_name(f"{path.name}-wal").stat().st_size
        if shutil.disk_usage(directory).free < 2 * needed:
            raise errors.HostFailed(
                f"the journal has to be migrated from schema {version}, and a backup of it in {directory} "
                f"needs {2 * needed} bytes of free space; make room and start again"
            )
        _copy(connection, temporary)
        failpoint("journal.backup")
        temporary.replace(target)
        for each in (directory, path.parent):
            sync_directory(each)
        for old in sorted(directory.glob("journal-schema-*.sqlite3"), key=_written)[:-KEPT_BACKUPS]:
            old.unlink()
    except OSError as error:
        raise errors.HostFailed(f"the journal cannot be backed up: {error.strerror}") from error
    log.info("the journal is migrated", backup=str(target), schema=version)


def _copy(connection: sqlite3.Connection, to: Path) -> None:
    """Page for page, so that what is damaged is copied as it is. Raises OSError."""
    fd = os.open(to, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with closing(sqlite3.connect(to, isolation_level=None)) as target:
            target.execute("PRAGMA journal_mode = OFF")
            connection.backup(target, pages=PAGES, progress=lambda *_: still_starting())
            target.execute("PRAGMA journal_mode = DELETE")
        os.fsync(fd)
    finally:
        os.close(fd)


def _written(path: Path) -> float:
    return path.stat().st_mtime
