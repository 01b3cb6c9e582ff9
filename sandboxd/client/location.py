"""Where the daemon's socket is, and what to tell somebody who cannot reach it."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["SYSTEM_SOCKET", "candidates", "unavailable"]

SYSTEM_SOCKET = "/run/sandboxd/sandboxd.sock"
MAX_SUN_PATH = 107  # bytes, unix(7): sun_path is 108 with its NUL


def candidates(socket: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The paths to try, in order.

    A socket that was named, by argument or by ``SANDBOXD_SOCKET``, is the only candidate: falling back
    to another daemon would run the call under another operator's policies.
    """
    if socket is not None:
        return (os.fspath(socket),)
    if named := environ.get("SANDBOXD_SOCKET"):
        return (named,)
    runtime = environ.get("XDG_RUNTIME_DIR")
    return (SYSTEM_SOCKET, f"{runtime}/sandboxd/sandboxd.sock") if runtime else (SYSTEM_SOCKET,)


def _owner(path: str) -> str:
    try:
        found = os.stat(path)  # noqa: PTH116 - pathlib costs 5 ms of start-up
    except OSError:
        return ""
    import grp  # noqa: PLC0415 - only needed to explain a refusal

    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    return f" (group {group}, mode {stat.S_IMODE(found.st_mode):04o})"


def _explain(path: str, error: OSError | None) -> tuple[str, str]:
    """The reason as a word, and a sentence about one candidate."""
    number = error.errno if error else None
    if len(os.fsencode(path)) > MAX_SUN_PATH:
        return "path", f"{path!r} is too long for a Unix socket (at most {MAX_SUN_PATH} bytes)"
    if number in {errno.EACCES, errno.EPERM}:
        return (
            "permission",
            f"no permission for {path}{_owner(path)}: ask the operator to add you to its group",
        )
    if number == errno.ECONNREFUSED:
        return "refused", f"nothing listens on {path} any more: start the daemon with `sandboxd serve`"
    if number in {errno.ENOENT, errno.ENOTDIR, None}:
        return "absent", f"no socket at {path}"
    if number in {errno.EAGAIN, errno.ETIMEDOUT}:
        return "timeout", f"the daemon on {path} does not accept connections in time"
    return "host", f"{path}: {os.strerror(number or 0)}"


def unavailable(tried: Sequence[tuple[str, OSError | None]]) -> errors.Unavailable:
    """The error for a daemon that could not be reached on any of the candidates.

    ``details["tried"]`` lists the paths, ``details["reason"]`` is one of ``absent``, ``permission``,
    ``refused``, ``timeout``, ``path``, ``host``.
    """
    explained = [_explain(path, error) for path, error in tried]
    # A socket that is there and refuses says more than one that is not there.
    reason, sentence = next((pair for pair in explained if pair[0] != "absent"), ("absent", ""))
    if reason == "absent":
        where = " or ".join(path for path, _ in tried)
        sentence = (
            f"no socket at {where}: start the daemon with `sandboxd serve`, "
            "or name its socket with --socket or SANDBOXD_SOCKET"
        )
    return errors.Unavailable(
        f"no sandboxd daemon answers: {sentence}", reason=reason, tried=[path for path, _ in tried]
    )
