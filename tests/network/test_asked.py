"""What somebody has to allow, by the real process, with whoever decides in the test."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from gateways import AUTHORITY, Served, read
from gateways import serving as in_namespace
from http2_peers import Peer, asked, echo
from world import WWW

from sandboxd.httprule import HttpRule
from sandboxd.network.questions import Answer, Question
from sandboxd.reach import Allow, NetworkRules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from world import World


pytestmark = pytest.mark.anyio

NAME = "asked.http.test"
RULES = NetworkRules(
    (
        Allow(NAME, (80, 8080, 443), "asked.yaml:1", HttpRule(methods=("GET", "POST")), ask=True),
        Allow(NAME, (7,), "asked.yaml:2", ask=True),
        Allow(NAME, (8081,), "asked.yaml:3", HttpRule(methods=("GET",))),
    ),
    (),
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def hosts(world: World) -> Iterator[World]:
    """The hosts that are asked about."""
    world.records[NAME] = [WWW]
    yield world
    del world.records[NAME]


class Somebody:
    """Decides on each question when told to."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.withdrawn: list[Question] = []
        self._answers: dict[int, Answer] = {}
        self._changed = anyio.Event()

    async def __call__(self, question: Question) -> Answer:
        self.questions.append(question)
        self._wake()
        try:
            while question.number not in self._answers:
                await self._changed.wait()
        except anyio.get_cancelled_exc_class():
            self.withdrawn.append(question)
            self._wake()
            raise
        return self._answers[question.number]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def say(self, question: Question, *, allowed: bool, why: str = "") -> None:
        self._answers[question.number] = Answer(allowed=allowed, why=why)
        self._wake()

    async def asked(self, count: int = 1) -> list[Question]:
        """The questions, once there are so many."""
        while len(self.questions) < count:
            await self._changed.wait()
        return self.questions

    async def gone(self, count: int = 1) -> list[Question]:
        while len(self.withdrawn) < count:
            await self._changed.wait()
        return self.withdrawn


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Served, Somebody]]:
    """A namespace whose connections a real process serves, and who is asked."""
    somebody = Somebody()
    async with in_namespace(RULES, decide=somebody) as served:
        yield served, somebody


GET = b"GET /page HTTP/1.1\r\nHost: %b\r\n\r\n" % NAME.encode()


async def test_a_request_of_http1_waits_and_the_next_one_on_its_connection_is_asked_about_too(
    hosts: World,
) -> None:
    del hosts
    async with serving() as (served, somebody):
        with await served.connect(NAME, 80) as sock:
            sock.sendall(GET)
            [question] = await somebody.asked()
            assert (question.protocol, question.name, question.port) == ("http", NAME, 80)
            assert (question.method, question.path, question.rule) == ("GET", "/page", "asked.yaml:1")
            sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(20)
            somebody.say(question, allowed=True)
            assert b"200 OK" in await read(sock, b"/page\n")
            sock.sendall(GET.replace(b"/page", b"/other"))
            question = (await somebody.asked(2))[1]
            assert question.path == "/other"
            somebody.say(question, allowed=False, why="not that one")
            said = await read(sock, b"}")
            assert b"403" in said
            assert b"not that one" in said
        use = await served.end()
        assert [refusal.why for refusal in use.refusals] == ["not that one"]
        requests = [event for event in served.events if event.method]
        assert [(event.verdict, event.rule) for event in requests] == [
            ("allowed", "asked.yaml:1"),
            ("denied", "asked.yaml:1"),
        ]


async def test_a_body_that_comes_meanwhile_waits_in_its_socket(hosts: World) -> None:
    del hosts
    size = 64 << 20
    async with serving() as (served, somebody):
        with await served.connect(NAME, 80) as sock:
            sock.sendall(
                b"POST /p HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n" % (NAME.encode(), size)
            )
            [question] = await somebody.asked()
            sock.setblocking(False)
            sent = 0
            while True:  # until it is full for a while
                try:
                    sent += sock.send(bytes(1 << 16))
                except BlockingIOError:
                    before = sent
                    await anyio.sleep(0.5)
                    with suppress(BlockingIOError):
                        sent += sock.send(bytes(1 << 16))
                    if sent == before:
                        break
            assert sent < size
            somebody.say(question, allowed=True)
            sock.setblocking(True)
            await anyio.to_thread.run_sync(sock.sendall, bytes(size - sent))
            assert b"200 OK" in await read(sock, b"/p\n")
        await served.end()
        assert [event.bytes_out for event in served.events if event.method] == [size]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("port", [80, 7])
async def test_a_program_that_goes_away_is_not_decided_on(hosts: World, port: int, *, reset: bool) -> None:
    async with serving() as (served, somebody):
        before = list(hosts.reached)
        with await served.connect(NAME, port) as sock:
            sock.sendall(GET)
            [question] = await somebody.asked()
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert await somebody.gone() == [question]
        events = await served.told(1)
        assert (events[0].verdict, events[0].why) == (
            "failed",
            "the program went away before it was decided on",
        )
        await served.end()
        assert hosts.reached == before


