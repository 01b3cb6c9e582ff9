"""The daemon's side of the network: which process serves which container, and what it reports.

Theory of operation.  A container's sockets (``namespace.Doors``) are handed to a process of
``sandboxd.egress`` when a call gets the container, and taken back when the call has ended. A process serves
the containers of one caller. It is started when first needed, and until it is up, connections wait in the
backlog of their sockets. When it dies, its connections die with it; the containers go to another, with the
names that they were told.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.egress.messages import MAX_FAULT, MAX_MESSAGE, MAX_NAMES, Serve, Setup, decode, encode
from sandboxd.kernel import descriptors
from sandboxd.kernel.cgroup import CgroupLimits
from sandboxd.models import NetworkEvent, NetworkUse
from sandboxd.network.authority import Authority
from sandboxd.network.filter import filter_program
from sandboxd.network.outward import Outward
from sandboxd.network.questions import Questions, nobody
from sandboxd.reach import Reach

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.abc import TaskGroup

    from sandboxd.config import NetworkConfig
    from sandboxd.egress.messages import Enter
    from sandboxd.engine.base import Slot
    from sandboxd.network.authority import Authority
    from sandboxd.network.namespace import Doors
    from sandboxd.network.questions import Decide
    from sandboxd.reach import NetworkRules

__all__ = ["Gateway", "Server"]

CONTAINERS = 32  # that one process serves before another is started beside it
END_SECONDS = 5.0  # that a process has for its last word on a container
IDLE_SECONDS = 300.0  # that a process without a container is kept
MAX_HEARD = 1000  # messages of a process that are heard for the sake of one container's end
AT_ONCE = 16  # messages of a process, before others have their turn
MAX_EVENTS = 2000  # of a call, by one process
MAX_FAULTS = 100  # of a process
MAX_NAME = 255
NAMES_AT_ONCE = 1000
MAX_THREADS = 8  # of a process, which needs one
MAX_CRASHES = 3  # of the processes that served one container

Secrets = Mapping[str, tuple[int, bytes] | None]
"""Version and value, by name; None: it may be given to no request any more."""

log = structlog.get_logger("sandboxd.network")


@dataclass
class _Served:
    """One container, and the call that it belongs to."""

    id: str
    uid: int
    doors: Doors
    shape: str
    rules: NetworkRules
    on_event: Callable[[NetworkEvent], None]
    worker: _Worker
    secrets: Secrets
    questions: Questions
    names: dict[str, str] = field(default_factory=dict)
    crashes: int = 0
    events: int = 0
    ending: bool = False
    awake: bool = False
    """Whether anybody in the container has connected to anything, asked for it, or was refused it."""
    inhabited: bool = False
    """Whether somebody lives in the container when it has ended."""
    quiet: bool = False
    """It has ended and was never awake: nobody waits for its process's last word."""
    ended: anyio.Event = field(default_factory=anyio.Event)
    use: NetworkUse = field(default_factory=NetworkUse)

    @cached_property
    def reach(self) -> Reach:
        """Its rules, by which each connection is checked again that its process asks for."""
        return Reach(self.rules)

    def hear(self, kind: str, content: dict[str, Any]) -> None:  # noqa: C901  (a line for each kind)
        """What its process says of it. Raises ValueError and the like for what it may not say."""
        if self.ended.is_set():
            raise ValueError("it speaks of what has ended")
        if self.quiet and kind != "ended":
            return  # of a call that is over
        match kind:
            case "awake":
                self.awake = True
            case "event" if self.events < MAX_EVENTS:
                event = NetworkEvent.model_validate(content)
                self.events += 1
                self.on_event(event)
            case "name" if len(self.names) < MAX_NAMES:
                name, address = content["name"], ipaddress.IPv4Address(content["address"])
                self.names[str(name)[:MAX_NAME]] = str(address)
            case "ask":
                if not self.ending:  # else it has not heard yet that the call is over
                    self.questions.ask(content, self.worker.send)
            case "connect":
                self.worker.outward.connect(content, self.reach.leads)
            case "withdraw":
                self.questions.withdraw(int(content["number"]))
            case "ended":
                self.use = NetworkUse.model_validate(content)
                self.ended.set()
            case _:
                raise ValueError(f"unknown, or too often: {kind[:32]!r}")

    def give_up(self) -> None:
        """Nobody serves it any more: what connects now is refused at once, and does not wait."""
        self.doors.close()
        self.questions.close()
        self.ended.set()


