"""Signatures of AWS made anew: as botocore makes them, as AWS documents them; whatever a program sends."""

from __future__ import annotations

import hashlib
import string
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.egress.sigv4 import EMPTY, SigningRefused, resign

REAL = {"access_key": "AKIDEXAMPLE", "secret_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Asked:
    """What a program asks of a service."""

    signer: tuple[type[SigV4Auth], str]
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def signed(self, credentials: Credentials, date: str | None = None) -> tuple[bytes, Headers]:
        """Target and headers of what an SDK sends, now or at a time."""
        auth, service = self.signer
        host = f"{service}.us-east-1.amazonaws.com"
        request = AWSRequest(self.method, f"https://{host}{self.path}", dict(self.headers), self.body)
        request.context["payload_signing_enabled"] = True
        with pytest.MonkeyPatch.context() as patch:
            if date is not None:
                then = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                patch.setattr("botocore.auth.get_current_datetime", lambda: then)
            auth(credentials, service, "us-east-1").add_auth(request)
        sent = [("Host", host), *request.headers.items()]
        target = request.url.removeprefix(f"https://{host}")
        return target.encode(), [(name.encode(), value.encode()) for name, value in sent]


def values(headers: Headers) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for name, value in headers:
        found.setdefault(name.decode().lower(), []).append(value)
    return found


SEGMENT = (
    st.text(min_size=1, max_size=12)
    .filter(lambda text: text not in {".", ".."})
    .map(lambda text: quote(text.encode(errors="replace"), safe="-_.~"))
)
PATH = st.lists(SEGMENT, max_size=4).flatmap(
    lambda parts: st.sampled_from(["/" + "/".join(parts), "/" + "/".join([*parts, ""])])
)
DOTTED = st.lists(st.one_of(SEGMENT, st.sampled_from([".", "..", ""])), max_size=8).map(
    lambda parts: "/" + "/".join(parts)
)
WORD = st.text(max_size=8).map(lambda text: quote(text.encode(errors="replace"), safe="-_.~"))
QUERY = st.lists(st.tuples(WORD.filter(bool), WORD), max_size=6).map(
    lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
)
VALUE = st.text(string.ascii_letters + string.digits + " \t,;=/:\"'", min_size=1, max_size=24)
NAME = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True).map(lambda name: f"x-amz-meta-{name}")
HEADERS = st.dictionaries(NAME, VALUE, max_size=5)
METHOD = st.sampled_from(["GET", "PUT", "POST", "DELETE", "HEAD"])
SIGNERS = st.sampled_from([(SigV4Auth, "dynamodb"), (SigV4Auth, "bedrock-runtime"), (S3SigV4Auth, "s3")])
TOKENS = st.sampled_from([None, "FQoGZXIvYXdzE+token/=="])


ASKED = st.builds(
    Asked, SIGNERS, METHOD, st.builds("{}?{}".format, PATH, QUERY), HEADERS, st.binary(max_size=64)
)
OF_DOTS = st.builds(Asked, st.just((SigV4Auth, "dynamodb")), METHOD, DOTTED, st.just({}), st.just(b""))


@given(st.one_of(ASKED, OF_DOTS), TOKENS, TOKENS)
def test_it_is_what_botocore_would_have_signed_with_the_real_keys(
    asked: Asked, token: str | None, dummy: str | None
) -> None:
    target, sent = asked.signed(Credentials("x", "x", dummy))
    real = Credentials(REAL["access_key"], REAL["secret_key"], token)
    again, wanted = asked.signed(real, values(sent)["x-amz-date"][0].decode())
    assert again == target
    digest = hashlib.sha256(asked.body).hexdigest()
    found = resign(asked.method, target, sent, **REAL, session_token=token, body_digest=digest)
    assert values(found) == values(wanted)


def example(
    target: bytes, *more: tuple[bytes, bytes], service: str = "service", signs: str = "host;x-amz-date"
) -> Headers:
    """A request of AWS's test suite, signed by somebody with other keys."""
    claim = (
        f"AWS4-HMAC-SHA256 Credential=x/20150830/us-east-1/{service}/aws4_request, SignedHeaders={signs}, "
    )
    return [
        (b"Host", b"example.amazonaws.com"),
        (b"X-Amz-Date", b"20150830T123600Z"),
        *more,
        (b"Authorization", f"{claim}Signature={'0' * 64}".encode()),
    ]


