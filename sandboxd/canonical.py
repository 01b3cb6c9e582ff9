"""Canonical JSON (RFC 8785) and the digests made of it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import rfc8785

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["canonical", "digest", "digest_bytes", "few", "joined"]


_MARKS = (b",", b"[", b"{")
MAX_INTEGER = 2**53 - 1
_LEAVES = frozenset({str, bool, type(None)})
_TEXT = frozenset({str})
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def canonical(value: Any) -> bytes:
    """Return the one RFC 8785 encoding of a JSON-compatible value (integers within 2**53).

    ``json`` writes most values in the same way, ten times as fast: for them it does.
    """
    if _is_plain(value):
        try:
            return _encode(value).encode()
        except UnicodeEncodeError:
            pass  # a lone surrogate, which the other refuses in its own words
    return rfc8785.dumps(value)


def _is_plain(value: Any) -> bool:
    """Whether a value has no float, whose form differs, and no key whose place in the order could.

    Looks at the types of many values at once: a receipt has hundreds, and each call of a function counts.
    """
    kind = type(value)
    if kind in _LEAVES:
        return True
    if kind is int:
        return bool(-MAX_INTEGER <= value <= MAX_INTEGER)
    if kind is dict:
        if not (_TEXT.issuperset(map(type, value)) and "".join(value).isascii()):
            return False
        value = value.values()
    elif kind is not list and kind is not tuple:
        return False
    return _LEAVES.issuperset(map(type, value)) or all(map(_is_plain, value))


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


def few(data: bytes, most: int) -> bool:
    """Whether a JSON text has at most ``most`` values, counted before it is parsed.

    A few bytes of ``[],[],`` cost hundreds as objects. What separates and opens values is counted outside of
    strings. A backslash outside of a string ends every parser's work, so what is taken out here, and what is
    counted after it, is right as far as a parser gets.
    """
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = data.count(b'"')
    if quotes > 4 * most:  # two for a key, two for its value
        return False
    marks = sum(data.count(mark) for mark in _MARKS)
    if marks > most:  # those inside of strings do not count
        marks = sum(part.count(mark) for part in data.split(b'"')[::2] for mark in _MARKS)
    return marks <= most
