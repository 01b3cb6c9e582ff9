"""``sandboxd journal search | prune``: what a running daemon does with its records."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors, units
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote

if TYPE_CHECKING:
    from sandboxd import models

__all__ = ["prune", "search"]

WIDTH = 100  # characters of a command, or of what was found

AlsoRemote = Annotated[Remote, Parameter(name="*")]


def search(
    *words: Annotated[str, Parameter(help='Words; also AND, OR, NOT, word*, and "text in quotes".')],
    policy: Annotated[str | None, Parameter(help="Only calls under this policy.")] = None,
    uid: Annotated[int | None, Parameter(help="Only calls of this user; for operators.")] = None,
    cause: Annotated[str | None, Parameter(help="Only calls that ended so, such as memory.")] = None,
    image: Annotated[str | None, Parameter(help="Only calls on the image of this digest.")] = None,
    since: Annotated[str | None, Parameter(help="Only calls that ended in this time, such as 2h.")] = None,
    until: Annotated[str | None, Parameter(help="Only calls that ended longer ago, such as 30m.")] = None,
    limit: Annotated[int, Parameter(alias="-n", help="At most so many calls.")] = 50,
    remote: AlsoRemote = REMOTE,
) -> None:
    """Find ended calls by words of their command and output, newest first."""
    found = remote.client().search(
        " ".join(words),
        policy=policy,
        uid=uid,
        cause=cause,
        image=image,
        since=_ago(since, "since"),
        until=_ago(until, "until"),
        limit=limit,
    )
    if remote.json:
        terminal.print_json(terminal.wire(found))
        return
    rows = [
        (
            hit.id,
            hit.cause.value,
            hit.policy,
            terminal.age(hit.at),
            _line(hit),
        )
        for hit in found.hits
    ]
    terminal.print_rows(("ID", "CAUSE", "POLICY", "AGE", "FOUND"), rows, empty="no call fits")


def _line(hit: models.Hit) -> str:
    """Where the words are, or the beginning of the command."""
    text = " ".join((hit.snippet or hit.command).split())
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def prune(
    *,
    age: Annotated[str | None, Parameter(help="What ended longer ago goes, such as 30d.")] = None,
    size: Annotated[str | None, Parameter(help="The oldest beyond this size go, such as 10GiB.")] = None,
    remote: AlsoRemote = REMOTE,
) -> None:
    """Remove bodies, output and artifacts of the oldest calls now; records and digests stay."""
    if age is None and size is None:
        raise errors.InvalidRequest("give --age or --size: what shall go?", field="age")
    try:
        asked = (
            None if age is None else units.parse_duration(age),
            None if size is None else units.parse_size(size),
        )
    except ValueError as error:
        raise errors.InvalidRequest(str(error)) from None
    done = remote.client().prune(age=asked[0], size=asked[1])
    if remote.json:
        terminal.print_json(terminal.wire(done))
    else:
        print(f"{done.calls} calls were pruned, which held {done.bytes} bytes of bodies and output")


def _ago(text: str | None, field: str) -> int | None:
    if text is None:
        return None
    try:
        return max(0, time.time_ns() // 1000 - units.parse_duration(text))
    except ValueError as error:
        raise errors.InvalidRequest(f"--{field}: {error}", field=field) from None
