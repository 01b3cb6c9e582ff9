"""``sandboxd session files | get | put | unlink | export | import``: the files of a session.

A tool made their names and bytes: what goes to a terminal is escaped, what goes to a file or a pipe is as it
is.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors, units
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sandboxd import models

__all__ = ["bring", "export", "files", "get", "put", "unlink"]

PAGE = 10_000
CHUNK = 1 << 18
MODE = re.compile("0?[0-7]{3}")
Session = Annotated[str, Parameter(help="The session's name or id.")]
At = Annotated[str, Parameter(help="A path below /workspace, as it is listed; after -- if it begins with -.")]
Checkpoint = Annotated[str | None, Parameter(help="At this checkpoint; else where the session stands.")]
Match = Annotated[str | None, Parameter(help="Only if the file has this digest.")]
File = Annotated[str, Parameter(allow_leading_hyphen=True, help="A file of yours; - for standard input.")]
Output = Annotated[str | None, Parameter(name=["--output", "-o"], help="A file of yours to write.")]
FlatRemote = Annotated[Remote, Parameter(name="*")]


def files(
    session: Session,
    path: At = "",
    /,
    *,
    recursive: Annotated[bool, Parameter(negative="", help="Also all that is beneath.")] = False,
    digest: Annotated[bool, Parameter(negative="", help="With the digests of files.")] = False,
    checkpoint: Checkpoint = None,
    limit: Annotated[int, Parameter(help="How many are told.")] = 1000,
    remote: FlatRemote = REMOTE,
) -> None:
    """List a directory of a session."""
    client, unnamed, after = remote.client(), 0, None
    found: list[models.FileInfo] = []
    while len(found) < limit:
        page = client.session_files(
            session,
            _text(path),
            checkpoint=checkpoint,
            recursive=recursive,
            digest=digest,
            after=after,
            limit=min(limit - len(found), PAGE),
        )
        found += page.files
        unnamed, after = max(unnamed, page.unnamed), page.next
        if after is None:
            break
    if remote.json:
        listed = [terminal.wire(one) for one in found]
        terminal.print_json({"files": listed, "truncated": after is not None, "unnamed": unnamed})
        return
    columns = ("MODE", "OWNER", "SIZE", "PATH", *(("DIGEST",) if digest else ()))
    rows = [(*_row(one), *((one.digest or "",) if digest else ())) for one in found]
    terminal.print_rows(columns, rows, empty="no files")
    if after is not None:
        terminal.complain("there are more; ask with --limit")
    if unnamed:
        terminal.complain(f"{unnamed} files have paths of over 4,095 bytes, which no request can name")


def _row(one: models.FileInfo) -> tuple[str, str, str, str]:
    kind = {"directory": "d", "symlink": "l", "fifo": "p", "socket": "s", "device": "c"}.get(one.kind, "-")
    bits = stat.filemode(one.mode)[1:]
    target = "" if one.target is None else f" -> {one.target}"
    return f"{kind}{bits}", f"{one.uid}:{one.gid}", units.format_size(one.size), f"{one.path}{target}"


def get(
    session: Session,
    path: At,
    /,
    *,
    output: Output = None,
    checkpoint: Checkpoint = None,
    remote: FlatRemote = REMOTE,
) -> None:
    """Write a file of a session to standard output, or to a file of yours."""
    with remote.client().read_file(session, _text(path), checkpoint=checkpoint) as chunks:
        _out(chunks, output)


def put(
    session: Session,
    path: At,
    file: File = "-",
    /,
    *,
    mode: Annotated[str | None, Parameter(help="Octal, such as 755; else the file's, or 644.")] = None,
    if_match: Match = None,
    new: Annotated[bool, Parameter(negative="", help="Only if nothing is there.")] = False,
    directory: Annotated[bool, Parameter(negative="", help="Make a directory; nothing is read.")] = False,
    remote: FlatRemote = REMOTE,
) -> None:
    """Write a file of a session, on a condition if you give one."""
    if mode is not None and not MODE.fullmatch(mode):
        raise errors.InvalidRequest(f"--mode {mode!r} is not three octal digits, such as 644", field="mode")
    if directory:
        if file != "-" or mode is not None or if_match is not None or new:
            raise errors.InvalidRequest("--directory takes a path, and nothing else", field="directory")
        _told(remote.client().make_directory(session, _text(path)), remote)
        return
    with _opened(file) as source:
        written = remote.client().write_file(
            session,
            _text(path),
            source,
            mode=None if mode is None else int(mode, 8),
            match=if_match,
            new=new,
        )
    _told(written, remote)


def unlink(
    session: Session,
    path: At,
    /,
    *,
    recursive: Annotated[bool, Parameter(negative="", help="Also a directory with files in it.")] = False,
    if_match: Match = None,
    remote: FlatRemote = REMOTE,
) -> None:
    """Remove a file or a directory of a session, on a condition if you give one."""
    found = remote.client().remove_file(session, _text(path), recursive=recursive, match=if_match)
    _told(found, remote)


def export(
    session: Session,
    /,
    *,
    output: Output = None,
    since: Annotated[str | None, Parameter(help="Only what differs from this checkpoint.")] = None,
    to: Annotated[str | None, Parameter(help="Of this checkpoint; else where the session stands.")] = None,
    times: Annotated[bool, Parameter(negative="", help="With the times of files, which are else 0.")] = False,
    remote: FlatRemote = REMOTE,
) -> None:
    """Write the files of a session as the tar of an OCI image layer."""
    if output is None and sys.stdout.isatty():
        raise errors.InvalidRequest("a tar is nothing for a terminal; give --output FILE", field="output")
    with remote.client().export_session(session, since=since, to=to, times=times) as chunks:
        if chunks.omitted:
            terminal.complain(f"{chunks.omitted} sockets and devices have no place in a layer: left out")
        _out(chunks, output)


def bring(
    session: Session,
    file: File = "-",
    /,
    *,
    if_match: Annotated[
        str | None, Parameter(help="Only if the session stands on the checkpoint of this digest.")
    ] = None,
    own: Annotated[
        bool, Parameter(negative="", help="All of it is the tool's, whatever the tar says.")
    ] = False,
    remote: FlatRemote = REMOTE,
) -> None:
    """Put a tar, such as `export` writes, over the files of a session; all of it, or nothing."""
    with _opened(file) as source:
        made = remote.client().import_session(session, source, match=if_match, own=own)
    if remote.json:
        terminal.print_json(terminal.wire(made))
    else:
        terminal.print_text(f"{made.id}  {made.digest}")


def _text(path: str) -> str:
    """A path of the command line as the daemon tells it: bytes that are no UTF-8 as ``%XX``."""
    return "".join(f"%{ord(one) - 0xDC00:02X}" if "\udc80" <= one <= "\udcff" else one for one in path)


@contextmanager
def _opened(file: str) -> Iterator[Iterator[bytes]]:
    """The bytes of a file, or of standard input, as they are asked for."""
    if file == "-":
        yield _chunks(sys.stdin.fileno())
        return
    with open(file, "rb", buffering=0) as source:  # noqa: PTH123 - a path of the caller's own
        yield _chunks(source.fileno())


def _chunks(fd: int) -> Iterator[bytes]:
    while chunk := os.read(fd, CHUNK):
        yield chunk


def _out(chunks: Iterable[bytes], output: str | None) -> None:
    if output is not None and output != "-":
        with open(output, "wb") as file:  # noqa: PTH123 - a path of the caller's own
            file.writelines(chunks)
        return
    sys.stdout.flush()
    if sys.stdout.isatty():
        terminal.print_bytes(chunks)
        return
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


def _told(found: models.FileWritten, remote: Remote) -> None:
    if remote.json:
        terminal.print_json(terminal.wire(found))
    elif found.digest is not None:
        terminal.print_text(found.digest)
