"""The composition root: builds everything by hand, in order, and takes it down in the other.

Theory of operation.  The process moves into a mount namespace of its own, before it has a thread, and
mounts a tmpfs in ``/run`` that nobody else sees. It adopts orphans, so that the containers'
first processes become its children and can be reaped. Then come the journal (whose lock keeps a
second daemon out), what an earlier daemon left, the engine, the policies, and last the socket: whoever
gets an answer on it gets a daemon that is ready. SIGTERM and SIGINT stop it: nothing new is taken, what
runs gets ``DRAIN`` seconds, and is then cancelled; a second signal cancels at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import signal
import sys
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import anyio
import psutil
import structlog

from sandboxd import errors, plan, systemd
from sandboxd.api.app import build
from sandboxd.api.app import serve as serve_app
from sandboxd.api.descriptors import Descriptors, listening_beside
from sandboxd.api.identity import Identity, Peer
from sandboxd.api.listener import listening
from sandboxd.archive import Archive
from sandboxd.blobs import BlobStore
from sandboxd.callbacks import Callbacks
from sandboxd.config import default_socket
from sandboxd.engine.host import enter_private_mounts, instance_name
from sandboxd.journal import Journal, signing
from sandboxd.kernel.orphans import adopt_orphans
from sandboxd.lanes import Lanes
from sandboxd.maker.process import EngineProcess
from sandboxd.network.authority import Authority
from sandboxd.network.gateway import Gateway
from sandboxd.policy import shipped_policies
from sandboxd.pool import Pool
from sandboxd.pool import Room as SlotRoom
from sandboxd.pressure import HostPressure
from sandboxd.reload import PolicyStore
from sandboxd.room import Room
from sandboxd.scheduler import Scheduler
from sandboxd.secrets import SecretStore, place_of
from sandboxd.service import DaemonService
from sandboxd.sessions import Sessions
from sandboxd.workspace.handles import Handles
from sandboxd.workspace.store import LayerStore

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.api.identity import Caller
    from sandboxd.config import Config

__all__ = ["serve"]

DRAIN = 30.0  # seconds that running calls get when the daemon is stopped
M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -3, -1  # malloc.h
WORKER_THREADS = 64
STOPPING = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger("sandboxd")


def policy_directories(config: Config) -> list[Path]:
    """The shipped policies and then the operator's, of which a later one of the same name wins."""
    return [shipped_policies(), *config.policies]


def serve(config: Config, *, socket: Path | None = None, state: Path | None = None) -> None:
    """Run the daemon until it is stopped by a signal. Raises ConfigInvalid, HostUnsupported.

    ``socket`` and ``state`` are taken before those of the configuration.
    """
    if socket is not None:
        config = config.model_copy(update={"socket": config.socket.model_copy(update={"path": socket})})
    if state is not None:
        config = config.model_copy(update={"state": state.absolute()})
    _configure_logs()
    # Every call holds descriptors from its acceptance on; the tool's own limit is its policy's.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _bound_the_heap()
    # Threads that collect and unpack compute in Python; the event loop waits this long for each of them.
    sys.setswitchinterval(0.0005)
    # Ignored where the daemon was started, it would take the status of every child away.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    config.state.mkdir(mode=0o711, parents=True, exist_ok=True)
    name = instance_name(config.state)
    run = enter_private_mounts(name)
    adopt_orphans()
    engine = EngineProcess.fork(config, run, name)
    try:
        anyio.run(_serve, config, engine)
    except BaseExceptionGroup as group:
        raise _alone(group) from None


def _bound_the_heap() -> None:
    """Keep what was freed from staying with the process: a daemon that runs for weeks would only grow.

    Threads come and go, and each has an arena that keeps its memory; and each read of a socket or pipe has a
    large buffer, between two of which something small is left in the heap. See mallopt(3).
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_ARENA_MAX, 1)
    libc.mallopt(M_MMAP_THRESHOLD, 512 * 1024)  # fixed: glibc would raise it by what is freed
    libc.mallopt(M_TRIM_THRESHOLD, 2**20)


def _alone(error: BaseException) -> BaseException:
    """What a task group wrapped, if that is one error: the group would hide what to do about it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _configure_logs() -> None:
    # No local variables in tracebacks: they hold requests, with the environment and input of their callers.
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    renderers: list[structlog.typing.Processor] = [
        structlog.processors.ExceptionRenderer(tracebacks),
        structlog.processors.JSONRenderer(),
    ]
    if sys.stderr.isatty():
        renderers = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


