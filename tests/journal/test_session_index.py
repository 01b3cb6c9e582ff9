"""The index of the records of sessions: it finds all, is checked against them, and is made again of them."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import pytest
from journals import behind, new_id, record, spoiled

from sandboxd import canonical, errors, models
from sandboxd.journal import Accepted, Journal, bundle, outcome_header, proof, schema, sessioncalls

if TYPE_CHECKING:
    from pathlib import Path

ONE, OTHER = "01a2234b-abc4-75b8-9b52-f1133330c15d", "01a2234b-abc5-7685-bd12-1c75378678ae"
BEFORE_IT = (
    "DROP TABLE session_records",
    "DROP TABLE forgotten",  # which came after it
    "ALTER TABLE merges DROP COLUMN content",
    "PRAGMA user_version = 12",
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def line(journal: Journal, session: str) -> list[str]:
    found: list[str] = []
    above: int | None = 0
    while above is not None:
        part, above = await journal.read(partial(sessioncalls.calls_of, session=session, above=above))
        found += [one.id for one in part]
    return found


async def filled(state: Path, *, end: int = 9) -> list[str]:
    """A journal with calls of two sessions and of none, in turn; the ids of those of ``ONE``."""
    async with Journal.open(state) as journal:
        found = []
        for number in range(end):
            session = (ONE, None, OTHER)[number % 3]
            done = await record(journal, state, stdout=b"%d\n" % number, session=session)
            found += [done.id] if session == ONE else []
    return found


def older(state: Path) -> None:
    """Leave a journal as the version before the index did."""
    behind(state, *BEFORE_IT)


def can_be_read(path: Path, record: int) -> bool:
    with closing(sqlite3.connect(path)) as connection:
        try:
            connection.execute("SELECT header FROM records WHERE n = ?", (record,)).fetchone()
        except sqlite3.DatabaseError:
            return False
    return True


async def test_the_calls_of_a_session_are_found_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = await filled(tmp_path)
    behind(tmp_path, f"UPDATE invocations SET doc = NULL, pruned = 1 WHERE id = '{mine[0]}'")
    monkeypatch.setattr(sessioncalls, "STEP", 2)
    async with Journal.open(tmp_path) as journal:
        assert await line(journal, ONE) == mine
        assert await line(journal, "nothing") == []
        first, _ = await journal.read(partial(sessioncalls.calls_of, session=ONE, above=0))
        assert [one.pruned for one in first] == [True, False]
        assert (await journal.verify()).ok


async def test_a_text_that_looks_like_a_session_is_none(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        first = await record(journal, tmp_path)
        for evidence, session in (
            ({"session": OTHER}, None),
            ({"session": OTHER, "stderr": "x"}, None),
            ({"text": f'"session":"{OTHER}","stderr":'}, None),
            ({"session": OTHER, "stderr": "x"}, ONE),
        ):
            id_ = new_id()
            begun = first.model_copy(update={"id": id_, "session": session})
            await journal.accept(Accepted(begun.model_copy(update={"state": models.State.ACCEPTED}), "x"))
            header = outcome_header(begun)
            header["outcome"]["evidence"] = evidence
            await journal.ended(begun, header)
        assert await line(journal, OTHER) == []
        assert await line(journal, ONE) == [id_]
        assert (await journal.verify()).ok
    behind(tmp_path, *BEFORE_IT)
    async with Journal.open(tmp_path) as journal:  # the same is found of the headers
        assert await line(journal, OTHER) == []
        assert await line(journal, ONE) == [id_]
        assert (await journal.verify()).ok


async def test_an_older_journal_gets_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = await filled(tmp_path)
    older(tmp_path)
    with closing(schema.connect_reader(tmp_path / "journal.sqlite3")) as connection:  # beside no daemon yet
        chosen = bundle.select(connection, [], session=ONE)
        assert [id_ for _, id_ in chosen.calls] == mine
    monkeypatch.setattr(sessioncalls, "STEP", 2)
    async with Journal.open(tmp_path) as journal:
        assert await line(journal, ONE) == mine
        assert (await journal.verify()).ok
    assert [path.name for path in (tmp_path / "backups").iterdir()] == ["journal-schema-12.sqlite3"]
    with closing(sqlite3.connect(tmp_path / "backups" / "journal-schema-12.sqlite3")) as old:
        assert old.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert old.execute("SELECT count(*) FROM records").fetchone() == (9,)
        assert old.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # it is one file


async def test_a_damaged_older_journal_is_migrated_and_copied_as_it_is(tmp_path: Path) -> None:
    """A page with records of it cannot be read: the others are in the index, and the damage is named."""
    mine = await filled(tmp_path, end=120)
    older(tmp_path)
    path = tmp_path / "journal.sqlite3"
    data = bytearray(path.read_bytes())
    target = mine[20].encode()
    pages = {at: data[at : at + 4096] for at in range(4096, len(data), 4096) if data[at] == 0x0D}
    (page,) = {at for at, held in pages.items() if b'"id":"' + target in held and b'"prev"' in held}
    data[page] = 0x77
    path.write_bytes(data)
    lost = {number for number in range(1, 121, 3) if not can_be_read(path, number)}
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
        assert "cannot be read: the database is damaged there" in str(report.problem)
        assert ["the table records of" in one.what for one in report.damaged] == [True]
        more = await record(journal, tmp_path, session=ONE)
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT n FROM session_records WHERE session = ?", (ONE,)).fetchall()
    assert len(rows) == len(mine) - len(lost) + 1
    assert 0 < len(lost) < 5
    assert more.session == ONE
    with closing(sqlite3.connect(tmp_path / "backups" / "journal-schema-12.sqlite3")) as old:
        assert old.execute("SELECT count(*) FROM invocations").fetchone() == (120,)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (f"DELETE FROM session_records WHERE session = '{ONE}' AND n = 4", [(4, "does not have it among")]),
        (
            f"INSERT INTO session_records VALUES ('{ONE}', 5)",
            [(5, f"has it for session {ONE}, which it does")],
        ),
        (
            f"INSERT INTO session_records VALUES ('{ONE}', 3)",
            [(3, f"has it for session {ONE}, which it does")],
        ),
        (f"INSERT INTO session_records VALUES ('{ONE}', 77)", [(77, "there is no such record")]),
        (f"INSERT INTO session_records VALUES ('{ONE}', -1)", [(-1, "there is no such record")]),
        (
            f"UPDATE session_records SET session = '{OTHER}' WHERE n = 4",
            [(4, "does not have it among"), (4, f"has it for session {OTHER}, which it does not name")],
        ),
    ],
)
async def test_an_index_that_was_changed_is_found_and_the_chain_checked(
    tmp_path: Path, change: str, told: list[tuple[int, str]]
) -> None:
    await filled(tmp_path)
    behind(tmp_path, change)
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
    assert (report.ok, report.problem, report.records) == (False, None, 9)
    assert [
        (each.n, wanted in each.what) for each, (_, wanted) in zip(report.damaged, told, strict=True)
    ] == [(n, True) for n, _ in told]


async def test_a_bundle_lacks_no_call_of_its_session(tmp_path: Path) -> None:
    mine = await filled(tmp_path)
    path = tmp_path / "journal.sqlite3"
    async with Journal.open(tmp_path) as journal:
        key = journal.key
        with closing(schema.connect_reader(path)) as connection:
            chosen = bundle.select(connection, [], session=ONE)
            late = await record(journal, tmp_path, session=ONE)  # as one that ends meanwhile
            bundle.export(connection, tmp_path, key, chosen, tmp_path / "x")
    report = proof.check(tmp_path / "x", {key.id})
    assert (report.ok, report.calls, report.sessions, report.head.n) == (True, 3, [ONE], 9)
    behind(tmp_path, "DELETE FROM session_records WHERE n = 4")
    with closing(schema.connect_reader(path)) as connection:
        chosen = bundle.select(connection, [], session=ONE)
        assert [id_ for _, id_ in chosen.calls] == [mine[0], mine[2], late.id]
        with pytest.raises(errors.JournalCorrupt, match=f"left out record 4 of session {ONE}"):
            bundle.export(connection, tmp_path, key, chosen, tmp_path / "y")
        assert not (tmp_path / "y").exists()
        lie = bundle.Chosen(chosen.calls, [], chosen.head)
        bundle.export(connection, tmp_path, key, lie, tmp_path / "z")
    with_claim(tmp_path / "z", [ONE])
    assert f"call {mine[1]} of session {ONE}, which is not in" in str(proof.check(tmp_path / "z").problem)
    with_claim(tmp_path / "z", [OTHER])
    assert "record 3 is of call" in str(proof.check(tmp_path / "z").problem)
    hostile: tuple[object, ...] = (None, "x", [1], {})
    for wrong in hostile:
        with_claim(tmp_path / "z", wrong)
        assert "manifest.json does not name sessions" in str(proof.check(tmp_path / "z").problem)


def with_claim(path: Path, sessions: object) -> None:
    """Let a bundle say that it has all calls of these sessions."""
    with tarfile.open(path) as tar:
        members = [(one.name, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            if name == "manifest.json":
                data = canonical.canonical(json.loads(data) | {"sessions": sessions})  # noqa: PLW2901
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


async def test_what_is_damaged_of_a_session_is_not_left_out_of_its_bundle(tmp_path: Path) -> None:
    mine = await filled(tmp_path)
    behind(
        tmp_path,
        f"UPDATE invocations SET doc = x'7b' WHERE id = '{mine[0]}'",
        f"UPDATE invocations SET doc = NULL, pruned = 1 WHERE id = '{mine[1]}'",
    )
    async with Journal.open(tmp_path) as journal:
        key = journal.key
    with closing(schema.connect_reader(tmp_path / "journal.sqlite3")) as connection:
        chosen = bundle.select(connection, [], session=ONE)
        bundle.export(connection, tmp_path, key, chosen, tmp_path / "x")
    report = proof.check(tmp_path / "x", {key.id})
    assert (report.problem, report.calls, report.pruned) == (None, 3, 1)
    assert [f"calls/{mine[0]}/body.json was changed" in one for one in report.damaged] == [True]
    behind(tmp_path, "UPDATE records SET header = x'7b' WHERE n = 4")
    with closing(schema.connect_reader(tmp_path / "journal.sqlite3")) as connection:
        chosen = bundle.select(connection, [mine[1]])
        with pytest.raises(errors.JournalCorrupt, match="record 4 was damaged"):
            bundle.export(connection, tmp_path, key, chosen, tmp_path / "y")


async def test_a_name_of_two_sessions_is_none(tmp_path: Path) -> None:
    mine = await filled(tmp_path)
    row = (
        "INSERT INTO sessions (id, uid, name, labels, created, used, head, origin, calls, gone)"
        " VALUES ('{}', {}, 'work', '{{}}', 1, 1, 'x', 'x', 0, 0)"
    )
    behind(tmp_path, row.format(ONE, 1))
    with closing(schema.connect_reader(tmp_path / "journal.sqlite3")) as connection:
        assert [id_ for _, id_ in bundle.select(connection, [], session="work").calls] == mine
        assert bundle.select(connection, [], session="work").sessions == [ONE]
    behind(tmp_path, row.format(OTHER, 2))
    with closing(schema.connect_reader(tmp_path / "journal.sqlite3")) as connection:
        with pytest.raises(errors.InvalidRequest, match=f"{ONE} of uid 1, {OTHER} of uid 2"):
            bundle.select(connection, [], session="work")
        assert not connection.in_transaction


async def test_a_damaged_index_holds_up_no_outcome_and_no_export(tmp_path: Path) -> None:
    mine = await filled(tmp_path)
    spoiled(tmp_path, "session_records")
    async with Journal.open(tmp_path) as journal:
        more = await record(journal, tmp_path, session=ONE)
        found = await journal.get(more.id)
        assert found is not None
        assert found.outcome == more.outcome
        report = await journal.verify()
        assert (report.problem, report.records) == (None, 10)
        assert "the table session_records of the journal's database" in report.damaged[0].what
        assert "the index of sessions cannot be read" in report.damaged[1].what
        key = journal.key
    with closing(schema.connect_reader(tmp_path / "journal.sqlite3")) as connection:
        chosen = bundle.select(connection, [], session=ONE)
        assert [id_ for _, id_ in chosen.calls] == [*mine, more.id]
        bundle.export(connection, tmp_path, key, chosen, tmp_path / "x")
    assert proof.check(tmp_path / "x", {key.id}).sessions == [ONE]
