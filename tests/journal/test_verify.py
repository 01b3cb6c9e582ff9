"""What is found by checking: cut tails, replaced chains, damaged pages, streams and artifacts."""

from __future__ import annotations

import json
import sqlite3
import tracemalloc
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from journals import behind, call, record

from sandboxd import canonical, errors, models
from sandboxd.journal import Accepted, Journal, chain, outcome_header, requests, schema, signing, upkeep
from sandboxd.journal import verify as verify_module
from sandboxd.journal.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

ASKED = "what was asked was changed: it no longer has the digest that it was accepted with"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_cut_tail_is_found_by_the_daemons_own_signed_head(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        for _ in range(5):
            await record(journal, tmp_path)
    behind(tmp_path, "DELETE FROM invocations WHERE id IN (SELECT id FROM records WHERE n > 3)",
           "DELETE FROM records WHERE n > 3")  # fmt: skip
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
    assert (report.at, report.records) == (4, 3)
    assert report.problem == "the head of record 5 was signed: the newest records were cut off"


async def test_a_chain_that_was_written_anew_is_found(tmp_path: Path) -> None:
    """Every digest is right, and the signed head is of another record."""
    async with Journal.open(tmp_path) as journal:
        for _ in range(4):
            await record(journal, tmp_path)
    connection = schema.connect_writer(tmp_path / "journal.sqlite3")
    rows = connection.execute("SELECT n, header FROM records ORDER BY n").fetchall()
    bodies = connection.execute(
        "SELECT i.doc FROM records r JOIN invocations i USING (id) ORDER BY n"
    ).fetchall()
    connection.execute("DELETE FROM records")
    head = chain.Head(0, chain.GENESIS)
    for (n, data), (body,) in zip(rows, bodies, strict=True):
        header = {k: v for k, v in json.loads(data).items() if k not in {"n", "prev", "body"}}
        head = chain.append(connection, head, header | ({"attempts": 7} if n == 2 else {}), body)
    connection.close()
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
    assert report.at == 4
    assert "the chain was replaced" in str(report.problem)


@pytest.mark.parametrize("number", [1, 2, 4])
async def test_a_record_that_was_changed_with_all_its_digests_is_found(tmp_path: Path, number: int) -> None:
    """Body, header and the digests of both are as they would have been; the newest has a signed head."""
    async with Journal.open(tmp_path) as journal:
        for _ in range(4):
            await record(journal, tmp_path)
    with closing(schema.connect_writer(tmp_path / "journal.sqlite3")) as connection:
        id_, data, body = connection.execute(
            "SELECT r.id, r.header, i.doc FROM records AS r JOIN invocations AS i USING (id) WHERE n = ?",
            (number,),
        ).fetchone()
        changed = body.replace(b'"argv":["true"]', b'"argv":["evil"]')
        assert changed != body
        header = json.loads(data) | {"body": canonical.digest_bytes(changed)}
        digest = canonical.digest(header)
        connection.execute("UPDATE invocations SET doc = ? WHERE id = ?", (changed, id_))
        connection.execute(
            "UPDATE records SET header = ?, digest = ? WHERE n = ?",
            (canonical.canonical(header), digest, number),
        )
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
    if number == 4:
        assert (report.at, "the chain was replaced" in str(report.problem)) == (4, True)
    else:
        assert report.at == number + 1
        assert f"record {number + 1} does not follow record {number}" in str(report.problem)


async def test_a_head_of_another_key_is_not_believed(tmp_path: Path) -> None:
    other = signing.NodeKey.open(signing.KeyPlace(tmp_path / "other.key", own=True))
    async with Journal.open(tmp_path / "state") as journal:
        await record(journal, tmp_path / "state")
        head = await journal.head()
        mine, theirs = journal.key.sign(head, 5), other.sign(head, 5)
        assert (await journal.verify(mine.decode())).ok
        with pytest.raises(errors.InvalidRequest, match="none of this node"):
            await journal.verify(theirs.decode())
        forged = json.loads(mine) | {"n": 9}
        with pytest.raises(errors.InvalidRequest, match="signature"):
            await journal.verify(json.dumps(forged))
    behind(tmp_path / "state", f"UPDATE heads SET signed = x'{theirs.hex()}'")
    async with Journal.open(tmp_path / "state") as journal:
        assert "does not hold" in str((await journal.verify()).problem)


@pytest.mark.parametrize(
    "text",
    ["{}", "{", "[]", '{"type": "head"}', "9" * 5000, "[" * 3000, "{" * 3000, "sha256:" + "g" * 64,
     '{"v":1,"type":"head","n":1,"digest":"sha256:x","at":1,"key":"k","public":"","signature":""}'],
)  # fmt: skip
async def test_what_is_no_head_is_said(tmp_path: Path, text: str) -> None:
    async with Journal.open(tmp_path) as journal:
        with pytest.raises(errors.InvalidRequest):
            await journal.verify(text)
        with pytest.raises(errors.InvalidRequest):
            signing.SignedHead.parse(text.encode())


async def test_a_body_names_the_record_though_a_text_looks_like_a_member(tmp_path: Path) -> None:
    """A nested object with the same members, and texts that look like them, are not the header's."""
    async with Journal.open(tmp_path) as journal:
        first = await record(journal, tmp_path)
        second = first.model_copy(update={"id": first.id[:-1] + ("0" if first.id[-1] != "0" else "1")})
        await journal.accept(Accepted(second.model_copy(update={"state": models.State.ACCEPTED}), "x"))
        header = outcome_header(second)
        header["outcome"]["evidence"] = {"prev": "sha256:" + "0" * 64, "n": 7, "text": '"prev":"sha256:00"'}
        await journal.ended(second, header)
        report = await journal.verify()
        assert (report.ok, report.records) == (True, 2)


async def test_streams_and_artifacts_are_read_on_request(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        good = await record(journal, tmp_path, stdout=b"good", files={"a": b"same"})
        bad = await record(journal, tmp_path, stdout=b"out", files={"a": b"same", "b": b"lost"})
        last = await record(journal, tmp_path, stdout=b"also good")
        assert (await journal.verify(deep=True)).files == 6
        path = tmp_path / "calls" / bad.id / "stdout"
        path.write_bytes(b"oUt")
        lost = bad.artifacts[1].digest
        (tmp_path / "blobs" / "sha256" / lost[7:9] / lost[7:]).unlink()
        assert (await journal.verify()).ok  # the chain itself is whole
        report = await journal.verify(deep=True)
        assert not report.ok
        assert report.records == 3
        assert [(each.n, each.id) for each in report.damaged] == [(2, bad.id)] * 2
        assert report.damaged[0].what.startswith("stdout was changed: it has the digest sha256:")
        assert report.damaged[1].what == f"artifact {lost} is gone"
        path.unlink()
        path.symlink_to("/etc/passwd")
        assert "cannot be read" in (await journal.verify(deep=True)).damaged[0].what
        assert good.id != last.id


async def test_a_damaged_page_is_named_by_its_record(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        for _ in range(300):
            await record(journal, tmp_path)
        keys = {journal.key.id}
    path = tmp_path / "journal.sqlite3"
    connection = sqlite3.connect(path)
    root = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'records'").fetchone()[0]
    connection.close()
    data = bytearray(path.read_bytes())
    data[(_leaf(path, root, 40) - 1) * 4096] = 0x77  # the page's kind
    path.write_bytes(data)
    reader = schema.connect_reader(path)
    report = verify(reader, keys=keys)
    reader.close()
    assert report.at is not None
    assert 1 < report.at < 300
    assert f"record {report.at}, or its call, cannot be read: the database is damaged there" in str(
        report.problem
    )


def _leaf(path: Path, root: int, number: int) -> int:
    """A child of an interior page of a table: https://www.sqlite.org/fileformat2.html."""
    page = path.read_bytes()[(root - 1) * 4096 : root * 4096]
    assert page[0] == 5
    pointer = int.from_bytes(page[12 + 2 * number : 14 + 2 * number], "big")
    return int.from_bytes(page[pointer : pointer + 4], "big")


async def test_a_body_that_retention_did_not_take_is_missed(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        for _ in range(3):
            await record(journal, tmp_path)
    behind(tmp_path, "UPDATE invocations SET doc = NULL WHERE id = (SELECT id FROM records WHERE n = 2)")
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
    assert (report.at, report.records) == (2, 1)
    assert report.problem == "the body of record 2 is gone, and it was not retention that took it"


async def test_large_documents_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Journal.open(tmp_path) as journal:
        for _ in range(12):
            await record(journal, tmp_path, argv=["x" * 1_000_000])
        keys = {journal.key.id}
        monkeypatch.setattr(verify_module, "_MOST", 2_000_000)
        monkeypatch.setattr(upkeep, "MOST", 2_000_000)
        with closing(schema.connect_reader(tmp_path / "journal.sqlite3")) as reader:
            tracemalloc.start()
            try:
                assert verify(reader, keys=keys).records == 12
                assert tracemalloc.get_traced_memory()[1] < 8_000_000
            finally:
                tracemalloc.stop()
        rows = await journal.after(0, 10)
        assert [row.n for row in rows] == [1, 2]
        assert [row.n for row in await journal.after(11, 10)] == [12]


@pytest.mark.parametrize(
    ("change", "which", "told"),
    [
        ("UPDATE requests SET doc = CAST(replace(CAST(doc AS TEXT), 'echo', 'evil') AS BLOB)", 1, ASKED),
        ("UPDATE requests SET doc = CAST(replace(CAST(doc AS TEXT), 'echo', 'evil') AS BLOB)", 0, ASKED),
        ("UPDATE invocations SET request_digest = 'sha256:00'", 1, ASKED),
        (
            "UPDATE requests SET contents = CAST(replace(CAST(contents AS TEXT), 'typed', 'other') AS BLOB)",
            1,
            "what its request named as sha256:",
        ),
        ("UPDATE requests SET contents = x'00'", 0, "are cut off"),
        ("UPDATE requests SET id = 'other'", 0, "it waits, and what was asked is gone"),
        ("UPDATE requests SET id = 'other'", 1, "what was asked is there, and the call is not"),
        ("UPDATE invocations SET uid = 0", 1, "its row was changed: uid is not as in its record"),
        ("UPDATE invocations SET cause = 'denied'", 1, "its row was changed: cause is not as in its record"),
        ("UPDATE invocations SET key = 'mine'", 1, "its row was changed: key is not as in its record"),
        ("UPDATE invocations SET key = NULL", 1, "its row was changed: key is not as in its record"),
    ],
)
async def test_what_is_beside_the_records_is_compared(
    tmp_path: Path, change: str, which: int, told: str
) -> None:
    """Of a call that has ended, and of one that waits."""
    ids = []
    async with Journal.open(tmp_path) as journal:
        for number in range(2):
            begun = call(argv=["echo"], key=f'"{number}ü"', labels={"key": "x"})
            asked = requests.describe(models.Request(argv=["echo"], stdin=models.Bytes.of(b"typed")))
            row = requests.Open(begun.id, 1, known=1)
            await journal.accept(Accepted(begun, asked.digest, asked, row))
            ids.append(begun.id)
        await record(journal, tmp_path, key=None, labels={"key": "x"})
        outcome = models.Outcome(cause=models.Cause.EXITED, message="It ended.", exit_code=0)
        done = begun.model_copy(update={"state": models.State.ENDED, "outcome": outcome})
        await journal.ended(done, outcome_header(done))
        assert (await journal.verify()).ok
    behind(tmp_path, f"{change} WHERE id = '{ids[which]}'")
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
    assert (report.ok, report.problem, report.records) == (False, None, 2)
    assert any(told in each.what for each in report.damaged)
    if "gone" not in told and "is there" not in told:
        assert len(report.damaged) == 1
        assert ids[which] in f"{report.damaged[0].id} {report.damaged[0].what}"
        assert report.damaged[0].n == (2 if which else 0)
