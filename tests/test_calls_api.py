"""Calls over the socket: queues, keys, who sees what, streams, signals, caps, policies that change."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from daemons import needs_containers, start_daemon, until

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd import Client
    from sandboxd.models import Invocation

OTHER_UID, OTHER_GID = 54_321, 65_534
CALLERS = """
callers:
  - {match: {uid: 0}, role: operator}
  - {match: {uid: 54321}, role: agent, policies: [tiny], concurrent: 1}
  - {match: {uid: 54322}, role: agent, policies: [tiny]}
"""


def begun(client: Client, *argv: str, **fields: Any) -> Invocation:
    """A call whose command runs."""
    found = client.start(list(argv), **fields)
    until(lambda: client.get(found.id).state == "running", "the command runs")
    return found


def text(found: Invocation) -> str | None:
    assert found.stdout is not None
    return found.stdout.text


def cause(found: Invocation) -> str:
    assert found.outcome is not None
    return found.outcome.cause


def as_other(daemon: Daemon, code: str, uid: int = OTHER_UID) -> Any:
    """What Python code prints as JSON when another user runs it with a ``client``; or its error's code."""
    program = (
        "import json, os, sys\nfrom sandboxd import Client, errors\nclient = Client(sys.argv[1])\n"
        "client.health()\n"  # the interpreter may be one that only root can read: all is imported now
        f"os.setgroups([]); os.setresgid({OTHER_GID}, {OTHER_GID}, {OTHER_GID})\n"
        f"os.setresuid({uid}, {uid}, {uid})\n"
        f"try:\n    print(json.dumps({code}))\nexcept errors.SandboxdError as error:\n"
        "    print(json.dumps({'code': error.code, 'message': str(error)}))\n"
    )
    for path in (daemon.socket.parent, *daemon.socket.parent.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", program, daemon.socket],
        capture_output=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon with one slot and a queue of two places."""
    needs_containers()
    config = f"budget: {{slots: 1}}\nqueue: 2\n{CALLERS}"
    with start_daemon(tmp_path_factory.mktemp("narrow"), config=config) as daemon:
        yield daemon


def test_a_queue_is_fair_bounded_and_can_be_left(narrow: Daemon) -> None:
    client = narrow.client()
    first = begun(client, "sleep", "1000", policy="tiny")
    second = client.start(["true"], policy="tiny")
    until(lambda: client.health().queued == 1, "the second waits")
    assert client.get(second.id).state == "queued"
    with pytest.raises(errors.QueueFull) as caught:
        [client.start(["true"], policy="tiny") for _ in range(3)]
    assert caught.value.details["retry_after"] >= 1
    late = client.list(state="queued").invocations
    assert second.id in {waiting.id for waiting in late}
    assert client.list(state="queued", limit=1).next == late[0].id
    assert [call.id for call in client.list(state="running").invocations] == [first.id]
    assert client.list(state="running", policy="default").invocations == []
    assert cause(client.cancel(second.id)) == "cancelled"
    assert client.get(second.id).times.started is None
    client.cancel(first.id)
    for waiting in late:
        client.wait(waiting.id, timeout=20)
    until(lambda: client.health().queued == 0, "a slot is free when its container is cleared away")


def test_a_deadline_passes_in_the_queue_too(narrow: Daemon) -> None:
    client = narrow.client()
    first = begun(client, "sleep", "1000", policy="tiny")
    began = time.monotonic()
    found = client.run(["true"], policy="tiny", deadline="300ms")
    assert cause(found) == "wall_time"
    assert found.outcome is not None
    assert "deadline of 300ms" in found.outcome.message
    assert "queue" in found.outcome.message
    assert [(one.limit, one.value, one.ended) for one in found.limits_reached] == [
        ("deadline", 300_000, True)
    ]
    assert 0.25 < time.monotonic() - began < 5
    client.cancel(first.id)


def test_callers_take_turns(narrow: Daemon) -> None:
    """A caller with a call before another's gets no second one before the other had its first."""
    client = narrow.client()
    first = begun(client, "sleep", "1000", policy="tiny")
    mine = client.start(["true"], policy="tiny")
    theirs = as_other(narrow, "client.start(['true'], policy='tiny').id")
    assert isinstance(theirs, str), theirs
    client.cancel(first.id)
    a, b = client.wait(mine.id), client.wait(theirs)
    assert a.times.started is not None
    assert b.times.started is not None
    assert (cause(a), cause(b)) == ("exited", "exited")


def test_others_see_nothing_and_the_operator_all(narrow: Daemon) -> None:
    client = narrow.client()
    mine = client.run(["echo", "mine"], policy="tiny")
    for code in (
        f"client.get('{mine.id}').id",
        f"client.cancel('{mine.id}').id",
        f"b''.join(client.stdout('{mine.id}')).decode()",
        f"client.signal('{mine.id}', 15)",
        f"client.write_stdin('{mine.id}', b'x')",
        f"[e.seq for e in client.events('{mine.id}')]",
        f"client.artifact('{mine.id}', 'x').close()",
    ):
        assert as_other(narrow, code)["code"] == "not_found", code
    assert as_other(narrow, "[i.id for i in client.list().invocations]", uid=54_322) == []
    theirs = as_other(narrow, "client.run(['id', '-u'], policy='tiny').id")
    assert text(client.get(theirs)) == "1000\n"
    assert theirs in [found.id for found in client.list().invocations]
    assert as_other(narrow, f"client.get('{theirs}').caller.uid") == OTHER_UID


def test_a_caller_uses_its_policies_and_no_others(narrow: Daemon) -> None:
    refused = as_other(narrow, "client.run(['true'], policy='default').id")
    assert refused["code"] == "not_permitted"
    assert "tiny" in refused["message"]
    assert as_other(narrow, "[p.name for p in client.policies()]") == ["tiny"]
    stranger = as_other(narrow, "client.run(['true'], policy='tiny').id", uid=54_399)
    assert stranger["code"] == "not_identified"


def test_a_key_stands_for_one_request(daemon: Daemon) -> None:
    client = daemon.client()
    first = client.run(["sh", "-c", "date +%s%N"], key="once")
    again = client.run(["sh", "-c", "date +%s%N"], key="once")
    assert (again.id, text(again)) == (first.id, text(first))
    assert again.outcome == first.outcome
    with pytest.raises(errors.KeyConflict):
        client.run(["sh", "-c", "date"], key="once")


def test_many_at_once_with_one_key_attach_to_one_call(daemon: Daemon) -> None:
    found: list[Invocation] = []

    def run() -> None:
        found.append(daemon.client().run(["sh", "-c", "sleep 0.3; date +%s%N"], key="together"))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 6
    assert len({one.id for one in found}) == 1
    assert len({text(one) for one in found}) == 1


def test_who_goes_away_cancels_only_a_call_that_is_tied(daemon: Daemon) -> None:
    client = daemon.client()
    outcomes = {}
    for name, fields in (("tied", {}), ("keyed", {"key": "stays"})):
        stream = client.stream(["sh", "-c", "sleep 0.7; echo end"], **fields)  # type: ignore[arg-type]
        event = next(stream)
        stream.close()
        assert event.id is not None
        outcomes[name] = client.wait(event.id, timeout=20)
    free = client.start(["sh", "-c", "echo end"])
    assert cause(outcomes["tied"]) == "cancelled"
    assert (cause(outcomes["keyed"]), text(outcomes["keyed"])) == ("exited", "end\n")
    assert cause(client.wait(free.id, timeout=20)) == "exited"


@pytest.mark.parametrize(
    ("limit", "value", "allowed"),
    [("memory", "1GiB", 64 * 2**20), ("wall", "1h", 10_000_000), ("pids", 1000, 32), ("cpus", 64, 1000)],
)
def test_a_request_may_only_narrow(daemon: Daemon, limit: str, value: object, allowed: int) -> None:
    with pytest.raises(errors.RequestTooWide) as caught:
        daemon.run("true", policy="tiny", limits={limit: value})
    details = caught.value.details
    assert (details["limit"], details["allowed"]) == (limit, allowed)
    assert details["asked"] > allowed


def test_what_is_narrowed_is_in_force(daemon: Daemon) -> None:
    found = daemon.run("true", limits={"memory": "32MiB", "pids": 7, "cpus": 0.5})
    assert found.receipt is not None
    values = {control.name: control.in_force for control in found.receipt.controls}
    assert (values["memory"], values["pids"], values["cpu"]) == (str(32 * 2**20), "7", "500")


def test_stdin_counts_from_the_start_of_the_stream(daemon: Daemon) -> None:
    client = daemon.client()
    call = client.start(["cat"], stdin="stream")
    assert client.write_stdin(call.id, b"abc", eof=False) == 3
    assert client.write_stdin(call.id, b"abcdef", offset=0, eof=False) == 6  # sent again, and more
    with pytest.raises(errors.StateConflict) as caught:
        client.write_stdin(call.id, b"z", offset=9, eof=False)
    assert caught.value.details["offset"] == 6
    assert client.write_stdin(call.id, [b"bc", b"de", b"fgh"], offset=1) == 8  # and in other pieces
    found = client.wait(call.id, timeout=20)
    assert text(found) == "abcdefgh"
    with pytest.raises(errors.StateConflict):
        client.write_stdin(call.id, b"late", offset=8)


@pytest.mark.parametrize("eof", [True, False])
def test_an_empty_write_beyond_a_gap_ends_nothing(daemon: Daemon, eof: bool) -> None:  # noqa: FBT001 - pytest passes it
    client = daemon.client()
    call = client.start(["cat"], stdin="stream")
    for data in (b"", [], [b"", b""]):
        with pytest.raises(errors.StateConflict) as refused:  # at once, while it may not have started yet
            client.write_stdin(call.id, data, offset=100, eof=eof)
        assert refused.value.details["offset"] == 0
    assert client.write_stdin(call.id, b"abc", eof=False) == 3
    with pytest.raises(errors.StateConflict) as refused:
        client.write_stdin(call.id, b"", offset=4, eof=eof)
    assert refused.value.details["offset"] == 3
    assert client.write_stdin(call.id, b"", offset=3, eof=False) == 3
    assert client.write_stdin(call.id, b"def", offset=3, eof=False) == 6  # it is open
    assert client.write_stdin(call.id, b"", offset=6) == 6
    done = client.wait(call.id, timeout=20)
    assert done.stdout is not None
    assert done.stdout.text == "abcdef"


def test_stdin_whose_answer_was_lost_is_told_from_what_came_too_late(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    call = client.start(["cat"], stdin="stream")
    assert client.write_stdin(call.id, b"abcdef") == 6
    assert client.wait(call.id, timeout=20).stdin_taken == 6
    other = daemon.run("true")
    for _ in range(2):
        for offset, data in ((0, b"abcdef"), (2, b"cd"), (6, b""), (0, [b"abc", b"def"])):
            assert client.write_stdin(call.id, data, offset=offset) == 6
        for offset, data in ((0, b"abcdefg"), (6, b"x"), (7, b""), (9, b"x")):
            with pytest.raises(errors.CallEnded) as caught:
                client.write_stdin(call.id, data, offset=offset)
            assert caught.value.details == {"offset": 6}
        with pytest.raises(errors.CallEnded) as caught:
            client.write_stdin(other.id, b"")
        assert caught.value.details == {}
        daemon.stop()  # and the next daemon knows it as well
        daemon = daemon_factory(state=daemon.state, name="next")
        client = daemon.client()
    client.prune(age=0)
    with pytest.raises(errors.CallEnded):
        client.write_stdin(call.id, b"abcdef")


def test_stdin_for_a_tool_that_never_reads_ends_with_the_tool(daemon: Daemon) -> None:
    client = daemon.client()
    call = client.start(["sleep", "1"], stdin="stream")
    began = time.monotonic()
    try:  # its pipe breaks first, and takes the rest as /dev/null would, or the call ends first
        assert client.write_stdin(call.id, bytes(8 * 2**20)) == 8 * 2**20
    except errors.StateConflict as error:
        assert error.details["offset"] < 8 * 2**20  # noqa: PT017  (either is right)
    assert time.monotonic() - began < 10
    assert cause(client.wait(call.id, timeout=20)) == "exited"


def test_stdin_is_only_for_those_who_asked_for_it(daemon: Daemon) -> None:
    client = daemon.client()
    call = begun(client, "sleep", "1000")
    with pytest.raises(errors.StateConflict):
        client.write_stdin(call.id, b"x")
    client.cancel(call.id)


def test_signals_reach_the_command(daemon: Daemon) -> None:
    client = daemon.client()
    call = begun(client, "sh", "-c", "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.01; done")
    until(lambda: text(client.get(call.id)) == "up\n", "the trap is set")
    client.signal(call.id, "SIGTERM")
    found = client.wait(call.id, timeout=20)
    assert text(found) == "up\nterm\n"
    assert found.outcome is not None
    assert found.outcome.exit_code == 3
    with pytest.raises(errors.StateConflict):
        client.signal(call.id, 15)
    killed = begun(client, "sleep", "1000")
    client.signal(killed.id, 9)
    found = client.wait(killed.id, timeout=20)
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.signal_name) == ("signalled", "SIGKILL")


@pytest.mark.parametrize("mode", ["truncate", "kill"])
def test_output_beyond_its_cap_is_cut_or_ends_the_call(daemon: Daemon, mode: str) -> None:
    (daemon.policies / f"cap-{mode}.yaml").write_text(
        f"version: 1\nname: cap-{mode}\nextends: default\n"
        f"limits: {{stdout: {{size: 64KiB, on_limit: {mode}}}}}\n"
    )
    until(lambda: f"cap-{mode}" in [p.name for p in daemon.client().policies()], "the policy is loaded")
    found = daemon.run("sh", "-c", "head -c 1M /dev/zero | tr '\\0' a; sleep 0.2", policy=f"cap-{mode}")
    assert found.stdout is not None
    assert (found.stdout.size, found.stdout.truncated) == (65_536, True)
    assert found.stdout.digest == "sha256:" + hashlib.sha256(b"a" * 65_536).hexdigest()
    assert cause(found) == ("output" if mode == "kill" else "exited")
    [limit] = [limit for limit in found.limits_reached if limit.limit == "stdout"]
    assert limit.ended == (mode == "kill")
    if mode == "truncate":
        assert found.stdout.dropped == 2**20 - 65_536


def test_labels_filter_the_list(daemon: Daemon) -> None:
    client = daemon.client()
    ids = [client.run(["true"], labels={"suite": "labels", "n": str(n)}).id for n in range(3)]
    assert [found.id for found in client.list(label="suite=labels").invocations] == ids[::-1]
    assert [found.id for found in client.list(label="n=1").invocations if found.id in ids] == [ids[1]]
    page = client.list(label="suite=labels", limit=2)
    assert page.next is not None
    rest = client.list(label="suite=labels", before=page.next)
    assert [found.id for found in rest.invocations] == [ids[0]]


def test_artifacts_are_known_by_digest_and_lead_back_to_their_call(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.client()
    found = client.run(
        ["sh", "-c", "mkdir out; cp in.txt out/copy; printf '\\377' > out/bytes"],
        policy="files",
        inputs={"in.txt": "content"},
        artifacts=["out/*"],
    )
    listed = {artifact.path: artifact for artifact in found.artifacts}
    assert set(listed) == {"out/copy", "out/bytes"}
    assert listed["out/copy"].digest == "sha256:" + hashlib.sha256(b"content").hexdigest()
    client.save_artifacts(found.id, tmp_path / "saved")
    assert (tmp_path / "saved/out/bytes").read_bytes() == b"\xff"
    assert client.get(found.id).artifacts == found.artifacts
    assert found.policy.digest.startswith("sha256:")  # what it came from is on the same record
    assert found.image.digest
    assert found.plan.startswith("sha256:")


def test_finished_calls_are_shown_by_every_command(daemon: Daemon) -> None:
    found = daemon.run("sh", "-c", "echo out; echo err >&2", labels={"shown": "yes"})

    def cli(*arguments: str) -> str:
        command = [
            str(Path(sys.executable).with_name("sandboxd")),
            *arguments,
            "--socket",
            str(daemon.socket),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout

    assert found.id in json.dumps(json.loads(cli("ps", "--all", "--json")))
    assert json.loads(cli("inspect", found.id, "--json"))["outcome"]["exit_code"] == 0
    assert "out\n" in cli("logs", found.id)


def test_a_plan_says_what_would_run_and_is_what_then_runs(daemon: Daemon) -> None:
    client = daemon.client()
    document = client.plan(["echo", "planned"], limits={"pids": 9})
    assert document.plan["limits"]["pids"] == 9
    assert document.explain
    found = client.run(["echo", "planned"], limits={"pids": 9})
    assert found.plan == document.digest


def test_policies_change_for_later_calls_alone(daemon: Daemon) -> None:
    client = daemon.client()
    file = daemon.policies / "changing.yaml"
    head = "version: 1\nname: changing\nextends: default\nlimits:\n"
    file.write_text(f"{head}  pids: 40\n")
    until(lambda: "changing" in [p.name for p in client.policies()], "the policy is loaded")
    old = client.policy("changing").digest
    call = begun(client, "sleep", "1000", policy="changing")
    file.write_text(f"{head}  pids: 41\n")
    until(lambda: client.policy("changing").digest != old, "the edit is in force")
    later = client.run(["true"], policy="changing")
    new = client.policy("changing").digest
    assert (client.get(call.id).policy.digest, later.policy.digest) == (old, new)
    file.write_text(f"{head}  pidz: 42\n")
    until(lambda: client.health().problems, "the bad edit is told")
    [problem] = client.health().problems
    assert (problem.file, problem.line, problem.column) == (str(file), 5, 3)
    assert client.run(["true"], policy="changing").policy.digest == new
    file.unlink()
    until(lambda: not client.health().problems, "the problem is gone")
    assert cause(client.cancel(call.id)) == "cancelled"


def test_an_image_that_is_not_there_is_told_with_the_command_that_gets_it(daemon: Daemon) -> None:
    (daemon.policies / "absent.yaml").write_text(
        "version: 1\nname: absent\nextends: default\nimage: nosuchimage\n"
    )
    client = daemon.client()
    until(lambda: "absent" in [p.name for p in client.policies()], "the policy is loaded")
    with pytest.raises(errors.NotFound) as caught:
        client.run(["true"], policy="absent")
    assert "sandboxd image" in str(caught.value)
    (daemon.policies / "absent.yaml").unlink()


def test_an_image_in_use_cannot_be_removed(daemon: Daemon, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    for name in ("dev", "proc", "tmp", "workspace", "etc", "usr"):
        (tree / name).mkdir()
    source = tmp_path / "sleep.c"
    source.write_text("#include <unistd.h>\nint main(void) { sleep(1000); return 0; }\n")
    subprocess.run(["cc", "-static", "-o", tree / "bin/sleeper", source], check=True)
    subprocess.run(["tar", "-C", tree, "-cf", tmp_path / "tree.tar", "."], check=True)
    sandboxd = str(Path(sys.executable).with_name("sandboxd"))
    name = f"used-{tmp_path.name[-20:].replace('_', '-').lower()}"

    def image(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sandboxd, "image", *arguments, "--state", str(daemon.state)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = image("import", str(tmp_path / "tree.tar"), "--name", name)
    assert done.returncode == 0, done.stderr
    policy = daemon.policies / "used.yaml"
    policy.write_text(f"version: 1\nname: used\nextends: default\nimage: {name}\n")
    client = daemon.client()
    until(lambda: "used" in [p.name for p in client.policies()], "the policy is loaded")
    call = begun(client, "/bin/sleeper", policy="used")
    refused = image("rm", name)
    assert refused.returncode != 0
    assert "use" in refused.stderr
    assert cause(client.cancel(call.id)) == "cancelled"
    policy.unlink()
    until(lambda: "used" not in [p.name for p in client.policies()], "the policy is gone")
    done = image("rm", name)
    assert done.returncode == 0, done.stderr


def test_a_call_is_cancelled_in_whatever_state(daemon: Daemon) -> None:
    client = daemon.client()
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04):
        call = client.start(["sleep", "1000"])
        time.sleep(delay)
        assert cause(client.cancel(call.id)) == "cancelled"
        assert cause(client.cancel(call.id)) == "cancelled"
    until(lambda: client.health().running == 0, "their containers are cleared away")


def test_a_call_without_output_tells_the_same_events_later(daemon: Daemon) -> None:
    client = daemon.client()
    with client.stream(["unshare", "--user", "/nothing"], policy="default", limits={"stderr": 0}) as live:
        seen = list(live)
    assert [event.type for event in seen] == ["accepted", "started", "denied", "limit", "ended"]
    assert seen[0].id is not None
    for follow in (True, False):
        with client.events(seen[0].id, follow=follow) as later:
            assert list(later) == seen
        with client.events(seen[0].id, after=3, follow=follow) as rest:
            assert list(rest) == seen[3:]
    with client.stderr(seen[0].id) as raw:
        assert list(raw) == []
    assert not (daemon.state / "calls" / seen[0].id).exists()
