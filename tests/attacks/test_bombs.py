"""Small things that unfold: archives of headers, pages of large records."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE

from sandboxd import errors, models

if TYPE_CHECKING:
    from daemons import Daemon

MEBI = 2**20


def _headers_alone(size: int) -> bytes:
    """A tar of empty files, each behind a run of extended headers that hold nothing."""
    unit = io.BytesIO()
    record = b"comment=" + b" " * (MEBI - 2048) + b"\n"
    filler = str(len(record) + 8).encode() + b" " + record
    filler = str(len(filler)).encode() + b" " + record
    for _ in range(15):
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(filler)
        unit.write(info.tobuf() + filler + bytes(-len(filler) % 512))
    unit.write(tarfile.TarInfo("empty").tobuf())
    packed = gzip.compress(unit.getvalue(), 9)
    return packed * (size // len(unit.getvalue()))  # gzip members follow each other


def test_a_tar_of_headers_alone_ends_soon(daemon: Daemon) -> None:
    bomb = _headers_alone(16 * 1024 * MEBI)
    assert len(bomb) < 24 * MEBI
    began = time.monotonic()
    with pytest.raises(errors.TooLarge):
        daemon.run("true", tar=bomb)
    assert time.monotonic() - began < 15 * PATIENCE


def test_a_page_of_large_records_is_short_and_goes_on(daemon: Daemon) -> None:
    argv = ["true", *["x" * 100_000] * 50]  # 5 MB in each record
    client = daemon.client()
    made = [client.run(argv, labels={"large": "1"}).id for _ in range(5)]
    found: list[str] = []
    pages = 0
    page = models.InvocationList(invocations=[])
    while not pages or page.next is not None:
        page = client.list(label="large=1", before=page.next, limit=100)
        assert len(page.invocations) <= 2
        found += [each.id for each in page.invocations]
        pages += 1
    assert found == made[::-1]
    assert pages >= 3
