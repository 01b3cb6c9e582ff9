"""HTTP/2 requests that somebody has to allow, or whose body has to be read, before they are made."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

import anyio
import pytest
from h2.exceptions import FlowControlError
from http2_peers import asked, between

from sandboxd.egress.http2end import STREAM_WINDOW
from sandboxd.egress.site import MAX_SIGNED
from sandboxd.httprule import HttpRule, Injection

if TYPE_CHECKING:
    from sandboxd.egress.site import Exchange
    from sandboxd.httprule import HttpRequest
    from sandboxd.reach import Decision

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Somebody:
    """Answers what is asked of a path when told to."""

    def __init__(self) -> None:
        self.asked: dict[str, anyio.Event] = {}
        self.allows: dict[str, bool] = {}
        self.gone: list[str] = []

    async def __call__(self, exchange: Exchange, decision: Decision) -> Decision:
        answered = self.asked[exchange.path] = anyio.Event()
        try:
            await answered.wait()
        finally:
            if not answered.is_set():
                self.gone.append(exchange.path)
        allowed = self.allows[exchange.path]
        return replace(decision, allowed=allowed, asks=False, why="" if allowed else "somebody said no")

    async def until_asked(self, *paths: str) -> None:
        while not set(paths) <= self.asked.keys():  # noqa: ASYNC110  (no event tells)
            await anyio.sleep(0.01)

    def say(self, path: str, *, allowed: bool = True) -> None:
        self.allows[path] = allowed
        self.asked[path].set()


async def test_answers_come_late_in_any_order_and_no_stream_waits_for_another() -> None:
    somebody = Somebody()
    async with between(ask=somebody) as world:
        numbers = {path: await world.program.ask(asked(path)) for path in ("/ok/1", "/ok/2", "/ok/3")}
        await somebody.until_asked(*numbers)
        assert not world.servers, "nothing is connected to before"
        somebody.say("/ok/3")
        assert (await world.program.answer(numbers["/ok/3"])).status == 200
        somebody.say("/ok/2", allowed=False)
        refused = await world.program.answer(numbers["/ok/2"])
        assert (refused.status, b"somebody said no" in refused.data) == (403, True)
        assert not world.program.streams[numbers["/ok/1"]].headers
        somebody.say("/ok/1")
        assert (await world.program.answer(numbers["/ok/1"])).status == 200
        assert [(each.path, each.verdict) for each in world.told] == [
            ("/ok/3", "allowed"),
            ("/ok/2", "denied"),
            ("/ok/1", "allowed"),
        ]


async def test_bodies_that_come_meanwhile_are_bounded_and_hold_up_no_other() -> None:
    somebody = Somebody()
    async with between(ask=somebody) as world:
        waiting = [f"/ok/{each}" for each in range(12)]  # whose windows are more than the connection's
        body = bytes(range(256)) * (STREAM_WINDOW // 256)
        for path in waiting:
            await world.program.ask(asked(path, "POST"), None)
            number = max(world.program.streams)
            await world.program.send(number, body)
            with pytest.raises(FlowControlError):
                world.program.http.send_data(number, b"x")  # no more than that
        await somebody.until_asked(*waiting)
        number = await world.program.ask(asked("/ok/other", "POST"), None)
        await somebody.until_asked("/ok/other")
        somebody.say("/ok/other")
        await world.program.send(number, bytes(3 * STREAM_WINDOW), last=True)
        assert (await world.program.answer(number)).size == 3 * STREAM_WINDOW
        for at, path in enumerate(waiting):  # and what waited is whole, and goes on
            somebody.say(path)
            await world.program.send(1 + 2 * at, body, last=True)
            seen = await world.program.answer(1 + 2 * at)
            assert (seen.status, bytes(seen.data) == body * 2) == (200, True)


async def test_a_program_that_gives_up_is_not_decided_on() -> None:
    somebody = Somebody()
    async with between(ask=somebody) as world:
        first = await world.program.ask(asked("/ok/1", "POST"), None)
        await world.program.send(first, bytes(1000))
        await world.program.ask(asked("/ok/2"))
        await somebody.until_asked("/ok/1", "/ok/2")
        world.program.http.reset_stream(first)
        await world.program.flush()
        while somebody.gone != ["/ok/1"]:  # noqa: ASYNC110
            await anyio.sleep(0.01)
        world.program.sock.close()
        await world.done.wait()
        assert somebody.gone == ["/ok/1", "/ok/2"]
        assert [each.verdict for each in world.told] == ["failed", "failed"]
        assert "gave the request up" in world.told[0].why
        assert "in the middle" in world.told[1].why
        assert not world.servers


async def test_the_calls_end_is_theirs() -> None:
    somebody = Somebody()
    async with between(ask=somebody) as world:
        await world.program.ask(asked("/ok/1"))
        await somebody.until_asked("/ok/1")
        world.scope.cancel()
        await world.done.wait()
        assert somebody.gone == ["/ok/1"]
        assert [(each.verdict, each.why) for each in world.told] == [
            ("failed", "the call ended before the answer did")
        ]


async def test_who_waits_for_a_word_gets_it_after_the_answer() -> None:
    somebody = Somebody()
    async with between(ask=somebody) as world:
        number = await world.program.ask(asked("/ok/1", "POST", expect="100-continue"), None)
        await somebody.until_asked("/ok/1")
        await anyio.sleep(0.1)
        assert not world.program.streams[number].informational
        somebody.say("/ok/1")
        await world.program.until(lambda: world.program.streams[number].informational == [b"100"])
        await world.program.send(number, b"body", last=True)
        assert bytes((await world.program.answer(number)).data) == b"body"


# signatures that need the body

SIGNS = HttpRule(inject=Injection(access_key="A", secret_key="S", plain=True))


def signed(seen: list[str | None], decision: Decision, request: HttpRequest, digest: str | None):  # type: ignore[no-untyped-def]
    """What the signature would have been made of."""
    del decision
    seen.append(digest)
    return list(request.headers), ()


@pytest.mark.parametrize("asks", [False, True])
async def test_a_body_is_read_whole_for_its_signature(*, asks: bool) -> None:
    seen: list[str | None] = []
    somebody = Somebody()
    inject = lambda *given: signed(seen, *given)  # noqa: E731
    async with between(inject=inject, rules=SIGNS, ask=somebody if asks else None) as world:
        body = bytes(range(256)) * (MAX_SIGNED // 256)
        number = await world.program.ask(asked("/ok/1", "POST"), None)
        if asks:
            await world.program.send(number, body[:STREAM_WINDOW])
            await somebody.until_asked("/ok/1")
            somebody.say("/ok/1")
            await world.program.send(number, body[STREAM_WINDOW:], last=True)
        else:
            await world.program.send(number, body, last=True)
        answer = await world.program.answer(number)
        assert (answer.status, bytes(answer.data) == body) == (200, True)
        assert seen == [sha256(body).hexdigest()]


async def test_bodies_that_are_too_long_to_sign_are_refused() -> None:
    inject = lambda *given: signed([], *given)  # noqa: E731
    async with between(inject=inject, rules=SIGNS) as world:
        number = await world.program.ask(asked("/ok/1", "POST"), None)
        with suppress(ConnectionError):
            await world.program.send(number, bytes(MAX_SIGNED + 1))
        assert (await world.program.answer(number)).status == 413
        many = [await world.program.ask(asked(f"/ok/{each}", "POST"), None) for each in range(6)]
        for each in many:  # none has its end
            with suppress(Exception):  # it may be refused in the middle
                await world.program.send(each, bytes(MAX_SIGNED - 1))
        statuses = [world.program.streams[each].status for each in many]
        assert 429 in statuses
        assert statuses.count(0) >= 3
