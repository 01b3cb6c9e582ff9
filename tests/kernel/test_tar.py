"""Tars of callers: everyday ones and hostile ones."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd import errors
from sandboxd.kernel import tar

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = tar.Limits(size=8 << 20, entries=1000)


def unpack(place: Path, data: bytes, limits: tar.Limits = LIMITS) -> int:
    fd = os.open(place, os.O_PATH)
    try:
        return tar.unpack_tar(fd, data, 1000, 1001, limits)
    finally:
        os.close(fd)


def make(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, mode
    return member


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_everyday_tars(tmp_path: Path, pack: object, form: int) -> None:
    long = "/".join(["a-directory-with-a-name"] * 12) + "/é.txt"
    data = make(
        (info("./", tarfile.DIRTYPE), b""),
        (info("./bin/", tarfile.DIRTYPE, mode=0o500), b""),
        (info("./bin/run", mode=0o4755), b"#!/bin/sh\n"),
        (info(long), b"long" * 1000),
        (info("bin/link", tarfile.SYMTYPE, "../bin/run"), b""),
        (info("hard", tarfile.LNKTYPE, "./bin/run"), b""),
        kind=form,
    )
    assert callable(pack)
    place = tmp_path / "ws"
    place.mkdir()
    assert unpack(place, pack(data)) == 6
    found = (place / "bin/run").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1000, 1001, 0o755)
    assert (place / long).read_bytes() == b"long" * 1000
    assert str((place / "bin/link").readlink()) == "../bin/run"
    assert (place / "hard").samefile(place / "bin/run")


def test_what_gnu_tar_writes(tmp_path: Path) -> None:
    source, place = tmp_path / "src", tmp_path / "ws"
    (source / "d").mkdir(parents=True)
    place.mkdir()
    (source / "d" / os.fsdecode(b"n\xff\n")).write_bytes(b"bytes")
    (source / ("x" * 150)).write_bytes(bytes(100_000))
    data = subprocess.run(["tar", "-C", source, "-cJf", "-", "."], check=True, capture_output=True).stdout
    unpack(place, data)
    assert (place / "d" / os.fsdecode(b"n\xff\n")).read_bytes() == b"bytes"
    assert (place / ("x" * 150)).read_bytes() == bytes(100_000)


def test_a_later_member_replaces_an_earlier_one(tmp_path: Path) -> None:
    unpack(tmp_path, make((info("a"), b"1"), (info("b", tarfile.SYMTYPE, "a"), b""), (info("b"), b"2")))
    assert (tmp_path / "a").read_bytes() == b"1"
    assert (tmp_path / "b").read_bytes() == b"2"


@pytest.mark.parametrize(
    "members",
    [
        [(info("/etc/x"), b"")],
        [(info("../x"), b"")],
        [(info("a/../../x"), b"")],
        [(info("l", tarfile.SYMTYPE, "/etc"), b"")],
        [(info("l", tarfile.SYMTYPE, "../x"), b"")],
        [(info("d/l", tarfile.SYMTYPE, "../../x"), b"")],
        [(info("l", tarfile.SYMTYPE, "."), b""), (info("l/x"), b"x")],
        [(info("h", tarfile.LNKTYPE, "/etc/passwd"), b"")],
        [(info("h", tarfile.LNKTYPE, "../x"), b"")],
        [(info("h", tarfile.LNKTYPE, "h"), b"")],
        [(info("h", tarfile.LNKTYPE, "missing"), b"")],
        [(info("d", tarfile.DIRTYPE), b""), (info("h", tarfile.LNKTYPE, "d"), b"")],
        [(info("dev", tarfile.CHRTYPE), b"")],
        [(info("dev", tarfile.BLKTYPE), b"")],
        [(info("fifo", tarfile.FIFOTYPE), b"")],
        [(info("f"), b""), (info("f/x"), b"")],
        [(info("d", tarfile.DIRTYPE), b""), (info("d"), b"")],
    ],
)
def test_hostile_members_are_refused(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    place = tmp_path / "ws"
    place.mkdir()
    with pytest.raises(errors.InvalidRequest):
        unpack(place, make(*members))
    assert list(tmp_path.iterdir()) == [place]


def test_bombs_end_at_their_limit(tmp_path: Path) -> None:
    with pytest.raises(errors.TooLarge, match="8MiB"):
        unpack(tmp_path, gzip.compress(make((info("zeros"), bytes(9 << 20)))))
    with pytest.raises(errors.TooLarge, match="1k members"):
        unpack(tmp_path, make(*((info("same"), b"") for _ in range(1001))))
    header = info("x", tarfile.XHDTYPE)
    header.size = 4 << 30
    with pytest.raises(errors.TooLarge, match="header"):
        unpack(tmp_path, gzip.compress(header.tobuf() + bytes(4096)))
    run = b"".join(info("x", tarfile.GNUTYPE_LONGNAME).tobuf() for _ in range(100))
    with pytest.raises(errors.InvalidRequest, match="run of extended"):
        unpack(tmp_path, run)


def test_an_xz_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    data = lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}])
    with pytest.raises(errors.InvalidRequest, match="decompressed"):
        unpack(tmp_path, data)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_that_is_cut_off(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    packed = pack(make((info("a"), os.urandom(50_000))))
    for size in (0, 1, 300, len(packed) // 2):
        with pytest.raises(errors.InvalidRequest):
            unpack(tmp_path, packed[:size])


def test_a_tar_that_is_cut_between_two_members(tmp_path: Path) -> None:
    data = make((info("a"), b"x" * 512), (info("b"), b"y" * 512))
    for size in range(0, 2049, 512):
        with pytest.raises(errors.InvalidRequest):
            unpack(tmp_path, data[:size])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 4095), data=st.binary(min_size=1, max_size=40))
def test_damage_gives_a_typed_error_or_nothing(tmp_path: Path, at: int, data: bytes) -> None:
    whole = bytearray(make((info("a/" + "n" * 200), b"x" * 600), (info("b", tarfile.SYMTYPE, "a"), b"")))
    whole[at : at + len(data)] = data
    with contextlib.suppress(errors.Refused):
        unpack(tmp_path, bytes(whole))
