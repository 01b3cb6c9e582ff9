"""The daemon's side of the network: which process serves which container, and what it reports.

Theory of operation.  A container's sockets (``namespace.Doors``) are handed to a process of
``sandboxd.egress`` when anybody in the container wants something of them, and taken back when the call has
ended: most calls never do, and cost no process anything. Until then connections wait in the backlog of their
sockets. A process serves the containers of one caller, and is there before the first of its calls with a
network begins. When it dies, its connections die with it; the containers go to another, with the
names that they were told.
"""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.to_thread
import structlog

from sandboxd import errors
from sandboxd.egress.messages import MAX_FAULT, MAX_MESSAGE, Serve, Setup, decode, encode
from sandboxd.kernel.cgroup import CgroupLimits
from sandboxd.models import NetworkEvent, NetworkUse
from sandboxd.network.authority import Authority
from sandboxd.network.filter import filter_program
from sandboxd.network.outward import Outward
from sandboxd.network.process import Server, Worker
from sandboxd.network.questions import Questions, nobody
from sandboxd.network.served import Secrets, Served, told_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anyio.abc import TaskGroup

    from sandboxd.config import NetworkConfig
    from sandboxd.egress.messages import Enter
    from sandboxd.engine.base import Slot
    from sandboxd.network.authority import Authority
    from sandboxd.network.questions import Decide

__all__ = ["Gateway"]

CONTAINERS = 32  # that one process serves before another is started beside it
END_SECONDS = 5.0  # that a process has for its last word on a container
IDLE_SECONDS = 300.0  # that a process without a container is kept
AT_ONCE = 16  # messages of a process, before others have their turn
MAX_FAULTS = 100  # of a process
NAMES_AT_ONCE = 1000
MAX_THREADS = 8  # of a process, which needs one
MAX_CRASHES = 3  # of the processes that served one container

