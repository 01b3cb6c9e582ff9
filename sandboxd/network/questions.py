"""What rules leave to somebody to decide: asked by the process that serves a container, answered some time.

Each question is a task that waits for whoever decides. It ends with its answer, when the program that it is
of goes away, when the process that asks dies, and with the call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from pydantic import BaseModel, ConfigDict, Field

from sandboxd.egress.messages import encode
from sandboxd.egress.questions import MAX_OPEN
from sandboxd.excerpt import excerpt

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

__all__ = ["Answer", "Decide", "Question", "Questions", "nobody"]

MAX_WHY = 300  # characters, which the program may be told


class Question(BaseModel):
    """May this be connected to, or asked for? As a process says it, with what a program chose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(ge=1, le=2**53)
    """Of this one among those of a container."""
    protocol: str = Field(max_length=32)
    """``tcp`` of a connection; ``http`` or ``https`` of a request."""
    name: str | None = Field(max_length=1024)
    address: str = Field(max_length=64)
    port: int = Field(ge=0, le=65535)
    method: str = Field(max_length=32)
    path: str = Field(max_length=4096)
    rule: str | None = Field(max_length=8192)
    """File and line of the rule that leaves it open."""


@dataclass(frozen=True)
class Answer:
    """What somebody decided, and what the program is told of why not."""

    allowed: bool
    why: str = ""


Decide = Callable[[Question], Awaitable[Answer]]
"""Takes as long as it takes; cancelled, nobody wants to know any more. Raises nothing."""


async def nobody(question: Question) -> Answer:
    """Who decides where nobody is there to be asked."""
    del question
    return Answer(allowed=False, why="it needs somebody to allow it, and nobody is asked here")


class Questions:
    """Of one container, by the process that serves it now."""

    def __init__(self, id: str, decide: Decide, tasks: TaskGroup) -> None:  # noqa: A002
        self._id = id
        self._decide = decide
        self._tasks = tasks
        self._open: dict[int, anyio.CancelScope] = {}

    def ask(self, content: dict[str, Any], send: Callable[[bytes], Awaitable[None]]) -> None:
        """Have one answered by ``send``. Raises ValueError for what is none, or one too many."""
        question = Question.model_validate(content)
        if question.number in self._open or len(self._open) >= MAX_OPEN:
            raise ValueError("a question too many")
        scope = self._open[question.number] = anyio.CancelScope()
        self._tasks.start_soon(self._answer, question, scope, send)

    def withdraw(self, number: int) -> None:
        """Nobody waits for that one any more. One that was just answered is no mistake."""
        if (scope := self._open.pop(number, None)) is not None:
            scope.cancel()

    def close(self) -> None:
        """Nobody waits for any."""
        for number in list(self._open):
            self.withdraw(number)

    async def _answer(
        self, question: Question, scope: anyio.CancelScope, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        with scope:
            answer = await self._decide(question)
            if self._open.get(question.number) is not scope:
                return
            del self._open[question.number]
            said = {"number": question.number, "allowed": answer.allowed, "why": excerpt(answer.why, MAX_WHY)}
            with suppress(OSError):  # a process that is gone waits for nothing
                await send(encode("answer", {"id": self._id, **said}))
