"""The Docker Engine down, slow, restarted, killed, full, too old: calls end, each with one outcome."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socketserver
import subprocess
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from archives import shell_tar
from daemons import SANDBOXD, until
from dockerd import Dockerd, own_engine
from podman import Podman

from sandboxd.engine.docker.engine import run_directory
from sandboxd.engine.host import instance_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation

PATIENT = "docker: {socket: SOCKET, timeout: 3s}\n"


@pytest.fixture
def engine(leak_session: object, kind: type[Dockerd]) -> Iterator[Dockerd]:
    """An engine that a test may do anything to."""
    with own_engine(kind=kind) as found:
        yield found


def cause(call: Invocation) -> str:
    """How a call ended; a fault of ours by its code."""
    assert call.outcome is not None
    return call.outcome.cause if call.outcome.error is None else call.outcome.error.code


def all_that_ended(daemon: Daemon) -> list[Invocation]:
    """Every page of them: while an engine is away, a call fails in a moment, and there are many."""
    page = daemon.client().list(state="ended", limit=1000)
    found = list(page.invocations)
    while page.next is not None:
        page = daemon.client().list(state="ended", limit=1000, before=page.next)
        found += page.invocations
    return found


def under_load(daemon: Daemon, disturb: Callable[[], None]) -> Counter[str]:
    """What became of the calls that came while something was done to the engine."""
    found: Counter[str] = Counter()
    over = threading.Event()

    def caller() -> None:
        while not over.is_set():
            found[cause(daemon.run("sh", "-c", "echo said; sleep 0.2", policy="small"))] += 1

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(caller) for _ in range(4)]
        try:
            time.sleep(1.5)
            disturb()
            time.sleep(1.5)
        finally:
            over.set()
        for one in callers:
            one.result(timeout=60)
    return found


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_restarted_under_load(engine: Dockerd, start_on: Callable[..., Daemon], end: str) -> None:
    daemon = start_on(engine)
    assert cause(daemon.run("true", policy="small")) == "exited"

    def disturb() -> None:
        getattr(engine, end)()
        time.sleep(1.0)
        engine.start()

    found = under_load(daemon, disturb)
    assert found.keys() <= {"exited", "engine"}, found
    assert found["exited"] > 4
    assert found["engine"] > 0
    ended = all_that_ended(daemon)
    assert Counter(map(cause, ended)) == found + Counter(
        exited=1
    )  # one outcome each, the same in the journal
    assert cause(daemon.run("true", policy="small")) == "exited"
    until(lambda: not engine.containers(), "nothing is left in the engine")
    until(lambda: not daemon.client().slots(), "nor in the daemon, which asks once more whether it is gone")


def test_a_call_that_runs_outlives_an_engine_that_is_killed(
    engine: Dockerd, start_on: Callable[..., Daemon]
) -> None:
    daemon = start_on(engine)
    client = daemon.client()
    call = client.start(["sh", "-c", "echo begun; sleep 3; echo ended"], policy="small")
    until(lambda: (out := client.get(call.id).stdout) and out.size, "it has begun")
    engine.kill()
    assert cause(daemon.run("true", policy="small")) == "engine"
    found = client.wait(call.id, timeout=20)
    assert cause(found) == "exited"
    assert found.stdout is not None
    assert found.stdout.text == "begun\nended\n"
    engine.start()
    assert cause(daemon.run("true", policy="small")) == "exited"
    until(lambda: not engine.containers(), "what could not be removed then is removed now")


def test_what_the_engine_fails_to_remove_by_itself_is_removed_later(
    engine: Dockerd, start_on: Callable[..., Daemon]
) -> None:
    if isinstance(engine, Podman):
        pytest.skip("it leaves no container of which it cannot remove the files")
    daemon = start_on(engine)
    client = daemon.client()
    call = client.start(["sleep", "60"], policy="small")
    until(lambda: client.get(call.id).state == "running", "it runs")
    [container] = engine.containers()
    held = Path(engine.inspect(container)["GraphDriver"]["Data"]["UpperDir"], "held")
    held.touch()
    subprocess.run(["chattr", "+i", held], check=True)
    try:
        client.cancel(call.id)
        until(lambda: "is not removed yet" in daemon.log.read_text(), "it was tried")
        assert engine.containers() == [container]
    finally:
        subprocess.run(["chattr", "-i", held], check=True)
    assert cause(daemon.run("true", policy="small")) == "exited"
    until(lambda: not engine.containers(), "it is removed before the next one is made")


@pytest.mark.parametrize("noticed", [True, False])
def test_a_kept_container_of_an_engine_that_is_restarted_leaves_its_files(
    engine: Dockerd, start_on: Callable[..., Daemon], *, noticed: bool
) -> None:
    if isinstance(engine, Podman):
        pytest.skip("its containers are not its service's: they go on")
    daemon = start_on(engine, lasting="extends: small\nisolation: session\n")
    client = daemon.client()
    session = client.create_session()
    code = "echo kept > kept; sleep 1000 >/dev/null 2>&1 &"
    assert cause(daemon.run("sh", "-c", code, policy="lasting", session=session.id)) == "exited"
    engine.stop()
    if noticed:
        until(lambda: client.session(session.id).container.state == "lost", "it is lost")  # type: ignore[union-attr]
        assert b"".join(client.read_file(session.id, "kept")) == b"kept\n"
    engine.start()
    after = daemon.run("sh", "-c", "cat kept", policy="lasting", session=session.id)
    assert cause(after) == "exited"
    assert after.stdout is not None
    assert after.stdout.text == "kept\n"
    assert after.container is not None
    assert after.container.lost is not None
    assert "its files were kept" in after.container.lost.why
    client.delete_session(session.id)
    until(lambda: not engine.containers(), "what could not be removed then is removed now")


def test_a_call_in_an_engine_that_is_stopped_is_a_failure_of_the_engine(
    engine: Dockerd, start_on: Callable[..., Daemon]
) -> None:
    daemon = start_on(engine)
    client = daemon.client()
    call = client.start(["sh", "-c", "echo begun; sleep 60"], policy="small")
    until(lambda: (out := client.get(call.id).stdout) and out.size, "it has begun")
    engine.stop()
    if isinstance(engine, Podman):  # whose containers are not its service's: they go on
        time.sleep(1)
        assert client.get(call.id).state == "running"
        client.cancel(call.id)
    found = client.wait(call.id, timeout=20)
    assert cause(found) == ("cancelled" if isinstance(engine, Podman) else "engine")
    assert found.stdout is not None
    assert found.stdout.text == "begun\n"


def test_an_engine_that_does_not_answer_hangs_no_call(
    engine: Dockerd, start_on: Callable[..., Daemon]
) -> None:
    daemon = start_on(engine, PATIENT.replace("SOCKET", str(engine.socket)))
    assert cause(daemon.run("true", policy="small")) == "exited"
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        found = daemon.run("true", policy="small")
        assert cause(found) == "engine"
        assert "does not answer" in (found.outcome.message if found.outcome else "")
        assert time.monotonic() - begun < 10
        begun = time.monotonic()
        assert cause(daemon.run("true", policy="small")) == "engine"  # the next waits for a ping alone
        assert time.monotonic() - begun < 5
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    assert cause(daemon.run("true", policy="small")) == "exited"
    until(lambda: not engine.containers(), "what was begun meanwhile is removed", seconds=30)


def test_the_daemon_killed_leaves_no_container(engine: Dockerd, start_on: Callable[..., Daemon]) -> None:
    daemon = start_on(engine, "pool: {min: 2, max: 2}\n")
    client = daemon.client()
    call = client.start(["sleep", "60"], policy="small")
    until(lambda: client.get(call.id).state == "running", "it runs")
    until(lambda: sum(slot.state == "waiting" for slot in client.slots()) == 2, "two wait beside it")
    assert len(engine.containers()) == 3
    daemon.stop(signal.SIGKILL)
    until(lambda: not engine.containers(), "PID 1 ends with the daemon, and the engine removes its container")
    again = start_on(engine)
    assert cause(again.client().get(call.id)) == "interrupted"
    assert not list(run_directory(instance_name(again.state)).iterdir())


def test_what_the_daemon_was_making_when_it_was_killed_is_removed_at_start(
    engine: Dockerd, start_on: Callable[..., Daemon]
) -> None:
    daemon = start_on(engine, "pool: {min: 2, max: 2}\n")
    assert cause(daemon.run("true", policy="small")) == "exited"
    until(engine.containers, "one is made, and may not be started yet")
    daemon.stop(signal.SIGKILL)
    start_on(engine)
    until(lambda: not engine.containers(), "the next daemon removes it")


def test_a_full_disk_is_the_engines_failure(
    leak_session: object, start_on: Callable[..., Daemon], need: Callable[[object, str], None]
) -> None:
    need(shutil.which("dockerd"), "docker.io")
    disk = Path(tempfile.mkdtemp(prefix="sandboxd-disk-", dir="/var/tmp"))  # a short path, for sockets
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", disk], check=True)
    try:
        with own_engine(under=disk) as engine:
            daemon = start_on(engine)
            assert cause(daemon.run("true", policy="small")) == "exited"
            found = daemon.run("true", policy="plain")  # its image has more than 100 MiB
            assert cause(found) == "engine"
            assert "no space left" in (found.outcome.message if found.outcome else "")
            filler = engine.directory / "data" / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            found = daemon.run("true", policy="small")
            assert cause(found) == "engine"
            assert "no space left" in (found.outcome.message if found.outcome else "")
            filler.unlink()
            assert cause(daemon.run("true", policy="small")) == "exited"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
        disk.rmdir()


class _Old(BaseHTTPRequestHandler):
    """An engine of Docker 19.03, as far as a client gets with it."""

    def do_GET(self) -> None:
        body = b'{"ApiVersion": "1.40", "MinAPIVersion": "1.12", "Version": "19.03.15"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the name of the overridden)
        pass


def refused_start(tmp_path: Path, config: str) -> str:
    """What a daemon says that does not start."""
    (tmp_path / "sandboxd.yaml").write_text(
        f"state: {tmp_path}/state\nsocket: {{path: {tmp_path}/s}}\n{config}"
    )
    done = subprocess.run(
        [SANDBOXD, "serve", "--config", tmp_path / "sandboxd.yaml"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr.decode()


def test_an_api_that_is_too_old_is_told(tmp_path: Path) -> None:
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "old"), _Old) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            said = refused_start(tmp_path, f"engine: docker\ndocker: {{socket: {tmp_path}/old}}\n")
        finally:
            server.shutdown()
            thread.join()
    assert "speaks API 1.40; 1.41 (Docker 20.10) or newer is needed" in said


def test_no_engine_is_told(tmp_path: Path) -> None:
    said = refused_start(tmp_path, f"engine: docker\ndocker: {{socket: {tmp_path}/none}}\n")
    assert f"the Docker Engine at {tmp_path}/none cannot be reached; is it running?" in said


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:2375", "ssh://root@host", "https://host:2376"])
def test_a_remote_engine_is_refused(tmp_path: Path, endpoint: str) -> None:
    said = refused_start(tmp_path, f"engine: docker\ndocker: {{socket: '{endpoint}'}}\n")
    assert "is a remote engine" in said
    assert "sandboxd.yaml:4:" in said


def test_a_runtime_that_the_engine_lacks_is_told(engine: Dockerd, tmp_path: Path) -> None:
    said = refused_start(tmp_path, f"engine: docker\ndocker: {{socket: {engine.socket}, runtime: runsc}}\n")
    assert "the Docker Engine has no runtime 'runsc'; it has" in said


def test_auto_takes_the_engine_where_no_oci_runtime_works(
    engine: Dockerd, start_on: Callable[..., Daemon], tmp_path: Path
) -> None:
    broken = tmp_path / "runc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    daemon = start_on(engine, f"runtime: {broken}\n", engine="auto")
    assert daemon.client().health().engine == "docker"
    assert cause(daemon.run("true", policy="small")) == "exited"


def test_what_an_earlier_daemon_left_is_removed_and_nothing_of_strangers(
    engine: Dockerd, start_on: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_on(engine)
    assert cause(daemon.run("true", policy="small")) == "exited"
    name = instance_name(daemon.state)
    image = "stranger:1"
    engine.load(shell_tar(), image)
    daemon.stop()

    def run(container: str, *options: str) -> None:
        engine.docker("run", "-d", "--name", container, "--network=none", *options, image, "sleep", "600")

    label = f"io.sandboxd.instance={name}"
    run(f"sandboxd-{name}-left", "--label", label)
    run("stranger")
    run("with-our-label", "--label", label)  # as an image may bring it
    run(f"sandboxd-{name}-with-our-name")
    run("sandboxd-0123456789ab-other", "--label", "io.sandboxd.instance=0123456789ab")
    again = start_on(engine)
    assert cause(again.run("true", policy="small")) == "exited"
    strangers = {
        "stranger",
        "with-our-label",
        f"sandboxd-{name}-with-our-name",
        "sandboxd-0123456789ab-other",
    }
    until(lambda: set(engine.containers()) == strangers, "only what was left is gone")
    assert len(engine.containers("--filter", "status=running")) == 4


def test_two_daemons_on_one_engine(engine: Dockerd, start_on: Callable[..., Daemon]) -> None:
    one, other = start_on(engine, name="one"), start_on(engine, name="other")
    call = one.client().start(["sh", "-c", "sleep 4; echo ended"], policy="small")
    until(lambda: one.client().get(call.id).state == "running", "it runs")
    assert cause(other.run("true", policy="small")) == "exited"
    other.stop(signal.SIGKILL)
    again = start_on(engine, name="other")  # removes what is left of its own
    assert cause(again.run("true", policy="small")) == "exited"
    assert cause(one.client().wait(call.id, timeout=20)) == "exited"
