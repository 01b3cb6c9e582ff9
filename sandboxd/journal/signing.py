"""The node's key, and heads that are signed with it.

Theory of operation: an Ed25519 key (RFC 8032) says that a chain had a record of this number and digest. It
proves that to whoever has the public key and a signed head, and nothing to whom root on this host is an enemy
of: root can read the key, and sign another chain with it. A head that was taken elsewhere in time is what
holds against that.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import secrets
import stat
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sandboxd import canonical, errors, keyfile
from sandboxd.failpoint import failpoint
from sandboxd.journal.chain import Head, parse_head

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

__all__ = [
    "CREDENTIAL",
    "KeyPlace",
    "NodeKey",
    "SignedHead",
    "key_id",
    "load_public",
    "pem",
    "place_of",
    "read_public",
]

CREDENTIAL = "sandboxd-journal-key"
"""The name of systemd's credential (``LoadCredential=``), systemd.exec(5)."""
OWN, PUBLIC = "journal.key", "journal.pub"
MOST = 32  # public keys that are kept
_END = b"-----END PUBLIC KEY-----\n"
_MAX = 4096  # bytes of a file of a key, or of a signed head
_FIELDS = {"v", "type", "n", "digest", "at", "key", "public", "signature"}


@dataclass(frozen=True)
class KeyPlace:
    """The file of the key. ``own``: the daemon's own, which it makes at its first start."""

    path: Path
    own: bool


def place_of(configured: Path | None, state: Path, environ: Mapping[str, str]) -> KeyPlace:
    """Where the key is: where the configuration says, else systemd's credential, else in ``state``."""
    return KeyPlace(*keyfile.find(configured, state / OWN, environ, CREDENTIAL))


def key_id(public: bytes) -> str:
    """What names a key: the digest of its 32 public bytes."""
    return "sha256:" + hashlib.sha256(public).hexdigest()


def pem(public: bytes) -> bytes:
    """A public key as PEM, which openssl reads too. Raises ValueError."""
    return Ed25519PublicKey.from_public_bytes(public).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@dataclass(frozen=True)
class NodeKey:
    """The key that this node signs with."""

    private: Ed25519PrivateKey

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return self.private.public_key().public_bytes_raw()

    @property
    def id(self) -> str:
        """Its name."""
        return key_id(self.public)

    def pem(self) -> bytes:
        """The public key as PEM."""
        return pem(self.public)

    def sign(self, head: Head, at: int) -> bytes:
        """A signed head: one canonical JSON object. ``at`` is microseconds since the epoch."""
        said = _said(head, at, self.public)
        signature = self.private.sign(canonical.canonical(said))
        return canonical.canonical({**said, "signature": base64.b64encode(signature).decode()})

    def publish(self, state: Path) -> None:
        """Leave the public key in the state directory, for commands that cannot read the key itself.

        Those that were there before follow it: what they signed holds. Raises HostFailed.
        """
        path = state / PUBLIC
        try:
            before = known(state)
            if before[:1] == [self.public]:
                return
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            all_of_them = [self.public, *(key for key in before if key != self.public)]
            temporary.write_bytes(b"".join(map(pem, all_of_them[:MOST])))
            temporary.replace(path)
        except OSError as error:
            raise errors.HostFailed(
                f"the public key of the journal cannot be written: {error.strerror}"
            ) from error

    @classmethod
    def load(cls, place: KeyPlace) -> NodeKey:
        """The key of a place. Raises ConfigInvalid, which says what to do; NotFound where there is none."""
        data = _read(place.path)
        try:
            key = serialization.load_pem_private_key(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise errors.ConfigInvalid(
                f"the key of the journal, {place.path}, is no Ed25519 key in PEM; make one: "
                "(umask 077; openssl genpkey -algorithm ed25519 -out FILE)"
            )
        return cls(key)

    @classmethod
    def open(cls, place: KeyPlace) -> NodeKey:
        """The same, and the daemon's own is made if it is not there. Raises ConfigInvalid, HostFailed."""
        try:
            return cls.load(place)
        except errors.NotFound as error:
            if not place.own:
                raise errors.ConfigInvalid(str(error)) from None
        try:
            _make(place.path)
        except OSError as error:
            raise errors.HostFailed(f"the key of the journal cannot be made: {error.strerror}") from error
        return cls.load(place)


@dataclass(frozen=True)
class SignedHead:
    """A head that somebody signed; ``check`` says whether that holds and who it was."""

    head: Head
    at: int
    public: bytes
    signature: bytes

    @classmethod
    def parse(cls, data: bytes) -> SignedHead:
        """Read what ``NodeKey.sign`` made. Raises InvalidRequest for what is none."""
        try:
            if len(data) > _MAX:
                raise ValueError("too long")
            found = json.loads(data)
            if not isinstance(found, dict) or set(found) != _FIELDS or found["type"] != "head":
                raise ValueError("no signed head")
            n, at = found["n"], found["at"]
            if found["v"] != 1 or type(n) is not int or type(at) is not int or not 0 <= n < 2**53:
                raise ValueError("not of this version")
            public = base64.b64decode(found["public"], validate=True)
            signature = base64.b64decode(found["signature"], validate=True)
            digest = parse_head(found["digest"])[1]
            if len(public) != 32 or digest != found["digest"] or found["key"] != key_id(public):
                raise ValueError("not consistent")
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error, errors.InvalidRequest):
            raise errors.InvalidRequest(
                "this is no signed head; `sandboxd journal head` prints one", field="head"
            ) from None
        return cls(Head(n, digest), at, public, signature)

    @property
    def key(self) -> str:
        """The id of the key that signed it."""
        return key_id(self.public)

    def check(self, keys: Collection[str]) -> None:
        """Raise InvalidRequest unless the signature holds and is of one of these keys."""
        if self.key not in keys:
            known = ", ".join(sorted(keys)) or "none"
            raise errors.InvalidRequest(
                f"it is signed with the key {self.key}, none of this node (known: {known}); "
                "name its public key with --key if it is",
                field="head",
            )
        said = canonical.canonical(_said(self.head, self.at, self.public))
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(self.signature, said)
        except (InvalidSignature, ValueError):
            raise errors.InvalidRequest(
                f"the signature of the head of record {self.head.n} is wrong: it was changed", field="head"
            ) from None


