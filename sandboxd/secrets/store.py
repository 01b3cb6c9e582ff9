"""The store: a file for each secret in the state directory, of which what is in plain is kept in memory.

Theory of operation.  A value is sealed (``record``) and written beside its file, synced, and moved into its
place, and the directory is synced: after a crash the file is the old one or the new one, and whole. Values
are read from disk and unsealed for each use, and not kept. A version's number is never used for another
value of that name: what is removed leaves its number behind. A secret that is damaged, or sealed with
another key, keeps its file; it is refused by whoever needs it and hinders nobody else.

All methods block, for a disk; all may be called from any thread.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import structlog

from sandboxd import errors, units
from sandboxd.failpoint import failpoint
from sandboxd.models import SecretInfo
from sandboxd.secrets.key import key_id, make_key, read_key
from sandboxd.secrets.record import NAME, Damaged, Known, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from sandboxd.secrets.key import KeyPlace

__all__ = ["MAX_GRANTED", "MAX_VALUE", "SecretStore", "Value"]

MAX_VALUE = 64 * 1024
"""Bytes of a value."""
MAX_GRANTED = 256 * 1024
"""Bytes of all values of a call together."""
MAX_SECRETS = 100_000
SHORTEST = 8  # bytes; as ``sandboxd.redaction`` has it, which a test compares
_MAX_FILE = 2 * MAX_VALUE
_TEMPORARY = ".new-"

log = structlog.get_logger("sandboxd.secrets")


@dataclass(eq=False)
class Value:
    """A version and its bytes, until ``wipe``."""

    version: int
    data: bytearray

    def wipe(self) -> None:
        """Overwrite the bytes. Copies that a library made of them are not reached."""
        self.data[:] = bytes(len(self.data))


class SecretStore:
    """Of one daemon, whose lock of the state directory keeps others out."""

    def __init__(self, directory: Path, place: KeyPlace) -> None:
        self._directory = directory
        self._place = place
        self._writing = threading.Lock()
        """Held while a disk is waited for; ``_lock`` never is."""
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        self._damaged: dict[str, str] = {}
        self._watching: dict[str, list[tuple[asyncio.AbstractEventLoop, Callable[[str], None]]]] = {}

    @classmethod
    def open(cls, directory: Path, place: KeyPlace, *, serving: bool = True) -> Self:
        """Read what is there; nothing is refused but a directory that cannot be used. Raises OSError.

        Without ``serving``, beside a daemon that may write there: nothing is cleaned up.
        """
        store = cls(directory, place)
        directory.mkdir(mode=0o700, exist_ok=True)
        _sync_directory(directory.parent)  # its own name; it may have been made a moment ago
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if name.startswith(_TEMPORARY):  # of a daemon that died while it wrote
                if serving:
                    (directory / name).unlink(missing_ok=True)
            elif NAME.fullmatch(name):
                store._look(name)
            else:
                log.warning("a file is no secret", file=str(directory / name))
        for name, why in store._damaged.items():
            log.error("a secret is damaged", name=name, reason=why)
        return store

    def _look(self, name: str) -> None:
        """Take over what the file of a secret says."""
        known, why = None, ""
        try:
            known = self._read(name).known
        except FileNotFoundError:
            pass
        except Damaged as error:
            why = str(error)
        except OSError as error:
            why = f"it cannot be read ({error.strerror})"
        with self._lock:
            for found in (self._known, self._damaged):
                found.pop(name, None)
            if known is not None:
                self._known[name] = known
            elif why:
                self._damaged[name] = why

    def _read(self, name: str) -> Record:
        fd = os.open(self._directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = os.read(fd, _MAX_FILE)  # of a regular file, all that there is
        finally:
            os.close(fd)
        return Record.decode(data, name)

    def list(self) -> list[SecretInfo]:
        """Every secret by name, damaged ones too."""
        with self._lock:
            found = [_info(known) for known in self._known.values() if not known.removed]
            found += [_damaged(name, why) for name, why in self._damaged.items()]
        return sorted(found, key=lambda info: info.name)

    def get(self, name: str) -> SecretInfo:
        """One secret. Raises NotFound."""
        with self._lock:
            if name in self._damaged:
                return _damaged(name, self._damaged[name])
            return _info(self._there(name))

    def _there(self, name: str) -> Known:
        known = self._known.get(name)
        if known is None or known.removed:
            raise errors.NotFound(f"there is no secret {name[:128]!r}", secret=name[:128])
        return known

    def set(self, name: str, value: bytes) -> SecretInfo:
        """Store the first value of a name.

        Raises InvalidRequest, TooLarge, StateConflict if there is one, SecretsUnavailable without the right
        key, HostFailed when it cannot be written; then nothing has changed.
        """
        _check_name(name)
        _check_value(value)
        with self._writing:
            if name in self._damaged:
                raise self._unusable(name)
            before = self._known.get(name)
            if before is not None and not before.removed:
                raise errors.StateConflict(
                    f"there is a secret {name}, at version {before.version}; rotate it for a new value",
                    secret=name,
                    version=before.version,
                )
            if len(self._known) >= MAX_SECRETS:
                raise errors.TooLarge(f"the store holds {MAX_SECRETS} names, which is all it takes")
            now = time.time_ns() // 1000
            version = 1 if before is None else before.version + 1
            return self._store(Known(name, version, now, now, "", len(value), has_nul=b"\0" in value), value)

    def rotate(self, name: str, value: bytes) -> SecretInfo:
        """Give a secret a new value, which the next use has. Raises NotFound, and as ``set`` does."""
        _check_name(name)
        _check_value(value)
        with self._writing:
            if name in self._damaged:
                raise self._unusable(name)
            known = self._there(name)
            now = time.time_ns() // 1000
            new = replace(
                known, version=known.version + 1, rotated=now, size=len(value), has_nul=b"\0" in value
            )
            info = self._store(new, value)
        self._tell(name)
        return info

    def remove(self, name: str) -> None:
        """Forget a value; needs no key. Raises NotFound, HostFailed."""
        with self._writing:
            if name in self._damaged:  # its number is not to be believed: what follows is beyond any that was
                now = time.time_ns() // 1000
                gone = Known(name, now // 1_000_000, now, now, key="", size=0, has_nul=False, removed=True)
                self._write(name, Record(gone))
            else:
                known = self._there(name)
                self._write(name, Record(replace(known, removed=True, key="", size=0, has_nul=False)))
        self._tell(name)

    def _store(self, known: Known, value: bytes) -> SecretInfo:
        key = self._key(make=True)
        ours = key_id(key)
        other = next((one for one in self._known.values() if one.key and one.key != ours), None)
        if other is not None:  # else half of them would be lost with whichever key is
            raise self._other_key(other, key)
        record = Record.seal(known, value, key)
        self._write(known.name, record)
        return _info(record.known)

    def _key(self, *, make: bool = False) -> bytes:
        sealed = any(known.key for known in self._known.values()) or self._damaged
        if make and self._place.own and not sealed and not self._place.path.exists():
            try:
                make_key(self._place)
            except OSError as error:
                raise _unwritten(error) from error
        return read_key(self._place)

    def _write(self, name: str, record: Record | None) -> None:
        """Have the file of a name be this record, or be gone, on disk. Raises HostFailed."""
        temporary = self._directory / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            if record is None:
                (self._directory / name).unlink(missing_ok=True)
            else:
                failpoint("secret.write")
                _write_new(temporary, record.encode())
                failpoint("secret.place")
                temporary.replace(self._directory / name)
            failpoint("secret.placed")
            _sync_directory(self._directory)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _unwritten(error) from error
        finally:
            self._look(name)  # what is there now, also where only the last step failed

    def check(self, names: Iterable[str], *, environment: Iterable[str] = ()) -> int:
        """Whether a call could have these now; returns the bytes that they have together.

        ``environment``: those of them that become variables. Raises SecretMissing, SecretsUnavailable,
        SecretUnfit.
        """
        wanted = list(dict.fromkeys(names))
        with self._lock:
            known = [self._wanted(name) for name in wanted]
        key = self._key()
        for one in known:
            if one.key != key_id(key):
                raise self._other_key(one, key)
        for one in known:
            if one.has_nul and one.name in environment:
                raise errors.SecretUnfit(
                    f"the secret {one.name} has a NUL byte, which no variable can hold; grant it `as: file`",
                    secret=one.name,
                )
        size = sum(one.size for one in known)
        if size > MAX_GRANTED:
            most = units.format_size(MAX_GRANTED)
            raise errors.SecretUnfit(
                f"the secrets {', '.join(wanted)} have {size} bytes together, and a call may have {most}"
            )
        return size

    def _wanted(self, name: str) -> Known:
        if name in self._damaged:
            raise self._unusable(name)
        known = self._known.get(name)
        if known is None or known.removed:
            raise self._missing(name)
        return known

    def _missing(self, name: str) -> errors.SecretMissing:
        return errors.SecretMissing(
            f"the policy grants the secret {name}, and there is none; an operator stores it with "
            f"`sandboxd secret set {name}`",
            secret=name,
        )

    def take(self, names: Iterable[str]) -> dict[str, Value]:
        """The newest values, which are the caller's to wipe. Raises SecretMissing, SecretsUnavailable."""
        found: dict[str, Value] = {}
        try:
            for name in names:
                found[name] = self._unsealed(name)
        except BaseException:
            for value in found.values():
                value.wipe()
            raise
        return found

    def _unsealed(self, name: str) -> Value:
        with self._lock:
            known = self._wanted(name)
        key = self._key()
        try:
            record = self._read(name)
            if record.known.version < known.version:  # one that is newer is being written now
                raise Damaged("its file was put back to an earlier version")
            if record.known.key != key_id(key):
                raise self._other_key(record.known, key)
            return Value(record.known.version, bytearray(record.unseal(key)))
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:  # of the host, and gone the next time
            raise errors.SecretsUnavailable(
                f"the secret {name} cannot be read: {error.strerror or error}", secret=name
            ) from error
        except Damaged as error:
            with self._lock:
                self._damaged[name] = str(error)
                self._known.pop(name, None)
            log.error("a secret is damaged", name=name, reason=str(error))  # noqa: TRY400
            raise self._unusable(name) from None

    @contextmanager
    def watched(self, names: Iterable[str], told: Callable[[str], None]) -> Iterator[None]:
        """Call ``told`` with a name, on this event loop, when it has a new value or none any more."""
        entry, wanted = (asyncio.get_running_loop(), told), list(names)
        with self._lock:
            for name in wanted:
                self._watching.setdefault(name, []).append(entry)
        try:
            yield
        finally:
            with self._lock:
                for name in wanted:
                    self._watching[name].remove(entry)
                    if not self._watching[name]:
                        del self._watching[name]

    def _tell(self, name: str) -> None:
        with self._lock:
            watching = list(self._watching.get(name, ()))
        for loop, told in watching:
            loop.call_soon_threadsafe(told, name)

    def _unusable(self, name: str) -> errors.SecretsUnavailable:
        return errors.SecretsUnavailable(
            f"the secret {name} is damaged ({self._damaged[name]}): put {self._directory / name} back from a "
            f"copy and restart, or `sandboxd secret rm {name}` and set it anew",
            secret=name,
        )

    def _other_key(self, known: Known, key: bytes) -> errors.SecretsUnavailable:
        return errors.SecretsUnavailable(
            f"the secret {known.name} was stored with another key ({known.key}) than that in "
            f"{self._place.path} ({key_id(key)}): put that key back, or remove what was stored with it and "
            "set it anew; nothing was changed",
            secret=known.name,
            key=str(self._place.path),
        )

    def problem(self) -> str | None:
        """What keeps the secrets from being used, or None. Raises nothing."""
        with self._lock:
            sealed = [known for known in self._known.values() if known.key]
            if not sealed and self._place.own and not self._place.path.exists():
                return None
            try:
                key = read_key(self._place)
                other = next((known for known in sealed if known.key != key_id(key)), None)
                if other is not None:
                    raise self._other_key(other, key)
            except errors.SecretsUnavailable as error:
                return str(error)
            return str(self._unusable(next(iter(self._damaged)))) if self._damaged else None


def _info(known: Known) -> SecretInfo:
    return SecretInfo(name=known.name, version=known.version, created=known.created, rotated=known.rotated)


def _damaged(name: str, why: str) -> SecretInfo:
    return SecretInfo(name=name, problem=why)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise errors.InvalidRequest(
            f"{name[:128]!r} is not the name of a secret: upper case letters, digits and _, a letter first, "
            "at most 128, such as GITHUB_TOKEN",
            field="name",
        )


def _check_value(value: bytes) -> None:
    """Says nothing of the value but its length."""
    if len(value) > MAX_VALUE:
        most = units.format_size(MAX_VALUE)
        raise errors.TooLarge(
            f"a secret has at most {most}, and this one {len(value)} bytes", limit=MAX_VALUE
        )
    if len(value.translate(None, b"\r\n")) < SHORTEST:
        raise errors.InvalidRequest(
            f"a secret has at least {SHORTEST} bytes beside line breaks: what is shorter could not be told "
            "apart from other output, which is searched for secrets",
            field="value",
        )


def _write_new(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _unwritten(error: OSError) -> errors.HostFailed:
    full = " (no space is left)" if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
    return errors.HostFailed(f"the secret could not be written{full}: {error.strerror}")
