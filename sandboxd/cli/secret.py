"""``sandboxd secret set | ls | rm | rotate``: the daemon's store of secrets, for operators.

A value comes from a file, from standard input, or is typed without being shown; never from the command line,
which every user of the host can read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote

if TYPE_CHECKING:
    from sandboxd.models import SecretInfo

__all__ = ["ls", "rm", "rotate", "set_secret"]

Name = Annotated[str, Parameter(help="The secret's name, such as GITHUB_TOKEN.")]
FromFile = Annotated[
    Path | None,
    Parameter(help="A file with the value, byte for byte; else standard input, or a prompt on a terminal."),
]
FlatRemote = Annotated[Remote, Parameter(name="*")]
MOST = 64 * 1024 + 1  # bytes that are read of what may be too large


def set_secret(name: Name, /, *, from_file: FromFile = None, remote: FlatRemote = REMOTE) -> None:
    """Store a secret. One that is there is not replaced: rotate it."""
    _told(remote.client().set_secret(name, _value(name, from_file)), "stored", remote)


def rotate(name: Name, /, *, from_file: FromFile = None, remote: FlatRemote = REMOTE) -> None:
    """Give a secret a new value, under the next version."""
    _told(remote.client().rotate_secret(name, _value(name, from_file)), "rotated", remote)


def ls(*, remote: FlatRemote = REMOTE) -> None:
    """List the secrets: names, versions and times, never values."""
    found = remote.client().secrets()
    if remote.json:
        terminal.print_json({"secrets": [terminal.wire(one) for one in found]})
        return
    rows = [
        (
            one.name,
            one.version or "-",
            terminal.age(one.created) if one.created else "-",
            terminal.age(one.rotated) if one.rotated else "-",
            one.problem or "",
        )
        for one in found
    ]
    empty = "no secrets yet: `sandboxd secret set NAME`"
    terminal.print_rows(("NAME", "VERSION", "CREATED", "ROTATED", ""), rows, empty=empty)


def rm(name: Name, /, *, remote: FlatRemote = REMOTE) -> None:
    """Remove a secret. Policies that grant it have no calls until it is set again."""
    remote.client().remove_secret(name)
    if remote.json:
        terminal.print_json({"removed": name})


def _told(info: SecretInfo, what: str, remote: Remote) -> None:
    if remote.json:
        terminal.print_json(terminal.wire(info))
    else:
        terminal.print_text(f"{what}: {info.name}, version {info.version}")


def _value(name: str, file: Path | None) -> bytes:
    if file is not None:
        with file.open("rb") as opened:
            return opened.read(MOST)
    if sys.stdin.isatty():
        return _typed(name)
    data = sys.stdin.buffer.read(MOST)
    # the newline that `echo` ends its line with is no part of a token; a file of several lines keeps its own
    return data[:-1] if data.count(b"\n") == 1 and data.endswith(b"\n") else data


def _typed(name: str) -> bytes:
    from getpass import getpass  # noqa: PLC0415 - only on a terminal

    try:
        first = getpass(f"Value of {name} (not shown): ")
        if getpass("Once more: ") != first:
            raise errors.InvalidRequest("the two are not the same; nothing was stored", field="value")
    except EOFError:
        raise errors.InvalidRequest("nothing was typed, and nothing stored", field="value") from None
    return first.encode("utf-8", "surrogateescape")
