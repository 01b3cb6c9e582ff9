"""Who is on the other end of the socket, as the kernel tells it, and what they may do.

The kernel keeps the uid, gid and supplementary groups that a peer had when it called ``connect``
(``SO_PEERCRED`` and ``SO_PEERGROUPS``, unix(7) and socket(7)): nothing that the peer sends can change
them, and a membership granted later counts from the peer's next login. The first rule of the
configuration whose keys all hold decides; a peer that no rule matches is nobody, and is refused.
"""

from __future__ import annotations

import array
import ctypes
import errno
import grp
import os
import pwd
import socket
import struct
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, Protocol

from sandboxd.config import SessionShare
from sandboxd.models import CallerInfo

if TYPE_CHECKING:
    from sandboxd.config import CallerRule, Match

__all__ = ["Caller", "Identity", "Peer", "peer_of"]

SO_PEERGROUPS = 59  # asm-generic/socket.h, since Linux 4.13; the socket module has no name for it
MAX_GROUPS = 65_536  # NGROUPS_MAX, linux/limits.h
FRESH = 10.0  # seconds that the number of a user's or group's name is remembered


class HasOptions(Protocol):
    """A connected Unix socket, or what asyncio shows of one."""

    def fileno(self) -> int:
        """The descriptor."""
        ...

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """The value of an option."""
        ...


@dataclass(frozen=True)
class Peer:
    """The credentials that a peer had when it connected. ``pid`` is 0 across pid namespaces."""

    uid: int
    gid: int
    groups: frozenset[int]
    pid: int = 0


@dataclass(frozen=True)
class Caller:
    """A peer and what the configuration grants it; the role ``none`` gets nowhere."""

    uid: int
    gid: int
    groups: frozenset[int]
    role: Literal["operator", "agent", "none"]
    policies: tuple[str, ...] = ()
    concurrent: int | None = None
    weight: int = 1
    queued: int | None = None
    """Calls that may wait; None: only the daemon's queue bounds them."""
    secrets: tuple[str, ...] = ()
    sessions: SessionShare = field(default_factory=SessionShare)
    callback: bool = False
    """Whether the daemon tells a socket of the caller's that a call has ended."""
    callbacks: tuple[str, ...] = ()
    """Names and globs of the programs that it starts then."""

    def may_have(self, secret: str) -> bool:
        """Whether a policy may give this secret to the caller's calls."""
        return any(fnmatchcase(secret, pattern) for pattern in self.secrets)

    def may_start(self, program: str) -> bool:
        """Whether the caller's calls may have this program of the configuration's told of their end."""
        return any(fnmatchcase(program, pattern) for pattern in self.callbacks)

    def may_use(self, policy: str) -> bool:
        """Whether the configuration grants this policy to the caller."""
        return "*" in self.policies or policy in self.policies

    @property
    def sees_all(self) -> bool:
        """Whether calls of others are visible to the caller."""
        return self.role == "operator"

    def info(self) -> CallerInfo:
        """The caller as records and the wire show it."""
        return CallerInfo(uid=self.uid, gid=self.gid, role=self.role)


def peer_of(sock: HasOptions) -> Peer:
    """The peer of a connected Unix socket. Raises OSError."""
    cred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    pid, uid, gid = struct.unpack("iII", cred)
    groups = array.array("I")
    groups.frombytes(_groups(sock))
    return Peer(uid, gid, frozenset(groups) | {gid}, pid)


def _groups(sock: HasOptions) -> bytes:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
    # More than 256 groups, which is all that Python's own getsockopt has room for.
    libc = ctypes.CDLL(None, use_errno=True)
    buffer, length = ctypes.create_string_buffer(MAX_GROUPS * 4), ctypes.c_uint(MAX_GROUPS * 4)
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw[: length.value]


@dataclass
class Identity:
    """The rules of the configuration, and the numbers of the names in them."""

    rules: tuple[CallerRule, ...]
    _names: dict[tuple[str, str], tuple[float, int | None]] = field(default_factory=dict)

    def caller(self, peer: Peer) -> Caller:
        """The caller that the first matching rule makes of a peer; else one with the role ``none``."""
        for rule in self.rules:
            if self._matches(rule.match, peer):
                return Caller(
                    uid=peer.uid,
                    gid=peer.gid,
                    groups=peer.groups,
                    role=rule.role,
                    policies=rule.policies,
                    concurrent=rule.concurrent,
                    weight=rule.weight,
                    queued=rule.queued,
                    secrets=rule.granted,
                    sessions=rule.sessions,
                    callback=rule.callback,
                    callbacks=rule.callbacks,
                )
        return Caller(peer.uid, peer.gid, peer.groups, "none")

    def _matches(self, match: Match, peer: Peer) -> bool:
        return (
            (match.uid is None or match.uid == peer.uid)
            and (match.gid is None or match.gid in peer.groups)
            and (match.user is None or self._number("user", match.user) == peer.uid)
            and (match.group is None or self._number("group", match.group) in peer.groups)
        )

    def _number(self, kind: Literal["user", "group"], name: str) -> int | None:
        """The id of a name, or None where there is no such name; it may appear later."""
        now = time.monotonic()
        known = self._names.get((kind, name))
        if known is not None and known[0] > now:
            return known[1]
        try:
            number = pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
        except KeyError:
            number = None
        self._names[kind, name] = (now + FRESH, number)
        return number