def _said(head: Head, at: int, public: bytes) -> dict[str, Any]:
    return {
        "v": 1,
        "type": "head",
        "n": head.n,
        "digest": head.digest,
        "at": at,
        "key": key_id(public),
        "public": base64.b64encode(public).decode(),
    }


def read_public(path: Path) -> bytes:
    """The 32 bytes of a public key in PEM. Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            return load_public(file.read(_MAX))
    except OSError as error:
        raise errors.InvalidRequest(f"{path} cannot be read: {error.strerror}", field="key") from None
    except ValueError as error:
        raise errors.InvalidRequest(f"{path}: {error}", field="key") from None


def known(state: Path) -> list[bytes]:
    """The public keys that this state was signed with, the newest first. Raises OSError."""
    path = state / PUBLIC
    if not path.exists():
        return []
    with path.open("rb") as file:
        parts = file.read(_MAX).split(_END)[:-1]
    found = []
    for part in parts:
        with contextlib.suppress(ValueError):  # it is damaged, and the others are not
            found.append(load_public(part + _END))
    return found


def load_public(data: bytes) -> bytes:
    """The 32 bytes of a public key in PEM. Raises ValueError."""
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(  # noqa: TRY004  # of bytes, not of a type
            "this is no public Ed25519 key in PEM; `sandboxd journal key` prints one"
        )
    return key.public_bytes_raw()


def _read(path: Path) -> bytes:
    """The file of a private key, if nobody else can read it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise errors.NotFound(f"the key of the journal, {path}, is not there") from None
    except OSError as error:
        raise errors.ConfigInvalid(
            f"the key of the journal, {path}, cannot be read: {error.strerror}"
        ) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in {0, os.geteuid()}:
            raise errors.ConfigInvalid(f"the key of the journal, {path}, is no regular file of root's")
        if found.st_mode & 0o077:
            raise errors.ConfigInvalid(
                f"the key of the journal, {path}, can be read by others; chmod 0600 {path}"
            )
        return os.read(fd, _MAX)
    finally:
        os.close(fd)


def _make(path: Path) -> None:
    """Make a key, durably and whole, unless there is one. Raises OSError."""
    data = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    keyfile.make(path, data, written=lambda: failpoint("journal.key"))
