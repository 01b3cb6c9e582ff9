"""Signatures of AWS (version 4), made anew: the program signs with keys of no worth, this with the real ones.

Pure. What a request says of when, where and for what it was signed is kept, and which headers are signed;
key, token and signature are replaced. ``host`` has to be signed, so that whoever gets the request can do
nothing with its signature elsewhere.

Source: AWS, "Create a signed AWS API request" and, for S3, "Authenticating Requests (AWS Signature Version
4)". Canonical is what the service makes of what it is sent: a path as it stands on the wire, its dots and
double slashes resolved, encoded once more; of S3, as it stands. Where two readings are possible, nothing is
signed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["EMPTY", "SigningRefused", "resign"]

Headers = list[tuple[bytes, bytes]]

EMPTY = hashlib.sha256().hexdigest()
"""``body_digest`` of a request without a body."""
ALGORITHM = "AWS4-HMAC-SHA256"
MAX_AUTHORIZATION = 8192
ONE_SLASH = frozenset({"s3", "s3-object-lambda", "s3-outposts", "s3express"})
"""Services whose paths are names of objects: encoded once, and otherwise as they are."""
UNSIGNED = frozenset({"UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"})
"""Words in the place of the body's digest with which no part of the body is signed."""
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "expect",
    }
)
"""Not signed even if they were: they say how a request is carried, which is another way from here on."""
TOKEN = "x-amz-security-token"  # noqa: S105  (a header)
PRESIGNED = re.compile(rb"(?i)(?:^|&)x-amz-(signature|credential|algorithm|security-token)(?:=|&|$)")
SCOPE = re.compile(r"([^,\s]{1,256})/(\d{8})/([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_.-]{1,64})/aws4_request")
FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,128}")  # RFC 9110's token, in lower case
DATE = re.compile(r"\d{8}T\d{6}Z")
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
VISIBLE = re.compile(r"[!-~]+")


class SigningRefused(Exception):
    """Raised for a request that cannot be signed; the message is for the program that made it."""


@dataclass(frozen=True)
class _Claim:
    """What a request says of its signature."""

    date: str
    region: str
    service: str
    signed: tuple[str, ...]

    @property
    def scope(self) -> str:
        return f"{self.date}/{self.region}/{self.service}/aws4_request"


def resign(
    method: str,
    target: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    access_key: str,
    secret_key: str,
    session_token: str | None,
    body_digest: str | None,
) -> Headers:
    """The headers of a request with its signature made anew.

    ``target`` is origin-form (``/path?query``), ``headers`` are those that are sent on, ``host`` among them
    also where HTTP/2 carries it as ``:authority``; both as they stand on the wire. ``body_digest`` is the
    SHA-256 of the body in hex (``EMPTY`` without one), None if it is not known yet. Raises SigningRefused,
    and ValueError for credentials that no header can hold.
    """
    _check_credentials(access_key, session_token)
    values = _by_name(headers)
    path, _, query = target.partition(b"?")
    _check_target(path, query)
    claim = _claim(values, query)
    moment = _moment(values, claim)
    payload = _payload(values, claim, body_digest)
    signed = {name for name in claim.signed if name not in HOP_BY_HOP and name != TOKEN}
    if session_token is not None:
        signed.add(TOKEN)
        values[TOKEN] = [session_token.encode()]
    names = sorted(signed)
    request = b"\n".join(
        (
            method.encode(),
            _canonical_path(path, claim.service).encode(),
            _canonical_query(query).encode(),
            *(name.encode() + b":" + b",".join(map(_trimmed, values[name])) for name in names),
            b"",
            ";".join(names).encode(),
            payload.encode(),
        )
    )
    to_sign = "\n".join((ALGORITHM, moment, claim.scope, hashlib.sha256(request).hexdigest()))
    signature = hmac.new(_key(secret_key, claim), to_sign.encode(), hashlib.sha256).hexdigest()
    credential = f"Credential={access_key}/{claim.scope}"
    said = f"{ALGORITHM} {credential}, SignedHeaders={';'.join(names)}, Signature={signature}"
    made: Headers = []
    for name, value in headers:
        lower = name.lower()
        if lower == b"authorization":
            made.append((name, said.encode()))
            if session_token is not None:
                made.append((TOKEN.encode(), session_token.encode()))
        elif lower != TOKEN.encode():
            made.append((name, value))
    return made


