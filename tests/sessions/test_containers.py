"""One container over the calls of a session, by a real daemon."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, slots_of, until
from living import live, living
from sessioned import said, sh

from sandboxd import errors
from sandboxd.config import PoolSize
from sandboxd.plan import ImageRef, make_shape
from sandboxd.policy import load_policies, shipped_policies
from sandboxd.shelf import Shelf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import SessionInfo


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    with living(tmp_path_factory.mktemp("live")) as one:
        yield one


def test_what_runs_in_the_background_is_there_for_the_next_call(daemon: Daemon, session: SessionInfo) -> None:
    first = live(daemon, session, "sleep 1000 & echo $!")
    pid = said(first).strip()
    second = live(daemon, session, f"kill -0 {pid} && echo alive; echo kept > /tmp/x; hostname > file")
    assert said(second) == "alive\n"
    third = live(daemon, session, f"kill {pid}; cat /tmp/x; cat file; ls")
    assert said(third).splitlines()[0] == "kept"
    uses = [call.container for call in (first, second, third)]
    assert [use and (use.since, use.number, use.ended) for use in uses] == [
        (first.id, number, None) for number in (1, 2, 3)
    ]


def test_a_checkpoint_has_the_files_and_the_container_goes_on(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    call = live(daemon, session, "echo one > a; sleep 1000 & mkdir d; echo two > d/b")
    assert client.session(session.id).head.digest == session.head.digest  # nothing is kept by the call
    assert call.checkpoint_before == call.checkpoint_after == session.head.digest
    made = client.checkpoint_session(session.id)
    assert made.digest != session.head.digest
    assert made.call == call.id
    assert client.session(session.id).head.id == made.id
    assert client.checkpoint_session(session.id).id == made.id  # nothing has changed since
    later = live(daemon, session, "rm a; echo three > c; grep -ls sleep /proc/[0-9]*/comm | wc -l; cat d/b")
    assert said(later) == "1\ntwo\n"
    assert later.checkpoint_before == made.digest
    second = client.checkpoint_session(session.id)
    assert second.parent == made.parent  # on what the container began with
    ended = client.end_session(session.id)
    assert ended.head.id == second.id
    assert ended.container is None
    assert said(sh(daemon, session, "ls; cat c d/b", policy="plain")) == "c\nd\nthree\ntwo\n"


def test_the_end_keeps_the_files_or_discards_them(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    live(daemon, session, "echo kept > kept")
    ended = client.end_session(session.id)
    assert ended.container is None
    assert not [slot for slot in client.slots() if slot.policy == "live"]
    assert said(live(daemon, session, "cat kept; echo thrown > thrown")) == "kept\n"
    assert client.end_session(session.id, discard=True).head.id == ended.head.id
    assert said(sh(daemon, session, "ls", policy="plain")) == "kept\n"
    with pytest.raises(errors.StateConflict, match="keeps no container"):
        client.end_session(session.id)
    with pytest.raises(errors.StateConflict, match="keeps no container"):
        client.checkpoint_session(session.id)


def test_what_was_undone_is_undone_in_the_next_checkpoint(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    live(daemon, session, "echo x > x")
    client.checkpoint_session(session.id)
    live(daemon, session, "rm x")
    again = client.checkpoint_session(session.id)
    assert again.digest == session.head.digest
    client.end_session(session.id)
    assert said(sh(daemon, session, "ls -A", policy="plain")) == ""


def test_a_policy_that_keeps_no_files_keeps_none_of_a_container(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    sh(daemon, session, "echo x > x", policy="nothing")
    with pytest.raises(errors.StateConflict, match="commit: never"):
        client.checkpoint_session(session.id)
    assert client.end_session(session.id).head.id == session.head.id


@pytest.mark.parametrize("policy", ["other", "plain"])
def test_a_call_under_another_policy_is_refused(daemon: Daemon, session: SessionInfo, policy: str) -> None:
    first = live(daemon, session, "true")
    with pytest.raises(errors.ContainerLive, match=f"session end {session.id}") as caught:
        sh(daemon, session, "true", policy=policy)
    assert caught.value.details["since"] == first.id
    with pytest.raises(errors.ContainerLive):
        daemon.client().write_file(session.id, "file", b"x")
    with pytest.raises(errors.ContainerLive):
        daemon.client().rollback_session(session.id, session.head.id)
    daemon.client().end_session(session.id)
    assert said(sh(daemon, session, "echo on", policy=policy)) == "on\n"


def test_a_call_that_waits_for_another_policys_is_denied_then(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    first = client.start(["sleep", "1"], policy="live", session=session.id)
    second = client.start(["true"], policy="plain", session=session.id)
    assert client.wait(first.id).outcome is not None
    outcome = client.wait(second.id).outcome
    assert outcome is not None
    assert outcome.error is not None
    assert (outcome.cause, outcome.error.code) == ("denied", "container_live")


def test_a_call_has_to_name_a_session(daemon: Daemon) -> None:
    with pytest.raises(errors.InvalidRequest, match="names none"):
        daemon.run("true", policy="live")


@pytest.mark.parametrize("limit", [{"memory": "32MiB"}, {"cpus": "0.5"}, {"pids": 8}])
def test_what_is_the_containers_cannot_be_narrowed(
    daemon: Daemon, session: SessionInfo, limit: dict[str, object]
) -> None:
    with pytest.raises(errors.InvalidRequest, match="leave it out"):
        live(daemon, session, "true", limits=limit)


def test_only_the_calls_own_processes_end_with_its_time(daemon: Daemon, session: SessionInfo) -> None:
    pid = said(live(daemon, session, "sleep 1000 & echo $!")).strip()
    late = live(daemon, session, "setsid sh -c 'sleep 999 & sleep 999' & sleep 998", limits={"wall": "1s"})
    assert late.outcome is not None
    assert late.outcome.cause == "wall_time"
    assert late.container is not None
    assert late.container.ended is None
    assert said(live(daemon, session, f"kill -0 {pid} && grep -ls sleep /proc/[0-9]*/comm | wc -l")) == "1\n"


def test_only_the_calls_own_processes_end_with_its_memory(daemon: Daemon, session: SessionInfo) -> None:
    pid = said(live(daemon, session, "sleep 1000 & echo $!")).strip()
    big = live(daemon, session, "sleep 997 & dd if=/dev/zero of=/dev/null bs=200M count=1")
    assert big.outcome is not None
    assert big.outcome.cause == "memory", big.outcome
    assert big.container is not None
    assert big.container.ended is None, big.container
    assert said(live(daemon, session, f"kill -0 {pid} && grep -ls sleep /proc/[0-9]*/comm | wc -l")) == "1\n"


def test_a_cancelled_call_ends_alone(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    pid = said(live(daemon, session, "sleep 1000 & echo $!")).strip()
    running = client.start(["sh", "-c", "sleep 999 & sleep 998"], policy="live", session=session.id)
    until(lambda: client.get(running.id).state == "running", "it runs")
    cancelled = client.cancel(running.id)
    assert cancelled.outcome is not None
    assert cancelled.outcome.cause == "cancelled"
    assert said(live(daemon, session, f"kill -0 {pid} && grep -ls sleep /proc/[0-9]*/comm | wc -l")) == "1\n"


def test_each_call_has_its_own_directory_environment_input_and_status(
    daemon: Daemon, session: SessionInfo
) -> None:
    live(daemon, session, "cd /tmp; export LEFT=1; umask 0; exit 0")
    call = daemon.client().run(
        ["sh", "-c", 'pwd; echo "${LEFT-gone} $OWN"; umask; cat; exit 7'],
        policy="live",
        session=session.id,
        cwd="/usr",
        env={"OWN": "mine"},
        stdin=b"given\n",
    )
    assert call.stdout is not None
    assert call.stdout.text == "/usr\ngone mine\n0022\ngiven\n"
    assert call.outcome is not None
    assert call.outcome.exit_code == 7


def test_inputs_are_put_in_and_artifacts_taken_out(daemon: Daemon, session: SessionInfo) -> None:
    loop = "i=0; while :; do i=$((i+1)); mkdir -p out; echo $i > out/n; ln -sfn /etc in; rm -rf in; done"
    live(daemon, session, f"({loop}) >/dev/null 2>&1 &")
    for number in range(5):
        call = daemon.client().run(
            ["sh", "-c", "cat data; cp data out/copy$$"],
            policy="live",
            session=session.id,
            inputs={"data": f"input {number}\n".encode()},
        )
        assert call.stdout is not None
        assert call.stdout.text == f"input {number}\n", call.stderr
        assert any(one.path.startswith("out/copy") for one in call.artifacts)
    daemon.client().end_session(session.id, discard=True)


def test_a_command_that_cannot_be_executed_leaves_the_container(daemon: Daemon, session: SessionInfo) -> None:
    live(daemon, session, "echo x > /tmp/x")
    failed = daemon.client().run(["/no/such"], policy="live", session=session.id)
    assert failed.outcome is not None
    assert failed.outcome.cause == "exec_failed"
    assert said(live(daemon, session, "cat /tmp/x")) == "x\n"


def test_the_receipt_says_that_it_is_shared(daemon: Daemon, session: SessionInfo) -> None:
    first, second = (live(daemon, session, "sleep 1000 &") for _ in range(2))
    for call in (first, second):
        assert call.receipt is not None
        found = {one.name: one for one in call.receipt.controls}
        assert all(one.enforced for one in call.receipt.controls)
        assert found["isolation"].asked.startswith("session")
    assert first.receipt is not None
    assert second.receipt is not None
    left = next(one for one in second.receipt.controls if one.name == "processes")
    assert left.in_force.endswith("and 1 others")
    names = [{one.name for one in call.receipt.controls} for call in (first, second) if call.receipt]
    assert names[0] == names[1]
    assert next(c for c in second.receipt.controls if c.name == "seccomp").enforced


def test_denied_calls_are_told_of_the_call_that_made_them(daemon: Daemon, session: SessionInfo) -> None:
    first = live(
        daemon, session, "(while :; do unshare -n true; sleep 0.05; done) >/dev/null 2>&1 & sleep 0.5"
    )
    assert any(one.name == "unshare" for one in first.denials)
    second = live(daemon, session, "sleep 0.5")
    assert second.denials == []
    found = daemon.client().session(session.id).container
    assert found is not None
    assert found.denied > 0


def test_a_shell_can_be_left_and_spoken_to(daemon: Daemon, session: SessionInfo) -> None:
    live(
        daemon,
        session,
        "mkfifo /tmp/in; (sh < /tmp/in > /tmp/out 2>&1 &) ; exec 3> /tmp/in; sleep 1000 <&- >&- 2>&- &",
    )
    live(daemon, session, "echo 'x=41; cd /tmp' > /tmp/in")
    live(daemon, session, "echo 'echo $((x+1)) $PWD' > /tmp/in; sleep 0.5")
    assert said(live(daemon, session, "cat /tmp/out")) == "42 /tmp\n"


def test_the_session_shows_its_container(daemon: Daemon, session: SessionInfo) -> None:
    call = live(daemon, session, "true")
    found = daemon.client().session(session.id).container
    assert found is not None
    assert (found.state, found.since, found.policy, found.calls) == ("live", call.id, "live", 1)
    assert found.memory == 64 * 2**20
    assert found.used is not None
    assert found.expires == found.used + 30 * 60 * 10**6
    shown = daemon.sandboxd("session", "show", session.id)
    assert f"container   of policy live, 1 calls since {call.id}" in shown
    made = daemon.sandboxd("session", "checkpoint", session.id)
    assert "sha256:" in made
    assert "container" not in daemon.sandboxd("session", "end", session.id, "--discard")


def test_it_goes_with_its_session(daemon: Daemon) -> None:
    client = daemon.client()
    made = client.create_session()
    live(daemon, made, "sleep 1000 &")
    before = len(slots_of(daemon))
    client.delete_session(made.id)
    until(lambda: len(slots_of(daemon)) < before, "the container is gone")
    assert not [slot for slot in client.slots() if slot.policy == "live"]


def test_what_a_call_on_a_directory_changed_is_brought(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "here").write_text("here\n")
    command = ["sh", "-c", "cat here; echo made > made; sleep 1000 &"]
    ran = daemon.cli("--workspace", str(tmp_path), "--pull", "--policy", "live", "--", *command)
    assert (ran.returncode, ran.stdout) == (0, b"here\n"), ran.stderr
    assert (tmp_path / "made").read_text() == "made\n"
    assert not [slot for slot in daemon.client().slots() if slot.policy == "live"]


def test_no_container_waits_for_a_session(daemon: Daemon, session: SessionInfo) -> None:
    live(daemon, session, "true")
    assert [slot.state for slot in daemon.client().slots() if slot.policy == "live"] == ["running"]
    policy = load_policies([shipped_policies(), daemon.policies]).get("live")
    shape = make_shape(policy, ImageRef("base", "sha256:0"))
    assert Shelf(shape, 0.0).wanted(0.0, PoolSize(min=2, max=4)) == 0
    assert Shelf(replace(shape, kept=False), 0.0).wanted(0.0, PoolSize(min=2, max=4)) == 2


def test_a_call_is_signalled_and_spoken_to(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    live(daemon, session, "sleep 1000 &")
    code = "trap 'echo told; exit 3' USR1; read line; echo got $line; while :; do sleep 0.1; done"
    call = client.start(["sh", "-c", code], policy="live", session=session.id, stdin="stream")
    client.write_stdin(call.id, b"a word\n", eof=False)
    until(lambda: b"got" in b"".join(client.stdout(call.id)), "it has heard")
    client.signal(call.id, signal.SIGUSR1)
    done = client.wait(call.id)
    assert done.stdout is not None
    assert done.stdout.text == "got a word\ntold\n"
    assert done.outcome is not None
    assert done.outcome.exit_code == 3
    assert said(live(daemon, session, "grep -ls sleep /proc/[0-9]*/comm | wc -l")) == "1\n"


def test_an_interpreter_that_was_warm_is_one_call_and_leaves_room_for_others(
    daemon: Daemon, session: SessionInfo
) -> None:
    for number in range(3):
        code = f"import os; open('/tmp/seen', 'a').write('{number}'); print(open('/tmp/seen').read())"
        call = daemon.run("python3", "-c", code, policy="snakes", session=session.id)
        assert said(call) == "012"[: number + 1] + "\n"


def test_inputs_that_do_not_fit_fail_their_call_alone(daemon: Daemon, session: SessionInfo) -> None:
    live(daemon, session, "sleep 1000 & head -c 12M /dev/zero | tr '\\0' x > big")
    call = live(daemon, session, "true", inputs={"more": b"x" * (8 << 20)})
    assert call.outcome is not None
    assert call.outcome.error is not None
    assert (call.outcome.cause, call.outcome.error.code) == ("failed", "too_large")
    assert call.container is not None
    assert call.container.ended is None
    assert said(live(daemon, session, "grep -ls sleep /proc/[0-9]*/comm | wc -l; ls big")) == "1\nbig\n"


def test_a_call_that_waits_for_what_is_kept_has_it(daemon: Daemon, session: SessionInfo) -> None:
    live(daemon, session, "echo kept > file")
    whole = "version: 1\nname: whole\nextends: default\nlimits: {memory: 2000MiB}\n"
    (daemon.policies / "whole.yaml").write_text(whole)
    client = daemon.client()
    until(lambda: "whole" in {one.name for one in client.policies()}, "it is in force")
    assert said(client.run(["echo", "ran"], policy="whole")) == "ran\n"
    assert client.session(session.id).container is None
    assert said(sh(daemon, session, "cat file", policy="plain")) == "kept\n"  # a checkpoint was made
