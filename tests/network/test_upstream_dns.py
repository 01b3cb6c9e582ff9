"""Name servers that answer wrongly, and names and questions that are as long or many as can be."""

from __future__ import annotations

import socket
import socketserver
import struct
from itertools import pairwise
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from gateways import read, serving
from world import OTHER, WWW

from sandboxd.egress.messages import MAX_NAMES
from sandboxd.reach import Allow, NetworkRules

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateways import Served
    from world import World

pytestmark = pytest.mark.anyio

RULES = NetworkRules((Allow("*.long.test", (80,), "p.yaml:1"),), ())
PAGE = b"GET /found HTTP/1.1\r\nHost: x\r\n\r\n"
Answer = dns.message.Message
A = dns.rdatatype.A


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def chain(answer: Answer, length: int, *, loops: bool = False) -> bytes:
    """CNAMEs, and an address at the end."""
    names = [answer.question[0].name.to_text(), *(f"hop{hop}.long.test." for hop in range(length))]
    for here, there in pairwise(names):
        answer.answer.append(dns.rrset.from_text(here, 60, "IN", "CNAME", there))
    if loops:
        answer.answer.append(dns.rrset.from_text(names[-1], 60, "IN", "CNAME", names[0]))
    elif answer.question[0].rdtype == A:
        answer.answer.append(dns.rrset.from_text(names[-1], 60, "IN", "A", WWW))
    return answer.to_wire()


def found(answer: Answer) -> bytes:
    return chain(answer, 0)


def wrong_id(answer: Answer) -> bytes:
    answer.id ^= 1
    return found(answer)


def wrong_question(answer: Answer) -> bytes:
    wire = found(answer)
    return wire.replace(b"\4long\4test", b"\4song\4test")


def another_name(answer: Answer) -> bytes:
    """An address of somebody else's name beside the question."""
    if answer.question[0].rdtype == A:
        answer.answer.append(dns.rrset.from_text("victim.long.test.", 60, "IN", "A", WWW))
    return answer.to_wire()


def cut_off(answer: Answer) -> bytes:
    answer.flags |= dns.flags.TC
    return answer.to_wire()


def many(answer: Answer) -> bytes:
    """More addresses than anybody tries; the last would answer."""
    if answer.question[0].rdtype == A:
        addresses = [f"192.0.2.{each}" for each in range(1, 250)]
        answer.answer.append(dns.rrset.from_text(answer.question[0].name, 60, "IN", "A", *addresses))
    return answer.to_wire()


def failed(answer: Answer) -> bytes:
    answer.set_rcode(dns.rcode.SERVFAIL)
    return answer.to_wire()


BEHAVIOURS: dict[str, Callable[[Answer], bytes]] = {
    "good": found,
    "chain": lambda answer: chain(answer, 12),
    "cutoff": cut_off,  # and whole over TCP
    "loop": lambda answer: chain(answer, 5, loops=True),
    "chains": lambda answer: chain(answer, 200),
    "id": wrong_id,
    "question": wrong_question,
    "another": another_name,
    "garbage": lambda answer: answer.to_wire()[:12] + b"\xc0\x0c" * 100,
    "pointers": lambda answer: answer.to_wire()[:2] + b"\x81\x80\0\1\xff\xff\0\0\0\0\xc0\x0c\0\1\0\1",
    "short": lambda answer: answer.to_wire()[:7],
    "nothing": lambda _: b"",
    "many": many,
    "failed": failed,
}


class Asked(socketserver.BaseRequestHandler):
    """Answers each question as its first label says."""

    def handle(self) -> None:
        if isinstance(self.request, tuple):
            data, sock = self.request
            sock.sendto(self.answer(data, over_tcp=False), self.client_address)
            return
        size = struct.unpack(">H", self.request.recv(2))[0]
        answer = self.answer(self.request.recv(size), over_tcp=True)
        self.request.sendall(struct.pack(">H", len(answer)) + answer)

    @staticmethod
    def answer(question: bytes, *, over_tcp: bool) -> bytes:
        answer = dns.message.make_response(dns.message.from_wire(question))
        answer.flags |= dns.flags.RA
        how = answer.question[0].name.labels[0].decode()
        if how == "cutoff" and over_tcp:
            return found(answer)
        return BEHAVIOURS.get(how, found)(answer)


