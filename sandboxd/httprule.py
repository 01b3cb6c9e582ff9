"""What of HTTP a network rule speaks of, and whether a request is that. Pure, as ``reach``, which asks it.

Paths are compared as a server would take them, with their escapes undone; one that servers take in different
ways (a dot segment, an escaped slash) is none that a rule can speak of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote_to_bytes

from sandboxd.globs import Pattern

__all__ = ["SECRET", "HttpRequest", "HttpRule", "Injection", "ambiguous"]

SECRET = re.compile(r"\{secret:([A-Z][A-Z0-9_]{0,127})\}")
"""A secret in the value of an ``Injection``."""
_ODD = re.compile(rb"%(?![0-9A-Fa-f]{2})|%(2[fF]|5[cC]|25|0[0-9a-fA-F]|1[0-9a-fA-F]|7[fF])|[^!-~]|[\\#]")
_DOTS = re.compile(rb"(^|/)\.{1,2}(/|$)")


@dataclass(frozen=True)
class HttpRequest:
    """The head of a request. Names of headers are in lower case."""

    method: str
    target: bytes
    """Path and query."""
    headers: tuple[tuple[bytes, bytes], ...]
    websocket: bool = False

    @cached_property
    def path(self) -> bytes:
        """Without the query, escapes undone."""
        return unquote_to_bytes(self.target.partition(b"?")[0])


@dataclass(frozen=True)
class Injection:
    """What is put into requests on their way out: one header, or a signature of AWS (version 4)."""

    header: str = ""
    value: str = ""
    """May hold ``{secret:NAME}``."""
    access_key: str = ""
    """Of a signature: the names of the secrets that it is made with."""
    secret_key: str = ""
    session_token: str = ""
    plain: bool = False
    """Whether a secret may go where there is no TLS."""

    @property
    def over_tls(self) -> bool:
        """Whether it may be put only into what is encrypted on its way."""
        return not self.plain and ("{secret:" in self.value or bool(self.secret_key))


@dataclass(frozen=True)
class HttpRule:
    """Conditions that all have to hold; an empty one always does."""

    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    """Names in lower case, each with a glob of the value; every header of that name has to match."""
    websocket: bool = False
    """Whether a request may go on as a WebSocket; where it may not, one that asks for it does not match."""
    inject: Injection | None = None

    def matches(self, request: HttpRequest, *, denies: bool = False) -> bool:
        """Whether the rule speaks of a request.

        Where servers may differ, one that ``denies`` does, and one that allows does not: of headers that come
        more than once, one has to match, or all of them; a slash at the end of a path may be left out.
        """
        if self.methods and request.method not in self.methods:
            return False
        if self._paths and not self._matches_path(request.path, denies=denies):
            return False
        for name, expression in self._headers:
            values = [value.decode("latin-1") for each, value in request.headers if each == name]
            if denies:
                values += [part.strip() for value in values for part in value.split(",")]
            enough = any if denies else all
            if not values or not enough(expression.fullmatch(value) for value in values):
                return False
        return True

    def _matches_path(self, path: bytes, *, denies: bool) -> bool:
        if path[:1] != b"/":
            return False
        names = {path[1:], path[1:].rstrip(b"/")} if denies else {path[1:]}
        return any(each.matches(name) for each in self._paths for name in names)

    @property
    def said(self) -> str:
        """The conditions, in a few words."""
        parts = [
            " ".join(self.methods) or "any method",
            " ".join(self.paths) or "any path",
            *(f"{name}: {glob}" for name, glob in self.headers),
            *(["WebSocket"] if self.websocket else []),
        ]
        return ", ".join(parts)

    @cached_property
    def _paths(self) -> tuple[Pattern, ...]:
        return tuple(map(path_pattern, self.paths))

    @cached_property
    def _headers(self) -> tuple[tuple[bytes, re.Pattern[str]], ...]:
        return tuple((name.lower().encode(), value_pattern(glob)) for name, glob in self.headers)


class _Root(Pattern):
    """The pattern of the path ``/`` alone."""

    def matches(self, path: bytes) -> bool:
        return not path


def path_pattern(glob: str) -> Pattern:
    """The pattern of a glob that begins with a slash. Raises InvalidRequest where it can match nothing."""
    return _Root(glob) if glob == "/" else Pattern.of(glob[1:])


def value_pattern(glob: str) -> re.Pattern[str]:
    """The expression of a glob of a header's value: ``*`` stands for any text, ``?`` for one character."""
    first, *rest = (re.escape(part).replace(r"\?", ".") for part in re.split(r"\*+", glob))
    if not rest:
        return re.compile(first, re.DOTALL)
    middle = "".join(f"(?>.*?{part})" for part in rest[:-1])  # each found once and never given back
    return re.compile(f"{first}{middle}.*{rest[-1]}", re.DOTALL)


def ambiguous(target: bytes) -> str | None:
    """Why servers may take the path of a target in different ways; None: they do not."""
    path = target.partition(b"?")[0]
    if _ODD.search(path):
        return "its path has an escape or a character that servers read in different ways"
    plain = unquote_to_bytes(path)
    if b"//" in plain or _DOTS.search(plain):
        return "its path has an empty segment or one of dots, which servers resolve in different ways"
    if b";" in plain:
        return "its path has a semicolon, with what follows it left out by some servers"
    try:
        plain.decode()
    except UnicodeDecodeError:
        return "its path is no UTF-8"
    return None
