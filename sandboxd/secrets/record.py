"""One stored secret: what is known of it in plain, and its value sealed with AES-256-GCM.

What is in plain (name, version, times, which key) is the associated data, so that no value can be passed off
as that of another name or version. The nonce is random, 96 bits, for each value (NIST SP 800-38D, 8.2.2).
"""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandboxd import canonical
from sandboxd.secrets.key import key_id

__all__ = ["NAME", "Damaged", "Known", "Record"]

NAME = re.compile(r"[A-Z][A-Z0-9_]{0,127}")
FORMAT = 1
NONCE, TAG = 12, 16  # bytes
MAX_VERSION = 2**53 - 1


class Damaged(Exception):
    """Raised when a file is no record, or its value is not what was sealed."""


@dataclass(frozen=True)
class Known:
    """What is in plain. Times are microseconds since the epoch."""

    name: str
    version: int
    created: int
    """When it was first set."""
    rotated: int
    """When this version was."""
    key: str
    """Which key sealed it, by its id."""
    size: int
    """Bytes of the value."""
    has_nul: bool
    """Such a value fits into no environment."""
    removed: bool = False
    """Nothing but the number of its last version is kept, which no other value gets."""

    def associated(self) -> bytes:
        """What the value is bound to."""
        return canonical.canonical({"format": FORMAT, **vars(self)})


@dataclass(frozen=True)
class Record:
    """What a file holds."""

    known: Known
    nonce: bytes = b""
    sealed: bytes = b""

    @classmethod
    def seal(cls, known: Known, value: bytes | bytearray, key: bytes) -> Self:
        """A record of a value; ``known.key`` is replaced."""
        known = replace(known, key=key_id(key))
        nonce = os.urandom(NONCE)
        return cls(known, nonce, AESGCM(key).encrypt(nonce, value, known.associated()))

    def unseal(self, key: bytes) -> bytes:
        """The value. Raises Damaged."""
        try:
            return AESGCM(key).decrypt(self.nonce, self.sealed, self.known.associated())
        except InvalidTag:
            raise Damaged("its value is not what was stored") from None

    def encode(self) -> bytes:
        """The content of its file."""
        sealed = {"nonce": self.nonce, "value": self.sealed}
        text = {name: base64.b64encode(data).decode() for name, data in sealed.items()}
        return json.dumps({"format": FORMAT, **vars(self.known), **text}).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, name: str) -> Self:
        """The record of a file, which is that of ``name``. Raises Damaged."""
        try:
            content = json.loads(data)
            if not isinstance(content, dict) or content.pop("format") != FORMAT:
                raise Damaged("it has another format")
            nonce, sealed = (
                base64.b64decode(content.pop(part), validate=True) for part in ("nonce", "value")
            )
            known = Known(**content)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Damaged("it is no record of a secret") from None
        _check(known, nonce, sealed, name)
        return cls(known, nonce, sealed)


def _check(known: Known, nonce: bytes, sealed: bytes, name: str) -> None:
    types: dict[str, type] = {"str": str, "int": int, "bool": bool}
    for field in fields(known):
        value: Any = getattr(known, field.name)
        if type(value) is not types[str(field.type)] or (
            type(value) is int and not 0 <= value <= MAX_VERSION
        ):
            raise Damaged(f"its {field.name} is not one")
    if known.name != name:
        raise Damaged("it is that of another name")
    if known.version < 1 or len(nonce) != (0 if known.removed else NONCE):
        raise Damaged("it is not whole")
    if not known.removed and len(sealed) != known.size + TAG:
        raise Damaged("it is not whole")
