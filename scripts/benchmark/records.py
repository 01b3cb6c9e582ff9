"""What checking and searching cost, with so many calls that it matters."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sandboxes

from sandboxd import Client
from sandboxd.journal import Ids, chain, outcome_header, schema
from sandboxd.journal.records import body
from sandboxd.journal.search import Entry, Query, SearchIndex
from sandboxd.journal.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.models import Invocation

__all__ = ["records", "search"]

BATCH = 1000
WORDS = 50_000  # that are in use, beside those that are in every call
IMAGE = "sha256:" + "ab" * 32
QUERIES = {
    "a word of every call": Query("common", limit=50),
    "a rare word": Query("word77", limit=50),
    "two words": Query("common AND word77", limit=50),
    "words in a row": Query('"common word77"', limit=50),
    "a word and a caller's few calls": Query("common", uid=7777, limit=50),
    "a policy and a cause": Query("", policy="python", cause="memory", limit=50),
    "a word, and an hour": Query("common", since=0, until=3_600_000_000, limit=50),
    "a word that all have, without one that most have": Query("common NOT python3", limit=50),
    "nothing but the newest": Query(limit=50),
}


def records(images: Path, count: int, until: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """So many copies of a real call: the seconds that ``journal verify`` takes, on one core."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        with sandboxes.start(images, directory=directory) as daemon:
            pattern = Client(daemon.socket).run(["sh", "-c", "echo out; echo err >&2"])
        written = _fill(directory / "state" / "journal.sqlite3", pattern, count, until)
        reader = schema.connect_reader(directory / "state" / "journal.sqlite3")
        began, cpu = time.perf_counter(), time.process_time()
        report = verify(reader)
        found = {"records": report.records, "verify_s": round(time.perf_counter() - began, 2)}
        found["verify_cpu_s"] = round(time.process_time() - cpu, 2)
        reader.close()
        if not report.ok or report.records < written:
            raise RuntimeError(f"the chain does not hold: {report}")
        size = (directory / "state" / "journal.sqlite3").stat().st_size
        found |= {"bytes_each": size // report.records}
    tell(f"{found}\n")
    return found


def search(count: int, until: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """The milliseconds of searches in an index of so many calls, the slowest of five each."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/var/tmp") as name:
        path, rng, began = Path(name) / "search.sqlite3", random.Random(1), time.perf_counter()  # noqa: S311
        index, written = SearchIndex(path), 0
        while written < count and time.monotonic() < until:
            batch = range(written + 1, min(count, written + BATCH) + 1)
            index.add([_entry(number, rng) for number in batch])
            written = batch[-1]
        index.close()
        found: dict[str, Any] = {"calls": written, "fill_s": round(time.perf_counter() - began, 1)}
        found["bytes_each"] = path.stat().st_size // written
        found["ms"] = {what: _slowest(index, query) for what, query in QUERIES.items()}
    tell(f"{found}\n")
    return found


def _entry(number: int, rng: random.Random) -> Entry:
    words = [f"word{rng.randrange(WORDS)}" for _ in range(12)]
    return Entry(
        number, f"id-{number:034d}", number * 10_000, 7777 if number % 5000 == 0 else 1000 + number % 97,
        "python" if number % 3 else "default", "exited" if number % 50 else "memory", IMAGE,
        f"python3 -c 'print({number})' common {words[0]}", " ".join(words[1:9]), " ".join(words[9:]),
    )  # fmt: skip


def _slowest(index: SearchIndex, query: Query) -> float:
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        index.find(query)
        taken.append(time.perf_counter() - began)
    return round(1000 * max(taken), 1)


def _fill(path: Path, pattern: Invocation, count: int, until: float) -> int:
    """Copies of a call, many in each transaction, without the syncs that calls wait for."""
    connection = schema.connect_writer(path)
    connection.execute("DELETE FROM heads")  # they are signed with a key of a daemon that has ended
    ids, head, written = Ids(), chain.read_head(connection), 0
    while written < count and time.monotonic() < until:
        connection.execute("BEGIN")
        for _ in range(min(BATCH, count - written)):
            call = pattern.model_copy(update={"id": ids.new()})
            data = body(call)
            connection.execute(
                "INSERT INTO invocations (uid, request_digest, state, policy, cause, doc, id)"
                " VALUES (0, 'x', 'ended', ?, 'exited', ?, ?)",
                (call.policy.name, data, call.id),
            )
            head = chain.append(connection, head, outcome_header(call), data)
            written += 1
        connection.execute("COMMIT")
    connection.close()
    return written
