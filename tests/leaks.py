"""The leak check: what a test session made, it has to have taken away when it ends.

Theory of operation. Before and after, the check lists mounts, cgroups, namespaces, processes, temporary
files and its own descriptors, and fails on what is new. The machine is shared: a colleague's session or
daemon may be at work beside this one, and so may another process of this session (pytest-xdist), each of
which looks after itself; who started them looks at all of it once more. So a thing counts when it carries
one of the session's *claims* (a random token, the session's temporary directory, whatever a fixture adds),
or descends from this process, or has the token in its environment. With ``CI=true`` and no other session
between start and end, everything that names sandboxd counts, claimed or not.

A fixture that gives something a name with neither the token nor a path below ``tmp_path`` in it adds
that name to ``claims``.

What the session's daemon holds is compared while it lives: ``held.py``.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import sys
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from held import Held, check_held, namespaces_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon

RUN = "SANDBOXD_TEST_RUN"  # in the environment of everything that the session starts
NAME = "sandboxd"
PREFIXES = ("sandboxd", "run-in-sandbox")
GRACE_SECONDS = 5.0  # a killed process needs a moment
SESSIONS = Path("/tmp/sandboxd-test-sessions")
SHARED = "PYTEST_XDIST_WORKER"  # in the environment of one of several processes that share the tests


FOREIGN = ("net", "user")  # what a container has and a service of the host mostly has not


@dataclass(frozen=True)
class Snapshot:
    """What there is, each as a line that a person can act on."""

    mounts: frozenset[str]
    cgroups: frozenset[str]
    namespaces: frozenset[str]
    processes: frozenset[str]
    files: frozenset[str]
    descriptors: frozenset[str]

    def new_since(self, before: Snapshot) -> str:
        """What is here and was not there, or an empty text."""
        lines = []
        for field in fields(self):
            added: frozenset[str] = getattr(self, field.name) - getattr(before, field.name)
            lines += [f"  {field.name}: {line}" for line in sorted(added)]
        return "\n".join(lines)


class Sessions:
    """Counts the sessions on this machine, so that one can know that it was alone."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._alone = self._lock(fcntl.LOCK_EX)
        self._number = self._count() + 1
        os.pwrite(self._fd, f"{self._number:020d}".encode(), 0)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _count(self) -> int:
        text = os.pread(self._fd, 20, 0)
        return int(text) if text.isdigit() else 0

    def alone(self) -> bool:
        """Whether no other session has run since this one began."""
        return self._alone and self._count() == self._number

    def close(self) -> None:
        os.close(self._fd)


