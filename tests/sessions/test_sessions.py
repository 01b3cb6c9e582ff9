"""Sessions by a real daemon: what a call leaves is there for the next, and what failed left nothing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from daemons import until
from pulled import run
from sessioned import by, layers, said, sh

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import SessionInfo


def test_files_are_there_for_the_next_call(daemon: Daemon, session: SessionInfo) -> None:
    first = sh(
        daemon, session, "echo one > file; mkdir -p a/b; echo deep > a/b/c; ln -s file link; ln file same"
    )
    assert said(first) == ""
    second = sh(daemon, session, "cat file a/b/c link; stat -c '%u %g %h' file; echo two > file; rm -r a; ls")
    assert said(second) == "one\ndeep\none\n1000 1000 2\nfile\nlink\nsame\n"
    third = sh(daemon, session, "cat file same link; ls -A; [ ! -e a ]; mkdir a; ls -A a")
    assert said(third) == "two\none\ntwo\nfile\nlink\nsame\n"  # one file until one of its names is written
    assert [one.session for one in (first, second, third)] == [session.id] * 3
    assert first.checkpoint_before == session.head.digest
    assert first.checkpoint_after == second.checkpoint_before != first.checkpoint_before
    assert second.checkpoint_after == third.checkpoint_before
    receipt = {control.name: control for control in (third.receipt.controls if third.receipt else [])}
    assert "overlay" in receipt["workspace"].in_force
    assert receipt["workspace"].enforced


def listing(daemon: Daemon, session: SessionInfo | str) -> str:
    return said(sh(daemon, session, "find . -mindepth 1 | sort; cat $(find . -type f | sort)", policy="kept"))


HOW_IT_ENDS = {
    "a status": ("echo x > new; rm file; exit 3", {"kept": True, "success": False, "always": True}),
    "success": ("echo x > new; rm file", {"kept": True, "success": True, "always": True, "never": False}),
    "a signal": ("echo x > new; rm file; kill -9 $$", {"kept": False, "success": False, "always": True}),
    "the clock": ("echo x > new; rm file; sleep 60", {"always": True}),
    "the file system": (
        "echo x > new; rm file; head -c 1G /dev/zero > big",
        {"kept": True, "success": False},
    ),
}


@pytest.mark.parametrize(
    ("what", "policy"), [(what, policy) for what, (_, kept) in HOW_IT_ENDS.items() for policy in kept]
)
def test_the_policy_says_when_files_are_kept(
    daemon: Daemon, session: SessionInfo, what: str, policy: str
) -> None:
    code, kept = HOW_IT_ENDS[what]
    before = sh(daemon, session, "echo old > file").checkpoint_after
    found = sh(daemon, session, code, policy=policy)
    names = said(sh(daemon, session, "ls")).split()
    if kept[policy]:
        assert "new" in names
        assert "file" not in names
        assert found.checkpoint_after != before
    else:
        assert names == ["file"]
        assert found.checkpoint_after == found.checkpoint_before == before


def test_a_limit_and_a_cancel_leave_nothing(daemon: Daemon, session: SessionInfo) -> None:
    before = layers(daemon)
    ended = sh(daemon, session, "echo x > new; sleep 60", limits={"wall": "1s"})
    assert ended.outcome is not None
    assert ended.outcome.cause == "wall_time"
    client = daemon.client()
    call = client.start(["sh", "-c", "echo x > new; sleep 60"], policy="kept", session=session.id)
    until(lambda: client.get(call.id).state == "running", "it runs")
    cancelled = client.cancel(call.id)
    assert cancelled.outcome is not None
    assert cancelled.outcome.cause == "cancelled"
    assert client.run(["/nothing"], policy="kept", session=session.id, inputs={"x": "x"}).outcome is not None
    assert listing(daemon, session) == ""
    assert layers(daemon) == before


def test_each_attempt_begins_with_the_same_files(daemon: Daemon, session: SessionInfo) -> None:
    """Also where what an attempt left would have been kept, had it been the last."""
    before = layers(daemon)
    found = sh(daemon, session, "ls -A; echo $$ >> attempt; sleep 2", policy="again")
    assert found.outcome is not None
    assert found.outcome.cause == "exited", found.outcome
    assert found.attempts == 2
    assert found.stdout is not None
    assert found.stdout.text == ""
    assert said(sh(daemon, session, "grep -c . attempt")) == "1\n"
    assert len(layers(daemon) - before) == 1


def test_one_call_at_a_time_in_the_order_in_which_they_came(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    code = "[ -e busy ] && echo together; touch busy; sleep 0.1; rm busy; echo $0 >> log"
    started = [
        client.start(["sh", "-c", code, str(number)], policy="kept", session=session.id)
        for number in range(8)
    ]
    for one in started:
        assert said(client.wait(one.id)) == ""
    assert said(sh(daemon, session, "cat log")).split() == [str(number) for number in range(8)]


def test_fork_and_rollback_move_pointers(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    digests = [session.head.digest]
    for number in range(3):
        found = sh(daemon, session, f"echo {number} > file; touch f{number}")
        assert found.checkpoint_after is not None
        digests.append(found.checkpoint_after)
    known = client.checkpoints(session.id).checkpoints
    assert [one.digest for one in reversed(known)] == digests
    assert [one.head for one in known] == [True, False, False, False]
    assert client.session(session.id).calls == 3
    before = layers(daemon)
    fork = client.fork_session(session.id, checkpoint=digests[2])
    assert layers(daemon) == before
    assert said(sh(daemon, fork.id, "cat file; ls; echo fork > file")) == "1\nf0\nf1\nfile\n"
    assert said(sh(daemon, session, "cat file")) == "2\n"
    back = client.rollback_session(session.id, known[-2].id)
    assert back.head.digest == digests[1]
    assert said(sh(daemon, session, "cat file; ls")) == "0\nf0\nfile\n"
    forth = client.rollback_session(session.id, digests[3])  # what it was rolled back from is there
    assert forth.head.id == known[0].id
    client.rollback_session(session.id, digests[1])
    client.discard_session(session.id)
    assert [one.digest for one in client.checkpoints(session.id).checkpoints] == digests[2::-1]
    with pytest.raises(errors.NotFound, match="no checkpoint"):
        client.rollback_session(session.id, digests[3])
    client.delete_session(session.id)  # the fork stands on some of its checkpoints
    until(lambda: len(layers(daemon)) == len(before) - 1 + 1, "layers that nobody needs are removed")
    assert said(sh(daemon, fork.id, "cat file; ls")) == "fork\nf0\nf1\nfile\n"
    client.rollback_session(fork.id, digests[1])
    client.rollback_session(fork.id, digests[2])
    client.delete_session(fork.id)
    until(lambda: not layers(daemon) & before, "nothing is left")


def test_many_calls_make_few_layers(daemon: Daemon, session: SessionInfo) -> None:
    for number in range(20):
        sh(daemon, session, f"echo {number} > f{number}; rm -f f{number - 3}; echo {number} > last")
    until(lambda: daemon.client().session(session.id).layers <= 5, "they are merged")
    assert listing(daemon, session) == "./f17\n./f18\n./f19\n./last\n17\n18\n19\n19\n"
    known = daemon.client().checkpoints(session.id).checkpoints
    assert len(known) == 21
    daemon.client().rollback_session(session.id, known[20 - 7].id)
    assert listing(daemon, session) == "./f4\n./f5\n./f6\n./last\n4\n5\n6\n6\n"


def test_names_are_the_callers_own(daemon: Daemon) -> None:
    client = daemon.client()
    made = client.create_session("work", labels={"task": "1"}, policy="kept")
    try:
        with pytest.raises(errors.SessionExists) as caught:
            client.create_session("work")
        assert caught.value.details["id"] == made.id
        assert client.session("work").labels == {"task": "1"}
        assert said(client.run(["echo", "x"], session="work")) == "x\n"  # the session's policy
        with pytest.raises(errors.NotPermitted, match=r"'kept'.*'never'"):
            client.run(["true"], session="work", policy="never")
        assert [one.name for one in client.sessions().sessions] == ["work"]
    finally:
        client.delete_session("work")
    with pytest.raises(errors.NotFound):
        client.session("work")
    again = client.create_session("work")
    assert again.id != made.id
    client.delete_session("work")


@pytest.mark.parametrize("name", ["a b", "", "x" * 129, "../x", "-x", "01a22169-d35d-7c31-99b3-4f895011e1d8"])
def test_a_bad_name_is_refused(daemon: Daemon, name: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="name"):
        daemon.client().create_session(name)


def test_an_empty_name_is_no_name_at_all(daemon: Daemon, session: SessionInfo, tmp_path: Path) -> None:
    """As a shell variable that is not set gives it."""
    client = daemon.client()
    before = client.sessions().sessions
    empty: list[dict[str, Any]] = [{"name": ""}, {"policy": ""}]
    for fields in empty:
        with pytest.raises(errors.InvalidRequest, match=next(iter(fields))):
            client.create_session(**fields)
        with pytest.raises(errors.InvalidRequest, match=next(iter(fields))):
            client.fork_session(session.id, **fields)
    for command in (("create", ""), ("fork", session.id, ""), ("create", "--policy", "")):
        done = run(daemon, "sandboxd", "session", *command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
    assert client.sessions().sessions == before


def test_a_policy_that_there_is_not(daemon: Daemon, session: SessionInfo, tmp_path: Path) -> None:
    """It is refused when the session is made, and not by its first call; later it may be there."""
    client = daemon.client()
    before = client.sessions().sessions
    makes: list[Callable[..., SessionInfo]] = [
        client.create_session,
        partial(client.fork_session, session.id),
    ]
    for make in makes:
        with pytest.raises(errors.NotFound, match=r"there is no policy 'keptt'.*'kept'") as caught:
            make("named", policy="keptt")
        assert caught.value.details["policy"] == "keptt"
        assert client.sessions().sessions == before
    done = run(daemon, "sandboxd", "session", "create", "named", "--policy", "keptt", cwd=tmp_path)
    assert done.returncode == 1
    assert "there is no policy 'keptt'" in done.stderr
    with by(4242, daemon), pytest.raises(errors.NotPermitted, match="you may use kept"):
        client.create_session(policy="keptt")
    file = daemon.policies / "later.yaml"
    file.write_text("version: 1\nname: later\nextends: kept\nlimit: {}\n")
    try:
        until(lambda: _kind(daemon, "later") is errors.PolicyInvalid, "a policy with an error")
        file.write_text("version: 1\nname: later\nextends: kept\n")
        until(lambda: _kind(daemon, "later") is None, "the policy")
    finally:
        file.unlink()
    until(lambda: _kind(daemon, "later") is errors.NotFound, "its end")


def _kind(daemon: Daemon, policy: str) -> type[Exception] | None:
    """What making a session with a policy raises."""
    try:
        made = daemon.client().create_session(policy=policy)
    except errors.Refused as error:
        return type(error)
    daemon.client().delete_session(made.id)
    return None


def test_what_is_unknown_is_not_found(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    for act in (
        lambda: client.session("nothing"),
        lambda: client.delete_session("nothing"),
        lambda: client.checkpoints("nothing"),
        lambda: client.fork_session("nothing"),
        lambda: client.discard_session("nothing"),
        lambda: client.rollback_session("nothing", "x"),
        lambda: client.rollback_session(session.id, "sha256:" + "0" * 64),
        lambda: client.fork_session(session.id, checkpoint="nothing"),
        lambda: client.run(["true"], session="nothing"),
    ):
        with pytest.raises(errors.NotFound):
            act()


def test_nothing_is_done_to_a_session_that_is_busy(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    call = client.start(["sleep", "20"], policy="kept", session=session.id)
    try:
        assert client.session(session.id).in_flight == 1
        for act in (
            lambda: client.delete_session(session.id),
            lambda: client.rollback_session(session.id, session.head.id),
            lambda: client.discard_session(session.id),
        ):
            with pytest.raises(errors.SessionBusy, match="1 calls"):
                act()
        client.fork_session(session.id, "while")  # reads only what is kept already
        client.delete_session("while")
    finally:
        client.cancel(call.id)


def test_a_session_goes_when_its_time_is_over_but_not_under_a_call(daemon: Daemon) -> None:
    client = daemon.client()
    made = client.create_session(ttl="1500ms")
    assert made.expires == made.created + 1_500_000
    found = client.run(["sh", "-c", "echo x > f; sleep 3"], policy="kept", session=made.id)
    assert said(found) == ""
    assert found.checkpoint_after != found.checkpoint_before
    until(lambda: not [one for one in client.sessions().sessions if one.id == made.id], "its ttl is over")
    with pytest.raises(errors.NotFound):
        client.run(["true"], policy="kept", session=made.id)
    idle = client.create_session(idle="2s")
    for _ in range(4):
        client.run(["sleep", "1"], policy="kept", session=idle.id)
    until(lambda: not [one for one in client.sessions().sessions if one.id == idle.id], "it is idle")


def test_inputs_take_the_place_of_files(daemon: Daemon, session: SessionInfo) -> None:
    sh(daemon, session, "mkdir d; echo old > d/f; ln -s /etc/passwd link; ln -s d through; chmod 0 d/f")
    found = sh(daemon, session, "cat d/f link; stat -c %u d/f", inputs={"d/f": "new\n", "link": "mine\n"})
    assert said(found) == "new\nmine\n1000\n"
    assert said(sh(daemon, session, "cat d/f link")) == "new\nmine\n"
    refused = sh(daemon, session, "true", inputs={"through/x": "x"})
    assert refused.outcome is not None
    assert refused.outcome.cause == "failed"
    assert "symbolic link" in refused.outcome.message
    assert refused.checkpoint_after == refused.checkpoint_before


def test_the_command_line(daemon: Daemon) -> None:
    assert daemon.sandboxd("session", "create", "cli", "--ttl", "1h", "--label", "a=b").strip() == "cli"
    try:
        found = daemon.cli("--policy", "kept", "--session", "cli", "--", "sh", "-c", "echo x > f")
        assert (found.returncode, found.stderr) == (0, b"")
        found = daemon.cli("--policy", "kept", "--session", "cli", "--", "cat", "f")
        assert found.stdout == b"x\n"
        assert "cli" in daemon.sandboxd("session", "ls")
        assert "any" in daemon.sandboxd("session", "show", "cli")
        known = daemon.client().checkpoints("cli").checkpoints
        assert all(one.id in daemon.sandboxd("session", "checkpoints", "cli") for one in known)
        assert "other" in daemon.sandboxd("session", "fork", "cli", "other", "--checkpoint", known[-1].id)
        assert daemon.sandboxd("session", "rollback", "cli", known[-1].digest)
        assert daemon.sandboxd("session", "discard", "cli")
        assert daemon.cli("--policy", "kept", "--session", "cli", "--", "ls").stdout == b""
        daemon.sandboxd("session", "rm", "other")
    finally:
        daemon.sandboxd("session", "rm", "cli")
    found = daemon.cli("--session", "cli", "--", "true")
    assert found.returncode == 125
    assert b"sandboxd session create" in found.stderr