class _Worker:
    """One process, and the socket to it."""

    def __init__(self, caller: int, uid: int, *, looks: bool) -> None:
        self.caller = caller
        self.looks = looks
        """Whether it has what rules need that look into HTTP: the authority's key, and programs for TLS."""
        self.uid = uid
        self.containers: dict[str, _Served] = {}
        self.inward: dict[int, Callable[[dict[str, object] | None], None]] = {}
        """Who is told of the end of a connection into a container, or that nobody will say how it ended."""
        self.name = f"egress-{uid}"
        self.ready = anyio.Event()
        """Set when it takes containers, or never will."""
        self.faults = 0
        self.outward: Outward
        self.rules: set[str] = set()
        """The names of those that it has."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            descriptors.let_wait(sock, 4 * MAX_MESSAGE)
        ours.setblocking(False)
        self.sock = ours
        self.send = descriptors.Sender(ours).send
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-m", "sandboxd.egress", str(theirs.fileno()), str(uid)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"LANG": "C.UTF-8"},
            )

    def hear(self, kind: str, content: dict[str, Any]) -> None:
        """What it says that is of no container. Raises ValueError and the like for what it may not say."""
        match kind:
            case "inward":
                self.inward.pop(content["number"])(content)
            case "connect":
                self.outward.connect(content, None)
            case "query":
                self.outward.query(content)
            case "enough":
                self.outward.enough(int(content["number"]))
            case _:
                raise ValueError(f"unknown: {kind[:32]!r}")

    def kill(self) -> None:
        """End the process; its end is heard like any other."""
        self.process.kill()

    async def stop(self) -> None:
        """End the process and reap it."""
        self.process.kill()
        await anyio.to_thread.run_sync(self.process.wait)
        self.sock.close()  # not before: who waits until it can be written would never wake


class Server(Protocol):
    """A process that serves connections, to those who have some there."""

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Tell it something. Raises OSError when it is gone."""

    def kill(self) -> None:
        """End it, and all that it serves."""


class Confining(Protocol):
    """Who puts processes into cgroups."""

    async def confine(self, name: str, pid: int, limits: CgroupLimits) -> None:
        """Put a process into one of its own."""

    async def release(self, name: str) -> None:
        """Take it away."""


