"""``sandboxd session diff | pull | push | lend``: a session and a directory of yours."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors, units
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote
from sandboxd.cli.usage import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from sandboxd import models
    from sandboxd.client.pulling import Pulled
    from sandboxd.client.pushing import Pushed
    from sandboxd.client.sync import Client

__all__ = [
    "SHOWN",
    "cannot_open",
    "diff",
    "lend",
    "line_of",
    "not_sent",
    "pull",
    "push",
    "pushed",
    "remove",
    "told",
]

MARKS = {"added": "A", "changed": "M", "removed": "D"}
WORDS = {"applied": "pulled", "sent": "pushed", "removed": "removed", "left": "left", "refused": "refused"}
SHOWN = 20
PAUSES = (0.02, 0.1, 0.3, 1.0)  # seconds
Directory = Annotated[str | None, Parameter(help="The directory; else this one, if the session knows it.")]
Session = Annotated[str, Parameter(help="The session's name or id.")]
FlatRemote = Annotated[Remote, Parameter(name="*")]


def diff(
    session: Session,
    /,
    *,
    since: Annotated[str | None, Parameter(help="A checkpoint, of any session; else its first.")] = None,
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
            lines.append(f"{line_of(one)}{note}")
    if found.truncated:
        lines.append("… and more; ask with --limit")
    if lines:
        terminal.print_text("\n".join(lines))


def pull(
    session: Session,
    directory: Directory = None,
    /,
    *,
    git: Annotated[bool, Parameter(negative="", help="Also what is in .git.")] = False,
    force: Annotated[bool, Parameter(negative="", help="Also what changed on both sides.")] = False,
    most: Annotated[str, Parameter(help="Bytes of files to bring; what is over it is refused.")] = "4GiB",
    remote: FlatRemote = REMOTE,
) -> None:
    """Bring what a session changed into a directory of yours; files changed on both sides stay."""
    try:
        size = units.parse_size(most)
    except ValueError as error:
        raise errors.InvalidRequest(f"--most: {error}", field="most") from error
    client = remote.client()
    place = _directory(client, session, directory)
    pulled = client.pull(session, place, git=git, force=force, most=size)
    if remote.json:
        refused = [{"path": one.path, "reason": one.reason} for one in pulled.refused]
        document = {"applied": pulled.applied, "already": pulled.already, "removed": pulled.removed}
        terminal.print_json(document | {"refused": refused, "unnoted": pulled.unnoted})
    else:
        told(pulled, terminal.print_text)
    if pulled.refused:
        raise errors.StateConflict(
            f"{len(pulled.refused)} changes were not brought; they are still in the session"
        )


def push(
    session: Session,
    directory: Directory = None,
    /,
    *,
    git: Annotated[bool, Parameter(negative="", help="Also what is in .git.")] = False,
    force: Annotated[bool, Parameter(negative="", help="Also what changed on both sides.")] = False,
    remote: FlatRemote = REMOTE,
) -> None:
    """Bring what changed in a directory of yours into a session; files changed on both sides stay."""
    client = remote.client()
    found = client.push(session, _directory(client, session, directory), git=git, force=force)
    if remote.json:
        document = {
            key: getattr(found, key)
            for key in ("sent", "removed", "ignored", "size", "checkpoint", "unnoted")
        }
        for key, refused in (("refused", found.refused), ("left", found.left)):
            document[key] = [{"path": one.path, "reason": one.reason} for one in refused]
        terminal.print_json(document)
    else:
        told(found, terminal.print_text)
    if found.refused:
        raise errors.StateConflict(
            f"{len(found.refused)} changes were not brought; pull what the session has, or push with --force"
        )


def _directory(client: Client, session: str, directory: str | None) -> str:
    """The directory that is meant; here, where the session is known to belong to it."""
    from sandboxd.client.agreement import Agreement  # noqa: PLC0415 - only for these commands

    if directory is not None:
        return directory
    info = client.session(session)
    if info.checkout is None:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Agreement(info.id, fd) as agreement:
                if not agreement.is_known:
                    raise errors.InvalidRequest(
                        f"session {session!r} and this directory have nothing in common yet; name the "
                        "directory, such as .",
                        field="directory",
                    )
        finally:
            os.close(fd)
    return "."


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


def remove(client: Client, session: str) -> None:
    """Remove a session; a call that has just ended may not have left it yet."""
    with suppress(errors.SandboxdError):
        for pause in PAUSES:
            try:
                client.delete_session(session)
            except errors.SessionBusy:
                time.sleep(pause)
            else:
                return


def not_sent(found: Pushed, say: Callable[[str], None]) -> None:
    """What could not be sent of a directory, as far as anybody reads it."""
    for one in found.left[:SHOWN]:
        say(f"not sent: {visible(one.path)}: {one.reason}")
    if len(found.left) > SHOWN:
        say(f"and {len(found.left) - SHOWN} more were not sent")


@contextmanager
def pushed(
    client: Client, directory: str, *, git: bool = False, **fields: Any
) -> Iterator[tuple[models.SessionInfo, Pushed]]:
    """A new session with what a directory has; it is removed where that, or the block, fails."""
    from sandboxd.client.agreement import forget  # noqa: PLC0415 - only where files are sent

    made = client.create_session(fields.pop("name", None), **fields)
    try:
        try:
            found = client.push(made.id, directory, git=git)
        except OSError as error:
            raise cannot_open(directory, "directory", error) from error
        yield made, found
    except BaseException:
        remove(client, made.id)
        forget(made.id)
        raise


def cannot_open(directory: str, name: str, error: OSError) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"{name} {directory!r} cannot be opened: {error.strerror}", field=name)


def told(found: Pulled | Pushed, say: Callable[[str], None]) -> None:
    """What came of a pull or a push, a line for each path."""
    gone = set(found.removed)
    for word in ("applied", "sent", "removed"):
        for path in getattr(found, word, ()):
            if word == "applied" and path in gone:
                continue
            say(f"{WORDS[word]:7} {visible(path)}")
    for word in ("left", "refused"):
        for one in getattr(found, word, ()):
            say(f"{WORDS[word]:7} {visible(one.path)}: {visible(one.reason)}")
    if found.unnoted is not None:
        say(
            f"warning: what both sides have now could not be noted ({visible(found.unnoted)}); the "
            "next time it counts as changed on both"
        )


def line_of(change: models.FileChange) -> str:
    return f"{MARKS[change.change]} {visible(change.path)}"
