"""A daemon's life: killed, drained, twice on one directory, activated by its manager, out of disk, long."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import IMAGES, PATIENCE, SANDBOXD, berths_of, slots_of, until

from sandboxd import Client, errors
from sandboxd.engine.berth import READY
from sandboxd.engine.host import instance_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation


def running(client: Client, *argv: str, **fields: object) -> Invocation:
    """A call whose command runs."""
    found = client.start(list(argv), **fields)  # type: ignore[arg-type]
    until(lambda: client.get(found.id).state == "running", "the command runs")
    return found


def test_kill_9_leaves_no_container_and_every_call_with_an_outcome(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    first = daemon_factory()
    client = first.client()
    calls = [running(client, "sh", "-c", "echo before; exec sleep 1000", policy="tiny") for _ in range(3)]
    done = first.run("echo", "done", key="finished")
    queued = client.start(["true"], key="repeated")
    containers: set[int] = set()
    for path in slots_of(first):
        with suppress(FileNotFoundError):  # that of the call that is done may go meanwhile
            text = (Path(path) / "cgroup.procs").read_text() if path.startswith("/") else ""
            containers |= {int(pid) for pid in text.split() if pid != "0"}
    assert len(containers) >= 6  # PID 1 and the tool of each
    first.stop(signal.SIGKILL)
    until(lambda: not any(psutil.pid_exists(pid) for pid in containers), "the containers die", 5)
    began = time.monotonic()
    second = daemon_factory(state=first.state, name="second")
    assert second.run("echo", "served").outcome is not None
    assert time.monotonic() - began < 10 * PATIENCE
    client = second.client()
    for call in calls:
        found = client.get(call.id)
        assert found.state == "ended"
        assert found.outcome is not None
        assert found.outcome.cause == "failed"
        assert found.outcome.error is not None
        assert found.outcome.error.code == "interrupted"
        assert found.stdout is not None
        assert found.stdout.text == "before\n"
        assert [event.type for event in client.events(call.id)] == ["accepted", "started", "output", "ended"]
    opened = [file.path for file in psutil.Process(second.process.pid).open_files()]
    assert not [path for path in opened if "/calls/" in path]
    assert client.get(queued.id).state == "ended"
    again = client.run(["true"], key="repeated")  # the same key and request: the same outcome
    assert again.id == queued.id
    kept = client.get(done.id)
    assert kept.outcome is not None
    assert kept.outcome.exit_code == 0
    until(lambda: not slots_of(second), "no container is left")
    assert instance_name(first.state) not in Path("/proc/self/mountinfo").read_text()


def test_sigterm_lets_what_runs_finish_and_takes_nothing_new(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    call = running(client, "sh", "-c", "read line; echo got $line", stdin="stream", key="drained")
    daemon.process.send_signal(signal.SIGTERM)
    until(lambda: client.health().status == "draining", "the daemon drains")
    with pytest.raises(errors.Draining):
        client.run(["true"])
    attached = client.start(["sh", "-c", "read line; echo got $line"], stdin="stream", key="drained")
    assert attached.id == call.id  # what is known already is answered
    with client.events(call.id) as events:  # before it ends: then the daemon does
        client.write_stdin(call.id, b"it\n")
        done = [event.invocation for event in events][-1]
    assert done is not None
    assert done.outcome is not None
    assert done.outcome.exit_code == 0
    assert done.stdout is not None
    assert done.stdout.text == "got it\n"
    assert daemon.process.wait(20) == 0


def test_a_second_signal_cancels(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    call = running(daemon.client(), "sleep", "1000")
    daemon.process.send_signal(signal.SIGTERM)
    until(lambda: daemon.client().health().status == "draining", "the daemon drains")
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.process.wait(10) == 0
    found = daemon_factory(state=daemon.state, name="second").client().get(call.id)
    assert found.outcome is not None
    assert found.outcome.cause == "cancelled"


def test_a_second_daemon_on_one_state_directory_is_refused(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    first = daemon_factory()
    call = running(first.client(), "sleep", "1000")
    done = subprocess.run(
        [SANDBOXD, "serve", "--state", first.state, "--socket", tmp_path / "other"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "another" in done.stderr
    assert str(first.state) in done.stderr
    assert first.client().get(call.id).state == "running"  # and nothing of the first was touched
    assert first.run("true").outcome is not None
    ended = first.client().cancel(call.id)
    assert ended.outcome is not None
    assert ended.outcome.cause == "cancelled"


def test_a_socket_that_nobody_listens_on_is_replaced(daemon_factory: Callable[..., Daemon]) -> None:
    first = daemon_factory()
    first.stop(signal.SIGKILL)
    assert first.socket.is_socket()
    second = daemon_factory(state=first.state)
    assert second.socket == first.socket
    found = second.run("true")
    assert found.outcome is not None
    assert found.outcome.exit_code == 0


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    state.mkdir()
    (state / "images").symlink_to(IMAGES)
    return state


def test_socket_activation_and_readiness(daemon_factory: Callable[..., Daemon], state: Path) -> None:
    """As systemd starts it: a listening socket as descriptor 3, and a socket to say READY on."""
    directory = state.parent
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        listener.bind(str(directory / "activated"))
        listener.listen()
        manager.bind(str(directory / "notify"))
        manager.settimeout(20)
        script = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&$FD'
        environment = {**os.environ, "FD": str(listener.fileno()), "NOTIFY_SOCKET": str(directory / "notify")}
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", script, "bash", SANDBOXD, "serve", "--state", state],
                env=environment,
                pass_fds=[listener.fileno()],
                stdout=log,
                stderr=log,
            )
        try:
            said = manager.recv(4096)
            assert b"READY=1" in said, (directory / "log").read_text()
            found = Client(directory / "activated").run(["echo", "activated"])
            assert found.stdout is not None
            assert found.stdout.text == "activated\n"
            process.send_signal(signal.SIGTERM)
            assert b"STOPPING=1" in manager.recv(4096)
            assert process.wait(20) == 0
        finally:
            process.terminate()
            process.wait(20)
    assert (directory / "activated").is_socket()  # the manager's, not ours to remove


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def test_a_full_disk_is_told_and_survived(
    daemon_factory: Callable[..., Daemon], state: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, "8m"):
        (disk / "images").symlink_to(IMAGES)
        daemon = daemon_factory(state=disk)
        assert daemon.run("true").outcome is not None
        with pytest.raises(errors.HostFailed, match="how could not be recorded yet: no space left") as full:
            daemon.run("sh", "-c", "head -c 64M /dev/zero", policy="loud")
        id_ = full.value.details["id"]
        assert daemon.client().get(id_).outcome is None  # nobody is told what is not on disk
        with daemon.client().events(id_, follow=False) as events:
            *before, notice = events
        assert (notice.type, notice.seq) == ("unrecorded", before[-1].seq)
        assert notice.error is not None
        assert notice.error.code == "host"
        following = daemon.client().events(id_, after=before[-1].seq)
        assert next(following).type == "unrecorded"
        with pytest.raises(errors.HostFailed):  # nothing is accepted that could not be kept
            [daemon.run("true") for _ in range(50)]
        (disk / "calls" / id_ / "stdout").write_bytes(b"")
        until(lambda: _runs(daemon), "it serves again once there is room", 20)
        until(
            lambda: daemon.client().list(state="ended", limit=100).invocations[-1].outcome, "all is recorded"
        )
        until(lambda: daemon.client().get(id_).outcome, "its outcome is told")
        outcome = daemon.client().get(id_).outcome
        assert outcome is not None
        assert outcome.error is not None
        assert (outcome.cause, outcome.error.code) == ("failed", "host")
        with following:  # it was told, and then the end, with the numbers that are kept
            told = list(following)
        assert [event.type for event in told] == ["ended"]
        assert told[0].seq == before[-1].seq + 1
        assert daemon.process.poll() is None
        daemon.stop()


def _runs(daemon: Daemon) -> bool:
    try:
        found = daemon.run("true")
    except errors.SandboxdError:
        return False
    return found.outcome is not None and found.outcome.exit_code == 0


def test_signals_that_come_at_any_moment_of_a_stop_leave_nothing(
    daemon_factory: Callable[..., Daemon],
) -> None:
    """Whoever stops it may be impatient up to its last moment."""
    daemon = daemon_factory()
    client = daemon.client()
    running = [client.start(["sleep", "1000"], key=f"k{number}").id for number in range(3)]
    until(lambda: all(client.get(id_).state == "running" for id_ in running), "they run")
    number = signal.SIGTERM
    while daemon.process.poll() is None:
        daemon.process.send_signal(number)
        number = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
        time.sleep(0.002)
    said = daemon.log.read_text()[-2000:]
    assert daemon.process.returncode in {0, -signal.SIGTERM, -signal.SIGINT}, said
    assert "Traceback" not in said
    assert not list(Path("/sys/fs/cgroup").glob(f"**/sandboxd-{instance_name(daemon.state)}"))
    second = daemon_factory(state=daemon.state, name="second")
    assert "containers of an earlier daemon were removed" not in second.log.read_text()
    outcomes = [second.client().get(id_).outcome for id_ in running]
    assert [None if one is None else one.cause for one in outcomes] == ["cancelled"] * 3


def test_a_daemon_ends_with_its_engine(daemon_factory: Callable[..., Daemon]) -> None:
    """Its other process is killed: it says so and ends, and the next one closes what was left open."""
    first = daemon_factory()
    call = first.client().start(["sleep", "100"])
    until(lambda: first.client().get(call.id).state == "running", "it runs")
    os.kill(first.engine, signal.SIGKILL)
    assert first.process.wait(timeout=30) not in {0, -signal.SIGKILL}
    assert "the engine's process has ended" in first.log.read_text()
    second = daemon_factory(state=first.state, name="second")
    outcome = second.client().get(call.id).outcome
    assert outcome is not None
    assert outcome.cause == "failed"
    assert outcome.error is not None
    assert outcome.error.code == "interrupted"
    assert not slots_of(second)
    assert _runs(second)


def test_the_engine_ends_with_its_daemon(daemon_factory: Callable[..., Daemon]) -> None:
    first = daemon_factory()
    engine = first.engine
    first.stop(signal.SIGKILL)
    until(lambda: not psutil.pid_exists(engine), "the engine's process is gone")
    second = daemon_factory(state=first.state, name="second")  # removes what the first had prepared
    assert _runs(second)


def descriptors(daemon: Daemon) -> int:
    """Open descriptors, without what there is a bounded number of, and more of under load.

    That is the user namespaces, of which one is kept for each id range that was ever in use, and the journal,
    which each of its readers opens.
    """
    links = []
    for pid in daemon.processes:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                links.append(str(fd.readlink()))
    namespaces = [link for link in links if link.startswith("user:")]
    assert len(namespaces) <= 4 + READY + 4  # at once: calls, berths, and what is being cleared away
    journals = [link for link in links if "/journal.sqlite3" in link]
    assert len(journals) <= 3 * 5  # two readers, the writer, the mover, whoever syncs; each with its log
    return len(links) - len(namespaces) - len(journals)


def test_two_hundred_calls_leave_nothing_in_the_daemon(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    process, engine = psutil.Process(daemon.process.pid), psutil.Process(daemon.engine)

    def some(count: int) -> None:
        client = daemon.client()
        for number in range(count):
            if number % 20 == 0:
                client.run(["/no/such/program"], policy="tiny")
            elif number % 20 == 1:
                client.cancel(client.start(["sleep", "100"], policy="tiny").id)
            else:
                client.run(["sh", "-c", "cat; echo out"], stdin=b"in", policy="tiny")

    def several(count: int) -> None:
        threads = [threading.Thread(target=some, args=(count // 4,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def prepared() -> bool:
        return len(berths_of(daemon)) == READY

    several(40)  # what is made once is made now: readers, caches
    until(prepared, "as many berths wait as shall")  # each holds descriptors
    before, resident = descriptors(daemon), [one.memory_info().rss for one in (process, engine)]
    several(200)
    until(prepared, "as many berths wait as shall")
    until(lambda: descriptors(daemon) <= before + 2, f"descriptors are closed (were {before})")
    for one, was in zip((process, engine), resident, strict=True):
        assert one.memory_info().rss - was < 16 * 2**20
        assert one.num_threads() < 64 + 16
    until(lambda: not slots_of(daemon), "no container is left")
    until(lambda: len(engine.children()) == len(berths_of(daemon)), "only those that wait are left")
    health = daemon.client().health()
    assert (health.running, health.queued) == (0, 0)


def test_what_a_killed_daemon_left_half_written_goes(daemon_factory: Callable[..., Daemon]) -> None:
    first = daemon_factory()
    first.stop(signal.SIGKILL)
    left = first.state / "blobs" / "tmp" / "half"
    left.write_bytes(b"half")
    daemon_factory(state=first.state, name="second")
    assert not left.exists()


def test_a_policy_directory_may_come_later(daemon_factory: Callable[..., Daemon], tmp_path: Path) -> None:
    late = tmp_path / "late"
    daemon = daemon_factory(config=f"policies: [{late}]\n")
    late.mkdir()
    (late / "mine.yaml").write_text("version: 1\nname: mine\nextends: default\n")
    until(lambda: "mine" in {policy.name for policy in daemon.client().policies()}, "it is seen")
