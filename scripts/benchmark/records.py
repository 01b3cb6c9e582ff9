"""What checking and searching cost: a journal of so many calls, written by the journal's own chain."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sandboxes

from sandboxd import Client
from sandboxd.journal import chain, new_id, outcome_header, schema
from sandboxd.journal.records import body
from sandboxd.journal.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.models import Invocation

__all__ = ["records"]

BATCH = 1000


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


def _fill(path: Path, pattern: Invocation, count: int, until: float) -> int:
    """Copies of a call, many in each transaction, without the syncs that calls wait for."""
    connection = schema.connect_writer(path)
    connection.execute("DELETE FROM heads")  # they are signed with a key of a daemon that has ended
    head, written = chain.read_head(connection), 0
    while written < count and time.monotonic() < until:
        connection.execute("BEGIN")
        for _ in range(min(BATCH, count - written)):
            call = pattern.model_copy(update={"id": new_id()})
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
