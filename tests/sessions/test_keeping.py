"""Containers that sessions keep, without the containers: what checkpoints stand on, and who has a turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from keptcalls import kept_call, live_of, scheduler
from sessioncalls import CALLER, serving

from sandboxd import models
from sandboxd.workspace.turns import Turns

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_each_checkpoint_stands_on_what_the_container_began_with(tmp_path: Path) -> None:
    async with serving(tmp_path / "state", tmp_path / "uppers", attended=False) as served:
        made, scheduling = await served.sessions.create(CALLER, models.SessionRequest()), scheduler()
        began = (await served.call(made.id, {"a": "before", "gone": "x"})).checkpoint_after
        heads = []
        for changes in ({"a": "one"}, {"b": "two", "gone": None}, {}):
            await kept_call(served, scheduling, made.id, changes)
            heads.append(await served.sessions.checkpoint(CALLER, made.id))
        one, two, three = heads
        assert three == two, "nothing had changed"
        for head in (one, two):
            parent = (await served.line(head.id))[-2]
            assert parent.digest == began
        assert await served.files(one.id) == {"a": "one", "gone": "x"}
        assert await served.files(two.id) == {"a": "one", "b": "two"}
        await served.check()
        await served.sessions.end(CALLER, made.id, discard=True)
        assert await served.files((await served.rows())[made.id].head) == {"a": "one", "b": "two"}


@pytest.mark.anyio
async def test_one_whose_time_is_over_ends_before_calls_that_wait(tmp_path: Path) -> None:
    async with serving(tmp_path / "state", tmp_path / "uppers") as served:
        made, scheduling = await served.sessions.create(CALLER, models.SessionRequest()), scheduler()
        first = await kept_call(served, scheduling, made.id, {"log": "first"})
        turns = served.sessions.holds.turns
        turns.enter(made.id)
        await turns.take(made.id)  # a call runs
        done: list[models.Invocation] = []

        async def following() -> None:
            done.append(await kept_call(served, scheduling, made.id, {"more": "x"}))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(following)
            with anyio.fail_after(10):
                while turns.inside(made.id) < 2:  # noqa: ASYNC110  -- nothing tells when
                    await anyio.sleep(0.01)
                live_of(served, made.id).kept.born -= 1e9
                while turns.inside(made.id) < 3:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            assert not done
            assert live_of(served, made.id).kept.since == first.id, "it ends after the call"
            turns.give(made.id)
            turns.leave(made.id)
        [call] = done
        assert call.container is not None
        assert (call.container.since, call.container.number, call.container.lost) == (call.id, 1, None)
        head = (await served.rows())[made.id].head
        assert await served.files(head) == {"log": "first"}, "what it had is kept"


async def waits(turns: Turns, name: str, order: list[str], *, first: bool = False) -> None:
    turns.enter("s")
    await turns.take("s", first=first)
    order.append(name)
    turns.give("s")
    turns.leave("s")


@pytest.mark.anyio
async def test_who_is_first_has_the_next_turn_and_all_others_theirs_in_order() -> None:
    turns, order = Turns(), list[str]()
    turns.enter("s")
    await turns.take("s")
    async with anyio.create_task_group() as tasks:
        for name in ("one", "two", "three"):
            tasks.start_soon(waits, turns, name, order)
            await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as gone:
            gone.start_soon(lambda: waits(turns, "gone", order, first=True))
            await anyio.wait_all_tasks_blocked()
            gone.cancel_scope.cancel()
        tasks.start_soon(lambda: waits(turns, "first", order, first=True))
        await anyio.wait_all_tasks_blocked()
        turns.give("s")
        turns.leave("s")
    assert order == ["first", "one", "two", "three"]
