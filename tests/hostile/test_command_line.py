"""``run-in-sandbox`` against a real daemon: its exit status and what it says, for each cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from daemons import PATIENCE, RUN_IN_SANDBOX

if TYPE_CHECKING:
    from pathlib import Path

    from daemons import Daemon

CAUSES: dict[str, tuple[list[str], int, list[str]]] = {
    "a status": (["--", "sh", "-c", "exit 7"], 7, []),
    "a signal": (["--", "sh", "-c", "kill -SEGV $$"], 139, ["signalled: The command was ended by SIGSEGV"]),
    "the wall clock": (["--timeout", "200ms", "--", "sleep", "9"], 124, ["wall_time: ", "200ms"]),
    "a deadline": (["--deadline", "300ms", "--", "sleep", "9"], 124, ["wall_time: ", "deadline"]),
    "output": (["--policy", "strict", "--", "yes"], 124, ["output: ", "256KiB to stdout"]),
    "memory": (["--policy", "tiny", "--", "perl", "-e", "$x .= 'x' x 1048576 while 1"], 137,
               ["memory: ", "64MiB"]),
    "no such tool": (["--", "no-such-tool"], 127, ["exec_failed: 'no-such-tool' could not be executed"]),
    "not executable": (["--", "/etc/passwd"], 126, ["exec_failed: '/etc/passwd' could not be executed"]),
    "no such policy": (["--policy", "no-such", "--", "true"], 125, ["no-such"]),
    "a limit above the policy's": (["--timeout", "2h", "--", "true"], 125, ["2h"]),
    "denied calls": (["--", "sh", "-c", "unshare -U true; exit 3"], 3,
                     ["the policy denied unshare(CLONE_NEWUSER)"]),
    # not by a shell: bash tries again for seconds, and gives up when a signal comes meanwhile
    "pids": (["--policy", "tiny", "--", "perl", "-e", "for (1..40) { fork // next or sleep 60 } exit 4"], 4,
             ["limits reached: pids (32)"]),
    "output over its cap": (["--", "sh", "-c", "head -c 2M /dev/zero; exit 5"], 5,
                            ["stdout was cut, 1048576 bytes"]),
}  # fmt: skip


@pytest.mark.parametrize("what", CAUSES)
def test_the_status_and_the_words_of_each_cause(daemon: Daemon, what: str) -> None:
    arguments, status, words = CAUSES[what]
    found = daemon.cli(*arguments)
    said = found.stderr.decode()
    assert found.returncode == status, said
    for word in words:
        assert word in said
    ours = [line for line in said.splitlines() if line.startswith("run-in-sandbox: ")]
    assert len(ours) <= 2
    assert bool(ours) == bool(words)


def test_json_holds_the_same(daemon: Daemon) -> None:
    for arguments, status, _ in CAUSES.values():
        found = daemon.cli("--json", *arguments)
        assert found.returncode == status
        document: dict[str, Any] = json.loads(found.stdout)
        assert ("outcome" in document) != ("code" in document)
        if status != 125:
            assert document["state"] == "ended"
            assert document["receipt"]["controls"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_caller_cancels(daemon: Daemon, number: int) -> None:
    process = subprocess.Popen(
        [RUN_IN_SANDBOX, "--socket", daemon.socket, "--", "sh", "-c", "echo on; sleep 30"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=20 * PATIENCE)
    assert process.returncode == 130, said


def test_a_caller_that_is_killed_takes_its_call_along(daemon: Daemon) -> None:
    label = f"test=killed-{os.getpid()}"
    process = subprocess.Popen(
        [RUN_IN_SANDBOX, "--socket", daemon.socket, "--label", label, "--", "sleep", "30"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    client = daemon.client()
    with process:
        until = time.monotonic() + 20
        while client.health().running == 0:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.kill()
    (call,) = client.list(label=label).invocations
    ended = client.wait(call.id, timeout=10 * PATIENCE)
    assert ended.outcome is not None
    assert ended.outcome.cause == "cancelled"


def test_a_reader_that_closes_the_pipe(daemon: Daemon) -> None:
    shell = f"{RUN_IN_SANDBOX} --socket {daemon.socket} -- yes | head -n 2"
    found = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=30, check=True)
    assert (found.stdout, found.stderr) == (b"y\ny\n", b"")


def test_artifacts_of_a_hostile_tool_stay_in_their_directory(daemon: Daemon, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "got"
    target.mkdir()
    (target / "d").symlink_to(outside)  # what an earlier run, or the caller, has put there
    code = "mkdir d; echo x > d/f; ln -s /etc e; echo y > '..\\\\up'; printf z > $'new\\nline'"
    found = daemon.cli("--policy", "files", "--artifacts", str(target), "--", "bash", "-c", code)
    assert list(outside.iterdir()) == []
    assert found.returncode in {0, 125}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "outside"]
