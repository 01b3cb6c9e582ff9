"""Layers that come compressed, as OCI images have them: what they bring, and what they may not become."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from typing import TYPE_CHECKING

import pytest
from sessioned import by, said, sh

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import SessionInfo

PACKED = pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
SMALL = 4242
"""Who may have 8 MiB in sessions."""
MARK = bytes(1024)


def tar(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@PACKED
def test_a_layer_may_be_compressed(
    daemon: Daemon, session: SessionInfo, pack: Callable[[bytes], bytes]
) -> None:
    client = daemon.client()
    sh(daemon, session, "mkdir d; echo 1 >d/one; ln -s one d/link; head -c 3000000 /dev/urandom >random")
    with client.export_session(session.id) as chunks:
        layer = b"".join(chunks)
    other = client.create_session()
    try:
        client.import_session(other.id, pack(layer))
        with client.export_session(other.id) as chunks:
            assert b"".join(chunks) == layer
        client.import_session(other.id, pack(tar(**{".wh.random": b"", "new": b"2\n"})))
        assert said(sh(daemon, other, "ls; cat d/link new")) == "d\nnew\n1\n2\n"
    finally:
        client.delete_session(other.id)


@PACKED
def test_damage_changes_nothing(daemon: Daemon, session: SessionInfo, pack: Callable[[bytes], bytes]) -> None:
    client, layer = daemon.client(), pack(tar(f=b"some text" * 1000, g=b"more"))
    wrong = bytearray(layer)
    wrong[-7] ^= 1  # a checksum, behind all that the tar has
    short = pack(tar(f=b"x")[:1024])
    for bad in (layer[:10], layer[: len(layer) // 2], layer[:-1], bytes(wrong), pack(b""), short):
        with pytest.raises(errors.InvalidRequest):
            client.import_session(session.id, bad)
    with pytest.raises(errors.InvalidRequest, match="zstd"):
        client.import_session(session.id, b"\x28\xb5\x2f\xfd" + layer)
    assert client.session(session.id).head.id == session.head.id


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(tar(f=bytes(64 << 20)), id="zeros"),
        pytest.param(tar(f=b"x" * (64 << 20)), id="content"),
        pytest.param(tar(f=b"x") + bytes(64 << 20), id="after the end"),
        pytest.param(b"".join(header("x", 0) for _ in range(64 << 11)) + MARK, id="headers"),
    ],
)
def test_a_bomb_ends_at_the_quota(daemon: Daemon, bomb: bytes) -> None:
    with by(SMALL, daemon):
        client = daemon.client()
        made = client.create_session()
        try:
            for pack in (gzip.compress, bz2.compress, lzma.compress):
                with pytest.raises(errors.QuotaExceeded) as refused:
                    client.import_session(made.id, pack(bomb))
                assert refused.value.details["quota"] == "sessions.size"
            assert client.session(made.id).head.id == made.head.id
            client.import_session(made.id, gzip.compress(tar(f=b"x" * (4 << 20))))  # all of it is still there
        finally:
            client.delete_session(made.id)


def test_a_header_that_promises_too_much_is_refused(daemon: Daemon, session: SessionInfo) -> None:
    with pytest.raises(errors.TooLarge, match="4GiB"):
        daemon.client().import_session(session.id, gzip.compress(header("f", 5 << 30) + bytes(1 << 20)))


def test_an_xz_that_asks_for_gigabytes_is_refused(daemon: Daemon, session: SessionInfo) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    with pytest.raises(errors.InvalidRequest, match="decompressed"):
        daemon.client().import_session(session.id, lzma.compress(tar(f=b"x"), filters=filters))
