"""A request of HTTP/2 on its two streams, and what a head of HTTP/2 may hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple

from sandboxd.egress.http2end import Flow
from sandboxd.egress.site import Refused, head_of, without_hops
from sandboxd.excerpt import excerpt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sandboxd.egress.http2undecided import Undecided
    from sandboxd.egress.site import Exchange, Site
    from sandboxd.httprule import HttpRequest

__all__ = ["Pair", "answer_head", "is_sound", "length_of", "request_head", "understood"]

Headers = list[tuple[bytes, bytes]]

# RFC 9110, section 5.6.2; h2 lets more through
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"([!-~\x80-\xff]([\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_PATH = re.compile(rb"/[!\"$-~]*")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_STATUS = re.compile(rb"[1-9][0-9]{2}")
PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path"})


class Pair:
    """``ours`` is the program's stream; ``theirs``, the server's, is 0 until the request is made."""

    def __init__(self, ours: int, exchange: Exchange, over: Callable[[Pair], None]) -> None:
        """``over`` is called when a direction is."""
        self.ours = ours
        self.theirs = 0
        self.exchange = exchange
        self.head: Headers = []
        """As it goes out."""
        self.length: int | None = None
        """Of the request's body, where it says so."""
        self.came = 0
        self.asked = False
        """The program has ended its side."""
        self.continues = False
        """It waits for a word before it sends its body."""
        self.answering = False
        """The program has been told a status."""
        self.refused = False
        """It is not the server that answers."""
        self.undecided: Undecided | None = None
        """As long as it is not known whether, or how, the request is made."""
        self.out, self.back = Flow(lambda: over(self)), Flow(lambda: over(self))
        self.back.id = ours

    def decided(self) -> None:
        """Nothing is waited for any more."""
        if self.undecided is not None:
            self.undecided.scope.cancel()
            self.undecided = None


def understood(headers: Iterable[tuple[bytes, bytes]], site: Site) -> HttpRequest:
    """The request that a head is. Raises Refused.

    The authority is among the headers as ``host``, as HTTP/1.1 has it, so that rules see the same of both.
    """
    listed = list(headers)
    pseudo = {name: value for name, value in listed if name[:1] == b":"}
    plain = [(name, value) for name, value in listed if name[:1] != b":"]
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if method == b"CONNECT":
        raise Refused(405, "denied", "CONNECT: this is no proxy; connect to the host itself")
    if not pseudo.keys() <= PSEUDO or not _TOKEN.fullmatch(method) or not is_sound(plain):
        raise Refused(400, "denied", "the request's head is malformed")
    if pseudo.get(b":scheme") != site.scheme.encode():
        said = excerpt(pseudo.get(b":scheme", b"").decode("latin-1"), 255)
        raise Refused(
            400, "denied", f"the request's scheme is {said!r}, and the connection's {site.scheme!r}"
        )
    if not _PATH.fullmatch(path) and not (path == b"*" and method == b"OPTIONS"):
        said = excerpt(path.decode("latin-1"), 255)
        raise Refused(400, "denied", f"{said!r} is no path: it has to begin with '/'")
    hosts = [value for name, value in plain if name == b"host"]
    named = [pseudo[b":authority"], *hosts] if b":authority" in pseudo else hosts
    if len(hosts) > 1 or len({each.lower() for each in named}) != 1:
        raise Refused(400, "denied", "the request names no host, or more than one")
    site.check_authority(named[0])
    without = [(name, value) for name, value in plain if name != b"host"]
    return head_of(method, path, [(b"host", named[0]), *without], websocket=False)


def length_of(request: HttpRequest, *, ended: bool) -> int | None:
    """What a request says of its body's length; ``ended``: there is none. Raises Refused.

    Who makes HTTP/1 of it would believe it, and take a request that follows for the body.
    """
    said = [value for name, value in request.headers if name == b"content-length"]
    if not said:
        return None
    if len(said) > 1 or not _LENGTH.fullmatch(said[0]) or (ended and int(said[0])):
        raise Refused(400, "denied", "the request's content-length is not that of its body")
    return int(said[0])


def request_head(
    request: HttpRequest, headers: Headers, site: Site, came: Iterable[tuple[bytes, bytes]]
) -> Headers:
    """The head that goes to the server: ``headers`` were decided on, and ``came`` is what the program said.

    What was put in is not remembered for compression, where guesses could be measured against it.
    """
    indexable = {tuple(each) for each in came if getattr(each, "indexable", True)}
    host = next((value for name, value in headers if name == b"host"), site.authority)
    found: Headers = [
        (b":method", request.method.encode("latin-1")),
        (b":scheme", site.scheme.encode()),
        (b":authority", host),
        (b":path", request.target),
    ]
    for name, value in headers:
        if name != b"host":
            kind = HeaderTuple if (name, value) in indexable else NeverIndexedHeaderTuple
            found.append(kind(name, value))
    if (b"te", b"trailers") in {(name, value.lower()) for name, value in came}:
        found.append((b"te", b"trailers"))
    return found


def answer_head(headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, Headers] | None:
    """Status and head of an answer as they are passed on; None: it is malformed."""
    listed = list(headers)
    status = listed[0][1] if listed and listed[0][0] == b":status" else b""
    rest = without_hops(listed[1:], keep=frozenset({b"proxy-authenticate", b"trailer"}))
    if not _STATUS.fullmatch(status) or status == b"101" or not is_sound(rest):
        return None
    return int(status), [(b":status", status), *rest]


def is_sound(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether names and values are what they may be (RFC 9110, section 5)."""
    return all(_NAME.fullmatch(name) and _VALUE.fullmatch(value) for name, value in headers)