async def _serve(config: Config, engine: EngineProcess) -> None:
    anyio.to_thread.current_default_thread_limiter().total_tokens = WORKER_THREADS
    gc.disable()  # what is made until the daemon is ready stays
    async with AsyncExitStack() as stack:
        place = signing.place_of(config.journal.key, config.state, os.environ)
        journal = await stack.enter_async_context(Journal.open(config.state, place))
        await stack.enter_async_context(engine)
        authority = Authority.make()  # here, and not before the engine's process was made: that has no key
        removed = await engine.open((authority.certificate, authority.fingerprint))
        if removed:
            log.warning("containers of an earlier daemon were removed", count=len(removed))
        policies = _policies(config)
        blobs = BlobStore(config.state / "blobs")
        blobs.clean()
        lanes = Lanes("directories", most=32, each=2, waiting=0)
        sessions, handles = await _open_sessions(config, journal, policies, lanes, stack)
        secrets = _secrets(config)
        scheduler = _scheduler(config)
        archive = Archive(
            state=config.state, journal=journal, blobs=blobs, policies=policies, retention=config.retention
        )

        def in_force(shape: plan.Shape) -> bool:
            try:
                policy = policies.current.get(shape.policy)
                image = engine.images.resolve(policy.image)
            except errors.SandboxdError:
                return False
            return plan.make_shape(policy, plan.ImageRef(image.name, image.digest)).digest == shape.digest

        def room() -> SlotRoom:
            left = scheduler.memory - scheduler.memory_used
            return SlotRoom(scheduler.slots - scheduler.running, left, scheduler.running)

        pool = Pool(engine, config.pool, images=engine.images, room=room, in_force=in_force)
        scheduler.on_grant = pool.give_way
        scheduler.on_starved = sessions.containers.starve
        tasks = await stack.enter_async_context(anyio.create_task_group())
        service = DaemonService(
            config,
            version=version("sandboxd"),
            engine_name=engine.name,
            runtime=engine.runtime,
            policies=policies,
            images=engine.images,
            pool=pool,
            gateway=Gateway(config.network, engine, tasks, authority),
            journal=journal,
            scheduler=scheduler,
            blobs=blobs,
            tasks=tasks,
            callbacks=Callbacks(journal, config.callbacks, engine),
            inputs=Room(config.budget.inputs),
            secrets=secrets,
            sessions=sessions,
            identify=partial(_identify, Identity(config.callers)),
            archive=archive,
        )
        waiting = stack.enter_context(ExitStack())
        waiting.enter_context(scheduler.paused())
        await service.recover()
        for task in (
            engine.watch,
            policies.watch,
            pool.run,
            sessions.run,
            archive.run,
            service.callbacks.run,
        ):
            tasks.start_soon(task)
        sock = stack.enter_context(listening(config.socket, os.environ))
        tasks.start_soon(
            Descriptors(handles, Identity(config.callers), lanes).serve,
            stack.enter_context(listening_beside(sock, config.socket)),
        )
        stopping = anyio.Event()
        started = anyio.Event()
        tasks.start_soon(partial(serve_app, build(service), sock, config, started=started, stop=stopping))
        await started.wait()
        waiting.close()
        gc.collect()
        gc.freeze()  # no collection has to look at it again
        gc.enable()
        _say_ready(config, engine)
        await _until_stopped(service, _signals())
        systemd.notify("STOPPING=1")
        stopping.set()
        tasks.cancel_scope.cancel()


async def _open_sessions(
    config: Config, journal: Journal, policies: PolicyStore, lanes: Lanes, stack: AsyncExitStack
) -> tuple[Sessions, Handles]:
    handles = Handles()
    kept = [config.state, config.socket.path or default_socket()]
    store = LayerStore(config.state / "sessions")
    sessions = Sessions(
        journal,
        store,
        handles=handles,
        lanes=lanes,
        policy_of=policies.get,
        kept=kept,
    )
    await sessions.open()
    stack.push_async_callback(sessions.close)
    return sessions, handles


def _say_ready(config: Config, engine: EngineProcess) -> None:
    socket = str(config.socket.path or default_socket())
    log.info("ready", socket=socket, engine=engine.name, runtime=engine.runtime)
    systemd.notify("READY=1")


def _policies(config: Config) -> PolicyStore:
    found = PolicyStore(policy_directories(config), config.floor, host_network=config.network.host)
    for problem in found.problems:
        log.warning("policy not in force", problem=str(problem))
    return found


def _scheduler(config: Config) -> Scheduler:
    scheduler = Scheduler(
        memory=config.budget.bytes_of(psutil.virtual_memory().total),
        slots=config.budget.slots,
        cpus=config.budget.cpus,
        queue=config.queue,
    )
    scheduler.pressed = HostPressure(config.pressure).high
    return scheduler


def _secrets(config: Config) -> SecretStore:
    found = SecretStore.open(config.state / "secrets", place_of(config.secrets.key, config.state, os.environ))
    if (why := found.problem()) is not None:
        log.error("secrets cannot be used", reason=why)
    return found


def _signals() -> asyncio.Queue[signal.Signals]:
    """The signals that stop the daemon, from now on until the process has ended.

    By default one that comes late would end it while it clears away.
    """
    found: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def take(number: int, _: object) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(found.put_nowait, signal.Signals(number))

    for number in STOPPING:
        signal.signal(number, take)
    return found


async def _until_stopped(service: DaemonService, signals: asyncio.Queue[signal.Signals]) -> None:
    """Wait for a signal, then for the calls in flight: all of them have an outcome when this returns."""
    number = await signals.get()
    log.info("draining", signal=number.name, in_flight=len(service.in_flight))
    service.drain()
    async with anyio.create_task_group() as waiting:
        waiting.start_soon(_cancel_on_signal, signals, service)
        with anyio.move_on_after(DRAIN):
            await service.all_ended()
        service.cancel_all()
        await service.all_ended()
        await service.sessions.containers.end_all()
        waiting.cancel_scope.cancel()


def _identify(rules: Identity, uid: int, gid: int, groups: frozenset[int]) -> Caller:
    return rules.caller(Peer(uid, gid, groups))


async def _cancel_on_signal(signals: asyncio.Queue[signal.Signals], service: DaemonService) -> None:
    await signals.get()
    service.cancel_all()
