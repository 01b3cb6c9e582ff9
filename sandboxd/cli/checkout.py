"""``sandboxd session diff | pull | lend``, and what ``run-in-sandbox --workspace`` does."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors, units
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote
from sandboxd.cli.usage import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd import models
    from sandboxd.client.pulling import Pulled
    from sandboxd.client.sync import Client

__all__ = ["diff", "lend", "pull", "report", "standing"]

MARKS = {"added": "A", "changed": "M", "removed": "D"}
SHOWN = 20
KEPT = "1h"
"""How long a session of one call outlives this process, if that dies before it has removed it."""
Session = Annotated[str, Parameter(help="The session's name or id.")]
FlatRemote = Annotated[Remote, Parameter(name="*")]


def diff(
    session: Session,
    /,
    *,
    since: Annotated[str | None, Parameter(help="A checkpoint; else the session's first.")] = None,
    to: Annotated[str | None, Parameter(help="A checkpoint; else where the session stands.")] = None,
    text: Annotated[
        bool, Parameter(negative="", help="Show how texts differ, as patch(1) reads it.")
    ] = False,
    limit: Annotated[int, Parameter(help="How many changes are told.")] = 1000,
    remote: FlatRemote = REMOTE,
) -> None:
    """Show what calls changed in a session: A for added, M for changed, D for removed."""
    found = remote.client().diff_session(session, since, to, text=text, limit=limit)
    if remote.json:
        terminal.print_json(terminal.wire(found))
        return
    lines = []
    for one in found.changes:
        if one.diff:
            lines += [visible(line, most=len(line)) for line in one.diff.rstrip("\n").split("\n")]
        else:
            note = f"  ({one.omitted.replace('_', ' ')})" if one.omitted else ""
            lines.append(f"{_line(one)}{note}")
    if found.truncated:
        lines.append("… and more; ask with --limit")
    if lines:
        terminal.print_text("\n".join(lines))


def pull(
    session: Session,
    directory: Annotated[str, Parameter(help="The directory that the session stands on.")] = ".",
    /,
    *,
    git: Annotated[bool, Parameter(negative="", help="Also what is in .git.")] = False,
    most: Annotated[str, Parameter(help="Bytes of files to bring; what is over it is refused.")] = "4GiB",
    remote: FlatRemote = REMOTE,
) -> None:
    """Bring what a session changed into the directory that it stands on; files changed on both sides stay."""
    from sandboxd.client.pulling import pull as bring  # noqa: PLC0415 - only for this command

    try:
        size = units.parse_size(most)
    except ValueError as error:
        raise errors.InvalidRequest(f"--most: {error}", field="most") from error
    pulled = bring(remote.client(), session, directory, git=git, most=size)
    if remote.json:
        refused = [{"path": one.path, "reason": one.reason} for one in pulled.refused]
        terminal.print_json({"applied": pulled.applied, "already": pulled.already, "refused": refused})
    else:
        told(pulled, terminal.print_text)
    if pulled.refused:
        raise errors.StateConflict(
            f"{len(pulled.refused)} changes were not brought; they are still in the session"
        )


def lend(
    session: Session,
    directory: Annotated[str, Parameter(help="The directory that the session stands on.")] = ".",
    /,
    *,
    remote: FlatRemote = REMOTE,
) -> None:
    """Give a session the directory that it stands on again, after a restart of the daemon."""
    info = remote.client().lend(session, directory)
    if remote.json:
        terminal.print_json(terminal.wire(info))


@contextmanager
def standing(
    socket: str | None, directory: str, policy: str | None
) -> Iterator[tuple[Client, models.SessionInfo]]:
    """A session on a directory for one call, removed afterwards. Raises as the client does."""
    from sandboxd.client.sync import Client  # noqa: PLC0415 - only with --workspace

    client = Client(socket)
    try:
        made = client.create_session(policy=policy, idle=KEPT, directory=directory)
    except OSError as error:
        raise errors.InvalidRequest(
            f"--workspace {directory!r} cannot be opened: {error.strerror}", field="workspace"
        ) from error
    try:
        yield client, made
    finally:
        with suppress(errors.SandboxdError):
            client.delete_session(made.id)


def report(client: Client, session: str, directory: str, say: Callable[[str], None], *, pull: bool) -> bool:
    """Say what a call changed, and bring it if asked; whether all that was to be brought is there."""
    if not pull:
        found = client.diff_session(session, limit=SHOWN)
        for one in found.changes:
            say(_line(one))
        if found.truncated:
            say("… and more")
        if found.changes:
            say("these changes are not in the directory; --pull brings them")
        return True
    from sandboxd.client.pulling import pull as bring  # noqa: PLC0415 - only with --pull

    pulled = bring(client, session, directory)
    told(pulled, say)
    return not pulled.refused


def told(pulled: Pulled, say: Callable[[str], None]) -> None:
    """What came of a pull, a line for each path."""
    for path in pulled.applied:
        say(f"pulled  {visible(path)}")
    for one in pulled.refused:
        say(f"refused {visible(one.path)}: {one.reason}")


def _line(change: models.FileChange) -> str:
    return f"{MARKS[change.change]} {visible(change.path)}"
