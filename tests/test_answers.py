"""How an outcome reaches its caller: after a while, by a socket of its own, and of many calls at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from acting import acting_as
from daemons import until

from sandboxd import AsyncClient, errors
from sandboxd.client import transport, wire
from sandboxd.models import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import BatchResult

UID = 54_322
CALLERS = (
    "callers:\n  - {match: {uid: 0}, role: operator, callback: true}\n"
    f"  - {{match: {{uid: {UID}}}, role: agent, callback: true}}\n"
    "  - {match: {uid: 54323}, role: agent}\n"
)


def ask(daemon: Daemon, method: str, target: str, body: Any = None, **headers: str) -> tuple[int, list[Any]]:
    """The status, and the lines of the answer."""
    data = None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    exchange = wire.Exchange(method, f"/v1/{target}", data, named)
    with transport.exchange([str(daemon.socket)], exchange, connect_timeout=5, timeout=60) as answer:
        return answer.status, [json.loads(line) for line in answer.read().splitlines()]


def test_an_answer_comes_after_a_while_whether_or_not_the_call_has_ended(daemon: Daemon) -> None:
    began = time.monotonic()
    status, [found] = ask(daemon, "POST", "invocations", {"argv": ["sleep", "50"]}, Prefer="wait=0.3")
    assert status == 202
    assert found["state"] != "ended"
    assert 0.3 <= time.monotonic() - began < 20
    status, [shown] = ask(daemon, "GET", f"invocations/{found['id']}?wait=0.2")
    assert (status, shown["id"]) == (200, found["id"])
    assert shown["state"] != "ended"  # it went on without its caller
    daemon.client().cancel(found["id"])
    status, [shown] = ask(daemon, "GET", f"invocations/{found['id']}?wait=50")
    assert shown["outcome"]["cause"] == "cancelled"
    status, [found] = ask(daemon, "POST", "invocations", {"argv": ["true"]}, Prefer="respond-async, wait=50")
    assert (status, found["outcome"]["exit_code"]) == (200, 0)
    for wrong in ("-1", "nan", "inf", "4000", "x"):
        with pytest.raises(errors.InvalidRequest):
            ask(daemon, "GET", f"invocations/{found['id']}?wait={wrong}")


def test_the_head_of_an_answer_goes_ahead_of_a_long_call(daemon: Daemon) -> None:
    exchange = wire.Exchange("POST", "/v1/invocations", json.dumps({"argv": ["sleep", "50"]}).encode())
    with transport.exchange([str(daemon.socket)], exchange, connect_timeout=5, timeout=10) as answer:
        id_ = answer.location.rpartition("/")[2]
        assert daemon.client().get(id_).state != "ended"
    found = daemon.client().wait(id_, timeout=20)  # its caller hung up
    assert found.outcome is not None
    assert found.outcome.cause == "cancelled"


def test_a_batch_answers_each_request_as_it_ends_and_a_bad_one_sinks_no_other(daemon: Daemon) -> None:
    requests: list[Any] = [
        {"argv": ["sleep", "1"]},
        {"argv": []},
        {"argv": ["sh", "-c", "exit 3"]},
        "nonsense",
        {"argv": ["true"], "policy": "nosuch"},
        {"argv": ["echo", "x"], "key": "of-a-batch"},
        {"argv": ["true"], "nosuch": 1},
    ]
    status, lines = ask(daemon, "POST", "batches", {"requests": requests, "parallel": 3})
    assert status == 200
    by_index = {line["index"]: line for line in lines}
    assert sorted(by_index) == list(range(7))
    assert lines[-1]["index"] == 0
    assert by_index[2]["invocation"]["outcome"]["exit_code"] == 3
    codes = {index: line["problem"]["code"] for index, line in by_index.items() if "problem" in line}
    assert codes == {
        1: "invalid_request",
        3: "invalid_request",
        4: "not_found",
        6: "invalid_request",
    }
    again = daemon.client().run(["echo", "x"], key="of-a-batch")
    assert again.id == by_index[5]["invocation"]["id"]
    bad: list[dict[str, Any]] = [{"requests": []}, {"requests": [1], "parallel": 0}, {}, {"requests": 5}]
    for wrong in bad:
        with pytest.raises(errors.InvalidRequest):
            ask(daemon, "POST", "batches", wrong)


def test_whoever_leaves_a_batch_takes_its_calls_along_but_for_those_with_a_key(daemon: Daemon) -> None:
    client = daemon.client()
    label = {"of": "left"}
    requests = [{"argv": ["sleep", "50"], "labels": label} for _ in range(4)]
    requests.append({"argv": ["sleep", "50"], "labels": label, "key": "left"})
    requests += [{"argv": ["true"], "labels": label} for _ in range(20)]
    exchange = wire.Exchange(
        "POST", "/v1/batches", json.dumps({"requests": requests, "parallel": 5}).encode()
    )
    with transport.exchange([str(daemon.socket)], exchange, connect_timeout=5, timeout=30):
        until(lambda: len(client.list(label="of=left").invocations) == 5, "all that may be are there")
    until(lambda: len(client.list(label="of=left", cause="cancelled").invocations) == 4, "they are gone")
    found = client.list(label="of=left").invocations
    assert len(found) == 5  # nothing more began
    [kept] = [each for each in found if each.key]
    assert kept.state != "ended"
    client.cancel(kept.id)


def receiver(directory: Path, name: str = "r") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(directory / name))
    sock.settimeout(30)
    return sock


def as_user(uid: int, daemon: Daemon, request: dict[str, Any]) -> None:
    """Ask for a call as somebody else."""
    with acting_as(uid):
        status, _ = ask(daemon, "POST", "invocations", request, Prefer="respond-async")
    assert status == 202


def test_a_callback_is_told_by_a_process_of_the_callers_own(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = daemon_factory(config=CALLERS)
    daemon.admit_everybody()
    mine = tmp_path / "mine"
    mine.mkdir()
    for directory in (tmp_path, *tmp_path.parents):
        if not directory.stat().st_mode & 0o001:
            directory.chmod(directory.stat().st_mode | 0o011)
    with closing(receiver(mine)) as sock, closing(receiver(tmp_path, "roots")) as other:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        os.chown(mine / "r", UID, UID)
        (tmp_path / "roots").chmod(0o600)
        as_user(UID, daemon, {"argv": ["sh", "-c", "exit 7"], "callback": {"unix": str(mine / "r")}})
        data, control, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(12))
        said = json.loads(data)
        assert said == {"id": said["id"], "state": "ended", "cause": "exited", "exit_code": 7}
        sender = int.from_bytes(control[0][2][4:8], "little")
        assert sender == UID
        # a socket of root's: the daemon could write to it, and the caller cannot
        as_user(UID, daemon, {"argv": ["true"], "callback": {"unix": str(tmp_path / "roots")}})
        as_user(UID, daemon, {"argv": ["true"], "callback": {"unix": str(mine / "r")}})
        assert json.loads(sock.recv(4096))["cause"] == "exited"
        other.settimeout(2)
        with pytest.raises(TimeoutError):
            other.recv(4096)


def test_a_callback_is_told_by_the_next_daemon_too(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    first = daemon_factory(config=CALLERS)
    path = tmp_path / "later"
    ids = []
    for argv in (["true"], ["sleep", "1000"]):
        body = {"argv": argv, "callback": {"unix": str(path)}}
        ids.append(ask(first, "POST", "invocations", body, Prefer="respond-async")[1][0]["id"])
    first.client().wait(ids[0], timeout=20)  # nobody is there to be told
    first.stop(signal.SIGKILL)
    with closing(receiver(tmp_path, "later")) as sock:
        second = daemon_factory(config=CALLERS, state=first.state, name="second")
        told = [json.loads(sock.recv(4096)) for _ in ids]
        assert {each["id"]: each["cause"] for each in told} == {ids[0]: "exited", ids[1]: "failed"}
        until(lambda: not leftover(second.state), "what was told is not owed any more")


def leftover(state: Path) -> Sequence[Any]:
    with closing(sqlite3.connect(f"file:{state}/journal.sqlite3?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT id FROM callbacks WHERE done IS NULL").fetchall()


def test_who_may_not_have_callbacks_is_refused(daemon_factory: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = daemon_factory(config=CALLERS)
    daemon.admit_everybody()
    body = {"argv": ["true"], "callback": {"unix": str(tmp_path / "r")}}
    with acting_as(54_323), pytest.raises(errors.NotPermitted):
        ask(daemon, "POST", "invocations", body)
    for wrong in ("relative", "/" + "x" * 200, "/a\0b"):
        with pytest.raises((errors.InvalidRequest, errors.TooLarge)):
            ask(daemon, "POST", "invocations", {"argv": ["true"], "callback": {"unix": wrong}})


def test_a_batch_of_the_command_line(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "batch.ndjson"
    file.write_text('{"argv": ["echo", "a"]}\n\n{"argv": ["sh", "-c", "exit 4"]}\n')
    done = daemon.cli("--batch", str(file), "--parallel", "2")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["index"]: line["invocation"]["outcome"]["exit_code"] for line in lines} == {0: 0, 1: 4}
    assert done.returncode == 1
    file.write_text('{"argv": ["true"]}\n')
    assert daemon.cli("--batch", str(file)).returncode == 0
    file.write_text('{"argv": ["true"]}\nnot json\n')
    done = daemon.cli("--batch", str(file))
    assert done.returncode == 125
    assert b"line 2" in done.stderr
    assert isinstance(done, subprocess.CompletedProcess)


def test_batches_of_both_clients(daemon: Daemon) -> None:
    requests: list[Any] = [
        ["sh", "-c", "exit 1"],
        Request(argv=["sh", "-c", "exit 2"]),
        {"argv": [], "policy": "x"},
    ]

    async def run() -> list[BatchResult]:
        async with await AsyncClient(daemon.socket).batch(requests, parallel=2) as results:
            return [each async for each in results]

    with daemon.client().batch(requests) as results:
        found = list(results)
    for each in (found, anyio.run(run)):
        by_index = {one.index: one for one in each}
        codes = [one.invocation.outcome.exit_code for _, one in sorted(by_index.items())
                 if one.invocation and one.invocation.outcome]  # fmt: skip
        assert codes == [1, 2]
        assert by_index[2].problem is not None
        assert by_index[2].problem.code == "invalid_request"
