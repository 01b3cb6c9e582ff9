"""``sandboxd ps | inspect | logs | cancel``: the calls that a daemon runs and has run."""

from __future__ import annotations

import contextlib
import os
from itertools import islice
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors, models
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.client import Client

__all__ = ["cancel", "find", "inspect", "logs", "ps"]

FULL = 36  # characters of a UUID
SHORTEST = 4
PAGE = 500
AlsoRemote = Annotated[Remote, Parameter(name="*")]
Id = Annotated[
    str, Parameter(name="ID", help="The call's id, or the beginning or end of it (at least 4 characters).")
]
ACTIVE = [state for state in models.State if state is not models.State.ENDED]


def find(client: Client, text: str) -> str:
    """The id that ``text`` is, begins or ends, among the recent ones. Raises NotFound, InvalidRequest."""
    if len(text) >= FULL:
        return text
    if len(text) < SHORTEST:
        raise errors.InvalidRequest(f"{text!r} is too short for an id: give at least {SHORTEST} characters")
    # Ids are UUIDv7: they begin with a time that neighbours share, so that the end says more.
    page = client.list(limit=PAGE).invocations
    found = [one.id for one in page if one.id.startswith(text) or one.id.endswith(text)]
    if not found:
        raise errors.NotFound(f"no recent call has an id like {text!r}; `sandboxd ps -a` lists them")
    if len(found) > 1:
        shown = ", ".join(found[:3])
        raise errors.InvalidRequest(f"{text!r} fits {len(found)} calls, such as {shown}: give more of it")
    return found[0]


def _pages(
    client: Client, state: str | None, policy: str | None, label: str | None
) -> Iterator[models.Invocation]:
    before: str | None = None
    while True:
        page = client.list(state=state, policy=policy, label=label, before=before, limit=PAGE)
        yield from page.invocations
        if page.next is None or page.next == before:
            return
        before = page.next


def _row(call: models.Invocation) -> tuple[object, ...]:
    ended = call.outcome is not None
    how = call.state.value
    if call.outcome is not None:
        how = call.outcome.cause.value
        if call.outcome.exit_code is not None:
            how += f" {call.outcome.exit_code}"
        elif call.outcome.signal_name:
            how += f" {call.outcome.signal_name}"
    took = terminal.duration(call.usage.wall) if ended and call.usage else "-"
    return (
        call.id,
        how,
        call.policy.name,
        terminal.age(call.times.accepted),
        took,
        terminal.words(call.argv)[:200],
    )


def ps(
    *,
    finished: Annotated[
        bool, Parameter(name="--all", alias="-a", negative="", help="Finished calls too, newest first.")
    ] = False,
    limit: Annotated[int, Parameter(alias="-n", help="At most so many calls.")] = 50,
    policy: Annotated[str | None, Parameter(help="Only calls under this policy.")] = None,
    label: Annotated[str | None, Parameter(help="Only calls with this label, as NAME=VALUE.")] = None,
    slots: Annotated[
        bool, Parameter(negative="", help="The containers instead, also those that wait for a call.")
    ] = False,
    remote: AlsoRemote = REMOTE,
) -> None:
    """List the calls that wait or run; with -a those that have ended too."""
    if limit < 1:
        raise errors.InvalidRequest("--limit is at least 1")
    client = remote.client()
    if slots:
        if finished or label is not None:
            raise errors.InvalidRequest("--slots lists containers, which --all and --label say nothing of")
        _list_slots(client, policy=policy, limit=limit, as_json=remote.json)
        return
    states = [None] if finished else [state.value for state in ACTIVE]
    # A call that changes its state between two questions is in two answers, or in none of them.
    found = {
        call.id: call for state in states for call in islice(_pages(client, state, policy, label), limit)
    }
    calls = sorted(found.values(), key=lambda call: call.id, reverse=True)[:limit]
    if remote.json:
        terminal.print_json({"invocations": [terminal.wire(call) for call in calls]})
        return
    empty = "no calls yet" if finished else "nothing runs now; `sandboxd ps -a` lists finished calls"
    terminal.print_rows(("ID", "STATE", "POLICY", "AGE", "TOOK", "COMMAND"), map(_row, calls), empty=empty)


def _list_slots(client: Client, *, policy: str | None, limit: int, as_json: bool) -> None:
    found = [slot for slot in client.slots() if policy in {None, slot.policy}][:limit]
    if as_json:
        terminal.print_json({"slots": [terminal.wire(slot) for slot in found]})
        return
    rows = [
        (
            slot.id or "-",
            slot.state,
            slot.policy,
            slot.image,
            terminal.age(slot.since),
            "ahead" if slot.warm else "for its call",
            slot.shape.removeprefix("sha256:")[:12],
        )
        for slot in found
    ]
    columns = ("ID", "STATE", "POLICY", "IMAGE", "AGE", "MADE", "SHAPE")
    terminal.print_rows(columns, rows, empty="the daemon holds no containers now")


def inspect(call_id: Id, *, remote: AlsoRemote = REMOTE) -> None:
    """Show all that is known about a call: outcome, receipt, usage, denials, limits, artifacts."""
    client = remote.client()
    call = client.get(find(client, call_id))
    document = terminal.wire(call)
    if remote.json:
        terminal.print_json(document)
        return
    with contextlib.suppress(errors.NotFound):
        document["callback"] = terminal.wire(client.callback(call.id))
    from sandboxd.cli.policy import dump  # noqa: PLC0415 - YAML is only for people

    for warning in call.receipt.warnings if call.receipt is not None else ():
        terminal.print_text(f"# WARNING: {warning}")
    terminal.print_text(dump(document))


def logs(
    call_id: Id,
    *,
    follow: Annotated[
        bool, Parameter(alias="-f", negative="", help="Go on until the call has ended.")
    ] = False,
    stdout: Annotated[bool, Parameter(negative="", help="Only standard output.")] = False,
    stderr: Annotated[
        bool, Parameter(negative="", help="Only standard error, still on standard error.")
    ] = False,
    remote: AlsoRemote = REMOTE,
) -> None:
    """Write what a call wrote, byte by byte: its standard output to ours, its standard error to ours.

    With --json the events themselves, one JSON object a line.
    """
    client = remote.client()
    found = find(client, call_id)
    if remote.json:
        with client.events(found, follow=follow) as events:
            for event in events:
                _write(1, event.model_dump_json(exclude_none=True).encode() + b"\n")
        return
    if stdout != stderr:
        with (client.stdout if stdout else client.stderr)(found, follow=follow) as chunks:
            for chunk in chunks:
                _write(1 if stdout else 2, chunk)
        return
    with client.events(found, follow=follow) as events:
        for event in events:
            if event.type == "output" and event.data is not None:
                _write(2 if event.stream == "stderr" else 1, event.data.decode())


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def cancel(call_id: Id, *, remote: AlsoRemote = REMOTE) -> None:
    """End a call, whatever its state; one that has ended keeps its outcome."""
    client = remote.client()
    call = client.cancel(find(client, call_id))
    if remote.json:
        terminal.print_json(terminal.wire(call))
    else:
        cause = call.outcome.cause.value if call.outcome else "being cancelled"
        print(f"{call.id}: {cause}")
