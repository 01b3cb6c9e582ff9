"""What a tool that is left running in its session's container tries against the calls after it, and us."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import needs_containers, slots_of, until
from living import live, living
from sessioned import layers, said

from sandboxd import errors
from sandboxd.workspace import layer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import SessionInfo


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    with living(tmp_path_factory.mktemp("attacks")) as one:
        yield one


@pytest.fixture
def session(daemon: Daemon) -> Iterator[SessionInfo]:
    made = daemon.client().create_session()
    yield made
    daemon.client().delete_session(made.id)
    until(lambda: not slots_of(daemon), "nothing of it survives")


def descriptors(daemon: Daemon) -> int:
    return sum(psutil.Process(pid).num_fds() for pid in daemon.processes)


def test_what_is_written_after_a_calls_end_is_no_part_of_any(daemon: Daemon, session: SessionInfo) -> None:
    first = live(daemon, session, "(while :; do echo noise; echo noise >&2; done) & echo mine")
    assert first.stdout is not None
    assert first.stderr is not None
    size = first.stdout.size
    for _ in range(3):
        assert said(live(daemon, session, "echo mine")) == "mine\n"
    time.sleep(1)
    again = daemon.client().get(first.id)
    assert again.stdout is not None
    assert again.stdout.size == size
    spool = sum(one.stat().st_size for one in (daemon.state / "calls" / first.id).rglob("*") if one.is_file())
    assert spool < size + first.stderr.size + 64 * 1024
    assert said(live(daemon, session, "grep -ls sh /proc/[0-9]*/comm | wc -l")).strip() != "0"  # it lives


def test_a_writer_is_neither_killed_nor_stopped_by_its_calls_end(
    daemon: Daemon, session: SessionInfo
) -> None:
    code = "(i=0; while :; do i=$((i+1)); head -c 100000 /dev/zero; echo $i > /tmp/n; done) &"
    live(daemon, session, code)
    first = int(said(live(daemon, session, "sleep 1; cat /tmp/n")))
    second = int(said(live(daemon, session, "sleep 2; cat /tmp/n")))
    assert second > first + 5


def test_pipes_that_are_held_hold_few_descriptors_of_the_daemons(
    daemon: Daemon, session: SessionInfo
) -> None:
    live(daemon, session, "sleep 1000 &")
    before = descriptors(daemon)
    for _ in range(12):
        live(daemon, session, "sleep 1000 &")
    # two pipes for each of the newest, and the listener of each filter that is in use
    assert descriptors(daemon) - before < 16 + 12 + 8
    assert said(live(daemon, session, "kill $(grep -ls sleep /proc/[0-9]*/comm | tr -dc '0-9\\n')")) == ""
    live(daemon, session, "true")
    until(lambda: descriptors(daemon) <= before + 4, "they are given back")


def test_nobody_makes_a_call_seem_to_have_ended_well(daemon: Daemon, session: SessionInfo) -> None:
    """Every other process of the container is killed over and over."""
    killer = "trap '' TERM HUP; while :; do for p in /proc/[0-9]*; do p=${p#/proc/}; "
    killer += "[ $p -gt $$ ] && kill -9 $p; done; done"
    live(daemon, session, f"(setsid sh -c '{killer}' >/dev/null 2>&1 &)")
    for _ in range(8):
        call = live(daemon, session, "exec sleep 2")  # one process: a shell might outlive its command
        assert call.outcome is not None
        assert call.outcome.cause in {"signalled", "failed"}, call.outcome
        if call.container is not None and call.container.ended is not None:
            break
    assert daemon.client().health().status == "ready"


def test_a_fork_bomb_costs_its_session_the_container_and_nobody_else_anything(
    daemon: Daemon, session: SessionInfo
) -> None:
    live(daemon, session, "(b() { b | b & }; b) >/dev/null 2>&1 & sleep 0.3")
    call = live(daemon, session, "true")
    assert call.outcome is not None
    assert call.outcome.cause in {"exited", "failed"}
    assert daemon.run("true", policy="plain").outcome.cause == "exited"  # type: ignore[union-attr]
    try:
        daemon.client().end_session(session.id, discard=True)
    except errors.StateConflict:
        assert call.container is not None
        assert call.container.ended is not None
    assert said(live(daemon, session, "echo on")) == "on\n"


def test_a_bomb_in_a_call_ends_with_its_time(daemon: Daemon, session: SessionInfo) -> None:
    pid = said(live(daemon, session, "sleep 1000 & echo $!")).strip()
    call = live(daemon, session, "b() { b | b & }; b; sleep 100", limits={"wall": "2s"})
    assert call.outcome is not None
    assert call.outcome.cause == "wall_time"
    assert call.container is not None
    if call.container.ended is None:
        assert said(live(daemon, session, f"kill -0 {pid} && echo alive")) == "alive\n"
    else:
        assert "could not be ended apart" in call.outcome.message


def test_nothing_leaves_its_calls_part_of_the_container(daemon: Daemon, session: SessionInfo) -> None:
    code = "for i in 1 2 3; do (setsid sh -c 'trap \"\" TERM HUP INT; (setsid sleep 999 &) ; sleep 999' &) ;"
    code += " done"
    code += "; for f in /proc/self/cgroup /sys/fs/cgroup/*/cgroup.procs; do echo 0 > $f; done 2>/dev/null"
    code += "; sleep 100"
    live(daemon, session, "true")
    call = live(daemon, session, code, limits={"wall": "1s"})
    assert call.container is not None
    assert call.container.ended is None
    assert said(live(daemon, session, "grep -ls sleep /proc/[0-9]*/comm | wc -l")) == "0\n"


def test_a_checkpoint_is_a_copy_that_nothing_changes_afterwards(daemon: Daemon, session: SessionInfo) -> None:
    busy = "while :; do echo x >> busy; mv busy b2; mv b2 busy; ln -f busy link; rm -f link; mkdir -p d; "
    busy += "rmdir d; done"
    live(daemon, session, f"for i in 1 2 3; do (setsid sh -c '{busy}' >/dev/null 2>&1 &) ; done; sleep 0.2")
    client = daemon.client()
    for _ in range(5):
        client.checkpoint_session(session.id)
        time.sleep(0.1)
    with sqlite3.connect(f"file:{daemon.state}/journal.sqlite3?mode=ro", uri=True) as journal:
        found = journal.execute("SELECT layer, content FROM checkpoints WHERE layer IS NOT NULL").fetchall()
    assert len(found) >= 2
    assert {name for name, _ in found} <= layers(daemon)
    for name, digest in found:
        fd = os.open(daemon.state / "sessions/layers" / name, layer.DIRECTORY)
        try:
            assert layer.measure(fd).digest == digest
        finally:
            os.close(fd)


def test_a_process_that_is_stopped_or_traced_does_not_hold_up_a_checkpoint(
    daemon: Daemon, session: SessionInfo
) -> None:
    live(daemon, session, "echo x > x; sleep 1000 & kill -STOP $!; (sh -c 'kill -STOP $$' &); sleep 0.2")
    made = daemon.client().checkpoint_session(session.id)
    assert made.inodes == 1
    # and stays as it was
    states = said(live(daemon, session, "grep -hs ^State /proc/[0-9]*/status | sort | uniq -c"))
    assert "T (stopped)" in states


def test_links_that_come_and_go_lead_no_input_astray(daemon: Daemon, session: SessionInfo) -> None:
    swap = "while :; do rm -rf in; ln -s /tmp in; rm -f in; mkdir in; ln -s /etc/passwd in/data; done"
    live(daemon, session, f"(setsid sh -c '{swap}' >/dev/null 2>&1 &)")
    before = Path("/etc/passwd").read_bytes()
    for number in range(10):
        try:
            call = daemon.client().run(
                ["true"], policy="live", session=session.id, inputs={"in/data": f"{number}".encode()}
            )
        except errors.SandboxdError:
            continue
        assert call.outcome is not None
    assert Path("/etc/passwd").read_bytes() == before


def test_output_beyond_its_cap_ends_its_call_alone(daemon: Daemon, session: SessionInfo) -> None:
    pid = said(live(daemon, session, "sleep 1000 & echo $!", policy="killed")).strip()
    call = live(daemon, session, "(yes &) ; yes", policy="killed")
    assert call.outcome is not None
    assert call.outcome.cause == "output"
    assert (
        said(
            live(daemon, session, f"kill -0 {pid} && grep -ls yes /proc/[0-9]*/comm | wc -l", policy="killed")
        )
        == "0\n"
    )


def test_the_root_of_a_container_has_no_hold_on_pid_1(daemon: Daemon, session: SessionInfo) -> None:
    code = (
        "kill -9 1; kill -STOP 1; cat /proc/1/environ /proc/1/maps; ls /proc/1/fd; true > /proc/1/mem; "
        "ls /proc/1/root/; echo 500 > /proc/1/oom_score_adj; id -u"
    )
    call = live(daemon, session, code, policy="root")
    assert call.stdout is not None
    assert call.stdout.text == "0\n"
    assert call.container is not None
    assert call.container.ended is None
    assert said(live(daemon, session, "echo on", policy="root")) == "on\n"
