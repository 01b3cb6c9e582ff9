"""Requests: what a command starts with, and that a request can narrow its policy and never widen it."""

from __future__ import annotations

import http.client as http_client
import json
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import errors
from sandboxd.conformance.case import outcome, sh, text
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.policies import PREFIX

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject

MIB = 2**20


def test_the_environment_is_the_policys_and_the_requests(subject: Subject) -> None:
    found = subject.run("env", "-0", env={"MINE": "a\nb=c", "BOTH": "request", "EMPTY": ""})
    lines = dict(line.split("=", 1) for line in text(found).split("\0") if line)
    assert lines.pop("PATH").startswith("/")
    assert lines == {
        "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "OF_POLICY": "1", "BOTH": "request",
        "MINE": "a\nb=c", "EMPTY": "",
    }  # fmt: skip


def test_ids_umask_and_place(subject: Subject) -> None:
    found = subject.run("sh", "-c", "id -u; id -g; id -G; umask; pwd; hostname; [ -t 0 ] || echo none")
    assert text(found) == "1000\n1000\n1000\n0022\n/workspace\nsandbox\nnone\n"
    found = subject.run("sh", "-c", "id -u; id -g; id -G; umask; hostname", policy="proof")
    assert text(found) == "1234\n4321\n4321\n0027\nproving\n"
    assert text(subject.run("pwd", cwd="/usr/bin")) == "/usr/bin\n"


@needs("a root inside")
def test_root_inside_is_nobody(subject: Subject) -> None:
    code = "id -u; grep CapEff /proc/self/status; touch /usr/x || echo no; chown 1 . || echo no"
    assert text(subject.run("sh", "-c", code, policy="root")).split() == [
        "0", "CapEff:", "0000000000000000", "no", "no",
    ]  # fmt: skip


def test_signals_and_descriptors_are_as_a_program_expects(subject: Subject) -> None:
    code = "grep -E 'Sig(Blk|Ign)|ShdPnd' /proc/self/status | cut -f2; ls /proc/self/fd | wc -l; echo $$"
    *masks, descriptors, _ = text(subject.run("sh", "-c", code)).split()
    assert set(masks) == {"0" * 16}
    assert int(descriptors) == 4  # ls itself reads a directory


def test_arguments_are_bytes(subject: Subject) -> None:
    odd = [b"\xff\xfe", b"", b"\n", b"a b", b"*", b"$(id)", b"-e", b"\xc3\x28"]
    found = subject.run(b"printf", rb"%s\0", *odd)
    assert found.stdout is not None
    assert found.stdout.decode() == b"".join(one + b"\0" for one in odd)


@pytest.mark.parametrize(
    ("limit", "value", "line", "in_force"),
    [
        ("memory", 48 * MIB, "memory", str(48 * MIB)),
        ("memory", "32MiB", "memory", str(32 * MIB)),
        ("pids", 7, "pids", "7"),
        ("cpus", 0.5, "cpu", "500"),
    ],
)
def test_what_is_narrowed_is_in_force(
    subject: Subject, limit: str, value: Any, line: str, in_force: str
) -> None:
    found = subject.run("true", limits={limit: value})
    assert outcome(found).exit_code == 0
    assert found.receipt is not None
    assert {one.name: one.in_force for one in found.receipt.controls}[line] == in_force


NARROWED = {
    "wall": ("sleep 60", "300ms", "wall_time"),
    "cpu_time": ("while :; do :; done", "100ms", "cpu_time"),
    "memory": ("head -c 60M /dev/zero | tail | wc -c", "24MiB", "exited"),
    "pids": ("true | true | true | true | true", 3, "exited"),
    "stdout": ("yes | head -c 5000", 100, "exited"),
    "stderr": ("yes | head -c 5000 >&2", 100, "exited"),
}


