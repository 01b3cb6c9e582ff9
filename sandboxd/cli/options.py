"""The options that every command of ``sandboxd`` has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from sandboxd.client import Client

__all__ = ["FORMAT", "REMOTE", "Format", "Remote"]


@dataclass(frozen=True)
class Format:
    """How a command answers."""

    json: Annotated[bool, Parameter(negative="", help="Print one JSON value on stdout, for programs.")] = (
        False
    )


@dataclass(frozen=True)
class Remote(Format):
    """How a command answers, and which daemon it asks."""

    socket: Annotated[
        str | None,
        Parameter(
            help="The daemon's socket; else SANDBOXD_SOCKET, else /run/sandboxd/sandboxd.sock, "
            "else $XDG_RUNTIME_DIR/sandboxd/sandboxd.sock."
        ),
    ] = None

    def client(self) -> Client:
        """A client of that daemon."""
        from sandboxd.client.sync import Client  # noqa: PLC0415 - `--help` must not pay for it

        return Client(self.socket)


FORMAT = Format()
REMOTE = Remote()
