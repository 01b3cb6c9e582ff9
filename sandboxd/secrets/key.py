"""The key that secrets are encrypted with: where it is, and whether it may be used.

It is read when it is needed and not kept, so what an operator mends is in force at once, without a restart.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd import errors, keyfile
from sandboxd.failpoint import failpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["CREDENTIAL", "KeyPlace", "key_id", "make_key", "place_of", "read_key"]

SIZE = 32  # bytes: AES-256
CREDENTIAL = "sandboxd-secrets-key"
"""The name of systemd's credential (``LoadCredential=``), systemd.exec(5)."""
OWN = "secrets.key"
_HEX = re.compile(rb"[0-9A-Fa-f]{64}\s*")
_MAX = 256  # bytes of a file that are read: a key has less


@dataclass(frozen=True)
class KeyPlace:
    """The file of the key. ``own``: the daemon's own, which it makes when the first secret is stored."""

    path: Path
    own: bool

    def unavailable(self, what: str, todo: str) -> errors.SecretsUnavailable:
        """The error that says what is wrong with it and what to do."""
        said = f"the key of the secrets, {self.path}, {what}: {todo}; the stored secrets are as they were"
        return errors.SecretsUnavailable(said, key=str(self.path))


def place_of(configured: Path | None, state: Path, environ: Mapping[str, str]) -> KeyPlace:
    """Where the key is: where the configuration says, else systemd's credential, else in ``state``."""
    return KeyPlace(*keyfile.find(configured, state / OWN, environ, CREDENTIAL))


def read_key(place: KeyPlace) -> bytes:
    """The 32 bytes. Raises SecretsUnavailable, which says what to do."""
    try:
        fd = os.open(place.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise place.unavailable("is not there", _make(place)) from None
    except OSError as error:
        raise place.unavailable(f"cannot be read ({error.strerror})", "mend its path or its mode") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise place.unavailable("is no regular file", _make(place))
        if found.st_uid not in {0, os.geteuid()}:
            raise place.unavailable(f"belongs to uid {found.st_uid}", f"chown root: {place.path}")
        if found.st_mode & 0o077:
            mode = stat.S_IMODE(found.st_mode)
            raise place.unavailable(f"can be read by others (mode {mode:04o})", f"chmod 0600 {place.path}")
        data = os.read(fd, _MAX)
    finally:
        os.close(fd)
    if len(data) == SIZE:
        return data
    if _HEX.fullmatch(data):
        return bytes.fromhex(data.decode())
    has = f"{len(data)}" if len(data) < _MAX else f"{_MAX} or more"
    raise place.unavailable(
        f"has {has} bytes", f"a key is {SIZE} bytes, or their {2 * SIZE} hexadecimal digits"
    )


def _make(place: KeyPlace) -> str:
    if place.own:
        return "put it back, or remove every secret to begin anew"
    return f"put it back, or make one: (umask 077; head -c {SIZE} /dev/urandom > {place.path})"


def make_key(place: KeyPlace) -> None:
    """Make the daemon's own key, durably, unless it is there. Raises OSError."""
    keyfile.make(place.path, secrets.token_bytes(SIZE), written=lambda: failpoint("secret.key"))


def key_id(key: bytes) -> str:
    """What tells keys apart and says nothing of them: a key has 256 bits that nobody can try."""
    return hashlib.sha256(b"sandboxd: id of a key of secrets\0" + key).hexdigest()[:16]
