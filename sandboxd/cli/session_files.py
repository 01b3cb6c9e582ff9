"""``sandboxd session files | cat | put | unlink | diff | export | import``: the files of sessions."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 - cyclopts evaluates the annotations
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import units
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd import models

__all__ = ["cat", "diff", "export", "files", "import_tar", "put", "unlink"]

Session = Annotated[str, Parameter(help="The session's name or id.")]
At = Annotated[str, Parameter(help="A path from the workspace on.")]
Checkpoint = Annotated[str | None, Parameter(help="A checkpoint; else where the session stands.")]
Match = Annotated[str | None, Parameter(help="Only if the file has this digest.")]
FlatRemote = Annotated[Remote, Parameter(name="*")]
CHANGES = {"added": "A", "changed": "M", "removed": "D"}


def files(
    session: Session, path: At = "", /, *, checkpoint: Checkpoint = None, remote: FlatRemote = REMOTE
) -> None:
    """List a directory of a session."""
    client, found, after = remote.client(), [], None
    while True:
        page = client.files(session, path, checkpoint=checkpoint, after=after)
        found += page.files
        if (after := page.next) is None:
            break
    if remote.json:
        terminal.print_json({"files": [terminal.wire(one) for one in found]})
        return
    rows = [
        (
            f"{one.kind[0]} {one.mode:04o}",
            f"{one.uid}:{one.gid}",
            "-" if one.size is None else units.format_size(one.size),
            one.path + ("" if one.target is None else f" -> {one.target}"),
        )
        for one in found
    ]
    terminal.print_rows(("MODE", "OWNER", "SIZE", "PATH"), rows, empty="no files")


def cat(session: Session, path: At, /, *, checkpoint: Checkpoint = None, remote: FlatRemote = REMOTE) -> None:
    """Write a file of a session to standard output, byte for byte."""
    with remote.client().read_file(session, path, checkpoint=checkpoint) as chunks:
        _out(chunks)


def put(
    session: Session,
    path: At,
    /,
    *,
    from_file: Annotated[Path | None, Parameter(help="A file of yours; else standard input.")] = None,
    mode: Annotated[str | None, Parameter(help="Octal, such as 755; else that of the file, or 644.")] = None,
    match: Match = None,
    new: Annotated[bool, Parameter(negative="", help="Only if nothing is there.")] = False,
    remote: FlatRemote = REMOTE,
) -> None:
    """Write a file of a session."""
    data = sys.stdin.buffer.read() if from_file is None else from_file.read_bytes()
    number = None if mode is None else int(mode, 8)
    _told(
        remote.client().write_file(session, path, data, mode=number, match=match, new=new), remote, "written"
    )


def unlink(
    session: Session,
    path: At,
    /,
    *,
    recursive: Annotated[bool, Parameter(negative="", help="Also a directory with files in it.")] = False,
    match: Match = None,
    remote: FlatRemote = REMOTE,
) -> None:
    """Remove a file or directory of a session."""
    _told(remote.client().remove_file(session, path, recursive=recursive, match=match), remote, "removed")


def diff(
    session: Session,
    old: Annotated[str | None, Parameter(help="A checkpoint; else the one that it began with.")] = None,
    new: Annotated[str | None, Parameter(help="A checkpoint; else where the session stands.")] = None,
    /,
    *,
    text: Annotated[bool, Parameter(negative="", help="Show the differences of texts.")] = False,
    remote: FlatRemote = REMOTE,
) -> None:
    """Show what differs between two checkpoints of a session: added, changed, removed."""
    found = remote.client().diff(session, old, new, text=text)
    if remote.json:
        terminal.print_json(terminal.wire(found))
        return
    for one in found.changes:
        sizes = f"  {_size(one.old_size)} -> {_size(one.new_size)}" if one.change == "changed" else ""
        terminal.print_text(
            f"{CHANGES[one.change]} {one.path}{'/' if one.kind == 'directory' else ''}{sizes}"
        )
        if one.diff is not None:
            terminal.print_text(one.diff.rstrip("\n"))
        if one.omitted is not None:
            terminal.print_text(f"  (not shown: {one.omitted})")
    if not found.complete:
        terminal.complain("more differs than is shown; compare checkpoints that are nearer to each other")


def export(
    session: Session,
    /,
    *,
    checkpoint: Checkpoint = None,
    since: Annotated[str | None, Parameter(help="Only what changed since this checkpoint.")] = None,
    remote: FlatRemote = REMOTE,
) -> None:
    """Write the files of a session as a tar to standard output: a layer of an OCI image."""
    with remote.client().export(session, checkpoint=checkpoint, since=since) as chunks:
        _out(chunks)


def import_tar(
    session: Session,
    /,
    *,
    from_file: Annotated[Path | None, Parameter(help="A file of yours; else standard input.")] = None,
    remote: FlatRemote = REMOTE,
) -> None:
    """Unpack a tar over the files of a session."""
    data = sys.stdin.buffer.read() if from_file is None else from_file.read_bytes()
    found = remote.client().import_tar(session, data)
    if remote.json:
        terminal.print_json(terminal.wire(found))
    else:
        terminal.print_text(f"unpacked: {found.entries} entries")


def _out(chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


def _told(found: models.FileWritten, remote: Remote, what: str) -> None:
    if remote.json:
        terminal.print_json(terminal.wire(found))
    else:
        terminal.print_text(f"{what}: {found.path}" + (f"  {found.digest}" if found.digest else ""))


def _size(size: int | None) -> str:
    return "-" if size is None else units.format_size(size)
