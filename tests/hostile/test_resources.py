"""Processes, memory and time: what takes all it can get, and what does not want to end."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import PATIENCE

from sandboxd.models import Cause

if TYPE_CHECKING:
    from daemons import Daemon
    from programs import Programs

    from sandboxd.models import Invocation

KILL_SECONDS = 5.0  # that a container full of processes may take to be gone, on a busy machine


def attack(daemon: Daemon, programs: Programs, *argv: str, policy: str, **options: object) -> Invocation:
    return daemon.run(f"./{argv[0]}", *argv[1:], policy=policy, inputs=programs.input(argv[0]), **options)


def cause(found: Invocation) -> Cause:
    assert found.outcome is not None
    return found.outcome.cause


def reached(found: Invocation) -> dict[str, bool]:
    return {limit.limit: limit.ended for limit in found.limits_reached}


def test_a_fork_bomb_ends_at_its_deadline(daemon: Daemon, programs: Programs) -> None:
    began = time.monotonic()
    found = attack(daemon, programs, "stubborn", "bomb", policy="default", limits={"wall": "700ms"})
    assert time.monotonic() - began < (0.7 + KILL_SECONDS) * PATIENCE
    assert cause(found) is Cause.WALL_TIME
    assert reached(found) == {"wall": True, "pids": False}
    counts = {limit.limit: limit.count for limit in found.limits_reached}
    assert (counts["pids"] or 0) > 10
    assert found.usage is not None
    assert found.usage.pids_peak in {None, 64}


def test_a_shell_fork_bomb_ends_with_its_shell(daemon: Daemon) -> None:
    found = daemon.run("bash", "-c", ":(){ :|:& };: ; sleep 0.3", limits={"wall": "5s"})
    assert cause(found) in {Cause.EXITED, Cause.WALL_TIME}
    assert "pids" in reached(found)


def test_a_fork_bomb_holds_up_nobody_else(daemon: Daemon, programs: Programs) -> None:
    client = daemon.client()
    bomb = client.start(["./stubborn", "bomb"], inputs=programs.input("stubborn"), limits={"wall": "20s"})
    time.sleep(0.2)
    began = time.monotonic()
    beside = daemon.run("sh", "-c", "echo fine | cat")
    assert time.monotonic() - began < 5 * PATIENCE
    assert beside.stdout is not None
    assert beside.stdout.text == "fine\n"
    ended = client.cancel(bomb.id)
    assert ended.outcome is None or ended.outcome.cause is Cause.CANCELLED
    assert cause(client.wait(bomb.id, timeout=10 * PATIENCE)) is Cause.CANCELLED


@pytest.mark.parametrize("kind", ["anonymous", "shared", "memfd", "system_v", "page_tables", "buffers"])
def test_a_memory_hog_is_killed_and_named(daemon: Daemon, programs: Programs, kind: str) -> None:
    found = attack(daemon, programs, "hog", kind, policy="tiny")
    assert cause(found) is Cause.MEMORY, found.outcome
    assert reached(found)["memory"] is True
    assert found.outcome is not None
    assert found.outcome.evidence["oom_kills"] >= 1
    assert found.outcome.exit_status() == 137
    assert found.usage is not None
    assert 32 * 2**20 < found.usage.memory_peak <= 64 * 2**20


def test_a_process_that_was_killed_for_memory_is_no_verdict_if_the_command_copes(
    daemon: Daemon, programs: Programs
) -> None:
    found = daemon.run("sh", "-c", "./hog anonymous; echo $?", policy="tiny", inputs=programs.input("hog"))
    assert cause(found) is Cause.EXITED
    assert found.stdout is not None
    assert found.stdout.text == "137\n"
    assert reached(found) == {"memory": False}


def test_file_systems_in_memory_are_full_at_their_size(daemon: Daemon) -> None:
    code = """
    for d in /tmp /dev/shm /workspace; do
        head -c 100M /dev/zero > $d/x 2>/dev/null && exit 9
        stat -c %s $d/x
    done
    """
    found = daemon.run("sh", "-c", code, policy="tiny")
    assert cause(found) is Cause.EXITED, found.outcome
    assert found.stdout is not None
    assert found.stdout.text == f"{16 * 2**20}\n" * 3
    assert reached(found) == {"workspace.size": False, "tmp": False}


def test_files_and_memory_together_are_too_much(daemon: Daemon, programs: Programs) -> None:
    code = "for d in /tmp /dev/shm /workspace; do head -c 15M /dev/zero > $d/x; done; exec ./hog anonymous"
    found = daemon.run("sh", "-c", code, policy="tiny", inputs=programs.input("hog"))
    assert cause(found) is Cause.MEMORY


def test_spinning_threads_use_up_their_cpu_time(daemon: Daemon, programs: Programs) -> None:
    began = time.monotonic()
    found = attack(daemon, programs, "stubborn", "spin", "16", policy="default", limits={"cpu_time": "500ms"})
    assert cause(found) is Cause.CPU_TIME
    assert reached(found) == {"cpu_time": True}
    assert found.outcome is not None
    assert 500_000 <= found.outcome.evidence["cpu_total"] < 500_000 + 400_000 * PATIENCE
    assert time.monotonic() - began < 10 * PATIENCE


def test_spinning_threads_get_no_more_than_their_cpus(daemon: Daemon, programs: Programs) -> None:
    found = attack(
        daemon, programs, "stubborn", "spin", "8", policy="default", limits={"wall": "1s", "cpus": 0.2}
    )
    assert cause(found) is Cause.WALL_TIME
    assert found.outcome is not None
    assert found.outcome.evidence["cpu_total"] < 400_000


def test_sleeping_past_the_deadline_ignoring_every_signal(daemon: Daemon, programs: Programs) -> None:
    began = time.monotonic()
    found = attack(daemon, programs, "stubborn", "sleep", policy="default", limits={"wall": "300ms"})
    assert cause(found) is Cause.WALL_TIME
    assert time.monotonic() - began < (0.3 + KILL_SECONDS) * PATIENCE
    assert found.usage is not None
    assert 300_000 <= found.usage.wall < 2_000_000


def test_a_deadline_counts_from_acceptance(daemon: Daemon, programs: Programs) -> None:
    found = attack(daemon, programs, "stubborn", "sleep", policy="default", deadline="400ms")
    assert cause(found) is Cause.WALL_TIME
    assert reached(found) == {"deadline": True}


def test_stopped_processes_die_too(daemon: Daemon, programs: Programs) -> None:
    found = attack(daemon, programs, "stubborn", "stopped", policy="default", limits={"wall": "300ms"})
    assert cause(found) is Cause.WALL_TIME


def test_signals_of_the_caller_reach_no_process_that_ignores_them_but_cancel_does(
    daemon: Daemon, programs: Programs
) -> None:
    client = daemon.client()
    call = client.start(["./stubborn", "sleep"], inputs=programs.input("stubborn"))
    with client.events(call.id) as events:
        assert next(event.type for event in events if event.type != "accepted") == "started"
    time.sleep(0.1)  # until it ignores them
    client.signal(call.id, "SIGTERM")
    client.signal(call.id, "SIGINT")
    time.sleep(0.1)
    assert client.get(call.id).state == "running"
    client.cancel(call.id)
    assert cause(client.wait(call.id, timeout=10 * PATIENCE)) is Cause.CANCELLED


def test_a_daemon_of_the_tool_that_keeps_stdout_open_ends_with_it(daemon: Daemon, programs: Programs) -> None:
    began = time.monotonic()
    found = attack(daemon, programs, "stubborn", "daemon", policy="default")
    assert cause(found) is Cause.EXITED
    assert found.outcome is not None
    assert found.outcome.exit_code == 7
    assert time.monotonic() - began < 5 * PATIENCE
    assert found.stdout is not None
    assert "still here" in (found.stdout.text or "")


def test_open_files_and_file_size_have_limits(daemon: Daemon) -> None:
    code = "ulimit -Hn; ulimit -n 2000 2>&1; ulimit -c; i=3; "
    found = daemon.run(
        "bash", "-c", code + 'while eval "exec $i</dev/null" 2>/dev/null; do i=$((i+1)); done; echo $i'
    )
    assert found.stdout is not None
    lines = (found.stdout.text or "").splitlines()
    assert (lines[0], lines[-2]) == ("1024", "0"), lines
    assert 1000 < int(lines[-1]) <= 1024  # less what the shell keeps for itself
    assert "cannot modify" in lines[1] or "Operation not permitted" in lines[1]
    found = daemon.run("sh", "-c", "head -c 17M /dev/zero > x", policy="strict")
    assert found.outcome is not None
    assert "workspace.size" in reached(found) or found.outcome.signal_name == "SIGXFSZ"


def test_no_core_dump_is_written_or_piped(daemon: Daemon) -> None:
    found = daemon.run("sh", "-c", "ulimit -c; sh -c 'kill -SEGV $$'; ls -A")
    assert found.stdout is not None
    assert found.stdout.text == "0\n"


def test_inotify_instances_of_a_call_are_its_own(daemon: Daemon, programs: Programs) -> None:
    client = daemon.client()
    greedy = client.start(["./watches", "hold"], inputs=programs.input("watches"), limits={"wall": "20s"})
    until_output(daemon, greedy.id)
    beside = attack(daemon, programs, "watches", "count", policy="default")
    assert beside.stdout is not None
    assert int(beside.stdout.text or "0") > 100  # its own, not what the other left
    fd = inotify()
    os.close(fd)
    client.cancel(greedy.id)
    assert cause(client.wait(greedy.id, timeout=10 * PATIENCE)) is Cause.CANCELLED


def until_output(daemon: Daemon, call: str) -> None:
    with daemon.client().events(call) as events:
        assert any(event.type == "output" for event in events)


def inotify() -> int:
    """An instance of the host's, as root."""
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.inotify_init1(os.O_CLOEXEC))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def test_the_host_stays_responsive_under_all_of_it_at_once(daemon: Daemon, programs: Programs) -> None:
    client = daemon.client()
    inputs = programs.input("stubborn", "hog")
    attacks = {
        "./stubborn bomb": "default",
        "./stubborn spin 32": "default",
        "./stubborn daemon": "tiny",
        "./hog buffers": "tiny",
    }
    calls = [
        client.start(
            argv.split(),
            policy=policy,
            inputs=inputs,
            limits={"wall": f"{min(1500 * PATIENCE, 10_000):.0f}ms"},
        )
        for argv, policy in attacks.items()
    ]
    slowest = 0.0
    while any(client.get(call.id).state != "ended" for call in calls):
        began = time.monotonic()
        assert daemon.client(timeout=5).health().status == "ready"
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    assert slowest < 2 * PATIENCE
    found = [cause(client.wait(call.id)) for call in calls]
    assert found == [Cause.WALL_TIME, Cause.WALL_TIME, Cause.EXITED, Cause.MEMORY]
    assert psutil.Process(daemon.process.pid).is_running()


def socket_memory() -> int:
    """Bytes of all TCP and UDP buffers of this host, whatever the namespace (proc_net(5), sockstat)."""
    text = Path("/proc/net/sockstat").read_text()
    return sum(int(pages) for pages in re.findall(r" mem (\d+)", text)) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_buffers_of_sockets_are_bounded(daemon: Daemon, programs: Programs, kind: str) -> None:
    before = socket_memory()
    client = daemon.client()
    inputs = programs.input("loopback")
    call = client.start(["./loopback", kind], policy="tiny", inputs=inputs, limits={"wall": "8s"})
    most = 0
    while (now := client.get(call.id)).state != "ended":
        most = max(most, socket_memory() - before)
        if now.stdout is not None and now.stdout.size:
            client.cancel(call.id)
        time.sleep(0.05)
    assert most < 96 * 2**20, f"a container of 64 MiB took {most >> 20} MiB of the host's"
    assert cause(client.wait(call.id)) in {Cause.CANCELLED, Cause.WALL_TIME, Cause.MEMORY}
    end = time.monotonic() + 10
    while socket_memory() - before > 16 * 2**20:
        assert time.monotonic() < end, "the buffers are not given back"
        time.sleep(0.05)
