"""The journal on a real disk: durable, exactly once, one daemon, chained."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from journals import new_id

from sandboxd import canonical, errors, models
from sandboxd.journal import Accepted, Head, Journal, Refusal, outcome_header
from sandboxd.journal import schema as schema_module
from sandboxd.journal import store as store_module

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


def call(
    uid: int = 1, key: str | None = None, labels: dict[str, str] | None = None, policy: str = "default"
) -> models.Invocation:
    return models.Invocation(
        id=new_id(),
        state=models.State.ACCEPTED,
        caller=models.CallerInfo(uid=uid, gid=uid, role="agent"),
        policy=models.DigestRef(name=policy, digest=DIGEST),
        image=models.DigestRef(name="host", digest=DIGEST),
        plan=DIGEST,
        argv=["true", models.Bytes.of(b"\xff")],
        labels=labels or {},
        key=key,
        times=models.Times(accepted=1_700_000_000_000_000),
    )


def ended(invocation: models.Invocation, cause: models.Cause = models.Cause.EXITED) -> models.Invocation:
    outcome = models.Outcome(cause=cause, message="It ended.", exit_code=0, evidence={"limit": 2**63 - 4096})
    stream = models.Content(text="out\n", size=4, digest=canonical.digest_bytes(b"out\n"))
    return invocation.model_copy(
        update={
            "state": models.State.ENDED,
            "outcome": outcome,
            "stdout": stream,
            "times": invocation.times.model_copy(update={"ended": 1_700_000_000_500_000}),
            "usage": models.Usage(wall=5),
            "artifacts": [models.Artifact(path="a", size=1, digest=DIGEST)],
            "attempts": 1,
        }
    )


async def accept_all(journal: Journal, several: list[Accepted]) -> None:
    for each in several:
        await journal.accept(each)


async def finish(journal: Journal, invocation: models.Invocation, attempts: int | None = None) -> Head:
    done = ended(invocation)
    done.attempts = done.attempts if attempts is None else attempts
    return await journal.ended(done, outcome_header(done, inputs=[DIGEST]))


async def run_one(journal: Journal, **fields: object) -> models.Invocation:
    invocation = call(**fields)  # type: ignore[arg-type]
    assert await journal.accept(Accepted(invocation, DIGEST)) is None
    await finish(journal, invocation)
    return invocation


async def test_a_call_from_acceptance_to_outcome(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        assert await journal.head() == Head(0, "sha256:" + "0" * 64)
        first = call(labels={"a": "b"})
        await journal.accept(Accepted(first, DIGEST))
        assert await journal.get(first.id) == first
        assert await journal.in_flight() == [first]
        running = first.model_copy(update={"state": models.State.RUNNING, "attempts": 1})
        journal.follow(running)
        head = await finish(journal, first)
        assert head == await journal.head()
        assert head.n == 1
        found = await journal.get(first.id)
        assert found is not None
        assert found.state is models.State.ENDED
        assert found.outcome is not None
        assert found.outcome.evidence == {"limit": 2**63 - 4096}
        assert found.stdout == models.Content(
            text="", size=4, digest=canonical.digest_bytes(b"out\n"), complete=False
        )
        assert await journal.in_flight() == []
        assert await journal.get(new_id()) is None
    async with Journal.open(tmp_path) as journal:
        assert await journal.head() == head
        assert await journal.get(first.id) == found
        assert (await journal.verify(str(head))).ok


async def test_the_header_names_everything_by_digest(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        first, second = await run_one(journal), await run_one(journal)
    with sqlite3.connect(tmp_path / "journal.sqlite3") as connection:
        rows = connection.execute("SELECT digest, header FROM records ORDER BY n").fetchall()
    connection.close()
    headers = [json.loads(row[1]) for row in rows]
    assert [header["id"] for header in headers] == [first.id, second.id]
    assert headers[1]["prev"] == rows[0][0] == canonical.digest_bytes(rows[0][1])
    assert rows[0][1] == canonical.canonical(headers[0])
    header = headers[0]
    assert (header["v"], header["n"], header["type"]) == (1, 1, "outcome")
    assert header["caller"] == {"uid": 1, "gid": 1, "role": "agent"}
    assert header["policy"] == header["image"] == header["plan"] == DIGEST
    assert header["inputs"] == header["artifacts"] == [DIGEST]
    assert header["stdout"] == {"digest": canonical.digest_bytes(b"out\n"), "size": 4}
    assert header["outcome"]["evidence"] == {"limit": str(2**63 - 4096)}
    assert header["checkpoint_before"] is None


async def test_an_outcome_is_recorded_once(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        invocation = await run_one(journal)
        with pytest.raises(errors.StateConflict):
            await finish(journal, invocation, attempts=7)
        assert (await finish(journal, invocation)).n == 1  # the same, as after a sync that failed
        with pytest.raises(errors.NotFound):
            await finish(journal, call())
        with pytest.raises(ValueError, match="outcome"):
            await journal.ended(invocation, {})
        other = call()
        await journal.accept(Accepted(other, DIGEST))
        results = await asyncio.gather(
            *(finish(journal, other, at) for at in range(20)), return_exceptions=True
        )
        assert sum(isinstance(result, Head) for result in results) == 1
        assert sum(isinstance(result, errors.StateConflict) for result in results) == 19
        journal.follow(other)  # late: changes nothing any more
        assert (await journal.head()).n == 2
        assert (await journal.verify()).ok
        found = await journal.get(other.id)
        assert found is not None
        assert found.state is models.State.ENDED


async def test_what_nobody_waits_for_is_written_though_nothing_follows(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        other = call()
        await journal.accept(Accepted(other, DIGEST))
        journal.follow(other.model_copy(update={"state": models.State.STARTING, "attempts": 1}))
        while (found := await journal.get(other.id)) is None or not found.attempts:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert found.state is models.State.STARTING


async def test_a_key_stands_for_one_call(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        calls = [call(key="k") for _ in range(50)]
        found = await asyncio.gather(*(journal.accept(Accepted(each, DIGEST)) for each in calls))
        assert found.count(None) == 1
        winner = calls[found.index(None)].id
        assert {existing.id for existing in found if existing is not None} == {winner}
        with pytest.raises(errors.KeyConflict) as caught:
            await journal.accept(Accepted(call(key="k"), "sha256:" + "cd" * 32))
        assert caught.value.details["id"] == winner
        assert await journal.accept(Accepted(call(uid=2, key="k"), "sha256:" + "cd" * 32)) is None
        existing = await journal.find_key(1, "k")
        assert existing is not None
        assert existing.id == winner
        assert await journal.find_key(3, "k") is None
        assert len(await journal.list()) == 2


async def test_a_bad_operation_fails_alone(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        same = call()
        results = await asyncio.gather(
            *(journal.accept(Accepted(each, DIGEST)) for each in (call(), same, same, call())),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [type(None), type(None), errors.HostFailed, type(None)]
        assert len(await journal.list()) == 3


async def test_lists_and_filters(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        a = await run_one(journal, uid=1, labels={"team": "x", "n": "1"})
        b = await run_one(journal, uid=2, labels={"team": "x"}, policy="python")
        c = call(uid=1)
        await journal.accept(Accepted(c, DIGEST))

        async def ids(**filters: object) -> list[str]:
            return [found.id for found in await journal.list(**filters)]  # type: ignore[arg-type]

        assert await ids() == [c.id, b.id, a.id]
        assert await ids(limit=2) == [c.id, b.id]
        assert await ids(before=b.id) == [a.id]
        assert await ids(uid=1) == [c.id, a.id]
        assert await ids(policy="python") == [b.id]
        assert await ids(cause=models.Cause.EXITED) == [b.id, a.id]
        assert await ids(state=models.State.ACCEPTED) == [c.id]
        assert await ids(labels={"team": "x"}) == [b.id, a.id]
        assert await ids(labels={"team": "x", "n": "1"}) == [a.id]
        assert await ids(labels={"team": "'; DROP TABLE invocations; --"}) == []
        assert await ids(limit=-5) == [c.id]
        with pytest.raises(errors.InvalidRequest):
            await ids(labels={str(n): "x" for n in range(17)})


async def test_refusals_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "KEPT_REFUSALS", 200)
    async with Journal.open(tmp_path) as journal:
        await asyncio.gather(
            *(journal.refused(Refusal(n, None, "invalid_request", "x" * 9000, "\ud800")) for n in range(1000))
        )
        found = await journal.refusals(500)
        assert len(found) == 200
        assert (found[0].at, len(found[0].detail), found[0].request) == (999, 2000, "\\ud800")


async def tampered(tmp_path: Path, *statements: str, head: str | None = None) -> str:
    async with Journal.open(tmp_path) as journal:
        for _ in range(6):
            await run_one(journal)
        exported = str(await journal.head())
        assert (await journal.verify(exported)).ok
    connection = sqlite3.connect(tmp_path / "journal.sqlite3", isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify(exported if head is None else head)
        assert not report.ok
        assert report.problem is not None
        return f"{report.at}: {report.problem}"


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM records WHERE n = 3", "3: record 3 is missing"),
        ("DELETE FROM records WHERE n = 1", "1: record 1 is missing"),
        (
            "UPDATE records SET header = CAST(replace(header, 'agent', 'root') AS BLOB) WHERE n = 4",
            "4: record 4",
        ),
        ("UPDATE records SET header = x'00' WHERE n = 4", "4: record 4 was changed"),
        ("UPDATE records SET digest = 'x' WHERE n = 2", "2: record 2 was changed"),
        (
            "UPDATE invocations SET doc = CAST(replace(doc, 'agent', 'spy') AS BLOB) WHERE rowid = 5",
            "5: the body of record 5 was changed",
        ),
        (
            "DELETE FROM invocations WHERE id = (SELECT id FROM records WHERE n = 2)",
            "2: record 2 has lost its invocation",
        ),
        ("DELETE FROM records WHERE n > 4", "5: the head"),
    ],
)
async def test_verify_says_which_record_differs(tmp_path: Path, statement: str, said: str) -> None:
    assert (await tampered(tmp_path, statement)).startswith(said)


async def test_verify_sees_records_that_changed_places(tmp_path: Path) -> None:
    said = await tampered(
        tmp_path,
        "UPDATE records SET n = 100 WHERE n = 3",
        "UPDATE records SET n = 3 WHERE n = 4",
        "UPDATE records SET n = 4 WHERE n = 100",
    )
    assert said.startswith("3: record 3 is not the record of its place")


async def test_verify_against_heads(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        empty = str(await journal.head())
        await run_one(journal)
        early = await journal.head()
        await run_one(journal)
        for head in (None, empty, str(early), early.digest):
            assert (await journal.verify(head)).ok
        assert not (await journal.verify(f"2:{early.digest}")).ok
        with pytest.raises(errors.InvalidRequest):
            await journal.verify("nonsense")


async def test_a_pruned_body_leaves_the_chain_whole(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        invocation = await run_one(journal)
    connection = sqlite3.connect(tmp_path / "journal.sqlite3", isolation_level=None)
    connection.execute("UPDATE invocations SET doc = NULL, pruned = 1")
    connection.close()
    async with Journal.open(tmp_path) as journal:
        report = await journal.verify()
        assert (report.ok, report.pruned, report.records) == (True, 1, 1)
        found = await journal.get(invocation.id)
        assert found is not None
        assert (found.pruned is not None, found.argv) == (True, [])
        assert await journal.list() == []


async def test_one_daemon_per_state_directory(tmp_path: Path) -> None:
    async with Journal.open(tmp_path):
        with pytest.raises(errors.ConfigInvalid, match=f"pid {os.getpid()}"):
            async with Journal.open(tmp_path):
                pass
    async with Journal.open(tmp_path):
        pass


async def test_a_newer_or_foreign_database_is_refused(tmp_path: Path) -> None:
    async with Journal.open(tmp_path):
        pass
    path = tmp_path / "journal.sqlite3"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA user_version = {len(schema_module.MIGRATIONS) + 1}")
    connection.close()
    for _ in range(2):  # the lock is let go of
        with pytest.raises(errors.ConfigInvalid, match="newer"):
            async with Journal.open(tmp_path):
                pass
    path.unlink()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(errors.ConfigInvalid, match="another program"):
        async with Journal.open(tmp_path):
            pass


async def test_damage_is_journal_corrupt(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite3").write_bytes(b"not a database" * 1000)
    with pytest.raises(errors.JournalCorrupt):
        async with Journal.open(tmp_path):
            pass
    (tmp_path / "journal.sqlite3").unlink()
    async with Journal.open(tmp_path) as journal:
        for _ in range(50):
            await run_one(journal)
    data = bytearray((tmp_path / "journal.sqlite3").read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    (tmp_path / "journal.sqlite3").write_bytes(data)
    with pytest.raises(errors.JournalCorrupt):
        async with Journal.open(tmp_path) as journal:
            await journal.list()


async def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    await asyncio.to_thread(run, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place))
    try:
        async with Journal.open(place) as journal:
            big = call(labels={"x": "y" * 1000})
            several = [Accepted(big.model_copy(update={"id": new_id()}), DIGEST) for _ in range(2000)]
            with pytest.raises(errors.HostFailed, match="no space"):
                await accept_all(journal, several)
            assert len(await journal.in_flight()) > 10
            assert (await journal.verify()).ok
    finally:
        await asyncio.to_thread(run, "umount", str(place))


async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    """A writer is killed in the middle; each id that it printed after an acknowledgement is there."""
    program = textwrap.dedent(f"""
        import asyncio, sys, os
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
        from pathlib import Path
        import test_store as t
        async def one(journal):
            while True:
                invocation = t.call()
                await journal.accept(t.Accepted(invocation, t.DIGEST))
                os.write(1, f"A {{invocation.id}}\\n".encode())
                await t.finish(journal, invocation)
                os.write(1, f"E {{invocation.id}}\\n".encode())
        async def main():
            async with t.Journal.open(Path({str(tmp_path)!r})) as journal:
                await asyncio.gather(*(one(journal) for _ in range(20)))
        asyncio.run(main())
    """)
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert child.stdout is not None
    lines = [(await child.stdout.readline()).decode().split() for _ in range(500)]
    child.send_signal(signal.SIGKILL)
    lines += [line.decode().split() for line in (await child.stdout.read()).splitlines()]
    await child.wait()
    async with Journal.open(tmp_path) as journal:
        assert (await journal.verify()).ok
        open_ids = {invocation.id for invocation in await journal.in_flight()}
        for what, id_ in (line for line in lines if len(line) == 2 and len(line[1]) == 36):
            if what == "E":
                assert id_ not in open_ids
            elif id_ not in open_ids:
                assert await journal.get(id_) is not None


async def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    async with Journal.open(tmp_path) as journal:
        waiting = asyncio.create_task(journal.accept(Accepted(call(), DIGEST)))
        await asyncio.sleep(0)
    assert await waiting is None  # what was asked before the end is still done
    with pytest.raises(errors.HostFailed, match="closed"):
        await journal.accept(Accepted(call(), DIGEST))


async def test_many_waiting_commits_share_a_sync(tmp_path: Path) -> None:
    """A thousand calls at once take far fewer syncs than calls: the time of them shows it."""
    async with Journal.open(tmp_path) as journal:
        calls = [call() for _ in range(1000)]
        start = time.perf_counter()
        await asyncio.gather(*(journal.accept(Accepted(each, DIGEST)) for each in calls))
        rate = 1000 / (time.perf_counter() - start)
        assert rate > 300  # some thousands on a quiet machine
        await asyncio.gather(*(finish(journal, each) for each in calls))
        assert (await journal.verify()).records == 1000


async def test_the_log_stays_short_however_much_is_written(tmp_path: Path) -> None:
    """Its file is written from the start again only when all of it is in the database."""
    async with Journal.open(tmp_path) as journal:

        async def one() -> None:
            invocation = call().model_copy(update={"argv": ["x" * 50_000]})
            await journal.accept(Accepted(invocation, DIGEST))
            done = ended(invocation)
            await journal.ended(done, outcome_header(done))

        await asyncio.gather(*(one() for _ in range(1500)))
        assert (tmp_path / "journal.sqlite3-wal").stat().st_size < 64 * 2**20
        assert (await journal.verify()).ok
