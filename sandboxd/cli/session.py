"""``sandboxd session …``: lines of calls that share a workspace, and their checkpoints."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd import models

__all__ = ["checkpoints", "create", "delete", "discard", "fork", "list_sessions", "rollback", "show", "told"]

PAGE = 500
P = TypeVar("P", "models.SessionList", "models.CheckpointList")
Session = Annotated[str, Parameter(help="The session's name or id.")]
Checkpoint = Annotated[str, Parameter(help="The checkpoint's id or digest.")]
FlatRemote = Annotated[Remote, Parameter(name="*")]
Policy = Annotated[str | None, Parameter(help="The only policy of its calls; else any that you may use.")]
Ttl = Annotated[str | None, Parameter(help="Remove it after so long, such as 8h.")]
Idle = Annotated[str | None, Parameter(help="Remove it so long after it was last used.")]
Size = Annotated[str | None, Parameter(help="What its files may hold, such as 1GiB.")]
Inodes = Annotated[str | None, Parameter(help="How many files it may have, such as 100k.")]
Labels = Annotated[
    tuple[str, ...], Parameter(name="--label", negative="", help="KEY=VALUE; may be given more than once.")
]


def create(
    name: Annotated[str | None, Parameter(help="A name for it; its id does as well.")] = None,
    /,
    *,
    policy: Policy = None,
    label: Labels = (),
    ttl: Ttl = None,
    idle: Idle = None,
    size: Size = None,
    inodes: Inodes = None,
    from_: Annotated[
        str | None,
        Parameter(name="--from", help="A directory of yours that it stands on, lent and not copied."),
    ] = None,
    upload: Annotated[
        bool,
        Parameter(negative="", help="Copy what is in --from instead, but for what git ignores there."),
    ] = False,
    git: Annotated[bool, Parameter(negative="", help="With --upload: also .git.")] = False,
    remote: FlatRemote = REMOTE,
) -> None:
    """Make a session: calls in it find the files that the calls before left."""
    if (upload and from_ is None) or (git and not upload):
        raise errors.InvalidRequest("--upload is of --from DIR, and --git of --upload", field="upload")
    if upload:
        _uploaded(
            remote, from_ or "", git=git, name=name, policy=policy, labels=_labels(label), ttl=ttl, idle=idle,
            size=size, inodes=inodes,
        )  # fmt: skip
        return
    try:
        made = remote.client().create_session(
            name,
            policy=policy,
            labels=_labels(label),
            ttl=ttl,
            idle=idle,
            size=size,
            inodes=inodes,
            directory=from_,
        )
    except OSError as error:
        raise errors.InvalidRequest(
            f"--from {from_!r} cannot be opened: {error.strerror}", field="from"
        ) from error
    _made(made, remote)


def _uploaded(remote: Remote, directory: str, *, git: bool, **fields: Any) -> None:
    """Make a session of what a directory has; it goes again where that cannot be sent."""
    from sandboxd.cli.checkout import not_sent, pushed  # noqa: PLC0415 - only with --upload

    client = remote.client()
    with pushed(client, directory, git=git, **fields) as (made, found):
        not_sent(found, terminal.complain)
        ignored = f", {found.ignored} ignored" if found.ignored else ""
        terminal.complain(f"sent {len(found.sent)} files, {_bytes(found.size)}{ignored}")
    _made(client.session(made.id), remote)


def fork(
    session: Session,
    name: Annotated[str | None, Parameter(help="A name for the new one.")] = None,
    /,
    *,
    checkpoint: Annotated[
        str | None, Parameter(help="Where to begin; else where the session stands.")
    ] = None,
    policy: Policy = None,
    label: Labels = (),
    ttl: Ttl = None,
    idle: Idle = None,
    size: Size = None,
    inodes: Inodes = None,
    remote: FlatRemote = REMOTE,
) -> None:
    """Make a session that begins with the files of another; both go on apart."""
    made = remote.client().fork_session(
        session,
        name,
        checkpoint=checkpoint,
        policy=policy,
        labels=_labels(label),
        ttl=ttl,
        idle=idle,
        size=size,
        inodes=inodes,
    )
    _made(made, remote)


def _pages(read: Callable[..., P]) -> Iterator[P]:
    """Every page of a list."""
    before: str | None = None
    while True:
        page = read(before=before, limit=PAGE)
        yield page
        if (before := page.next) is None:
            return


def list_sessions(*, remote: FlatRemote = REMOTE) -> None:
    """List sessions, newest first."""
    client, found = remote.client(), []
    for page in _pages(client.sessions):
        found += page.sessions
    if remote.json:
        terminal.print_json({"sessions": [terminal.wire(one) for one in found]})
        return
    rows = [
        (
            one.name or one.id,
            one.policy or "any",
            one.calls,
            _bytes(one.size),
            terminal.age(one.created),
            terminal.age(one.used),
            f"{one.in_flight} in flight" if one.in_flight else "",
        )
        for one in found
    ]
    empty = "no sessions yet: `sandboxd session create NAME`"
    terminal.print_rows(("SESSION", "POLICY", "CALLS", "SIZE", "CREATED", "USED", ""), rows, empty=empty)


def show(session: Session, /, *, remote: FlatRemote = REMOTE) -> None:
    """Show one session."""
    told(remote.client().session(session), remote)


def delete(session: Session, /, *, remote: FlatRemote = REMOTE) -> None:
    """Remove a session and its files; what forks of it stand on stays."""
    from sandboxd.client.agreement import forget  # noqa: PLC0415 - only for this command

    client = remote.client()
    id_ = client.session(session).id
    client.delete_session(id_)
    forget(id_)
    if remote.json:
        terminal.print_json({"removed": session})


def checkpoints(session: Session, /, *, remote: FlatRemote = REMOTE) -> None:
    """List the checkpoints of a session, newest first."""
    client, found = remote.client(), []
    for page in _pages(partial(client.checkpoints, session)):
        found += page.checkpoints
    if remote.json:
        terminal.print_json({"checkpoints": [terminal.wire(one) for one in found]})
        return
    rows = [
        (
            "*" if one.head else "",
            one.id,
            one.digest[:19],
            _bytes(one.size),
            one.inodes,
            terminal.age(one.created),
            one.call or "",
        )
        for one in found
    ]
    columns = ("", "CHECKPOINT", "DIGEST", "ADDED", "FILES", "MADE", "CALL")
    terminal.print_rows(columns, rows, empty="no checkpoints")


def rollback(session: Session, checkpoint: Checkpoint, /, *, remote: FlatRemote = REMOTE) -> None:
    """Let a session stand on another of its checkpoints."""
    told(remote.client().rollback_session(session, checkpoint), remote)


def discard(session: Session, /, *, remote: FlatRemote = REMOTE) -> None:
    """Forget the checkpoints that a session does not stand on, as a rollback left them."""
    told(remote.client().discard_session(session), remote)


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise errors.InvalidRequest(f"--label {text!r} is not KEY=VALUE", field="labels")
    return dict(text.split("=", 1) for text in given)


def _made(info: models.SessionInfo, remote: Remote) -> None:
    if remote.json:
        terminal.print_json(terminal.wire(info))
    else:
        terminal.print_text(info.name or info.id)


def told(info: models.SessionInfo, remote: Remote) -> None:
    """Print a session as it stands."""
    if remote.json:
        terminal.print_json(terminal.wire(info))
        return
    lines = [
        f"{info.name or info.id}" + (f"  {info.id}" if info.name else ""),
        f"policy      {info.policy or 'any'}",
        f"stands on   {info.head.id}  {info.head.digest}",
        f"files       {_bytes(info.size)} in {info.inodes} entries of {info.layers} layers",
        f"calls       {info.calls}" + (f", {info.in_flight} in flight" if info.in_flight else ""),
        f"made        {terminal.age(info.created)} ago, used {terminal.age(info.used)} ago",
    ]
    if info.checkout == "lent":
        lines.append("directory   of its caller's, lent")
    elif info.checkout == "missing":
        lines.append(f"directory   missing: `sandboxd session lend {info.name or info.id} DIRECTORY`")
    if (kept := info.container) is not None and kept.lost is not None:
        lines.append(
            f"container   lost, with what its {kept.calls} calls did that no checkpoint has: {kept.lost.why}"
        )
    elif kept is not None:
        lines.append(f"container   of policy {kept.policy}, {kept.calls} calls since {kept.since}")
    terminal.print_text("\n".join(lines))


def _bytes(size: int) -> str:
    from sandboxd import units  # noqa: PLC0415 - only for a table

    return units.format_size(size)
