"""The Unix socket that the daemon listens on: bound here, or inherited from systemd.

A socket is bound under a temporary name, given its owner and mode while nobody can connect to it
yet, made to listen, and renamed into place: at no moment does it stand there with another mode, and
a stale one is replaced without a gap. It is stale if nobody answers on it; a lock on the directory
keeps two daemons that start at once from both finding it so.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import socket
import stat
from typing import TYPE_CHECKING

from sandboxd.config import MAX_SOCKET_PATH, default_socket
from sandboxd.errors import ConfigInvalid
from sandboxd.kernel import socketfile

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping
    from pathlib import Path

    from sandboxd.config import SocketConfig

__all__ = ["activated", "bind", "listening"]

BACKLOG = 2048
SO_PASSRIGHTS = 83  # asm-generic/socket.h
FIRST_FD = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


@contextlib.contextmanager
def listening(config: SocketConfig, environ: MutableMapping[str, str]) -> Iterator[socket.socket]:
    """The daemon's socket while the context is open: inherited, else bound, and then removed again.

    Raises ConfigInvalid when another daemon answers there or the path cannot be used.
    """
    inherited = activated(environ)
    if inherited is not None:
        with inherited:
            refuse_descriptors(inherited)
            yield inherited
        return
    path = config.path or default_socket(environ)
    with bind(path, mode=config.mode, group=config.group) as sock:
        refuse_descriptors(sock)
        with socketfile.removed(path):
            yield sock


def refuse_descriptors(sock: socket.socket) -> None:
    """Have the kernel refuse descriptors on the connections of a socket, where it can (Linux 6.16).

    HTTP has no place for one, so it would be closed by the thread that reads, which is the event loop's; and
    whoever made it says how long that takes (``api.descriptors``).
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


def activated(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The socket that systemd handed over (sd_listen_fds(3)), or None.

    The variables are removed, so that no child takes the socket for its own. Raises ConfigInvalid for
    anything but one listening Unix stream socket.
    """
    pid, count = environ.get("LISTEN_PID"), environ.get("LISTEN_FDS")
    if pid != str(os.getpid()) or not count:
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    if count != "1":
        raise ConfigInvalid(f"socket activation handed over {count[:20]} sockets; configure one")
    try:
        sock = socket.socket(fileno=FIRST_FD)
    except OSError as error:
        raise ConfigInvalid(
            f"socket activation handed over something that is no socket: {error.strerror}"
        ) from None
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listens:
        sock.close()
        raise ConfigInvalid("socket activation handed over something else than a listening stream socket")
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def bind(path: Path, *, mode: int, group: str | None) -> socket.socket:
    """A socket that listens at ``path``; a group that does not exist is left out.

    Raises ConfigInvalid.
    """
    temporary = path.with_name(f".{os.getpid():x}")
    if max(len(os.fsencode(path)), len(os.fsencode(temporary))) > MAX_SOCKET_PATH:
        raise ConfigInvalid(f"the path {path} is longer than the {MAX_SOCKET_PATH} bytes of a socket address")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _locked(path.parent):
            _make_way(path)
            return _bind(path, temporary, mode, group)
    except OSError as error:
        raise ConfigInvalid(f"cannot listen on {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _make_way(path: Path) -> None:
    """Return if nothing stands at ``path`` but a socket that nobody answers on."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigInvalid(f"{path} exists and is no socket; move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return
        except BlockingIOError:  # its backlog is full: somebody is there, and busy
            pass
    raise ConfigInvalid(f"another daemon answers on {path}")


def _bind(path: Path, temporary: Path, mode: int, group: str | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        temporary.unlink(missing_ok=True)
        sock.bind(os.fspath(temporary))
        try:
            if group is not None:
                with contextlib.suppress(KeyError):
                    os.chown(temporary, -1, grp.getgrnam(group).gr_gid)
            temporary.chmod(mode)
            sock.setblocking(False)
            sock.listen(BACKLOG)
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except BaseException:
        sock.close()
        raise
    return sock
