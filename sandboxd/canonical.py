"""Canonical JSON (RFC 8785) and the digests made of it."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

__all__ = ["canonical", "digest", "digest_bytes"]


def canonical(value: Any) -> bytes:
    """Return the one RFC 8785 encoding of a JSON-compatible value (integers within 2**53)."""
    return rfc8785.dumps(value)


def digest_bytes(data: bytes) -> str:
    """Return ``sha256:<hex>`` of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Return ``sha256:<hex>`` of the canonical encoding of a JSON-compatible value."""
    return digest_bytes(canonical(value))