class Gateway:
    """Which process serves which container. ``tasks`` is the daemon's task group."""

    def __init__(
        self, config: NetworkConfig, confining: Confining, tasks: TaskGroup, authority: Authority
    ) -> None:
        self._config = config
        self._confining = confining
        self._tasks = tasks
        self._authority = authority
        self._workers: dict[int, list[_Worker]] = {}
        self._uids = list(range(config.uid + config.count - 1, config.uid - 1, -1))
        self._served: dict[str, _Served] = {}

    async def serve(
        self,
        id: str,  # noqa: A002
        uid: int,
        slot: Slot,
        on_event: Callable[[NetworkEvent], None],
        secrets: Secrets = MappingProxyType({}),
        *,
        decide: Decide = nobody,
    ) -> None:
        """Have a slot served, for the call ``id`` of the caller ``uid``. Raises HostFailed.

        ``secrets``: what its requests may be given on their way out, by name: version and value.
        ``decide``: who answers what its rules leave open.
        """
        rules, doors = slot.shape.network, slot.doors
        assert rules is not None  # noqa: S101
        assert doors is not None  # noqa: S101
        doors.begin()
        worker = await self._worker_for(uid, looks=rules.look_inside)
        questions = Questions(id, decide, self._tasks)
        served = _Served(
            id, uid, doors, slot.shape.digest, rules, on_event, worker, dict(secrets), questions=questions
        )
        await self._hand_over(served)
        self._served[id] = served

    def renew(self, id: str, secrets: Secrets) -> None:  # noqa: A002
        """Secrets have new values; requests have them from now on. Of a call that ended: nothing."""
        if (served := self._served.get(id)) is not None:
            served.secrets = {**served.secrets, **secrets}
            self._tasks.start_soon(self._renew, served, secrets)

    async def _renew(self, served: _Served, secrets: Secrets) -> None:
        if served.ending:
            return  # it would keep what it has no container for
        with suppress(OSError):  # who dies is followed by one that is told all
            await served.worker.send(encode("secrets", _told(served, secrets)))

    async def begin_end(self, id: str, *, inhabited: bool = False) -> None:  # noqa: A002
        """Cut what is left of the call's connections; ``end`` waits for that.

        ``inhabited``: somebody lives in the container still, and is refused everything until it is served.
        """
        served = self._served[id]
        served.inhabited = inhabited
        served.ending = True
        served.questions.close()
        served.quiet = not inhabited and self._nothing_happened(served)
        with suppress(OSError):
            await served.worker.send(encode("end", {"id": id}))

    async def end(self, id: str) -> NetworkUse:  # noqa: A002
        """What the call used, and what it was refused, after ``begin_end``."""
        served = self._served.pop(id)
        if served.quiet:
            self._tasks.start_soon(self._finish, served)
        else:
            await self._finish(served)
        if served.inhabited:  # when its process waits at them no more
            served.doors.rest()
        return served.use

    def _nothing_happened(self, served: _Served) -> bool:
        """Whether there is nothing that its process could still tell, now that nobody lives in the container.

        It says that it is awake before it takes anything: so what is neither said nor waiting has not been.
        """
        if served.ended.is_set() or served.doors.knocked():
            return False
        for _ in range(MAX_HEARD):
            try:
                message = served.worker.sock.recv(MAX_MESSAGE)
            except BlockingIOError:
                return not served.awake
            except OSError:
                return False
            if not message or not self._understood(served.worker, message):
                served.worker.kill()
                return False
        return False

    async def _finish(self, served: _Served) -> None:
        try:
            with anyio.move_on_after(END_SECONDS) as scope:
                await served.ended.wait()
        finally:
            served.worker.containers.pop(served.id, None)
        if scope.cancelled_caught:
            log.error("a network process does not answer", pid=served.worker.process.pid)
            served.worker.process.kill()  # nobody else is to wait for it; what it did is not known
            if not served.quiet:
                served.on_event(_failed("the process that served the connections did not answer in the end"))

    async def enter(
        self,
        uid: int,
        asked: Enter,
        fds: Sequence[int],
        on_end: Callable[[dict[str, object] | None], None],
    ) -> Server:
        """Have a connection into a container of the caller ``uid`` served; returns by whom.

        The descriptors stay the caller's to close. ``on_end`` is called once, unless this raises HostFailed.
        """
        worker = await self._worker_for(uid)
        worker.inward[asked.number] = on_end
        try:
            await worker.send(encode("enter", asked), fds)
        except BaseException as error:
            told = worker.inward.pop(asked.number, None) is None
            if isinstance(error, OSError) and not told:
                raise errors.HostFailed(f"the network's process takes no connection: {error}") from error
            if not isinstance(error, OSError):
                raise
        return worker

    async def _hand_over(self, served: _Served) -> None:
        worker = served.worker
        worker.containers[served.id] = served
        try:
            if served.shape not in worker.rules:
                await worker.send(encode("rules", {"name": served.shape, "rules": asdict(served.rules)}))
                worker.rules.add(served.shape)
            names = iter(served.names.items())
            while known := dict(islice(names, NAMES_AT_ONCE)):
                await worker.send(encode("names", {"id": served.id, "names": known}))
            if served.secrets:
                await worker.send(encode("secrets", _told(served, served.secrets)))
            await worker.send(encode("serve", Serve(served.id, served.shape)), served.doors.descriptors)
        except BaseException as error:
            worker.containers.pop(served.id, None)
            if isinstance(error, OSError):
                raise errors.HostFailed(f"the network's process takes no container: {error}") from error
            raise

    async def _worker_for(self, caller: int, *, looks: bool = False) -> _Worker:
        workers = self._workers.setdefault(caller, [])
        while fitting := [worker for worker in workers if worker.looks or not looks]:
            least = min(fitting, key=lambda worker: len(worker.containers))
            if len(least.containers) >= CONTAINERS and len(workers) < (os.cpu_count() or 1):
                break
            await least.ready.wait()
            if least in workers:  # it may have ended meanwhile
                return least
        if not self._uids:
            raise errors.HostFailed("every id of the network's processes is in use; raise network.count")
        nameservers = tuple(map(str, self._config.nameservers)) or _host_nameservers()
        worker = _Worker(caller, self._uids.pop(), looks=looks)
        worker.outward = Outward(self._tasks, worker.send, nameservers, self._config.port)
        workers.append(worker)
        self._tasks.start_soon(self._hear, worker)
        try:
            limits = CgroupLimits(self._config.memory, MAX_THREADS, self._config.cpus)
            await self._confining.confine(worker.name, worker.process.pid, limits)
            await worker.send(encode("setup", self._setup(nameservers, looks=looks)))
        except BaseException as error:
            worker.process.kill()  # the end of it is heard, and who waits for it looks for another
            if isinstance(error, errors.SandboxdError | OSError | UnicodeDecodeError):
                raise errors.HostFailed(f"a process for the network could not be started: {error}") from error
            raise
        worker.ready.set()
        return worker

    def _setup(self, nameservers: tuple[str, ...], *, looks: bool) -> Setup:
        program = base64.b64encode(filter_program()).decode()
        if not looks:
            return Setup(nameservers, self._config.port, program, "", "", "")
        authorities = "\n".join(file.read_text(encoding="ascii") for file in self._config.authorities)
        authority = self._authority
        return Setup(
            nameservers, self._config.port, program, authorities, authority.certificate, authority.key
        )

    async def _hear(self, worker: _Worker) -> None:
        heard = 0
        try:
            while True:
                try:
                    message = worker.sock.recv(MAX_MESSAGE)
                except BlockingIOError:
                    with anyio.move_on_after(IDLE_SECONDS) as scope:
                        await anyio.wait_readable(worker.sock)
                    if scope.cancelled_caught and not worker.containers and not worker.inward:
                        break
                    continue
                except OSError:
                    break
                if not message or not self._understood(worker, message):
                    break
                heard += 1
                if heard % AT_ONCE == 0:
                    await anyio.lowlevel.checkpoint()  # it may say more than anybody wants to hear
        finally:
            self._workers[worker.caller].remove(worker)
            with anyio.CancelScope(shield=True):
                await worker.stop()
                with suppress(errors.SandboxdError):
                    await self._confining.release(worker.name)
            worker.ready.set()
            worker.outward.close()
            self._uids.append(worker.uid)
            while worker.inward:
                worker.inward.popitem()[1](None)
        await self._after_crash(worker)

    def _understood(self, worker: _Worker, message: bytes) -> bool:
        """Take what a process says, as that of a stranger; False: it is not to be believed any more.

        It says nothing of containers that it does not serve, and no more of any than it may.
        """
        try:
            kind, content = decode(message)
            id = content.pop("id", None)  # noqa: A001
            if kind == "fault":
                worker.faults += 1
                if worker.faults <= MAX_FAULTS:
                    why = str(content["why"])[:MAX_FAULT]
                    log.error("a network process failed", pid=worker.process.pid, why=why)
                return True
            if id is None or kind == "inward":  # which is of a call whose container it may not serve
                worker.hear(kind, content)
            else:
                worker.containers[id].hear(kind, content)
        except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
            log.error(  # noqa: TRY400  (its words are hostile, and no trace of ours)
                "a network process is not understood", pid=worker.process.pid, reason=str(error)[:500]
            )
            return False
        return True

    async def _after_crash(self, worker: _Worker) -> None:
        left = [served for served in worker.containers.values() if not served.ended.is_set()]
        if left:
            log.error("a network process ended", pid=worker.process.pid, status=worker.process.returncode)
        for served in left:
            if served.quiet:
                served.ended.set()
                continue
            served.crashes += 1
            served.questions.close()
            served.events = 0
            served.on_event(_failed("the process that served the connections ended, and they with it"))
            # what was used of a budget is not known any more
            if served.ending or served.crashes > MAX_CRASHES or served.rules.budget:
                served.give_up()
        for served in left:
            if served.ended.is_set():
                continue
            try:
                worker = await self._worker_for(served.uid, looks=served.rules.look_inside)
                if served.ending:
                    served.give_up()
                    continue
                served.worker = worker
                await self._hand_over(served)
            except errors.HostFailed:
                log.exception("a container's connections are not served any more", id=served.id)
                served.give_up()


def _told(served: _Served, secrets: Secrets) -> dict[str, object]:
    values = {
        name: None if found is None else (found[0], base64.b64encode(found[1]).decode())
        for name, found in secrets.items()
    }
    return {"id": served.id, "values": values}


def _failed(why: str) -> NetworkEvent:
    return NetworkEvent(verdict="failed", why=why)


def _host_nameservers() -> tuple[str, ...]:
    found = []
    with suppress(OSError):
        for line in Path("/etc/resolv.conf").read_text(errors="replace").splitlines():
            word, _, rest = line.strip().partition(" ")
            if word == "nameserver" and rest.strip():
                found.append(rest.split()[0].partition("%")[0])
    return tuple(found) or ("127.0.0.1",)