def _check_credentials(access_key: str, session_token: str | None) -> None:
    """Secrets are not said in the error."""
    if not VISIBLE.fullmatch(access_key) or "," in access_key or "/" in access_key:
        raise ValueError("the secret for sigv4.access_key is no access key's id")
    if session_token is not None and not VISIBLE.fullmatch(session_token):
        raise ValueError("the secret for sigv4.session_token is no token")


def _by_name(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, list[bytes]]:
    values: dict[str, list[bytes]] = {}
    for name, value in headers:
        if re.search(rb"[\0\r\n]", name + value):
            raise SigningRefused("a header has a line break or a NUL byte in it")
        values.setdefault(name.lower().decode("latin-1"), []).append(value)
    return values


def _one(values: Mapping[str, Sequence[bytes]], name: str) -> str | None:
    """The value of a header that may stand once, in ASCII; None where it is not."""
    found = values.get(name)
    if found is None:
        return None
    if len(found) != 1:
        raise SigningRefused(f"the header {name} is there {len(found)} times; send it once")
    try:
        return found[0].decode("ascii").strip(" \t")
    except UnicodeDecodeError:
        raise SigningRefused(f"the header {name} is not ASCII") from None


def _check_target(path: bytes, query: bytes) -> None:
    if not path.startswith(b"/"):
        raise SigningRefused("the target of a request that is signed begins with a slash")
    if re.search(rb"[\0-\x20\x7f#]", path + query):
        raise SigningRefused(
            "the target has a space, a control character or a # in it; write %20 and the like"
        )
    if re.search(rb"%(?![0-9A-Fa-f]{2})", path + query):
        raise SigningRefused("the target has a % that begins no escape; write %25")


def _claim(values: Mapping[str, Sequence[bytes]], query: bytes) -> _Claim:
    if PRESIGNED.search(query) is not None:
        raise SigningRefused(
            "a signature in the query (a presigned URL) is not made anew; have the SDK sign the request "
            "itself, in its Authorization header"
        )
    if "x-amz-s3session-token" in values:
        raise SigningRefused(
            "sessions of S3 Express have keys of their own, which are not replaced; set "
            "AWS_S3_DISABLE_EXPRESS_SESSION_AUTH=true"
        )
    said = _one(values, "authorization")
    if said is None:
        raise SigningRefused(
            "the request is not signed; give the SDK any access key and secret key, such as "
            "AWS_ACCESS_KEY_ID=x and AWS_SECRET_ACCESS_KEY=x"
        )
    if len(said) > MAX_AUTHORIZATION:
        raise SigningRefused(f"the Authorization header has more than {MAX_AUTHORIZATION} bytes")
    scheme, _, rest = said.partition(" ")
    if scheme.startswith("AWS4-ECDSA"):
        raise SigningRefused(
            "a signature for many regions (SigV4A) is not made anew; sign for one (sigv4, AWS4-HMAC-SHA256)"
        )
    if scheme != ALGORITHM:
        raise SigningRefused(f"the Authorization header is no signature of version 4 ({ALGORITHM})")
    return _parsed(rest)


def _parsed(rest: str) -> _Claim:
    fields: dict[str, str] = {}
    for part in rest.split(","):
        name, _, value = part.strip(" \t").partition("=")
        if name in fields or name not in {"Credential", "SignedHeaders", "Signature"}:
            raise SigningRefused(
                "the Authorization header has Credential, SignedHeaders and Signature, each once"
            )
        fields[name] = value
    if len(fields) != 3:
        raise SigningRefused(
            "the Authorization header has Credential, SignedHeaders and Signature, each once"
        )
    scope = SCOPE.fullmatch(fields["Credential"])
    if scope is None:
        raise SigningRefused(
            "Credential of the Authorization header is KEY/YYYYMMDD/REGION/SERVICE/aws4_request"
        )
    signed = tuple(fields["SignedHeaders"].split(";"))
    if not all(map(FIELD_NAME.fullmatch, signed)) or len(set(signed)) != len(signed):
        raise SigningRefused("SignedHeaders names headers in lower case, each once, with ; between them")
    if "host" not in signed:
        raise SigningRefused("the header host has to be signed, and SignedHeaders does not name it")
    if "authorization" in signed:
        raise SigningRefused("the Authorization header cannot be signed by itself")
    _, date, region, service = scope.groups()
    return _Claim(date, region, service, signed)


