"""What is behind the events that a header vouches for: the outcome's own, and the summary of the streams.

Theory of operation.  A header is written before the event that tells of it, so it has no digest of that. But
all of it follows from the header: the event has the invocation, which is the record's body, and the summary
has the sizes and digests of the streams. An event of the network may have come in between, and has nothing
but its checksum. A spool that a daemon had no time to close ends before them, or with what the power left of
them: whoever reads it next makes them again, so what does not have its checksum is no damage here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from sandboxd import canonical, errors
from sandboxd.journal import records
from sandboxd.journal.index import DETAIL, RECORD_SIZE, STREAMS, SUMMARY, Index, Record, Stream, Summary

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["problem"]

MOST = 1000
_SUMMARIES: TypeAdapter[dict[Stream, Summary]] = TypeAdapter(dict[Stream, Summary])


def problem(directory: Path, header: dict[str, Any]) -> str:
    """What is wrong behind the events of a call's spool, as the end of a sentence; empty: nothing. Blocks.

    ``header`` is of a record with ``events``.
    """
    index, begin = Index(directory), header["events"]["events"]["size"] // RECORD_SIZE
    try:
        size = index.size("events")
        if size // RECORD_SIZE > begin + MOST:
            return "go on behind the outcome"
        return _of_tail(index, begin, size, header)
    except errors.NotFound:
        return "are gone"
    except errors.SandboxdError as error:
        return f"cannot be read: {error}"


def _of_tail(index: Index, begin: int, size: int, header: dict[str, Any]) -> str:
    end, has_ended = size // RECORD_SIZE, False
    for number, record in enumerate(index.records(begin, end), begin + 1):
        if not index.holds(record):
            return ""
        if record.kind == SUMMARY:
            if number * RECORD_SIZE != size:
                return "go on behind the last of them"
            return _of_summary(index, record, header)
        if has_ended or record.kind != DETAIL:
            return "go on behind the outcome"
        (event,) = index.events(number - 1, number)
        if event.type == "ended":
            has_ended = True
            body = b"" if event.invocation is None else records.body(event.invocation)
            if canonical.digest_bytes(body) != header["body"]:
                return f"were changed: number {number} tells of another outcome"
        elif event.type != "network":
            return "go on behind the outcome"
    return ""


def _of_summary(index: Index, record: Record, header: dict[str, Any]) -> str:
    try:
        found = _SUMMARIES.validate_json(index.read("details", record.size, record.offset))
    except ValidationError:
        return "have a summary that cannot be read"
    for stream in STREAMS:
        said = header.get(stream)
        if said is not None and (found[stream].digest, found[stream].size) != (said["digest"], said["size"]):
            return f"have a summary of another {stream}"
    return ""
