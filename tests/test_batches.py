"""Batches that are larger than the queue: they pace themselves, and take nobody's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from daemons import RUN_IN_SANDBOX, until

from sandboxd import errors
from sandboxd.client import transport, wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

OTHER = 54_321
NARROW = (
    "budget: {slots: 2}\ncallers:\n  - {match: {uid: 0}, role: operator, queued: 3, concurrent: 1}\n"
    f"  - {{match: {{uid: {OTHER}}}, role: agent}}\n"
)


def opened(daemon: Daemon, requests: list[Any], parallel: int, **more: Any) -> transport.Answer:
    body = json.dumps({"requests": requests, "parallel": parallel, **more}).encode()
    exchange = wire.Exchange("POST", "/v1/batches", body, waits=True)
    return transport.exchange([str(daemon.socket)], exchange, connect_timeout=5, timeout=60)


def batch(daemon: Daemon, requests: list[Any], parallel: int, **more: Any) -> dict[int, dict[str, Any]]:
    """What came of each request, by its number."""
    with opened(daemon, requests, parallel, **more) as answer:
        lines = [json.loads(line) for line in answer.lines()]
    assert len(lines) == len(requests)
    return {line["index"]: line for line in lines}


def test_a_batch_is_held_back_by_its_callers_limits_and_not_refused(
    daemon_factory: Callable[..., Daemon],
) -> None:
    daemon = daemon_factory(config=NARROW)
    requests = [{"argv": ["sh", "-c", f"exit {number % 7}"]} for number in range(24)]
    found = batch(daemon, requests, 24)
    codes = {index: line["invocation"]["outcome"]["exit_code"] for index, line in found.items()}
    assert codes == {number: number % 7 for number in range(24)}
    accepted = sorted(found, key=lambda index: found[index]["invocation"]["id"])
    assert accepted == list(range(24))  # in their order
    assert not (daemon.client().health().queued)


def test_one_of_the_whole_queues_size_is_too(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="budget: {slots: 2}\nqueue: 4\n")
    found = batch(daemon, [{"argv": ["true"]}] * 20, 20)
    assert {line["invocation"]["outcome"]["cause"] for line in found.values()} == {"exited"}


def test_what_is_held_back_takes_nobodys_place(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="budget: {slots: 1}\nqueue: 5\n" + NARROW.partition("\n")[2])
    daemon.admit_everybody()
    client = daemon.client()
    lines: list[dict[str, Any]] = []

    def read() -> None:
        lines.extend(batch(daemon, [{"argv": ["sleep", "0.2"]}] * 14, 14).values())

    reading = threading.Thread(target=read)
    reading.start()
    until(lambda: client.health().queued == 3, "as many wait as may")
    os.seteuid(OTHER)
    try:
        theirs = [client.run(["true"]) for _ in range(3)]
    finally:
        os.seteuid(0)
    reading.join(60)
    started = sorted(line["invocation"]["times"]["started"] for line in lines)
    assert len(started) == 14
    for one in theirs:
        assert one.outcome is not None
        assert one.outcome.cause == "exited"
        assert one.times.started is not None
        between = [each for each in started if one.times.accepted < each < one.times.started]
        assert len(between) <= 1  # theirs was next, whatever the batch holds back
    assert any(each > theirs[-1].times.accepted for each in started)


def test_a_request_waits_for_room_no_longer_than_its_deadline(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=NARROW)
    client = daemon.client()
    blockers = [client.start(["sleep", "1000"]).id for _ in range(4)]
    until(lambda: client.health().queued == 3, "the queue is full")
    began = time.monotonic()
    found = batch(daemon, [{"argv": ["true"], "deadline": "300ms"}] * 3, 3)
    assert 0.3 <= time.monotonic() - began < 20
    assert {line["problem"]["code"] for line in found.values()} == {"queue_full"}
    assert len(client.list(limit=100).invocations) == len(blockers)
    for each in reversed(blockers):
        client.cancel(each)


def test_who_leaves_while_it_is_held_back_begins_nothing_more(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=NARROW)
    client = daemon.client()
    blockers = [client.start(["sleep", "1000"]).id for _ in range(4)]
    requests = [{"argv": ["true"]}, {"argv": ["true"], "key": "k"}, {"argv": ["true"]}]
    with opened(daemon, requests, 3):
        time.sleep(1)
    time.sleep(0.2)
    for each in reversed(blockers):
        client.cancel(each)
    time.sleep(2)
    assert len(client.list(limit=100).invocations) == len(blockers)


@pytest.mark.parametrize("tied", [[5], [0, 2], [2, 0], [9_999]])
def test_a_number_that_no_request_has_is_refused(daemon: Daemon, tied: list[int]) -> None:
    requests = [{"argv": ["true"], "labels": {"of": "nobody"}}] * 2
    with pytest.raises(errors.InvalidRequest, match="numbered from 0 to 1") as refused:
        opened(daemon, requests, 2, tied=tied)
    assert refused.value.details["field"] == "tied"
    assert daemon.client().list(label="of=nobody").invocations == []
    assert set(batch(daemon, [{"argv": ["true"]}] * 2, 2, tied=[1, 0, 1])) == {0, 1}


def test_a_key_may_be_tied_to_who_asks(daemon: Daemon) -> None:
    client = daemon.client()
    requests = [
        {"argv": ["sleep", "50"], "labels": {"of": "tied"}, "key": key} for key in ("tied", "not-tied")
    ]
    with opened(daemon, requests, 2, tied=[0]):
        until(lambda: len(client.list(label="of=tied").invocations) == 2, "both are there")
    until(lambda: client.list(label="of=tied", cause="cancelled").invocations, "one has ended")
    states = {one.key: one.state for one in client.list(label="of=tied").invocations}
    assert states["tied"] == "ended"
    assert states["not-tied"] != "ended"
    client.run(["sleep", "50"], labels={"of": "tied"}, key="tied")  # its outcome stays
    client.cancel(next(one.id for one in client.list(label="of=tied").invocations if one.key == "not-tied"))


def file_of(tmp_path: Path, *requests: Any) -> str:
    file = tmp_path / "batch.ndjson"
    file.write_text("".join(one if isinstance(one, str) else f"{json.dumps(one)}\n" for one in requests))
    return str(file)


def command_line(daemon: Daemon, *options: str) -> tuple[int, dict[int, dict[str, Any]], str]:
    done = daemon.cli(*options)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {line["index"]: line for line in lines}, done.stderr.decode()


def test_options_are_for_each_request_that_does_not_say_so_itself(daemon: Daemon, tmp_path: Path) -> None:
    show = ["sh", "-c", "echo $A $B; pwd"]
    file = file_of(
        tmp_path,
        {"argv": show},
        {"argv": show, "env": {"A": "own"}, "labels": {"x": "own"}, "policy": "shell", "cwd": "/"},
        {"argv": ["sleep", "50"], "limits": {"memory": "32MiB"}},
        {"argv": ["sleep", "1"], "limits": {"wall": "9s"}, "deadline": "40s"},
    )
    options = ["--policy", "tiny", "--env", "A=1", "--env", "B=2", "--timeout", "500ms", "--deadline", "60s"]
    options += ["--memory", "48MiB", "--label", "x=1", "--label", "y=2", "--cwd", "/tmp"]
    status, found, said = command_line(daemon, "--batch", file, *options)
    assert (status, said) == (1, "")
    calls = {index: line["invocation"] for index, line in found.items()}
    assert [calls[index]["policy"]["name"] for index in range(4)] == ["tiny", "shell", "tiny", "tiny"]
    assert calls[0]["stdout"]["text"] == "1 2\n/tmp\n"
    assert calls[1]["stdout"]["text"] == "own 2\n/\n"
    assert calls[0]["labels"] == {"x": "1", "y": "2"}
    assert calls[1]["labels"] == {"x": "own", "y": "2"}
    assert [calls[index]["outcome"]["cause"] for index in range(4)] == [
        "exited",
        "exited",
        "wall_time",
        "exited",
    ]

    def memory(call: dict[str, Any]) -> int:
        [found] = [one["in_force"] for one in call["receipt"]["controls"] if one["name"] == "memory"]
        return int(found)

    assert [memory(calls[index]) // 2**20 for index in (0, 2)] == [48, 32]


def test_what_an_option_names_that_is_not_there_refuses_every_request(daemon: Daemon, tmp_path: Path) -> None:
    file = file_of(tmp_path, {"argv": ["true"]}, {"argv": ["true"], "policy": "tiny"})
    status, found, _ = command_line(daemon, "--batch", file, "--policy", "nosuch")
    assert status == 125
    assert found[0]["problem"]["code"] == "not_found"
    assert found[1]["invocation"]["policy"]["name"] == "tiny"
    for options in (["--session", "nosuch"], ["--policy", ""], ["--callback", "nosuch"], ["--timeout", "x"]):
        status, found, _ = command_line(daemon, "--batch", file_of(tmp_path, {"argv": ["true"]}), *options)
        assert (status, "problem" in found[0]) == (125, True), options


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--key", "k"], "`key`"),
        (["--input", "."], "`inputs`"),
        (["-i"], "`stdin`"),
        (["--artifacts", "to"], "`id`"),
        (["--workspace", "."], "--session"),
        (["--pull"], "session pull"),
        (["--upload"], "--upload"),
        (["--", "true"], "commands are in its file"),
    ],
)
def test_options_of_one_call_are_refused_with_a_sentence(
    daemon: Daemon, tmp_path: Path, options: list[str], word: str
) -> None:
    done = daemon.cli("--batch", file_of(tmp_path, {"argv": ["true"]}), *options)
    assert (done.returncode, done.stdout) == (125, b"")
    assert word in done.stderr.decode()


def test_a_key_of_another_request_is_told_with_both_values(daemon: Daemon, tmp_path: Path) -> None:
    first, other = (
        {"argv": ["echo", word], "key": "told of in a batch", "env": {"A": word}} for word in ("one", "two")
    )
    status, _, said = command_line(daemon, "--batch", file_of(tmp_path, first), "--priority", "1")
    assert (status, said) == (0, "")
    file = file_of(tmp_path, first | {"priority": 1}, other | {"priority": 2})
    status, found, said = command_line(daemon, "--batch", file, "--priority", "-7")
    assert (status, found[0]["invocation"]["outcome"]["cause"]) == (125, "exited")
    assert found[1]["problem"]["code"] == "key_conflict"
    assert said.splitlines() == [
        (
            "run-in-sandbox: line 2: this key was used before with another request: they differ in "
            "argv, env.A, priority"
        ),
        'run-in-sandbox: argv was ["echo", "one"], and is ["echo", "two"]',
        "run-in-sandbox: priority was 1, and is 2",
    ]


def test_problems_name_their_line(daemon: Daemon, tmp_path: Path) -> None:
    bad = {"argv": ["true"], "nosuch": 1}
    file = file_of(tmp_path, "\n", {"argv": ["true"]}, "\n \n", bad, "7\n", bad, bad, bad)
    status, found, said = command_line(daemon, "--batch", file)
    assert status == 125
    assert {index: line["line"] for index, line in found.items()} == {0: 2, 1: 5, 2: 6, 3: 7, 4: 8, 5: 9}
    assert found[1]["problem"]["detail"].startswith("line 5: nosuch")
    assert found[2]["problem"]["code"] == "invalid_request"
    assert said.count("run-in-sandbox: line ") == 3
    assert "2 more were refused" in said


def test_ctrl_c_ends_a_batch_of_the_command_line_and_what_runs_of_it(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.client()
    sleeping = {"argv": ["sleep", "1000"], "labels": {"of": "ctrl-c"}}
    options = ["--socket", str(daemon.socket), "--batch", file_of(tmp_path, *[sleeping] * 5)]
    command: list[Any] = [RUN_IN_SANDBOX, *options, "--parallel", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: len(client.list(label="of=ctrl-c").invocations) == 3, "all that may be are there")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, b"", b"")
    until(lambda: len(client.list(label="of=ctrl-c", cause="cancelled").invocations) == 3, "they are gone")
    assert len(client.list(label="of=ctrl-c").invocations) == 3


def test_a_batch_of_the_command_line_imports_little(daemon: Daemon, tmp_path: Path) -> None:
    file = file_of(tmp_path, {"argv": ["true"]})
    code = (
        "import sys; from sandboxd.cli.run import main; status = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--socket", str(daemon.socket), "--batch", file],
        capture_output=True,
        check=True,
    )
    heavy = {"pydantic", "anyio", "h11", "asyncio", "dataclasses", "sandboxd.models", "pathlib", "uuid"}
    assert not heavy & set(done.stderr.decode().split())