log = structlog.get_logger("sandboxd.network")


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
        self._workers: dict[int, list[Worker]] = {}
        self._uids = list(range(config.uid + config.count - 1, config.uid - 1, -1))
        self._served: dict[str, Served] = {}

    async def serve(
        self,
        id: str,  # noqa: A002
        uid: int,
        slot: Slot,
        on_event: Callable[[NetworkEvent], None],
        secrets: Secrets = MappingProxyType({}),
        *,
        left: Mapping[str, int] = MappingProxyType({}),
        decide: Decide = nobody,
    ) -> None:
        """Have a slot served, for the call ``id`` of the caller ``uid``. Raises HostFailed.

        ``left``: what its session has left of the budget of all its calls, by the names of that.
        ``secrets``: what its requests may be given on their way out, by name: version and value.
        ``decide``: who answers what its rules leave open.
        """
        rules, doors = slot.shape.network, slot.doors
        assert rules is not None  # noqa: S101
        assert doors is not None  # noqa: S101
        try:
            doors.begin()
        except OSError as error:
            raise errors.HostFailed(f"the container's connections cannot be served: {error}") from error
        await self._worker_for(uid, looks=rules.look_inside)  # there is one, or nothing runs
        questions = Questions(id, decide, self._tasks)
        served = Served(
            id,
            uid,
            doors,
            slot.shape.digest,
            rules,
            on_event,
            dict(secrets),
            questions=questions,
            left=dict(left),
        )
        self._served[id] = served
        served.watch(lambda: self._tasks.start_soon(self._begin, served))

    async def _begin(self, served: Served) -> None:
        """Hand a container over, once anybody in there wants something. Safe to call twice."""
        async with served.handing:
            if served.worker is not None or served.ended.is_set():
                return
            for left in reversed(range(MAX_CRASHES)):
                try:
                    worker = await self._worker_for(served.uid, looks=served.rules.look_inside)
                    served.worker = worker
                    await self._hand_over(served, worker)
                except errors.HostFailed:
                    if served.worker is not None and served.worker is not worker:
                        return  # whoever saw it end has found another
                    if not left:
                        log.exception("a container's connections are not served", id=served.id)
                        served.on_event(_failed("no process could be had that serves the connections"))
                        served.give_up()
                else:
                    return

    def renew(self, id: str, secrets: Secrets) -> None:  # noqa: A002
        """Secrets have new values; requests have them from now on. Of a call that ended: nothing."""
        if (served := self._served.get(id)) is not None:
            served.secrets = {**served.secrets, **secrets}
            self._tasks.start_soon(self._renew, served, secrets)

    async def _renew(self, served: Served, secrets: Secrets) -> None:
        async with served.handing:  # or what is handed over could come after this, and be older
            if served.ending or served.worker is None:
                return  # it would keep what it has no container for; or it is told all when it gets that
            with suppress(OSError):  # who dies is followed by one that is told all
                await served.worker.send(encode("secrets", told_secrets(served, secrets)))

    async def begin_end(self, id: str, *, inhabited: bool = False) -> None:  # noqa: A002
        """End what is left of the call's connections; ``end`` waits for that.

        ``inhabited``: somebody lives in the container still, and is refused everything until it is served.
        """
        served = self._served[id]
        served.unwatch()
        if served.worker is None and not served.awake and not served.doors.knocked():
            served.ended.set()  # nobody has wanted anything
        else:
            await self._begin(served)
        served.inhabited = inhabited
        served.ending = True
        served.questions.close()
        if served.worker is not None:
            with suppress(OSError):
                await served.worker.send(encode("end", {"id": id}))

    async def end(self, id: str) -> NetworkUse:  # noqa: A002
        """What the call used, and what it was refused, after ``begin_end``."""
        served = self._served.pop(id)
        if served.worker is not None:
            await self._finish(served, served.worker)
        if served.inhabited:  # when its process waits at them no more
            served.doors.rest()
        return served.use

    async def _finish(self, served: Served, worker: Worker) -> None:
        try:
            with anyio.move_on_after(END_SECONDS) as scope:
                await served.ended.wait()
        finally:
            (served.worker or worker).containers.pop(served.id, None)
        if scope.cancelled_caught:
            served.lose()
            log.error("a network process does not answer", pid=worker.process.pid)
            worker.process.kill()  # nobody else is to wait for it; what it did is not known
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

    async def _hand_over(self, served: Served, worker: Worker) -> None:
        worker.containers[served.id] = served
        try:
            if served.shape not in worker.rules:
                await worker.send(encode("rules", {"name": served.shape, "rules": asdict(served.rules)}))
                worker.rules.add(served.shape)
            names = iter(served.names.items())
            while known := dict(islice(names, NAMES_AT_ONCE)):
                await worker.send(encode("names", {"id": served.id, "names": known}))
            if served.secrets:
                await worker.send(encode("secrets", told_secrets(served, served.secrets)))
            await worker.send(
                encode("serve", Serve(served.id, served.shape, served.left)), served.doors.descriptors
            )
        except BaseException as error:
            worker.containers.pop(served.id, None)
            if isinstance(error, OSError):
                raise errors.HostFailed(f"the network's process takes no container: {error}") from error
            raise

    async def _worker_for(self, caller: int, *, looks: bool = False) -> Worker:
        workers = self._workers.setdefault(caller, [])
        while fitting := [worker for worker in workers if worker.looks or not looks]:
            least = min(fitting, key=lambda worker: len(worker.containers))
            if len(least.containers) >= CONTAINERS and len(workers) < (os.cpu_count() or 1):
                break
            if not least.ready.is_set():
                await least.ready.wait()
            if least in workers:  # it may have ended meanwhile
                return least
        if not self._uids:
            raise errors.HostFailed("every id of the network's processes is in use; raise network.count")
        nameservers = tuple(map(str, self._config.nameservers)) or _host_nameservers()
        uid = self._uids.pop()
        try:
            worker = Worker(caller, uid, looks=looks)
        except OSError as error:
            self._uids.append(uid)
            raise errors.HostFailed(f"a process for the network could not be started: {error}") from error
        worker.outward = Outward(self._tasks, worker.sender, nameservers, self._config.port)
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

    async def _hear(self, worker: Worker) -> None:
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

    def _understood(self, worker: Worker, message: bytes) -> bool:
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

    async def _after_crash(self, worker: Worker) -> None:
        left = [served for served in worker.containers.values() if not served.ended.is_set()]
        if left:
            log.error("a network process ended", pid=worker.process.pid, status=worker.process.returncode)
        for served in left:
            served.crashes += 1
            served.questions.close()
            served.events = 0
            served.lose()
            served.on_event(_failed("the process that served the connections ended, and they with it"))
            # what was used of a budget is not known any more
            if served.ending or served.crashes > MAX_CRASHES or served.counts:
                served.give_up()
        for served in left:
            async with served.handing:  # or its end could be told before it
                await self._hand_on(served, worker)

    async def _hand_on(self, served: Served, gone: Worker) -> None:
        """Give a container whose process is gone to another, if it has none yet."""
        if served.ended.is_set() or served.worker is not gone:
            return
        try:
            worker = await self._worker_for(served.uid, looks=served.rules.look_inside)
            if served.ending:
                served.give_up()
                return
            served.worker = worker
            await self._hand_over(served, worker)
        except errors.HostFailed:
            log.exception("a container's connections are not served any more", id=served.id)
            served.give_up()


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
