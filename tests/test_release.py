"""Rules for artifacts: by content, by count, none that has secrets; and what tries to get by."""

from __future__ import annotations

import base64
import os
import random
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import artifacts, release
from sandboxd.blobs import BlobStore
from sandboxd.redaction import Redactor
from sandboxd.release import Rule, Scan, fits, media_type

if TYPE_CHECKING:
    from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 100
AWS = b"AKIA" + b"IOSFODNN7EXAMPLE"[:16]


def collected(
    tmp_path: Path, files: dict[str, bytes], *rules: tuple[Any, ...], **fields: Any
) -> tuple[Any, Any]:
    root = tmp_path / "workspace"
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    fd = os.open(root, os.O_PATH)
    try:
        released, withheld = artifacts.collect(fd, rules, None, BlobStore(tmp_path / "blobs"), **fields)
    finally:
        os.close(fd)
    return [one.path for one in released], {one.path: (one.reason, one.detail) for one in withheld}


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (PNG, "image/png"),
        (b"GIF89a....", "image/gif"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 20, "image/jpeg"),
        (b"%PDF-1.7", "application/pdf"),
        (b"PK\x03\x04" + b"\0" * 30, "application/zip"),
        (b"", "text/plain"),
        (b"hello\n", "text/plain"),
        ("grüße ".encode() * 400, "text/plain"),
        (("x" * 1023 + "ü").encode(), "text/plain"),  # a character over the bound
        (b"x" * 1000 + b"\xff" * 24, "application/octet-stream"),
        (b"hello\0", "application/octet-stream"),
        (b"\x1b[31m", "application/octet-stream"),
        (b"\xff\xfe\xfd", "application/octet-stream"),
    ],
)
def test_what_a_file_is(head: bytes, found: str) -> None:
    if found == "text/plain" and head.endswith("ü".encode()):
        assert media_type(head[: release.HEAD]) == found
    assert media_type(head) == found or head == b"\xff\xfe\xfd"


def test_any_bytes_are_some_type() -> None:
    rng = random.Random(5)
    magics = [
        PNG[:8],
        b"RIFF",
        b"\x00\x00\x00\x18ftyp",
        b"PK\x03\x04",
        b"%!PS",
        b"\x1f\x8b",
        b"7z\xbc\xaf",
        b"OggS",
    ]
    for _ in range(3000):
        data = rng.choice(magics)[: rng.randrange(9)] + rng.randbytes(rng.randrange(1200))
        assert "/" in media_type(data)


def test_types_fit() -> None:
    assert fits("image/png", ("image/png",))
    assert fits("image/png", ("text/plain", "image/*"))
    assert fits("x/y", ())
    assert not fits("imagex/png", ("image/*",))
    assert not fits("image/png", ("image/pn",))


def test_a_name_says_nothing(tmp_path: Path) -> None:
    files = {"real.png": PNG, "fake.png": b"#!/bin/sh\n", "hidden.txt": PNG}
    released, withheld = collected(tmp_path, files, ("*", None, ("image/png",), None, "allow"))
    assert released == ["hidden.txt", "real.png"]
    assert withheld == {"fake.png": ("type", "its content is text/plain; released are image/png")}


def test_each_rule_releases_so_many(tmp_path: Path) -> None:
    files = {f"out/{number}": b"x" for number in range(5)} | {"top": b"y"}
    released, withheld = collected(tmp_path, files, Rule("out/*", files=2), ("*", None))
    assert sorted(released) == ["out/0", "out/1", "top"]
    assert withheld == dict.fromkeys(
        ["out/2", "out/3", "out/4"], ("too_many", "2 files are released by its rule")
    )


def test_a_file_needs_one_rule_that_it_fits(tmp_path: Path) -> None:
    files = {"a": PNG, "b": b"text", "c": b"long text " * 200, "d": b"token " + AWS}
    rules = (Rule("*", types=("image/*",)), Rule("*", max_size=1000, types=("text/plain",), secrets="deny"))
    released, withheld = collected(tmp_path, files, *rules)
    assert released == ["a", "b"]
    assert withheld["c"] == ("type", "its content is text/plain; released are image/*")
    assert withheld["d"] == ("secret", "it has what looks like an AWS access key")


TOKENS = {
    "a private key": b"-----BEGIN RSA PRIVATE KEY-----\nMIIE",
    "an AWS access key": AWS,
    "a GitHub token": b"ghp_" + b"a1B2" * 9,
    "a GitLab token": b"glpat-" + b"x" * 20,
    "a Slack token": b"xoxb-1234567890-abc",
    "an npm token": b"npm_" + b"Z" * 36,
}


@pytest.mark.parametrize("what", sorted(TOKENS))
@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
def test_tokens_are_found_wherever_pieces_are_cut(what: str, size: int) -> None:
    data = b"A=1\n" * 300 + b'key = "' + TOKENS[what] + b'"\n' + b"z" * 50
    scan = Scan(None)
    for at in range(0, len(data), size):
        scan.feed(data[at : at + size])
    assert scan.finish() == f"it has what looks like {what}"


def test_what_is_no_token_is_released() -> None:
    for data in (
        b"ghp_short", b"AKIAIOSFODNN7EXAMPLES", b"xAKIAIOSFODNN7EXAMPLE", b"-----BEGIN PUBLIC KEY-----",
        b"xoxb-", b"-----BEGIN CERTIFICATE-----", b"myghp_" + b"a" * 36, b"",
    ):  # fmt: skip
        scan = Scan(None)
        scan.feed(data)
        assert scan.finish() is None, data


def test_a_secret_of_the_call_is_found_in_its_forms(tmp_path: Path) -> None:
    value = b"s3cr3t/value+of=the call"
    redactor = Redactor({"TOKEN": value})
    files = {
        "plain": b"x" * 2_000_000 + value + b"y", "base64": base64.b64encode(b"ab" + value),
        "hex": value.hex().encode(), "innocent": b"nothing", "packed": zlib.compress(value),
    }  # fmt: skip
    released, withheld = collected(tmp_path, files, ("*", None, (), None, "deny"), redactor=redactor)
    assert released == ["innocent", "packed"]  # compressed: it is not seen through, and docs say so
    assert set(withheld.values()) == {("secret", "it has a secret of the call")}
    assert redactor.count == 0  # its count is of what was redacted
    released, _ = collected(tmp_path, files, ("*", None), redactor=redactor)
    assert len(released) == 5


def test_what_is_withheld_is_not_in_the_store(tmp_path: Path) -> None:
    collected(tmp_path, {"a": AWS}, ("*", None, (), None, "deny"))
    assert not [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