@pytest.mark.parametrize("port", [80, 7])
async def test_the_calls_end_is_the_end_of_what_waits(hosts: World, port: int) -> None:
    del hosts
    async with serving() as (served, somebody):
        with await served.connect(NAME, port) as sock:
            sock.sendall(GET)
            [question] = await somebody.asked()
            with anyio.fail_after(4):
                await served.end()
            assert await somebody.gone() == [question]
            sock.settimeout(10)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert {event.verdict for event in served.events} == {"failed"}
        assert all("the call ended" in event.why for event in served.events)


async def test_the_death_of_the_process_is_the_end_of_what_waits_and_another_asks_anew(hosts: World) -> None:
    del hosts
    async with serving() as (served, somebody):
        with await served.connect(NAME, 80) as sock:
            sock.sendall(GET)
            [question] = await somebody.asked()
            os.kill(served.process, signal.SIGKILL)
            assert await somebody.gone() == [question]
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        somebody.withdrawn.clear()
        somebody.questions.clear()
        with await served.connect(NAME, 80) as sock:
            sock.sendall(GET)
            [again] = await somebody.asked()
            somebody.say(again, allowed=True)
            assert b"200 OK" in await read(sock, b"/page\n")
        await served.end()


async def test_a_connection_that_nobody_looks_into_waits_before_anybody_is_connected_to(
    hosts: World,
) -> None:
    async with serving() as (served, somebody):
        before = len(hosts.reached)
        with await served.connect(NAME, 7) as one, await served.connect(NAME, 7) as two:
            for sock in (one, two):
                sock.sendall(b"early")
            first, second = await somebody.asked(2)
            assert (first.protocol, first.port, first.method) == ("tcp", 7, "")
            assert len(hosts.reached) == before
            somebody.say(second, allowed=False, why="no")
            somebody.say(first, allowed=True)
            said = []
            for sock in (one, two):
                try:
                    said.append(await read(sock, b"early"))
                except ConnectionResetError:
                    said.append(b"reset")
            assert sorted(said) == [b"early", b"reset"]
        use = await served.end()
        assert [refusal.why for refusal in use.refusals] == ["no"]


async def test_too_many_at_once_are_refused(hosts: World) -> None:
    del hosts
    async with serving() as (served, somebody):
        socks = [await served.connect(NAME, 80) for _ in range(65)]
        try:
            for sock in socks:
                sock.sendall(GET)
            await somebody.asked(64)
            refused = await served.told(1)
            assert refused[0].verdict == "denied"
            assert "64 others wait" in refused[0].why
            assert len(somebody.questions) == 64
            await served.end()
            assert len(await somebody.gone(64)) == 64
        finally:
            for sock in socks:
                sock.close()


async def test_streams_of_http2_wait_each_for_its_own_answer(hosts: World) -> None:
    """With a server that speaks it in plain, and TLS with one that is not there."""
    servers: list[socket.socket] = []
    async with serving() as (served, somebody), anyio.create_task_group() as tasks:
        listener = hosts.socket(WWW, 8080)
        listener.listen()
        listener.setblocking(False)

        async def accept() -> None:
            while True:
                await anyio.wait_readable(listener)
                accepted, _ = listener.accept()
                servers.append(accepted)
                tasks.start_soon(Peer(accepted, client_side=False, serve=echo).run, tasks)

        tasks.start_soon(accept)
        try:
            sock = await served.connect(NAME, 8080)
            servers.append(sock)
            program = Peer(sock, client_side=True)
            tasks.start_soon(program.run, tasks)

            def head(path: str) -> list[tuple[bytes, bytes]]:
                listed = asked(path, "POST")
                return [(n, f"{NAME}:8080".encode() if n == b":authority" else v) for n, v in listed]

            numbers = {path: await program.ask(head(path), path.encode()) for path in ("/a", "/b", "/c")}
            questions = {question.path: question for question in await somebody.asked(3)}
            assert len(servers) == 1
            somebody.say(questions["/c"], allowed=True)
            assert bytes((await program.answer(numbers["/c"])).data) == b"/c"
            somebody.say(questions["/b"], allowed=False, why="not b")
            assert (await program.answer(numbers["/b"])).status == 403
            program.http.reset_stream(numbers["/a"])
            await program.flush()
            assert await somebody.gone() == [questions["/a"]]
            assert len(servers) == 2
            last = await program.ask(head("/d"), b"d")
            question = (await somebody.asked(4))[3]
            somebody.say(question, allowed=True)
            assert bytes((await program.answer(last)).data) == b"d"
            use = await served.end()
            assert [refusal.why for refusal in use.refusals] == ["not b"]
        finally:
            tasks.cancel_scope.cancel()
            for each in [*servers, listener]:
                each.close()


async def test_inside_tls(hosts: World) -> None:
    del hosts
    async with serving() as (served, somebody):
        context = ssl.create_default_context(cadata=AUTHORITY.certificate)
        with await served.connect(NAME, 443) as plain:
            wrapped = await anyio.to_thread.run_sync(lambda: context.wrap_socket(plain, server_hostname=NAME))
            with wrapped as sock:
                sock.sendall(GET)
                [question] = await somebody.asked()
                assert (question.protocol, question.path) == ("https", "/page")
                somebody.say(question, allowed=False, why="no")
                assert b"403" in await read(sock, b"}")
                sock.sendall(GET)
                await somebody.asked(2)
        assert len(await somebody.gone()) == 1
        await served.end()