@pytest.fixture(scope="module")
def nameserver(world: World) -> str:
    """One that answers in every way."""
    world.serve(OTHER, 53, Asked)
    udp = socketserver.ThreadingUDPServer((OTHER, 53), Asked, bind_and_activate=False)
    udp.daemon_threads = True
    udp.socket.close()
    udp.socket = world.socket(OTHER, 53, socket.SOCK_DGRAM)
    world._run(udp)
    return OTHER


async def fetch(served: Served, name: str) -> bytes:
    """The page of a name; nothing where it was reset."""
    with await served.connect(name, 80) as sock:
        sock.sendall(PAGE)
        try:
            return await read(sock, b"/found\n")
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("how", ["good", "chain", "cutoff"])
async def test_what_is_an_answer(nameserver: str, how: str) -> None:
    async with serving(RULES, nameserver=nameserver) as served:
        assert b"200 OK" in await fetch(served, f"{how}.long.test")
        await served.end()


@pytest.mark.parametrize("how", sorted(BEHAVIOURS.keys() - {"good", "chain", "cutoff"}))
async def test_what_is_none_has_failed_in_time_and_is_nothing_to_other_names(
    nameserver: str, how: str
) -> None:
    async with serving(RULES, nameserver=nameserver) as served, anyio.create_task_group() as tasks:
        said: list[bytes] = []

        async def bad() -> None:
            with anyio.fail_after(25):
                said.append(await fetch(served, f"{how}.long.test"))

        tasks.start_soon(bad)
        await anyio.sleep(0.2)
        with anyio.fail_after(5):
            assert b"200 OK" in await fetch(served, "good.long.test")
        while not said:  # noqa: ASYNC110
            await anyio.sleep(0.05)
        assert said == [b""]
        events = [event for event in await served.told(2) if event.name == f"{how}.long.test"]
        assert [event.verdict for event in events] == ["denied" if how == "many" else "failed"]
        assert events[0].why
        await served.end()


# names and questions of programs

LONGEST = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 51, "long.test"])


async def test_the_longest_names_are_served(nameserver: str) -> None:
    assert len(LONGEST) == 253
    async with serving(RULES, nameserver=nameserver) as served:
        assert b"200 OK" in await fetch(served, LONGEST)
        [event] = await served.told(1)
        assert event.name == LONGEST
        many_labels = "a." * 122 + "long.test"
        assert len(many_labels) == 253
        assert b"200 OK" in await fetch(served, many_labels)
        await served.end()


def ask(sock: socket.socket, name: str) -> dns.message.Message:
    sock.sendto(dns.message.make_query(f"{name}.", "A").to_wire(), ("127.0.0.53", 53))
    return dns.message.from_wire(sock.recv(4096))


async def test_tens_of_thousands_of_questions(nameserver: str) -> None:
    """Each of another name; no more of them are kept than may be, and nobody is held up."""

    def flood(served: Served) -> list[int]:
        allowed = [f"n{number}.long.test" for number in range(MAX_NAMES + 2000)]
        denied = [f"n{number}.denied.test" for number in range(10_000)]
        with served.sock(socket.SOCK_DGRAM) as sock:
            codes = [int(ask(sock, name).rcode()) for name in allowed + denied]
            assert ask(sock, "n7.long.test").answer
        return codes

    async with serving(RULES, nameserver=nameserver, beside=1) as (flooding, other):
        codes: list[int] = []

        async def ask_all() -> None:
            codes.extend(await anyio.to_thread.run_sync(flood, flooding))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_all)
            while not codes:
                with anyio.fail_after(10):
                    assert b"200 OK" in await fetch(other, "good.long.test")
        assert codes[:MAX_NAMES] == [dns.rcode.NOERROR] * MAX_NAMES
        assert codes[MAX_NAMES : MAX_NAMES + 2000] == [dns.rcode.SERVFAIL] * 2000
        assert codes[MAX_NAMES + 2000 :] == [dns.rcode.NXDOMAIN] * 10_000
        assert b"200 OK" in await fetch(flooding, "n7.long.test")
        use = await flooding.end()
        assert sum(refusal.count for refusal in use.refusals) == 10_000
        assert len(use.refusals) <= 257
