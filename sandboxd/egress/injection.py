"""What is put into requests on their way out: the container never has it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd.egress.sigv4 import SigningRefused, resign
from sandboxd.egress.site import Refused
from sandboxd.httprule import SECRET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd.httprule import HttpRequest, Injection
    from sandboxd.reach import Decision

__all__ = ["Secret", "inject"]

_FORBIDDEN = re.compile(rb"[^\t -~\x80-\xff]")


@dataclass(frozen=True)
class Secret:
    """A value, and which version of it this is."""

    version: int
    value: bytes

    def __repr__(self) -> str:
        return f"Secret(version={self.version})"


def inject(
    secrets: Mapping[str, Secret], decision: Decision, request: HttpRequest, body_digest: str | None
) -> tuple[list[tuple[bytes, bytes]], tuple[str, ...]]:
    """The headers that a request goes out with, and which secrets are in them. Raises Refused.

    ``body_digest``: the SHA-256 of the request's body in hex, None where that is not known.
    """
    headers = list(request.headers)
    used: list[str] = []
    for injection in sorted(
        decision.injections, key=lambda each: bool(each.secret_key)
    ):  # what signs is last
        if injection.secret_key:
            headers = _signed(secrets, injection, request, headers, body_digest=body_digest, used=used)
            continue
        name = injection.header.lower().encode()
        value = _value(secrets, injection, used)
        headers = [(each, old) for each, old in headers if each != name]  # the program's own is no use
        headers.append((name, value))
    return headers, tuple(dict.fromkeys(used))


def _signed(
    secrets: Mapping[str, Secret],
    injection: Injection,
    request: HttpRequest,
    headers: list[tuple[bytes, bytes]],
    *,
    body_digest: str | None,
    used: list[str],
) -> list[tuple[bytes, bytes]]:
    def text(name: str) -> str:
        return _secret(secrets, name, used).value.decode("latin-1").strip()

    token = text(injection.session_token) if injection.session_token else None
    try:
        return resign(
            request.method,
            request.target,
            headers,
            access_key=text(injection.access_key),
            secret_key=text(injection.secret_key),
            session_token=token,
            body_digest=body_digest,
        )
    except SigningRefused as error:
        raise Refused(403, "denied", f"the request cannot be signed anew: {error}") from error
    except ValueError as error:
        raise Refused(502, "failed", str(error)) from error


def _value(secrets: Mapping[str, Secret], injection: Injection, used: list[str]) -> bytes:
    def put(match: re.Match[str]) -> str:
        secret = _secret(secrets, match[1], used)
        return secret.value.decode("latin-1")

    value = SECRET.sub(put, injection.value).encode("latin-1").strip()
    if _FORBIDDEN.search(value):
        raise Refused(502, "failed", f"what is to be put into {injection.header} is no value of a header")
    return value


def _secret(secrets: Mapping[str, Secret], name: str, used: list[str]) -> Secret:
    if (secret := secrets.get(name)) is None:
        raise Refused(502, "failed", f"the secret {name} is not there any more")
    used.append(f"{name}@{secret.version}")
    return secret
