"""A real server on a real Unix socket, over a service that keeps its invocations in memory."""

# ruff: noqa: A002  # the names are those of the protocol that it implements

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from memoryfiles import MemoryFiles

from sandboxd import canonical, errors, models
from sandboxd.api import app, listener
from sandboxd.config import CallerRule, Config, HttpLimits, Match

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence

    from sandboxd.api.identity import Caller
    from sandboxd.journal.search import Query
    from sandboxd.network.entrance import Entrance

AGENT_UID, AGENT_GID = 54_321, 54_322
CHUNK = 256 * 1024
SLOW = 99


@dataclass
class Call:
    """One invocation and its streams."""

    invocation: models.Invocation
    request: models.Request
    tied: bool
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    stdin: bytearray = field(default_factory=bytearray)
    stdin_closed: bool = False
    signals: list[int] = field(default_factory=list)
    cancelled: bool = False


class MemorySessions:
    """Sessions without files."""

    def __init__(self) -> None:
        self.made: dict[str, models.SessionInfo] = {}

    def find(self, caller: Caller, named: str) -> models.SessionInfo:
        for one in self.made.values():
            if named in {one.id, one.name} and one.uid == caller.uid:
                return one
        raise errors.NotFound("there is no such session")

    async def create(self, caller: Caller, asked: models.SessionRequest) -> models.SessionInfo:
        if asked.name is not None and any(one.name == asked.name for one in self.made.values()):
            raise errors.SessionExists("it is there")
        head = models.CheckpointInfo(id="first", digest="sha256:0", size=0, inodes=0, created=1, head=True)
        made = models.SessionInfo(
            id=f"session-{len(self.made)}",
            name=asked.name,
            uid=caller.uid,
            labels=asked.labels,
            created=1,
            used=1,
            quota=asked.quota,
            head=head,
            size=0,
            inodes=0,
            layers=0,
            calls=0,
        )
        self.made[made.id] = made
        return made

    async def list(self, caller: Caller, *, before: str | None, limit: int) -> models.SessionList:
        return models.SessionList(sessions=[one for one in self.made.values() if one.uid == caller.uid])

    async def get(self, caller: Caller, named: str) -> models.SessionInfo:
        return self.find(caller, named)

    async def delete(self, caller: Caller, named: str) -> None:
        del self.made[self.find(caller, named).id]

    async def checkpoints(
        self, caller: Caller, named: str, *, before: str | None, limit: int
    ) -> models.CheckpointList:
        return models.CheckpointList(checkpoints=[self.find(caller, named).head])

    async def fork(self, caller: Caller, named: str, asked: models.SessionFork) -> models.SessionInfo:
        self.find(caller, named)
        return await self.create(caller, asked)

    async def lend(self, caller: Caller, named: str, handle: str) -> models.SessionInfo:
        self.find(caller, named)
        raise errors.StateConflict(f"{handle} is of no directory")

    async def rollback(self, caller: Caller, named: str, checkpoint: str) -> models.SessionInfo:
        found = self.find(caller, named)
        if checkpoint != found.head.id:
            raise errors.NotFound("there is no such checkpoint")
        return found

    async def checkpoint(self, caller: Caller, named: str) -> models.CheckpointInfo:
        return self.find(caller, named).head

    async def end(self, caller: Caller, named: str, *, discard: bool) -> models.SessionInfo:
        found = self.find(caller, named)
        if not discard:
            raise errors.StateConflict("it keeps no container")
        return found

    async def discard(self, caller: Caller, named: str) -> models.SessionInfo:
        return self.find(caller, named)


