"""``run-in-sandbox`` as a process, against a server on a real socket."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from api_server import ID, Exchange, event, invocation, output

from sandboxd import models
from sandboxd.cli import conflict, usage
from sandboxd.cli.verdict import exit_status, explain

if TYPE_CHECKING:
    from api_server import ApiServer

COMMAND = [sys.executable, "-m", "sandboxd.cli.run"]
ROOT = Path(__file__).parents[2]


def environment(api: ApiServer | None) -> dict[str, str]:
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return known | ({"SANDBOXD_SOCKET": str(api.socket)} if api else {})


def run(
    api: ApiServer | None, *arguments: str | bytes, stdin: bytes = b"", **options: Any
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        env=environment(api),
        timeout=30,
        check=False,
        **options,
    )


def ended(*lines: bytes, **fields: Any) -> list[bytes]:
    cause = fields.pop("cause", "exited")
    return [event(1, "accepted", id=ID), *lines, event(99, "ended", invocation=invocation(cause, **fields))]


def test_output_is_passed_on_byte_by_byte(api: ApiServer) -> None:
    data = bytes(range(256)) * 3000
    half = base64.b64encode(data).decode()
    api.events(
        *ended(
            output(2, {"base64": half}), output(3, {"text": "err ü\n"}, "stderr"), output(4, {"text": "end"})
        )
    )
    found = run(api, "--", "cmd")
    assert found.stdout == data + b"end"
    assert found.stderr == "err ü\n".encode()
    assert found.returncode == 0


def test_the_request(api: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "g").write_text("deep")
    api.events(*ended())
    options = (
        "--policy p --session s --key k --timeout 2 --deadline 1.5s --memory 64MiB --cwd /tmp --priority -3"
    )
    pairs = ["--env", "A=1=2", "--env", "B=", "--label", "x=y"]
    found = run(
        api,
        *options.split(),
        *pairs,
        "--input",
        "f:in/f",
        "--input",
        "d",
        "--",
        "a",
        "--json",
        "",
        os.fsdecode(b"\xff"),
        cwd=tmp_path,
    )
    assert (found.returncode, found.stderr) == (0, b"")
    sent = api.requests[0].json()
    tar = base64.b64decode(sent.pop("tar")["base64"])
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert archive.getnames() == ["d", "d/g"]
    assert sent == {
        "argv": ["a", "--json", "", {"base64": "/w=="}],
        "policy": "p", "session": "s", "key": "k", "deadline": "1.5s", "cwd": "/tmp",
        "priority": -3,
        "limits": {"wall": "2s", "memory": "64MiB"},
        "env": {"A": "1=2", "B": ""}, "labels": {"x": "y"}, "stdin": "none",
        "inputs": [{"path": "in/f", "content": {"text": "content"}, "mode": 0o644}],
    }  # fmt: skip
    models.Request.model_validate(sent)


@pytest.mark.parametrize(
    ("arguments", "argv"),
    [
        (["--", "ls", "-l"], ["ls", "-l"]),
        (["ls", "-l", "--json"], ["ls", "-l", "--json"]),
        (["sh", "-c", "x", "--", "y"], ["sh", "-c", "x", "--", "y"]),
        (["--", "--", "x"], ["--", "x"]),
        (["--policy", "p", "--", "-x"], ["-x"]),
    ],
)
def test_where_the_command_begins(arguments: list[str], argv: list[str]) -> None:
    assert usage.parse(arguments).argv == argv


OUTCOMES: list[tuple[dict[str, Any], int]] = [
    ({"cause": "exited", "exit_code": 0}, 0),
    ({"cause": "exited", "exit_code": 77}, 77),
    ({"cause": "signalled", "signal": 11, "signal_name": "SIGSEGV"}, 139),
    ({"cause": "wall_time"}, 124),
    ({"cause": "cpu_time"}, 124),
    ({"cause": "output"}, 124),
    ({"cause": "memory"}, 137),
    ({"cause": "cancelled"}, 130),
    ({"cause": "denied"}, 125),
    ({"cause": "failed", "error": {"code": "engine", "message": "m"}}, 125),
    ({"cause": "exec_failed", "errno": "ENOENT"}, 127),
    ({"cause": "exec_failed", "errno": "ENOTDIR"}, 127),
    ({"cause": "exec_failed", "errno": "EACCES"}, 126),
]


@pytest.mark.parametrize(("outcome", "status"), OUTCOMES)
def test_the_status_is_that_of_the_model(outcome: dict[str, Any], status: int) -> None:
    typed = models.Outcome.model_validate({"message": "m"} | outcome)
    assert exit_status({"outcome": outcome}) == typed.exit_status() == status
    assert {one["cause"] for one, _ in OUTCOMES} == {cause.value for cause in models.Cause}


def test_anything_but_a_plain_exit_is_explained_in_two_lines(api: ApiServer) -> None:
    api.events(
        *ended(
            cause="wall_time",
            outcome={"message": "it ran longer than 5 s\n\x1b]0;pwned\x07"},
            denials=[{"kind": "syscall", "name": "ptrace", "count": 3}],
            limits_reached=[{"limit": "pids", "value": 64}, {"limit": "wall", "value": 5, "ended": True}],
            withheld=[{"path": "out/\x1b[31m", "reason": "symlink"}],
        )
    )
    found = run(api, "--artifacts", "/tmp", "--", "x")
    assert found.returncode == 124
    lines = found.stderr.decode().splitlines()
    assert lines[0] == r"run-in-sandbox: wall_time: it ran longer than 5 s\n\x1b]0;pwned\x07"
    facts = "the policy denied ptrace (3 times); limits reached: pids (64); "
    assert lines[1:] == ["run-in-sandbox: " + facts + r"artifacts withheld: out/\x1b[31m (symlink)"]


def test_a_plain_exit_is_not_explained(api: ApiServer) -> None:
    api.events(*ended(denials=[{"kind": "syscall", "name": "ptrace", "count": 3}]))
    assert run(api, "--", "x").stderr == b""


def test_json_is_one_object_and_nothing_else(api: ApiServer) -> None:
    api.events(*ended(output(2, {"text": "noise"}), cause="memory", labels={"a": "ü"}))
    found = run(api, "--json", "--", "x")
    assert json.loads(found.stdout) == invocation("memory", labels={"a": "ü"})
    assert found.stdout.count(b"\n") == 1
    assert found.returncode == 137


def test_a_refusal_is_125_and_a_problem_document(api: ApiServer) -> None:
    api.on(
        "POST",
        "invocations",
        lambda one: one.problem(422, "request_too_wide", "too wide\x1b[2J", asked="2GiB"),
    )
    plain = run(api, "--", "x")
    assert (plain.returncode, plain.stdout) == (125, b"")
    assert plain.stderr == b"run-in-sandbox: too wide\\x1b[2J\n"
    found = run(api, "--json", "--", "x")
    document = json.loads(found.stdout)
    assert found.returncode == 125
    assert (document["code"], document["status"], document["details"]) == (
        "request_too_wide",
        422,
        {"asked": "2GiB"},
    )


def test_no_daemon(tmp_path: Path) -> None:
    found = run(None, "--json", "--socket", str(tmp_path / "s"), "--", "x")
    assert found.returncode == 125
    assert b"sandboxd serve" in found.stderr
    assert json.loads(found.stdout)["code"] == "unavailable"


@pytest.mark.parametrize(
    "arguments", [[], ["--"], ["--nope", "--", "x"], ["--env", "A", "--", "x"], ["--pol", "p", "--", "x"]]
)
def test_a_wrong_command_line_is_125(arguments: list[str]) -> None:
    found = run(None, *arguments)
    assert (found.returncode, found.stdout) == (125, b"")
    assert found.stderr.count(b"\n") == 2


@pytest.mark.parametrize(
    "text",
    ["11", "-11", "1.5", "high", "", "1e1", "0x1", "\N{ARABIC-INDIC DIGIT ONE}", " 1", "1_0", "9" * 5000],
)
def test_a_priority_that_no_request_may_have_is_sent_to_nobody(api: ApiServer, text: str) -> None:
    found = run(api, "--priority", text, "--", "x")
    assert (found.returncode, found.stdout) == (125, b"")
    assert b"is not a whole number from -10 to 10" in found.stderr or b"expected one argument" in found.stderr
    assert not api.requests


def test_priorities_are_those_of_requests() -> None:
    for number in usage.PRIORITIES:
        models.Request.model_validate({"argv": ["x"], "priority": number})
        for form in (f"{number}", f"{number:+}"):
            for arguments in (["--priority", form], [f"--priority={form}"]):
                assert usage.parse([*arguments, "--", "x"]).priority == number
    for number in (usage.PRIORITIES[0] - 1, usage.PRIORITIES[-1] + 1):
        with pytest.raises(ValueError, match="priority"):
            models.Request.model_validate({"argv": ["x"], "priority": number})


DIFFERS = [
    {"field": "argv", "before": ["echo", "a\x1b[2J\u202e"], "now": ["echo", "b"]},
    {"field": "env.TOKEN"},
    {"field": "labels.\x07", "before": None, "now": "x"},
    {"field": "limits.memory", "before": 64 * 2**20, "now": None},
    {"field": "limits.wall", "before": 1_000_000, "now": 1_500_000},
    {"field": "priority", "before": 0, "now": 3},
]


def test_a_key_conflict_says_both_values_where_they_are_told(api: ApiServer) -> None:
    details: dict[str, Any] = {"differs": DIFFERS, "id": ID}
    api.on(
        "POST",
        "invocations",
        lambda one: one.problem(409, "key_conflict", "used before: they differ in argv", **details),
    )
    found = run(api, "--key", "k", "--", "x")
    assert (found.returncode, found.stdout) == (125, b"")
    said = [line.removeprefix("run-in-sandbox: ") for line in found.stderr.decode().splitlines()]
    assert said == [
        "used before: they differ in argv",
        r'argv was ["echo", "a\u001b[2J\u202e"], and is ["echo", "b"]',
        r'labels.\x07 was not given, and is "x"',
        "limits.memory was 64MiB, and is not given",
        "limits.wall was 1s, and is 1500ms",
        "priority was 0, and is 3",
    ]
    found = run(api, "--json", "--key", "k", "--", "x")
    assert json.loads(found.stdout)["details"]["differs"] == DIFFERS


@pytest.mark.parametrize(
    "differs",
    [
        None,
        "argv",
        {"field": "argv"},
        [None, 7, "argv", [], {}, {"field": 7, "before": 1, "now": 2}, {"field": "x", "before": 1}],
    ],
)
def test_a_key_conflict_that_says_nothing_sensible_is_told_without(api: ApiServer, differs: Any) -> None:
    api.on("POST", "invocations", lambda one: one.problem(409, "key_conflict", "used", differs=differs))
    assert run(api, "--key", "k", "--", "x").stderr == b"run-in-sandbox: used\n"


def test_a_key_conflict_is_told_in_few_and_short_lines() -> None:
    many = [
        {"field": f"{n}" + "f" * 5000, "before": "b" * 5000, "now": {"x": ["n" * 5000]}} for n in range(20)
    ]
    lines = conflict.told({"differs": many})
    assert len(lines) == 7
    assert lines[-1] == "and 14 more; --json has them"
    assert max(map(len, lines)) < 700


def test_a_cut_stream_goes_on_from_the_last_event(api: ApiServer) -> None:
    api.events(event(1, "accepted", id=ID), output(2, {"text": "some"}), finish=False)
    more = [output(3, {"text": "more"}), ended()[-1]]
    api.events(*more, method="GET", path=f"invocations/{ID}/events")
    found = run(api, "--", "x")
    assert (found.returncode, found.stdout) == (0, b"somemore")
    assert found.stderr == b"run-in-sandbox: the daemon went away; waiting for it\n"
    assert api.sent("GET", f"invocations/{ID}/events")[0].query == {"after": "2", "follow": "1"}
    assert len(api.sent("POST", "invocations")) == 1


def test_a_stream_that_ends_before_a_call_is_known_is_a_failure_of_ours(api: ApiServer) -> None:
    api.events(finish=False)
    found = run(api, "--", "x")
    assert (found.returncode, found.stdout) == (125, b"")
    assert found.stderr.startswith(b"run-in-sandbox: the connection to the daemon ended")
    assert len(api.sent("POST", "invocations")) == 1  # it may have run


def stdin_route(api: ApiServer, *, until_eof: threading.Event) -> bytearray:
    """Collect standard input as a daemon does: by offset, streamed."""
    got = bytearray()

    def route(exchange: Exchange) -> None:
        query = dict(pair.split("=") for pair in exchange.path.partition("?")[2].split("&"))
        assert int(query["offset"]) == len(got)
        for chunk in exchange.body():
            got.extend(chunk)
        if query["eof"] == "1":
            until_eof.set()
        exchange.json({"offset": len(got)})

    route.streams = True  # type: ignore[attr-defined]
    api.on("POST", f"invocations/{ID}/stdin", route)
    return got


def call_until(api: ApiServer, done: threading.Event, *, cause: str = "exited") -> None:
    """A call that is accepted, and ends when ``done`` is set."""

    def route(exchange: Exchange) -> None:
        def lines() -> Any:
            yield event(1, "accepted", id=ID)
            done.wait(20)
            yield event(2, "ended", invocation=invocation(cause))

        exchange.chunked(lines())

    api.on("POST", "invocations", route)


def test_stdin_is_streamed_unchanged(api: ApiServer) -> None:
    done = threading.Event()
    got = stdin_route(api, until_eof=done)
    call_until(api, done)
    data = os.urandom(2**20) * 20
    found = run(api, "-i", "--", "cat", stdin=data)
    assert (found.returncode, found.stderr) == (0, b"")
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    assert json.loads(api.sent("POST", "invocations")[0].body)["stdin"] == "stream"


def test_stdin_that_pauses_arrives_at_once_and_in_order(api: ApiServer) -> None:
    done = threading.Event()
    got = stdin_route(api, until_eof=done)
    call_until(api, done)
    with subprocess.Popen(
        [*COMMAND, "-i", "--", "cat"], env=environment(api), stdin=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        for part in (b"one", b"two"):
            process.stdin.write(part)
            process.stdin.flush()
            limit = time.monotonic() + 10
            while not got.endswith(part) and time.monotonic() < limit:
                time.sleep(0.02)
            assert got.endswith(part)
            time.sleep(0.8)  # longer than a pause: the next part is a request of its own
        process.stdin.close()
        assert process.wait(20) == 0
    assert bytes(got) == b"onetwo"


def test_a_tool_that_ends_without_reading_is_no_failure(api: ApiServer) -> None:
    api.on("POST", f"invocations/{ID}/stdin", lambda one: one.problem(409, "state_conflict", "it has ended"))
    api.events(*ended(outcome={"exit_code": 3}))
    with subprocess.Popen(
        [*COMMAND, "-i", "--", "x"], env=environment(api), stdin=subprocess.PIPE
    ) as process:
        assert process.wait(20) == 3


def test_stdin_that_cannot_be_delivered_ends_the_call(api: ApiServer) -> None:
    done = threading.Event()
    call_until(api, done, cause="cancelled")
    api.on("POST", f"invocations/{ID}/stdin", lambda one: one.problem(500, "host", "no space"))

    def cancel(exchange: Exchange) -> None:
        done.set()
        exchange.json(invocation("cancelled"))

    api.on("POST", f"invocations/{ID}/cancel", cancel)
    found = run(api, "-i", "--", "x", stdin=b"abc")
    assert found.returncode == 125
    assert b"standard input was not delivered: no space" in found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_call(api: ApiServer, number: int) -> None:
    done = threading.Event()
    call_until(api, done, cause="cancelled")

    def cancel(exchange: Exchange) -> None:
        done.set()
        exchange.json(invocation("cancelled"))

    api.on("POST", f"invocations/{ID}/cancel", cancel)
    with subprocess.Popen(
        [*COMMAND, "--json", "--", "x"], env=environment(api), stdout=subprocess.PIPE
    ) as process:
        api.wait_for("POST", "invocations")
        time.sleep(0.2)
        process.send_signal(number)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert json.loads(out)["outcome"]["cause"] == "cancelled"


def test_a_second_signal_leaves_at_once(api: ApiServer) -> None:
    done = threading.Event()
    call_until(api, done)
    api.json("POST", f"invocations/{ID}/cancel", invocation("cancelled"))
    with subprocess.Popen([*COMMAND, "--", "x"], env=environment(api)) as process:
        api.wait_for("POST", "invocations")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        api.wait_for("POST", f"invocations/{ID}/cancel")
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
    done.set()


def test_a_reader_that_goes_away_ends_it_by_sigpipe(api: ApiServer) -> None:
    def route(exchange: Exchange) -> None:
        exchange.chunked(output(number, {"text": "x" * 60_000}) for number in range(1, 10_000))

    api.on("POST", "invocations", route)
    with subprocess.Popen([*COMMAND, "--", "yes"], env=environment(api), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(10) == b"x" * 10
        process.stdout.close()
        assert process.wait(20) == -signal.SIGPIPE
    assert api.hung_up.wait(5)


def test_a_stdout_that_does_not_block(api: ApiServer) -> None:
    data = "x" * 60_000
    api.events(*ended(*(output(number, {"text": data}) for number in range(2, 30))))
    read, write = os.pipe()
    os.set_blocking(write, False)
    with subprocess.Popen([*COMMAND, "--", "x"], env=environment(api), stdout=write) as process:
        os.close(write)
        time.sleep(0.5)
        with os.fdopen(read, "rb") as file:
            assert len(file.read()) == 28 * 60_000
        assert process.wait(10) == 0


def test_artifacts_are_saved(api: ApiServer, tmp_path: Path) -> None:
    data = b"\x00data"
    one = {"path": "out/a b", "size": len(data), "digest": "sha256:" + hashlib.sha256(data).hexdigest()}
    api.events(*ended(artifacts=[one]))
    api.on("GET", f"invocations/{ID}/artifacts/out/a%20b", lambda exchange: exchange.send(data))
    assert run(api, "--artifacts", str(tmp_path / "to"), "--", "x").returncode == 0
    assert (tmp_path / "to" / "out" / "a b").read_bytes() == data
    api.events(*ended(artifacts=[one | {"path": "../evil"}]))
    found = run(api, "--artifacts", str(tmp_path / "to"), "--", "x")
    assert found.returncode == 125
    assert b"not a plain relative path" in found.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "s"] == ["to"]


def test_only_what_starts_fast_is_imported(api: ApiServer) -> None:
    api.events(*ended(output(2, {"text": "x"})))
    code = "import sys; from sandboxd.cli.run import main; main(['--', 'x']); print(*sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(api), capture_output=True, text=True, check=True
    )
    loaded = set(found.stdout.split())
    heavy = {
        "pydantic",
        "rich",
        "cyclopts",
        "anyio",
        "h11",
        "asyncio",
        "dataclasses",
        "inspect",
        "tarfile",
        "subprocess",
    }
    assert not loaded & (heavy | {"sandboxd.models", "pathlib", "tempfile", "uuid", "decimal"})


def test_every_option_is_documented() -> None:
    parser = usage.build_parser()
    for action in parser._actions:
        assert action.help, action.dest
        assert len(action.help) > 10 or action.dest == "help"
    found = run(None, "--help")
    assert found.returncode == 0
    for word in (
        b"examples:",
        b"exit status:",
        b"124",
        b"125",
        b"126",
        b"127",
        b"128+N",
        b"130",
        b"137",
        b"SANDBOXD_SOCKET",
    ):
        assert word in found.stdout


def test_attempts_are_told_whatever_the_exit() -> None:
    call = {"outcome": {"cause": "exited", "exit_code": 0}, "attempts": 2, "retried": [{"cause": "memory"}]}
    assert explain(call, artifacts=False) == ["2 attempts, after memory"]