@pytest.mark.parametrize("limit", NARROWED)
def test_what_is_narrowed_is_reached(subject: Subject, limit: str) -> None:
    code, value, cause = NARROWED[limit]
    found = subject.run("sh", "-c", f"{code}; true", limits={limit: value})
    assert outcome(found).cause == cause
    assert limit in {one.limit for one in found.limits_reached}


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("wall", "2h"),
        ("memory", "1TiB"),
        ("pids", 33),
        ("cpus", 900.0),
        ("stdout", "2MiB"),
        ("stderr", "2MiB"),
    ],
)
def test_what_is_wider_is_refused_with_both_values(subject: Subject, limit: str, value: Any) -> None:
    with pytest.raises(errors.RequestTooWide) as caught:
        subject.run("true", limits={limit: value})
    assert caught.value.details["asked"]
    assert caught.value.details["allowed"]
    assert limit in str(caught.value)


REFUSED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "no command": ([], {}),
    "an empty command": ([""], {}),
    "NUL in an argument": (["a\0b"], {}),
    "NUL in a variable": (["true"], {"env": {"A": "x\0y"}}),
    "an equals sign in a name": (["true"], {"env": {"A=B": "x"}}),
    "a relative directory": (["true"], {"cwd": "x"}),
    "an argument that is too long": (["x" * 131_072], {}),
    "too many arguments": (["true"] * 4097, {}),
    "another policy's name": (["true"], {"policy": "../default"}),
    "a policy that is not there": (["true"], {"policy": "conformance-nowhere"}),
    "a session": (["true"], {"session": "s"}),
    "a setuid input": (["true"], {"inputs": [{"path": "x", "content": {"text": ""}, "mode": 0o4755}]}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_does_not_run(subject: Subject, what: str) -> None:
    argv, fields = REFUSED[what]
    with pytest.raises(errors.Refused) as caught:
        subject.client.run(argv, **({"policy": PREFIX + "plain"} | fields))
    assert caught.value.code


def test_a_plan_says_what_would_run(subject: Subject) -> None:
    plan = subject.client.plan(["true"], policy=PREFIX + "proof", limits={"pids": 5})
    found = subject.run("true", policy="proof", limits={"pids": 5})
    assert found.plan == plan.digest
    assert plan.explain


def http(subject: Subject, method: str, path: str, body: Any = None) -> tuple[int, str, Any]:
    """Status, content type and JSON of an answer, by nothing but the standard library."""
    connection = http_client.HTTPConnection("localhost", timeout=subject.seconds(60))
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(subject.socket))
    with closing(connection):
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.headers.get_content_type(), json.loads(answer.read())


def test_http_is_all_that_is_needed(subject: Subject) -> None:
    request = {"argv": ["echo", "hi"], "policy": PREFIX + "plain"}
    status, kind, made = http(subject, "POST", "/v1/invocations", request)
    assert (status, kind, made["stdout"]["text"]) == (200, "application/json", "hi\n")
    assert http(subject, "GET", f"/v1/invocations/{made['id']}")[2]["outcome"] == made["outcome"]
    status, kind, problem = http(subject, "POST", "/v1/invocations", request | {"argvs": 1})
    assert (status, kind, problem["code"]) == (400, "application/problem+json", "invalid_request")
    status, kind, problem = http(subject, "GET", "/v1/invocations/nothing")
    assert (status, kind, problem["code"]) == (404, "application/problem+json", "not_found")
    assert http(subject, "GET", "/v1/health")[2]["status"] == "ready"
    assert "/v1/invocations" in http(subject, "GET", "/openapi.json")[2]["paths"]


def test_the_command_line_says_the_same_as_the_client(subject: Subject) -> None:
    ran = subject.command(
        "--policy",
        PREFIX + "plain",
        "-i",
        "--json",
        "--label",
        "by=cli",
        "--",
        *sh("cat; exit 3"),
        stdin=b"in",
    )
    assert ran.returncode == 3
    said = json.loads(ran.stdout)
    assert (said["outcome"]["cause"], said["outcome"]["exit_code"], said["stdout"]["text"]) == (
        "exited",
        3,
        "in",
    )
    found = subject.client.get(said["id"])
    assert {**said, "receipt": None} == {**found.model_dump(mode="json", exclude_unset=True), "receipt": None}
    (listed,) = subject.client.list(label="by=cli", limit=1).invocations
    assert listed.id == said["id"]
