"""The processes that serve connections: what they may do, whom they serve, what happens when they die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE, until
from networked import FETCH, FOUND, start_networked, workers
from world import WWW

from sandboxd.engine.host import instance_name

if TYPE_CHECKING:
    from collections.abc import Callable

    import psutil
    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation

    Python = Callable[..., Invocation]


REFUSED = (
    "python3",
    "-c",
    """
import socket
try: socket.create_connection(('10.9.9.9', 80), timeout=5)
except ConnectionRefusedError: pass
""",
)


@pytest.fixture
def worker(networked: Daemon, python: Python) -> psutil.Process:
    """The one that served the last call: those of earlier calls, with other rules, are gone."""
    for one in workers(networked):
        one.kill()
    until(lambda: not workers(networked), "the others are gone")
    assert python(FETCH).stdout.text == FOUND  # type: ignore[union-attr]
    (found,) = workers(networked)
    return found


def test_it_has_given_up_everything(worker: psutil.Process) -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    )
    ids = set(status["Uid"].split() + status["Gid"].split())
    assert len(ids) == 1
    assert int(ids.pop()) >= 1_878_982_656
    assert status["Groups"].split() == []
    assert {status[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == ("1", "2", "1")
    root = Path(f"/proc/{worker.pid}/root")
    assert list(os.scandir(root)) == []
    assert os.stat(root).st_nlink == 0  # noqa: PTH116  (of what the link leads to)
    for kind in ("mnt", "ipc", "uts"):
        assert os.readlink(f"/proc/{worker.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")  # noqa: PTH115


def test_it_may_use_no_more_than_its_share(networked: Daemon, worker: psutil.Process) -> None:
    name = f"/sandboxd-{instance_name(networked.state)}/egress-{worker.uids().real}"
    lines = Path(f"/proc/{worker.pid}/cgroup").read_text().splitlines()
    inside = {controller for line in lines for controller in line.split(":")[1].split(",") if name in line}
    assert inside >= {"memory", "pids", "cpu"} or inside == {""}
    assert name not in Path(f"/proc/{networked.process.pid}/cgroup").read_text()


def test_it_has_no_descriptor_of_the_daemons(worker: psutil.Process) -> None:
    kinds = {os.readlink(fd).partition(":")[0] for fd in Path(f"/proc/{worker.pid}/fd").iterdir()}  # noqa: PTH115
    assert kinds <= {"socket", "anon_inode", "/dev/null", "pipe"}


def test_its_environment_tells_nothing(worker: psutil.Process) -> None:
    assert Path(f"/proc/{worker.pid}/environ").read_bytes() == b"LANG=C.UTF-8\0"


def test_one_that_dies_takes_its_connections_along_and_another_goes_on(
    networked: Daemon, world: World, worker: psutil.Process
) -> None:
    code = f"""
import socket, sys, time
held = socket.create_connection(('echo.example.test', 7), timeout=10)
held.sendall(b'x'); held.recv(1)
address = held.getpeername()
print('held', flush=True)
sys.stdin.readline()
held.settimeout(10)
try: print('read', held.recv(1))
except OSError as error: print(type(error).__name__)
with socket.create_connection(address, timeout=10) as again:  # the address that it was told before
    again.sendall(b'y'); print(again.recv(1))
{FETCH}
"""
    client = networked.client()
    call = client.start(["python3", "-c", code], policy="net", stdin="stream")
    until(lambda: (out := client.get(call.id).stdout) and out.size, "the connection is held")
    worker.send_signal(signal.SIGKILL)
    until(lambda: [one.pid for one in workers(networked)] not in ([worker.pid], []), "another serves")
    client.write_stdin(call.id, b"go\n")
    done = client.wait(call.id, timeout=60 * PATIENCE)
    assert done.stdout is not None
    assert done.stdout.text == f"held\nConnectionResetError\nb'y'\n{FOUND}", done
    failed = [e.network for e in client.events(call.id) if e.network and e.network.verdict == "failed"]
    assert [event.why for event in failed] == [
        "the process that served the connections ended, and they with it"
    ]
    assert done.denials == []
    assert world.records["echo.example.test"] == [WWW]


def test_refusals_before_the_first_process_is_up_are_the_calls(tmp_path: Path, world: World) -> None:
    with start_networked(tmp_path) as daemon:
        call = daemon.run(*REFUSED, policy="net")
        assert [denial.name for denial in call.denials] == ["10.9.9.9:80"]
        del world


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_one_that_does_not_answer_holds_up_no_call(
    networked: Daemon, python: Python, worker: psutil.Process, sent: signal.Signals
) -> None:
    worker.send_signal(sent)
    before = time.monotonic()
    quiet = python("print('no connection')")  # for which nobody asks it anything
    networked.run(*REFUSED, policy="net")
    assert time.monotonic() - before < 10 * PATIENCE
    until(lambda: not worker.is_running(), "it was ended")
    assert [event for event in networked.client().events(quiet.id) if event.network is not None] == []
    assert python(FETCH).stdout.text == FOUND  # type: ignore[union-attr]


@pytest.mark.parametrize("stopped", [False, True])
def test_the_daemons_end_is_theirs(tmp_path: Path, world: World, *, stopped: bool) -> None:
    with start_networked(tmp_path) as daemon:
        assert daemon.run("python3", "-c", FETCH, policy="net").stdout.text == FOUND  # type: ignore[union-attr]
        (found,) = workers(daemon)
        if stopped:
            found.suspend()
        daemon.stop(signal.SIGKILL)
        until(lambda: not found.is_running(), "the process that served has ended")
    with start_networked(tmp_path) as daemon:  # and removes what the killed one could not
        assert daemon.run("python3", "-c", FETCH, policy="net").stdout.text == FOUND  # type: ignore[union-attr]
    del world
