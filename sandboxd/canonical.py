"""Canonical JSON (RFC 8785) and the digests made of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import rfc8785

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["canonical", "digest", "digest_bytes", "joined"]


def canonical(value: Any) -> bytes:
    """Return the one RFC 8785 encoding of a JSON-compatible value (integers within 2**53)."""
    return rfc8785.dumps(value)


def joined(members: Mapping[str, bytes]) -> bytes:
    """Return the encoding of an object whose members' values are encoded already."""
    ordered = sorted(members, key=lambda name: name.encode("utf-16be"))
    return b"{" + b",".join(canonical(name) + b":" + members[name] for name in ordered) + b"}"


def digest_bytes(data: bytes) -> str:
    """Return ``sha256:<hex>`` of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Return ``sha256:<hex>`` of the canonical encoding of a JSON-compatible value."""
    return digest_bytes(canonical(value))