class MemoryService:
    """Implements ``Service``. ``true`` and ``zeros N`` end at once, ``wait`` when it is told to."""

    def __init__(self, config: Config) -> None:
        self._sessions = MemorySessions()
        self.config = config
        self.calls: dict[str, Call] = {}
        self.refusals: list[tuple[Caller, str, dict[str, Any]]] = []
        self.callers: list[Caller] = []
        self.closed_streams = 0
        self.stored: dict[str, bytes] = {}
        self.files = MemoryFiles()

    def call(self, caller: Caller, id: str) -> Call:
        found = self.calls.get(id)
        if found is None or (found.invocation.caller.uid != caller.uid and not caller.sees_all):
            raise errors.NotFound("there is no such invocation", id=id)
        return found

    async def submit(self, caller: Caller, request: models.Request, *, tied: bool) -> models.Invocation:
        self.callers.append(caller)
        if not caller.may_use(request.policy):
            raise errors.NotPermitted(f"policy {request.policy!r} is not yours")
        if request.argv[0] == "crash":
            raise ZeroDivisionError("a secret of the daemon")
        if request.argv[0] == "full":
            raise errors.QueueFull("the queue is full", retry_after=2)
        for known in self.calls.values():
            if request.key is not None and known.request.key == request.key:
                if known.request != request:
                    raise errors.KeyConflict("this key was used with another request")
                return known.invocation
        made = models.Invocation(
            id=f"call-{len(self.calls)}",
            state=models.State.RUNNING,
            caller=caller.info(),
            policy=models.DigestRef(name=request.policy, digest="sha256:0"),
            image=models.DigestRef(name="host", digest="sha256:0"),
            plan="sha256:0",
            argv=request.argv,
            labels=request.labels,
            key=request.key,
            times=models.Times(accepted=1),
        )
        self.calls[made.id] = Call(made, request, tied)
        if request.argv[0] != "wait":
            self.end(made.id, models.Cause.EXITED)
        return made

    def end(self, id: str, cause: models.Cause) -> None:
        call = self.calls[id]
        call.invocation.state = models.State.ENDED
        call.invocation.outcome = models.Outcome(cause=cause, message="it ended", exit_code=0)
        call.ended.set()

    @property
    def sessions(self) -> MemorySessions:
        return self._sessions

    def may_store(self, caller: Caller) -> None:
        if not caller.sees_all:
            raise errors.NotPermitted("only operators see what the daemon holds for all callers")

    async def secrets(self, caller: Caller) -> list[models.SecretInfo]:
        self.may_store(caller)
        return [models.SecretInfo(name=name, version=1) for name in self.stored]

    async def secret(self, caller: Caller, name: str) -> models.SecretInfo:
        self.may_store(caller)
        if name not in self.stored:
            raise errors.NotFound("there is no such secret")
        return models.SecretInfo(name=name, version=1)

    async def set_secret(self, caller: Caller, name: str, value: bytes) -> models.SecretInfo:
        self.may_store(caller)
        if name in self.stored:
            raise errors.StateConflict("it is there")
        self.stored[name] = value
        return models.SecretInfo(name=name, version=1)

    async def rotate_secret(self, caller: Caller, name: str, value: bytes) -> models.SecretInfo:
        await self.secret(caller, name)
        self.stored[name] = value
        return models.SecretInfo(name=name, version=2)

    async def remove_secret(self, caller: Caller, name: str) -> None:
        await self.secret(caller, name)
        del self.stored[name]

    async def wait(self, caller: Caller, id: str) -> models.Invocation:
        call = self.call(caller, id)
        await call.ended.wait()
        return call.invocation

    async def get(self, caller: Caller, id: str) -> models.Invocation:
        return self.call(caller, id).invocation

    async def list(
        self,
        caller: Caller,
        *,
        policy: str | None,
        cause: models.Cause | None,
        state: models.State | None,
        key: str | None = None,
        label: Mapping[str, str],
        before: str | None,
        limit: int,
    ) -> models.InvocationList:
        found = [
            call.invocation
            for call in reversed(self.calls.values())
            if (caller.sees_all or call.invocation.caller.uid == caller.uid)
            and policy in {None, call.invocation.policy.name}
            and state in {None, call.invocation.state}
            and label.items() <= call.invocation.labels.items()
        ]
        return models.InvocationList(invocations=found[:limit])

    async def events(
        self, caller: Caller, id: str, *, after: int, follow: bool
    ) -> AsyncIterator[models.Event]:
        call = self.call(caller, id)
        try:
            if after < 1:
                yield models.Event(seq=1, at=1, type="accepted", id=id)
            if follow:
                await call.ended.wait()
            if call.ended.is_set() and after < 2:
                yield models.Event(seq=2, at=2, type="ended", invocation=call.invocation)
        finally:
            self.closed_streams += 1

    async def stream(
        self,
        caller: Caller,
        id: str,
        name: Literal["stdout", "stderr"],
        *,
        offset: int,
        length: int | None = None,
        follow: bool,
    ) -> AsyncIterator[bytes]:
        call = self.call(caller, id)
        try:
            if call.request.argv[0] == "zeros":
                left, piece = int(str(call.request.argv[1])) - offset, bytes(CHUNK)
                while left > 0:
                    yield piece if left >= CHUNK else piece[:left]
                    left -= CHUNK
            elif call.request.argv[0] == "broken":
                yield b"half"
                raise errors.HostFailed("the disk is gone")
            else:
                yield f"{name} of {id}"[offset:].encode()
                if follow:
                    await call.ended.wait()
        finally:
            self.closed_streams += 1

    async def write_stdin(
        self, caller: Caller, id: str, *, offset: int, chunks: AsyncIterator[bytes], eof: bool
    ) -> int:
        call = self.call(caller, id)
        if call.request.stdin != "stream" or call.stdin_closed or offset != len(call.stdin):
            raise errors.StateConflict("not now")
        async for chunk in chunks:
            call.stdin += chunk
        call.stdin_closed = eof
        return len(call.stdin)

    async def signal(self, caller: Caller, id: str, signal: int) -> None:
        self.call(caller, id).signals.append(signal)

    async def callback(self, caller: Caller, id: str) -> models.CallbackState:
        self.call(caller, id)
        return models.CallbackState(exec="tell", state="told", tries=1, at=1)

    async def cancel(self, caller: Caller, id: str) -> models.Invocation:
        call = self.call(caller, id)
        if not call.ended.is_set():
            call.cancelled = True
            self.end(id, models.Cause.CANCELLED)
        return call.invocation

    async def artifact(self, caller: Caller, id: str, path: str) -> models.Artifact:
        self.call(caller, id)
        size = {"out/a b%FF": 8, "out/short": 9, "out/long": 7, "out/slow": SLOW}.get(path)
        if size is None:
            raise errors.NotFound("there is no such artifact")
        return models.Artifact(path=path, size=size, digest=canonical.digest_bytes(b"12345678"))

    async def policies(self, caller: Caller) -> Sequence[models.PolicyInfo]:
        return [await self.policy(caller, "default")]

    async def policy(self, caller: Caller, name: str) -> models.PolicyInfo:
        if name != "default":
            raise errors.NotFound("there is no such policy")
        return models.PolicyInfo(name=name, digest="sha256:0", description="", file="f", image="host")

    async def check_policy(
        self, caller: Caller, text: str, name: str | None
    ) -> Sequence[models.PolicyProblem]:
        return [models.PolicyProblem(file=name or "-", line=1, column=1, code="c", message=text[:10])]

    async def plan(self, caller: Caller, request: models.Request) -> models.PlanDocument:
        return models.PlanDocument(digest="sha256:0", plan={"argv": request.argv}, explain=[])

    async def images(self, caller: Caller) -> Sequence[models.ImageInfo]:
        return []

    async def entrance(self, caller: Caller, id: str) -> Entrance:
        raise errors.CallNotStarted("it does not run yet")

    async def session_entrance(self, caller: Caller, named: str) -> Entrance:
        raise errors.SessionIdle("nothing runs")

    def slots(self, caller: Caller) -> Sequence[models.SlotInfo]:
        if not caller.sees_all:
            raise errors.NotPermitted("only operators")
        return [models.SlotInfo(state="creating", policy="p", image="i", shape="sha256:0", since=1)]

    async def metrics(self, caller: Caller) -> bytes:
        self.slots(caller)
        return b"# EOF"

    async def readable(self, caller: Caller, id: str) -> None:
        self.call(caller, id)

    async def search(self, caller: Caller, query: Query) -> models.SearchResults:
        return models.SearchResults(indexed=query.limit)

    async def replay(self, caller: Caller, id: str, policy: str | None) -> models.Replay:
        return models.Replay(recorded=id, replayed=self.call(caller, id).invocation)

    async def replay_session(
        self, caller: Caller, named: str, policy: str | None, *, keep: bool
    ) -> AsyncGenerator[models.ReplayEvent]:
        found = self._sessions.find(caller, named)

        async def events() -> AsyncGenerator[models.ReplayEvent]:
            yield models.ReplayEvent(ended=models.SessionReplay(recorded=found.id))

        return events()

    async def lineage(self, caller: Caller, digest: str) -> models.Lineage:
        raise errors.NotFound("no call of yours released that")

    async def blob(self, digest: str, size: int, start: int, length: int) -> AsyncIterator[bytes]:
        if size == SLOW:  # it is compared first, for ever
            try:
                await asyncio.sleep(3600)
            finally:
                self.closed_streams += 1
        if (start, length) == (0, size):  # which some paths say wrong
            yield b"1234"
            yield b"5678"
        else:
            yield b"12345678"[start : start + length]

    async def prune(self, caller: Caller, *, age: int | None, size: int | None) -> models.Pruning:
        self.slots(caller)
        return models.Pruning(calls=age or 0, bytes=size or 0)

    async def refused(self, caller: Caller, error: errors.Refused, summary: dict[str, Any]) -> None:
        self.refusals.append((caller, error.code, summary))

    def health(self) -> models.Health:
        return models.Health(status="ready", version="0", engine="fake", runtime="", running=0, queued=0)


class UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("sandboxd", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self.path)


@dataclass
class Served:
    """A running server."""

    path: str
    service: MemoryService
    loop: asyncio.AbstractEventLoop
    config: Config

    def connect(self) -> UnixConnection:
        return UnixConnection(self.path)

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(self.path)
        return sock

    def ask(
        self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, decoded body and headers of one request; a body that is no bytes is sent as JSON."""
        with contextlib.closing(self.connect()) as connection:
            given = dict(headers or {})
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                given.setdefault("Content-Type", "application/json")
            connection.request(method, target, body, given)
            response = connection.getresponse()
            data = response.read()
            kind = response.headers.get("content-type", "")
            return response.status, json.loads(data) if "json" in kind and data else data, response.headers

    def tell(self, action: Callable[[], object]) -> None:
        """Run something on the server's loop."""
        self.loop.call_soon_threadsafe(action)


def receive_all(sock: socket.socket) -> bytes:
    """What comes until the peer closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture
def everything() -> Callable[[socket.socket], bytes]:
    return receive_all


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Starts a server with these limits for HTTP; root is the operator, ``AGENT_UID`` an agent."""
    stack = contextlib.ExitStack()
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandboxd-test-")))
    directory.chmod(0o755)  # peers of other uids connect

    def start(callers: tuple[CallerRule, ...] | None = None, **limits: int) -> Served:
        config = Config(
            http=HttpLimits.model_construct(**HttpLimits().model_dump() | limits),
            callers=callers
            or (
                CallerRule(match=Match(uid=0), role="operator"),
                CallerRule(match=Match(gid=AGENT_GID), role="agent", policies=("default",), concurrent=3),
            ),
        )
        path = directory / "s.sock"
        ready, box = threading.Event(), list[Any]()

        async def main() -> None:
            started, stop = asyncio.Event(), asyncio.Event()
            service = MemoryService(config)
            sock = listener.bind(path, mode=0o666, group=None)
            box.extend([asyncio.get_running_loop(), stop, service])

            async def announce() -> None:
                await started.wait()
                ready.set()

            announcing = asyncio.create_task(announce())
            await app.serve(app.build(service), sock, config, started=started, stop=stop)
            await announcing

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        assert ready.wait(10)
        loop, stop, service = box

        def end() -> None:
            for call in service.calls.values():
                loop.call_soon_threadsafe(call.ended.set)
            loop.call_soon_threadsafe(stop.set)
            thread.join(20)
            assert not thread.is_alive()

        stack.callback(end)
        return Served(os.fspath(path), service, loop, config)

    with stack:
        yield start


@pytest.fixture
def server(serve: Callable[..., Served]) -> Served:
    """A server with the default limits."""
    return serve()
