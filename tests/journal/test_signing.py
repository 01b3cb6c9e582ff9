"""The node's key: made once, whole, for nobody else to read; and heads that are signed with it."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from journals import record

from sandboxd import canonical, errors
from sandboxd.journal import Head, Journal, signing
from sandboxd.journal import store as store_module

if TYPE_CHECKING:
    from pathlib import Path

RSA = rsa.generate_private_key(65537, 2048).private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
HEAD = Head(3, "sha256:" + "ab" * 32)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_key_is_made_once_and_is_roots_alone(tmp_path: Path) -> None:
    place = signing.place_of(None, tmp_path, {})
    with ThreadPoolExecutor(16) as several:
        ids = set(several.map(lambda _: signing.NodeKey.open(place).id, range(64)))
    assert len(ids) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["journal.key"]
    signing.NodeKey.open(place).publish(tmp_path)
    assert signing.key_id(signing.read_public(tmp_path / "journal.pub")) in ids
    assert stat.S_IMODE(place.path.stat().st_mode) == 0o600


def test_openssl_makes_the_key_and_checks_the_signature(tmp_path: Path) -> None:
    """The format is everybody's: a key of openssl signs, and openssl checks what was signed."""
    path = tmp_path / "key"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True, capture_output=True
    )
    path.chmod(0o600)
    key = signing.NodeKey.load(signing.KeyPlace(path, own=False))
    signed = signing.SignedHead.parse(key.sign(HEAD, 7))
    (tmp_path / "pub").write_bytes(key.pem())
    assert signing.read_public(tmp_path / "pub") == key.public
    (tmp_path / "said").write_bytes(canonical.canonical(signing._said(HEAD, 7, key.public)))
    (tmp_path / "signature").write_bytes(signed.signature)
    argv: list[str | Path] = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", tmp_path / "pub",
            "-in", tmp_path / "said", "-sigfile", tmp_path / "signature"]  # fmt: skip
    assert subprocess.run(argv, check=False, capture_output=True).returncode == 0
    (tmp_path / "said").write_bytes(b"else")
    assert subprocess.run(argv, check=False, capture_output=True).returncode != 0


def test_where_the_key_is(tmp_path: Path) -> None:
    (tmp_path / "sandboxd-journal-key").touch()
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert signing.place_of(None, tmp_path / "s", environ).path == tmp_path / "sandboxd-journal-key"
    assert signing.place_of(tmp_path / "x", tmp_path / "s", environ).path == tmp_path / "x"
    assert signing.place_of(None, tmp_path / "s", {}) == signing.KeyPlace(
        tmp_path / "s/journal.key", own=True
    )


@pytest.mark.parametrize("what", ["missing", "rsa", "text", "mode", "fifo", "empty"])
async def test_a_key_that_cannot_be_used_keeps_the_journal_shut(tmp_path: Path, what: str) -> None:
    path = tmp_path / "key"
    if what == "rsa":
        path.write_bytes(RSA)
    elif what == "fifo":
        os.mkfifo(path)
    elif what != "missing":
        path.write_text("" if what == "empty" else "no key")
    if what != "missing":
        path.chmod(0o644 if what == "mode" else 0o600)
    with pytest.raises(errors.ConfigInvalid, match=str(path)):
        async with Journal.open(tmp_path / "state", signing.KeyPlace(path, own=False)):
            pass
    async with Journal.open(tmp_path / "state"):  # its lock was let go of
        pass


async def test_heads_are_signed_at_stop_and_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SIGN_RECORDS", 2)
    monkeypatch.setattr(store_module, "SIGN_CHECK", 0.01)
    async with Journal.open(tmp_path) as journal:
        assert await journal.sign_head() is None  # nothing is there yet
        task = asyncio.create_task(journal.keep_signing())
        for _ in range(2):
            await record(journal, tmp_path)
        while (report := await journal.verify()).signed != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        await record(journal, tmp_path)
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
        assert (report.ok, report.signed) == (True, 3)


async def test_what_an_earlier_key_signed_holds_after_a_change_of_keys(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for number in range(3):
        if number:
            (state / signing.OWN).rename(tmp_path / f"old-{number}")
        async with Journal.open(state) as journal:
            await record(journal, state)
    async with Journal.open(state) as journal:
        assert ((report := await journal.verify()).ok, report.signed) == (True, 3)
    assert len(signing.known(state)) == 3
    (state / signing.PUBLIC).write_bytes(b"garbage\n" + (state / signing.PUBLIC).read_bytes()[200:])
    async with Journal.open(state) as journal:
        assert signing.known(state)[0] == journal.key.public  # and it is mended with what is left of it
        assert not (await journal.verify()).ok  # a key that nobody knows any more