VECTORS = {  # aws-sig-v4-test-suite
    "get-vanilla": (
        "GET", b"/", [], "host;x-amz-date",
        "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
    ),
    "get-vanilla-query-order-key-case": (
        "GET", b"/?Param2=value2&Param1=value1", [], "host;x-amz-date",
        "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
    ),
    "post-vanilla": (
        "POST", b"/", [], "host;x-amz-date",
        "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
    ),
    "get-header-value-trim": (
        "GET", b"/", [(b"My-Header1", b" value1"), (b"My-Header2", b' "a   b   c"')],
        "host;my-header1;my-header2;x-amz-date",
        "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
    ),
    "get-header-key-duplicate": (
        "GET", b"/", [(b"My-Header1", b"value2"), (b"My-Header1", b"value2"), (b"My-Header1", b"value1")],
        "host;my-header1;x-amz-date",
        "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea",
    ),
    "get-slashes": (
        "GET", b"//example//", [], "host;x-amz-date",
        "9a624bd73a37c9a373b5312afbebe7a714a789de108f0bdfe846570885f57e84",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_the_vectors_of_aws(name: str) -> None:
    method, target, more, signs, wanted = VECTORS[name]
    found = resign(
        method, target, example(target, *more, signs=signs), **REAL, session_token=None, body_digest=EMPTY
    )
    assert values(found)["authorization"] == [
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
        f"SignedHeaders={signs}, Signature={wanted}".encode()
    ]


def test_the_documented_example_of_s3() -> None:
    """Of "Examples: Signature Calculations": GET Bucket Lifecycle."""
    claim = "AWS4-HMAC-SHA256 Credential=x/20130524/us-east-1/s3/aws4_request,SignedHeaders="
    signs = "host;x-amz-content-sha256;x-amz-date"
    headers = [
        (b"host", b"examplebucket.s3.amazonaws.com"),
        (b"x-amz-date", b"20130524T000000Z"),
        (b"x-amz-content-sha256", EMPTY.encode()),
        (b"authorization", f"{claim}{signs},Signature=0".encode()),
    ]
    keys = {"access_key": "AKIAIOSFODNN7EXAMPLE", "secret_key": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"}
    found = resign("GET", b"/?lifecycle", headers, **keys, session_token=None, body_digest=None)
    signature = values(found)["authorization"][0].rpartition(b"=")[2]
    assert signature == b"fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"


def test_a_path_of_s3_is_as_the_service_reads_it() -> None:
    more = [(b"x-amz-content-sha256", b"UNSIGNED-PAYLOAD")]

    def authorization(target: bytes) -> list[bytes]:
        headers = example(target, *more, service="s3")
        return values(resign("GET", target, headers, **REAL, session_token=None, body_digest=None))[
            "authorization"
        ]

    assert authorization(b"/a:b@c") == authorization(b"/a%3Ab%40c") == authorization(b"/a%3ab%40c")
    assert authorization(b"/a/b") != authorization(b"/a%2Fb")
    assert authorization(b"/a//b") != authorization(b"/a/b")
    assert authorization(b"/a/../b") != authorization(b"/b")
    assert authorization(b"/?acl") == authorization(b"/?acl=")


@pytest.mark.parametrize("said", ["UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "a" * 64])
def test_what_signs_no_part_of_the_body_passes(said: str) -> None:
    headers = example(b"/", (b"x-amz-content-sha256", said.encode()), service="s3")
    found = resign("PUT", b"/", headers, **REAL, session_token=None, body_digest=None)
    assert values(found)["x-amz-content-sha256"] == [said.encode()]


def test_the_token_is_the_real_one_and_it_is_signed() -> None:
    headers = example(b"/", (b"X-Amz-Security-Token", b"dummy"), signs="host;x-amz-date;x-amz-security-token")
    found = values(resign("GET", b"/", headers, **REAL, session_token="real", body_digest=EMPTY))
    assert found["x-amz-security-token"] == [b"real"]
    assert b"SignedHeaders=host;x-amz-date;x-amz-security-token," in found["authorization"][0]
    without = values(resign("GET", b"/", headers, **REAL, session_token=None, body_digest=EMPTY))
    assert "x-amz-security-token" not in without
    assert b"SignedHeaders=host;x-amz-date," in without["authorization"][0]
    added = values(resign("GET", b"/", example(b"/"), **REAL, session_token="real", body_digest=EMPTY))
    assert added == found


def test_a_date_header_says_when_too() -> None:
    for date in (b"20150830T123600Z", b"Sun, 30 Aug 2015 12:36:00 GMT", b"Sun, 30 Aug 2015 14:36:00 +0200"):
        headers = [
            (name.replace(b"X-Amz-Date", b"Date"), date if name == b"X-Amz-Date" else value)
            for name, value in example(b"/", signs="date;host")
        ]
        found = resign("GET", b"/", headers, **REAL, session_token=None, body_digest=EMPTY)
        assert b"/20150830/" in values(found)["authorization"][0]


def test_headers_of_the_connection_are_not_signed() -> None:
    signs = "connection;content-length;host;transfer-encoding;x-amz-date"
    headers = example(b"/", (b"Connection", b"close"), (b"Content-Length", b"0"), signs=signs)
    found = values(resign("GET", b"/", headers, **REAL, session_token=None, body_digest=EMPTY))
    assert b"SignedHeaders=content-length;host;x-amz-date," in found["authorization"][0]


def with_authorization(text: str) -> Headers:
    return [*example(b"/")[:-1], (b"authorization", text.encode())]


CREDENTIAL = "Credential=x/20150830/us-east-1/service/aws4_request"
SIGNS = "SignedHeaders=host;x-amz-date"
GOOD = f"AWS4-HMAC-SHA256 {CREDENTIAL}, {SIGNS}, Signature=0"
CHUNKS = b"STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
HOST, _, SIGNED = example(b"/", signs="host")
BAD: dict[str, tuple[Headers, str]] = {
    "none": (example(b"/")[:-1], "not signed"),
    "twice": ([*example(b"/"), example(b"/")[-1]], "2 times"),
    "empty": (with_authorization(""), "no signature of version 4"),
    "basic": (with_authorization("Basic eDp4"), "no signature of version 4"),
    "version 2": (with_authorization("AWS x:y"), "no signature of version 4"),
    "many regions": (with_authorization(GOOD.replace("HMAC", "ECDSA-P256")), "SigV4A"),
    "no credential": (with_authorization(f"AWS4-HMAC-SHA256 {SIGNS}, Signature=0"), "each once"),
    "no headers": (with_authorization(f"AWS4-HMAC-SHA256 {CREDENTIAL}, Signature=0"), "each once"),
    "credential twice": (with_authorization(f"{GOOD}, {CREDENTIAL}"), "each once"),
    "another field": (with_authorization(f"{GOOD}, Extra=1"), "each once"),
    "short scope": (with_authorization(GOOD.replace("/aws4_request", "")), "KEY/YYYYMMDD"),
    "strange region": (with_authorization(GOOD.replace("us-east-1", "us east")), "KEY/YYYYMMDD"),
    "line in the region": (with_authorization(GOOD.replace("us-east-1", "a\nx: y")), "line break"),
    "no host": (with_authorization(GOOD.replace("host;", "")), "host has to be signed"),
    "capitals": (with_authorization(GOOD.replace("host;", "Host;host;")), "lower case"),
    "name twice": (with_authorization(GOOD.replace("host;", "host;host;")), "each once"),
    "no name": (with_authorization(GOOD.replace("host;", "host;;")), "lower case"),
    "itself": (with_authorization(GOOD.replace("host;", "host;authorization;")), "by itself"),
    "absent": (with_authorization(GOOD.replace("host;", "host;x-absent;")), "x-absent was signed"),
    "huge": (with_authorization(GOOD + " " * 9000 + "x"), "more than 8192"),
    "hosts": ([(b"host", b"other"), *example(b"/")], "host is there 2 times"),
    "dates": ([(b"x-amz-date", b"20150830T123600Z"), *example(b"/")], "x-amz-date is there 2 times"),
    "no date": ([one for one in example(b"/", signs="host") if one[0] != b"X-Amz-Date"], "send x-amz-date"),
    "bad date": ([HOST, (b"x-amz-date", b"today"), SIGNED], "20260131T235959Z"),
    "another day": (with_authorization(GOOD.replace("20150830", "20150831")), "of 20150830"),
    "line in a header": ([*example(b"/"), (b"x-y", b"a\r\nx-z: b")], "line break"),
    "chunks": (example(b"/", (b"x-amz-content-sha256", CHUNKS)), "chunkedEncodingEnabled"),
    "chunks, trailer": (example(b"/", (b"x-amz-content-sha256", CHUNKS + b"-TRAILER")), "in pieces"),
    "no digest": (example(b"/", (b"x-amz-content-sha256", b"deadbeef")), "SHA-256 in hex"),
    "another digest": (example(b"/", (b"x-amz-content-sha256", b"0" * 64)), "not the digest of the body"),
    "s3 without": (example(b"/", service="s3"), "S3 needs"),
    "express": ([*example(b"/"), (b"x-amz-s3session-token", b"x")], "AWS_S3_DISABLE_EXPRESS"),
    "not ascii": ([(b"host", b"\xff"), *example(b"/")[1:]], "not ASCII"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_signed_says_why(what: str) -> None:
    headers, said = BAD[what]
    with pytest.raises(SigningRefused, match=said) as raised:
        resign("GET", b"/", headers, **REAL, session_token=None, body_digest=EMPTY)
    assert REAL["secret_key"] not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (b"https://example.amazonaws.com/", "begins with a slash"),
        (b"*", "begins with a slash"),
        (b"", "begins with a slash"),
        (b"/a b", "%20"),
        (b"/a\r\nx: y", "control character"),
        (b"/#a", "#"),
        (b"/%zz", "%25"),
        (b"/?%", "%25"),
        (b"/?a=b+c", "two ways"),
        (b"/?X-Amz-Signature=0", "presigned"),
        (b"/?a=b&x-amz-credential=c", "presigned"),
        (b"/?X-Amz-Security-Token=c", "presigned"),
    ],
)
def test_targets_that_cannot_be_signed(target: bytes, said: str) -> None:
    with pytest.raises(SigningRefused, match=said):
        resign("GET", target, example(target), **REAL, session_token=None, body_digest=EMPTY)


def test_a_body_that_is_not_known_is_asked_for() -> None:
    with pytest.raises(SigningRefused, match="x-amz-content-sha256"):
        resign("POST", b"/", example(b"/"), **REAL, session_token=None, body_digest=None)


@pytest.mark.parametrize(
    "changed",
    [{"access_key": ""}, {"access_key": "a\r\nb"}, {"access_key": "a,b"}, {"access_key": "a/b"},
     {"access_key": "ä"}, {"session_token": ""}, {"session_token": "a\nb"}],
)  # fmt: skip
def test_credentials_that_no_header_holds_are_not_sent_and_not_said(changed: dict[str, str]) -> None:
    [(_, value)] = changed.items()
    keys: Any = {**REAL, "session_token": None, **changed}
    with pytest.raises(ValueError, match="the secret for sigv4") as raised:
        resign("GET", b"/", example(b"/"), **keys, body_digest=EMPTY)
    assert not value or value not in str(raised.value)


@given(
    st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=60)), max_size=6), st.binary(max_size=60)
)
def test_whatever_comes_is_signed_or_refused(headers: Headers, target: bytes) -> None:
    for each in (headers, [*headers, *example(b"/")]):
        try:
            found = resign("GET", b"/" + target, each, **REAL, session_token=None, body_digest=EMPTY)
        except SigningRefused:
            continue
        assert len(found) == len([name for name, _ in each if name.lower() != b"x-amz-security-token"])
        assert all(b"\n" not in name + value for name, value in found)


@given(st.text(max_size=200))
def test_whatever_stands_in_the_header_is_signed_or_refused(text: str) -> None:
    for rest in (
        text,
        f"{GOOD}{text}",
        GOOD.replace("us-east-1", text),
        GOOD.replace("host;", f"host;{text};"),
    ):
        try:
            found = resign(
                "GET", b"/", [*example(b"/")[:-1], (b"authorization", rest.encode(errors="replace"))],
                **REAL, session_token=None, body_digest=EMPTY,
            )  # fmt: skip
        except SigningRefused:
            continue
        assert b"\n" not in found[-1][1]