def _moment(values: Mapping[str, Sequence[bytes]], claim: _Claim) -> str:
    """When it was signed, ``YYYYMMDDTHHMMSSZ``."""
    for name in claim.signed:
        if name != TOKEN and name not in HOP_BY_HOP and name not in values:
            raise SigningRefused(f"the header {name} was signed, and is not in the request")
    _one(values, "host")
    moment = _one(values, "x-amz-date")
    if moment is None:
        date = _one(values, "date") or ""
        try:
            moment = (
                date
                if DATE.fullmatch(date)
                else f"{parsedate_to_datetime(date).astimezone(UTC):%Y%m%dT%H%M%SZ}"
            )
        except (ValueError, OverflowError):
            raise SigningRefused("the request does not say when it was signed; send x-amz-date") from None
    if DATE.fullmatch(moment) is None:
        raise SigningRefused("x-amz-date is a time such as 20260131T235959Z")
    if moment[:8] != claim.date:
        raise SigningRefused(f"the request is of {moment[:8]}, and its Credential of {claim.date}")
    return moment


def _payload(values: Mapping[str, Sequence[bytes]], claim: _Claim, body_digest: str | None) -> str:
    """What the signature has of the body."""
    said = _one(values, "x-amz-content-sha256")
    if said is None:
        if claim.service in ONE_SLASH:
            raise SigningRefused("S3 needs the header x-amz-content-sha256, which the request does not have")
        if body_digest is None:
            raise SigningRefused(
                "the body is not read before it is sent on; send its SHA-256 as x-amz-content-sha256"
            )
        return body_digest
    if said in UNSIGNED:
        return said
    if said.startswith("STREAMING-"):
        raise SigningRefused(
            f"the body is signed in pieces ({said[:64]}), which are not signed anew; have the SDK sign it "
            "whole or not at all: in Java chunkedEncodingEnabled(false), elsewhere UNSIGNED-PAYLOAD over TLS"
        )
    if DIGEST.fullmatch(said) is None:
        raise SigningRefused("x-amz-content-sha256 is a SHA-256 in hex, or UNSIGNED-PAYLOAD")
    if body_digest is not None and said.lower() != body_digest.lower():
        raise SigningRefused("x-amz-content-sha256 is not the digest of the body")
    return said


def _canonical_path(path: bytes, service: str) -> str:
    segments = path.split(b"/")
    if service in ONE_SLASH:
        return "/".join(quote(unquote_to_bytes(segment), safe="-_.~") for segment in segments)
    kept: list[bytes] = []
    for segment in segments:
        if segment == b"..":
            kept = kept[:-1]
        elif segment not in {b"", b"."}:
            kept.append(segment)
    last = "/" if kept and path.endswith(b"/") else ""
    return "/" + "/".join(quote(segment, safe="-_.~") for segment in kept) + last


def _canonical_query(query: bytes) -> str:
    if b"+" in query:
        raise SigningRefused("a + in the query can be read in two ways; write %20 or %2B")
    pairs = [pair.partition(b"=")[::2] for pair in query.split(b"&") if pair]
    encoded = [
        (quote(unquote_to_bytes(name), safe="-_.~"), quote(unquote_to_bytes(value), safe="-_.~"))
        for name, value in pairs
    ]
    return "&".join(f"{name}={value}" for name, value in sorted(encoded))


def _trimmed(value: bytes) -> bytes:
    return b" ".join(value.split())


def _key(secret: str, claim: _Claim) -> bytes:
    key = b"AWS4" + secret.encode()
    for part in (claim.date, claim.region, claim.service, "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key