class Watch:
    """Lists what is attributable to this session."""

    def __init__(self, claims: set[str], token: str) -> None:
        self.claims = claims
        self._token = f"{RUN}={token}".encode()

    def snapshot(self, *, everything: bool = False) -> Snapshot:
        """What there is now; ``everything``: also what names sandboxd and is claimed by nobody."""
        gc.collect()  # a descriptor of a collected object is no leak
        names = (*self.claims, *((NAME,) if everything else ()))
        processes = dict(self._processes(names))
        inside = [_text(f"/proc/{pid}/cgroup") for pid in processes]
        return Snapshot(
            mounts=frozenset(_mounts(names)),
            cgroups=frozenset(path for path in _cgroups() if _any(names, path) or _inside(path, inside)),
            namespaces=frozenset(self._namespaces(processes, names, everything=everything)),
            processes=frozenset(processes.values()),
            files=frozenset(_files(names)),
            descriptors=frozenset(descriptors()),
        )

    def leaks_since(self, before: Snapshot, *, everything: Callable[[], bool]) -> str:
        """What is new after some grace, or an empty text."""
        limit = time.monotonic() + GRACE_SECONDS
        while found := self.snapshot(everything=everything()).new_since(before):
            if time.monotonic() > limit:
                return found
            time.sleep(0.05)
        return ""

    def _processes(self, names: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        parents: dict[int, int] = {}
        for entry in os.listdir("/proc"):  # noqa: PTH208
            if entry.isdigit():
                parents[int(entry)] = _parent(int(entry))
        own = os.getpid()
        ancestors = set(_line_of(own, parents))
        for pid, parent in parents.items():
            if pid in ancestors or parent == 2:  # ourselves, who started us, kernel threads
                continue
            command = _text(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
            claimed = (
                own in _line_of(pid, parents)
                or self._token in _bytes(f"/proc/{pid}/environ").split(b"\0")
                or _any(names, _text(f"/proc/{pid}/cgroup"))
                or _any(tuple(self.claims), command)
            )
            if claimed:
                yield pid, f"{pid} {command or _text(f'/proc/{pid}/comm').strip()}"

    def _namespaces(
        self, processes: dict[int, str], names: tuple[str, ...], *, everything: bool
    ) -> Iterator[str]:
        ours = namespaces_of(os.getpid())
        for pid in processes:
            yield from namespaces_of(pid) - ours
        for entry in os.listdir("/proc") if everything else ():  # noqa: PTH208
            # Of somebody who names sandboxd nowhere: services of the host have mount namespaces too.
            if entry.isdigit():
                found = namespaces_of(int(entry)) - ours
                if any(name.startswith(FOREIGN) for name in found):
                    yield from found
        with contextlib.suppress(OSError):
            for path in Path("/run/netns").iterdir():
                if _any(names, path.name):
                    yield f"ip netns {path.name}"


def _line_of(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        yield pid
        pid = parents[pid]


def _any(names: tuple[str, ...], text: str) -> bool:
    return any(name in text for name in names)


def _bytes(path: str) -> bytes:
    """A file of a process that may end at any time, or be another user's."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _text(path: str) -> str:
    return _bytes(path).decode(errors="replace")


def _parent(pid: int) -> int:
    # The command in parentheses may hold anything, also parentheses: proc_pid_stat(5).
    fields_after = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields_after[1]) if len(fields_after) > 1 else 0


def _mounts(names: tuple[str, ...]) -> Iterator[str]:
    for line in _text("/proc/self/mountinfo").splitlines():
        if _any(names, line):
            parts = line.split(" ")
            yield f"{parts[4]} (root {parts[3]}, {line.partition(' - ')[2]})"


def _cgroups() -> Iterator[str]:
    """Directories below a cgroup mount whose path names sandboxd."""
    for line in _text("/proc/self/mountinfo").splitlines():
        if line.partition(" - ")[2].split(" ")[0] in {"cgroup", "cgroup2"}:
            for path, _, _ in os.walk(line.split(" ")[4]):
                if NAME in path:
                    yield path


def _inside(path: str, cgroups: list[str]) -> bool:
    """Whether a process of ours is in this cgroup: its name ends the directory's path."""
    return any(
        path.endswith(name)
        for text in cgroups
        for line in text.splitlines()
        if NAME in (name := line.split(":", 2)[-1])
    )


def _files(names: tuple[str, ...]) -> Iterator[str]:
    for directory in ("/tmp", "/run", "/dev/shm", "/var/tmp"):
        with contextlib.suppress(OSError):
            for path in Path(directory).iterdir():
                if path.name.startswith(PREFIXES) and _any(names, path.name):
                    yield str(path)


def descriptors() -> Iterator[str]:
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):  # the one that lists
            yield f"{entry} -> {Path('/proc/self/fd', entry).readlink()}"


WHOLE = pytest.StashKey["tuple[Session, Snapshot]"]()


@dataclass(frozen=True)
class Session:
    """What the fixtures below share."""

    watch: Watch
    token: str
    sessions: Sessions | None
    """None in one of several processes: who started them is the session that counts."""

    @classmethod
    def begin(cls, temporary: Path) -> Self:
        token = uuid.uuid4().hex[:12]
        os.environ[RUN] = token
        sessions = None if SHARED in os.environ else Sessions(SESSIONS)
        return cls(Watch({token, f"{temporary}/"}, token), token, sessions)

    def whole_machine(self) -> bool:
        return in_ci() and self.sessions is not None and self.sessions.alone()

    def end(self) -> None:
        os.environ.pop(RUN, None)
        if self.sessions is not None:
            self.sessions.close()


def in_ci() -> bool:
    """Whether a missing service has to fail and not to skip."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


@pytest.fixture(scope="session", autouse=True)
def leak_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Wraps the whole session; a leak is an error of its last test."""
    session = Session.begin(tmp_path_factory.getbasetemp())
    # Taken whole: what an unclaimed neighbour holds is then never new.
    before = session.watch.snapshot(everything=True)
    yield session
    found = session.watch.leaks_since(before, everything=session.whole_machine)
    session.end()
    if found:
        pytest.fail(f"the test session left behind:\n{found}", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Begins what wraps all processes that share the tests, as ``leak_session`` does each of them."""
    if session.config.getoption("numprocesses", None):
        whole = Session.begin(Path(f"/tmp/{NAME}-none"))
        session.config.stash[WHOLE] = whole, whole.watch.snapshot(everything=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Ends it: a leak is a failure of the whole session."""
    yield
    if WHOLE not in session.config.stash:
        return
    whole, before = session.config.stash[WHOLE]
    found = whole.watch.leaks_since(before, everything=whole.whole_machine)
    whole.end()
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        sys.stderr.write(f"ERROR the test session left behind:\n{found}\n")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Daemon]) -> Iterator[None]:
    """Has the session's daemon looked at when it has started, and before it is stopped."""
    result = yield
    if fixturedef.argname == "daemon" and fixturedef.scope == "session" and fixturedef.cached_result:
        daemon = fixturedef.cached_result[0]
        if daemon is not None:  # None: it did not start
            before = Held.by(daemon.processes, ())
            fixturedef.addfinalizer(lambda: check_held(daemon, before))
    return result


@pytest.fixture
def claims(leak_session: Session) -> set[str]:
    """Names that mark mounts, cgroups, processes and files as this session's; add to it."""
    return leak_session.watch.claims


@pytest.fixture
def run_token(leak_session: Session) -> str:
    """A word to put into names, so that what carries it is known to be this session's."""
    return leak_session.token


@pytest.fixture
def no_leaks(leak_session: Session) -> Iterator[None]:
    """Wraps one test: it leaves behind nothing that was not there when it began."""
    before = leak_session.watch.snapshot()
    yield
    found = leak_session.watch.leaks_since(before, everything=lambda: False)
    if found:
        pytest.fail(f"the test left behind:\n{found}", pytrace=False)


@pytest.fixture(scope="session")
def need() -> Callable[[object, str], None]:
    """``need(shutil.which("crun"), "crun")``: without it, fails in CI and skips on a laptop."""

    def check(found: object, what: str) -> None:
        if not found:
            (pytest.fail if in_ci() else pytest.skip)(f"this needs {what}")

    return check
