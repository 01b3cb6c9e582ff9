"""The journal's tables, how they came to be, and what SQLite's errors mean here.

Migrations are numbered from 1 and applied in order, all in one transaction that also moves ``user_version``:
a daemon that dies meanwhile leaves what the older version left. They are never edited once released. Before
them an older database is copied to ``backups/``.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.failpoint import failpoint
from sandboxd.journal import btrees, sessioncalls
from sandboxd.journal.anew import check_new
from sandboxd.journal.backups import back_up, still_starting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["connect_mover", "connect_reader", "connect_writer", "damage_told", "keep_private", "mapped"]

APPLICATION_ID = 0x73626F78  # "sbox", so that file(1) and we know whose file it is


def _fill_sessions(connection: sqlite3.Connection, path: Path) -> None:
    with closing(connect_reader(path)) as reader:
        if reader.execute("SELECT 1 FROM sqlite_schema WHERE name = 'records'").fetchone():  # else it is new
            sessioncalls.fill(connection, reader, still_starting)


MIGRATIONS: tuple[tuple[str | Callable[[sqlite3.Connection, Path], None], ...], ...] = (
    (
        # doc is the invocation's JSON, its streams without their heads. Once it has ended, doc is the
        # body that its record's header has the digest of, and is not written again; NULL: pruned.
        """CREATE TABLE invocations (
            id TEXT PRIMARY KEY NOT NULL,
            uid INTEGER NOT NULL,
            key TEXT,
            request_digest TEXT NOT NULL,
            state TEXT NOT NULL,
            policy TEXT NOT NULL,
            cause TEXT,
            doc BLOB
        ) STRICT""",
        "CREATE UNIQUE INDEX invocation_keys ON invocations (uid, key) WHERE key IS NOT NULL",
        "CREATE INDEX invocation_callers ON invocations (uid, id)",
        "CREATE INDEX invocation_policies ON invocations (policy, id)",
        "CREATE INDEX invocation_causes ON invocations (cause, id) WHERE cause IS NOT NULL",
        "CREATE INDEX invocations_open ON invocations (state, id) WHERE state != 'ended'",
        """CREATE TABLE labels (
            name TEXT NOT NULL, value TEXT NOT NULL, id TEXT NOT NULL, PRIMARY KEY (name, value, id)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE records (
            n INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            digest TEXT NOT NULL,
            header BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE refusals (
            n INTEGER PRIMARY KEY,
            at INTEGER NOT NULL,
            uid INTEGER,
            code TEXT NOT NULL,
            detail TEXT NOT NULL,
            request TEXT NOT NULL
        ) STRICT""",
    ),
    (
        # what was asked, as ``requests`` says; contents NULL: pruned
        """CREATE TABLE requests (
            id TEXT PRIMARY KEY NOT NULL, doc BLOB NOT NULL, contents BLOB
        ) STRICT""",
        # Of each call without an outcome what the scheduler has to know, and no more: 100,000 are read at a
        # start. started counts the attempts that were given a container, and is on disk before their command
        # is handed over; resting: the last of them has ended, and another follows.
        """CREATE TABLE queue (
            id TEXT PRIMARY KEY NOT NULL,
            uid INTEGER NOT NULL,
            gid INTEGER NOT NULL,
            groups TEXT NOT NULL,
            tied INTEGER NOT NULL,
            started INTEGER NOT NULL,
            memory INTEGER NOT NULL,
            cpus INTEGER NOT NULL,
            priority INTEGER NOT NULL,
            serial TEXT,
            deadline INTEGER,
            resting INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE request_blobs (
            digest TEXT NOT NULL, id TEXT NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (digest, id)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX request_blobs_of ON request_blobs (id)",
        # who has to be told of the end of a call: gone when that was done
        """CREATE TABLE callbacks (
            id TEXT PRIMARY KEY NOT NULL,
            uid INTEGER NOT NULL,
            gid INTEGER NOT NULL,
            groups TEXT NOT NULL,
            unix TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
    ),
    (
        # gone: it is being removed, and nobody sees it. quota_* and expires: NULL is none.
        """CREATE TABLE sessions (
            id TEXT PRIMARY KEY NOT NULL,
            uid INTEGER NOT NULL,
            name TEXT,
            policy TEXT,
            labels TEXT NOT NULL,
            created INTEGER NOT NULL,
            used INTEGER NOT NULL,
            ttl INTEGER,
            idle INTEGER,
            expires INTEGER,
            quota_size INTEGER,
            quota_inodes INTEGER,
            head TEXT NOT NULL,
            origin TEXT NOT NULL,
            calls INTEGER NOT NULL,
            gone INTEGER NOT NULL
        ) STRICT""",
        "CREATE UNIQUE INDEX session_names ON sessions (uid, name) WHERE name IS NOT NULL AND NOT gone",
        "CREATE INDEX session_callers ON sessions (uid, id)",
        "CREATE INDEX session_heads ON sessions (head)",
        "CREATE INDEX session_origins ON sessions (origin)",
        "CREATE INDEX sessions_expiring ON sessions (expires) WHERE expires IS NOT NULL AND NOT gone",
        "CREATE INDEX sessions_going ON sessions (id) WHERE gone",
        # session: the one that it was made in, NULL once that is removed; layer: NULL for the first of a
        # session, which has no files.
        """CREATE TABLE checkpoints (
            id TEXT PRIMARY KEY NOT NULL,
            session TEXT,
            uid INTEGER NOT NULL,
            parent TEXT,
            depth INTEGER NOT NULL,
            digest TEXT NOT NULL,
            layer TEXT,
            content TEXT,
            size INTEGER NOT NULL,
            inodes INTEGER NOT NULL,
            created INTEGER NOT NULL,
            call TEXT
        ) STRICT""",
        "CREATE INDEX checkpoint_sessions ON checkpoints (session, id)",
        "CREATE INDEX checkpoint_parents ON checkpoints (parent)",
        "CREATE INDEX checkpoint_digests ON checkpoints (digest)",
        # What the last ``span`` layers up to a checkpoint are together; below them is ``below``.
        """CREATE TABLE merges (
            checkpoint TEXT NOT NULL,
            span INTEGER NOT NULL,
            below TEXT,
            layer TEXT NOT NULL,
            size INTEGER NOT NULL,
            inodes INTEGER NOT NULL,
            PRIMARY KEY (checkpoint, span)
        ) STRICT, WITHOUT ROWID""",
    ),
    (
        # Heads that were signed; each has to be in the chain.
        "CREATE TABLE heads (n INTEGER PRIMARY KEY, signed BLOB NOT NULL) STRICT",
        # What records name by digest and share: the resolved forms of policies.
        """CREATE TABLE contents (
            digest TEXT PRIMARY KEY NOT NULL, data BLOB NOT NULL
        ) STRICT, WITHOUT ROWID""",
        # When the body, the streams and the artifacts of a call were removed; its record stays.
        "ALTER TABLE invocations ADD COLUMN pruned INTEGER",
        # What a call holds on disk: bytes of its body and streams. Its artifacts are shared, and beside it.
        "ALTER TABLE records ADD COLUMN at INTEGER",
        "ALTER TABLE records ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
        (
            "UPDATE records SET at = json_extract(CAST(header AS TEXT), '$.at'),"
            " bytes = 4096 + coalesce(json_extract(CAST(header AS TEXT), '$.stdout.size'), 0)"
            " + coalesce(json_extract(CAST(header AS TEXT), '$.stderr.size'), 0)"
            " WHERE json_valid(CAST(header AS TEXT))"
        ),
        "CREATE INDEX records_kept ON records (n, at, bytes) WHERE bytes > 0",
        # Which calls released which files: gone when a call is pruned.
        """CREATE TABLE artifacts (
            digest TEXT NOT NULL, id TEXT NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (digest, id)
        ) STRICT, WITHOUT ROWID""",
        (
            "INSERT OR IGNORE INTO artifacts SELECT json_extract(a.value, '$.digest'), i.id,"
            " json_extract(a.value, '$.size') FROM invocations AS i, json_each(CASE WHEN i.state = 'ended'"
            " AND json_valid(CAST(i.doc AS TEXT)) THEN CAST(i.doc AS TEXT) ELSE '{}' END, '$.artifacts') AS a"
        ),
        "CREATE INDEX artifacts_of_calls ON artifacts (id)",
    ),
    (
        # Copies of small spools whose files are not synced yet, as ``behind`` says.
        "CREATE TABLE unsynced (id TEXT PRIMARY KEY NOT NULL, files BLOB NOT NULL) STRICT",
    ),
    # device and inode of the caller's directory that a session stands on
    ("ALTER TABLE sessions ADD COLUMN checkout TEXT",),
    (
        # what may be pruned, by when it ended
        "DROP INDEX records_kept",
        "CREATE INDEX records_kept ON records (at, n, bytes) WHERE bytes > 0",
    ),
    (
        # What small layers are made of whose files are not on disk yet, as ``workspace.unwritten`` says.
        "CREATE TABLE packs (layer TEXT PRIMARY KEY NOT NULL, pack BLOB NOT NULL) STRICT",
    ),
    # what its calls used of the network, and what is held for one, as ``workspace.allowance`` has it
    ("ALTER TABLE sessions ADD COLUMN network TEXT",),
    (
        # program: a name of the configuration's, and unix is empty then. done: when it was told, or given up
        # where there is a problem; what is done stays for as long as the body of its call.
        "ALTER TABLE callbacks ADD COLUMN program TEXT",
        "ALTER TABLE callbacks ADD COLUMN tries INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE callbacks ADD COLUMN done INTEGER",
        "ALTER TABLE callbacks ADD COLUMN problem TEXT",
        "CREATE INDEX callbacks_owed ON callbacks (id) WHERE done IS NULL",
    ),
    (
        # containers that sessions keep over their calls; ``lost`` is when one was found to be gone
        """CREATE TABLE containers (
            session TEXT PRIMARY KEY NOT NULL,
            since TEXT NOT NULL,
            calls INTEGER NOT NULL,
            policy TEXT NOT NULL,
            lost INTEGER,
            why TEXT
        ) STRICT, WITHOUT ROWID""",
    ),
    (
        # what a merged layer does not share with those that it was made of
        "ALTER TABLE merges ADD COLUMN own_size INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE merges ADD COLUMN own_inodes INTEGER NOT NULL DEFAULT 0",
    ),
    (
        sessioncalls.TABLE,
        _fill_sessions,
        # the digest of what a merged layer holds; NULL where an earlier version merged it
        "ALTER TABLE merges ADD COLUMN content TEXT",
        # Checkpoints that a session's owner has discarded, which records name all the same. An empty digest:
        # any may have been, since an earlier version did not note it.
        """CREATE TABLE forgotten (
            session TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (session, digest)
        ) STRICT, WITHOUT ROWID""",
        "INSERT INTO forgotten (session, digest) SELECT id, '' FROM sessions",
    ),
)


@contextmanager
def mapped() -> Iterator[None]:
    """SQLite's errors as ours: JournalCorrupt for a damaged file, HostFailed for all else."""
    try:
        yield
    except sqlite3.Error as error:
        raise error_of(error) from error


def error_of(error: sqlite3.Error) -> errors.SandboxdError:
    """What an error of SQLite means for the journal: https://www.sqlite.org/rescode.html."""
    if btrees.is_damage(error) or "Could not decode" in str(error):
        return errors.JournalCorrupt(f"the journal's database is damaged: {error}")
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return errors.HostFailed("no space left for the journal in the state directory")
    return errors.HostFailed(f"the journal's database cannot be used: {error}")


def damage_told(damaged: Sequence[btrees.Damaged]) -> str:
    """Which parts of the database are damaged, and what to do."""
    named = ", ".join(f"the {one}" for one in damaged)
    return (
        f"the journal's database is damaged: {named}; `sandboxd journal verify --deep` says what can be "
        "read; restore the state directory from a backup"
    )


def connect_writer(path: Path) -> sqlite3.Connection:
    """Open the database for its one writer, which syncs its log itself, creating or migrating it.

    Raises ConfigInvalid when a newer version wrote it, or when it is empty and there was another one,
    JournalCorrupt, HostFailed.
    """
    with mapped():
        if not _has_bytes(path):
            check_new(path)  # before SQLite removes a log of what was there
        keep_private(path)
        connection = sqlite3.connect(path, isolation_level=None, timeout=1.0, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA wal_autocheckpoint = 0")  # that is the mover's
            connection.execute("PRAGMA temp_store = MEMORY")
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def connect_mover(path: Path) -> sqlite3.Connection:
    """Open the database for whoever moves its log into it, in whatever thread. Raises HostFailed."""
    with mapped():
        return sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)


def connect_reader(path: Path) -> sqlite3.Connection:
    """Open the database for reading, in the calling thread. Raises HostFailed."""
    with mapped():
        connection = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)
        connection.execute("PRAGMA query_only = ON")
        connection.text_factory = _text
    return connection


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:  # opening it says what else is wrong
        return False


def keep_private(path: Path) -> None:
    """Make a database's file, or take it from all others: it has what callers asked for.

    Its log gets its mode. Raises HostFailed.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        for each in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
            if each.exists():
                each.chmod(0o600)
    except OSError as error:
        raise errors.HostFailed(f"{path.name} cannot be made: {error.strerror}") from error


def _text(data: bytes) -> str:
    """Text as it is stored; what a damaged page made of it stands for itself, and ends no reading."""
    return data.decode("utf-8", "backslashreplace")


def check_known(connection: sqlite3.Connection, path: Path) -> int:
    """The schema of a journal, 0 where it has none yet. Raises ConfigInvalid for what is no journal of ours.

    That is also one of a newer version, of which nothing could be said. Raises sqlite3.Error.
    """
    application = _pragma(connection, "application_id")
    version = _pragma(connection, "user_version")
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application != APPLICATION_ID and (application or version or tables):
        raise errors.ConfigInvalid(f"{path} is a database of another program; choose another state directory")
    known = len(MIGRATIONS)
    if version > known:
        raise errors.ConfigInvalid(
            f"{path} was written by a newer sandboxd (schema {version}, this version knows {known}); "
            "run that version, or choose another state directory"
        )
    return version


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version, known = check_known(connection, path), len(MIGRATIONS)
    if not version:
        check_new(path)
    if 0 < version < known:
        _check_tables(connection, path, version)
        back_up(connection, path, version)
    if version == known:
        return
    connection.execute("BEGIN IMMEDIATE")
    for number in range(version + 1, known + 1):
        for step in MIGRATIONS[number - 1]:
            if isinstance(step, str):
                connection.execute(step)
            else:
                step(connection, path)
        failpoint("journal.migrate")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {known}")
    connection.execute("COMMIT")


def _check_tables(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """Raise ConfigInvalid for a database that has a released version's number, and not its tables."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        for steps in MIGRATIONS[:version]:
            for step in steps:
                if isinstance(step, str):
                    model.execute(step)
        missing = _columns(model) - _columns(connection)
    if missing:
        named = ", ".join(f"{table}.{column}" for table, column in sorted(missing)[:5])
        raise errors.ConfigInvalid(
            f"{path} says that it has schema {version}, and lacks {named}: a version between releases wrote "
            "it, or it was damaged; restore a backup, or choose another state directory"
        )


def _columns(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(
        connection.execute(
            "SELECT m.name, p.name FROM sqlite_schema AS m JOIN pragma_table_info(m.name) AS p"
            " WHERE m.type = 'table'"
        )
    )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
