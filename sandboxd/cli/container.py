"""``sandboxd session checkpoint`` and ``end``: the container that a session keeps over its calls."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE
from sandboxd.cli.session import FlatRemote, Session, told

__all__ = ["checkpoint", "end"]


def checkpoint(session: Session, /, *, remote: FlatRemote = REMOTE) -> None:
    """Make a checkpoint of the files in the container that a session keeps (`isolation: session`)."""
    made = remote.client().checkpoint_session(session)
    if remote.json:
        terminal.print_json(terminal.wire(made))
    else:
        terminal.print_text(f"{made.id}  {made.digest}")


def end(
    session: Session,
    /,
    *,
    discard: Annotated[
        bool, Parameter(negative="", help="Throw away what was changed since the last checkpoint.")
    ] = False,
    remote: FlatRemote = REMOTE,
) -> None:
    """End the container that a session keeps, and all that runs in it, after a checkpoint of its files."""
    told(remote.client().end_session(session, discard=discard), remote)
