"""Secrets that are put into requests on their way out, and are nowhere in the container."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import until
from mirror import Mirror
from networked import add_policy, start_networked
from world import KEYED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation

NAME = "keyed.http.test"
PLACEHOLDER = b"none-of-your-business"
VALUE, NEXT = b"s3cret-value-of-a-token", b"another-value-of-the-token"
KEY = b"wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
POLICY = f"""\
version: 1
name: keyed
extends: python
warm: !remove
secrets:
  - {{name: TOKEN, as: proxy, placeholder: {PLACEHOLDER.decode()}}}
  - {{name: AWS_ID, as: proxy}}
  - {{name: AWS_KEY, as: proxy}}
  - {{name: GONE, as: proxy}}
network:
  allow:
    - host: {NAME}
      ports: [80, 443]
      paths: [/api/**]
      inject: {{header: Authorization, value: "Bearer {{secret:TOKEN}}"}}
    - {{host: {NAME}, ports: [443], paths: [/plain/**]}}
    - host: {NAME}
      ports: [80]
      paths: [/inside]
      inject: {{header: X-Key, value: "{{secret:TOKEN}}", plain: true}}
    - {{host: {NAME}, ports: [443], paths: [/gone], inject: {{header: X-Gone, value: "{{secret:GONE}}"}}}}
    - host: {NAME}
      ports: [443]
      paths: [/aws/**]
      inject: {{sigv4: {{access_key: AWS_ID, secret_key: AWS_KEY}}}}
"""
ASK = f"""
import os, sys, http.client
made = http.client.HTTPSConnection('{NAME}', timeout=20)
def ask(path, method='GET', body=None, **headers):
    made.request(method, path, body, headers)
    answer = made.getresponse()
    answer.read()
    return answer.status
"""


@pytest.fixture(scope="module")
def keyed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has secrets, and a policy that has requests carry them."""
    world.records[NAME] = [KEYED]
    world.serve(KEYED, 80, Mirror)
    world.serve(KEYED, 443, Mirror, tls=NAME)
    authority = world.certificate(NAME)
    with start_networked(tmp_path_factory.mktemp("keyed"), authorities=f"{authority}.crt") as daemon:
        add_policy(daemon, "keyed", POLICY)
        client = daemon.client()
        for name, value in {
            "TOKEN": VALUE,
            "AWS_ID": b"AKIDEXAMPLE",
            "AWS_KEY": KEY,
            "GONE": b"x" * 9,
        }.items():
            client.set_secret(name, value)
        yield daemon


@pytest.fixture
def ask(keyed: Daemon) -> Callable[..., Invocation]:
    """Run a piece of Python under the policy ``keyed``."""
    Mirror.requests.clear()
    return lambda code: keyed.run("python3", "-c", ASK + code, policy="keyed")


def said(call: Invocation) -> str:
    """What a call printed."""
    assert call.stdout is not None, call.outcome
    assert call.stderr is not None
    return (call.stdout.text or "") + (call.stderr.text or "")


def sent(number: int = -1) -> dict[str, str]:
    """The headers of a request, as the server got them."""
    return dict(Mirror.requests[number]["headers"])


def test_a_request_carries_it_and_the_container_does_not(
    keyed: Daemon, ask: Callable[..., Invocation]
) -> None:
    call = ask(
        "print(ask('/api/x', Authorization='Bearer ' + os.environ['TOKEN'], authorization='mine'))\n"
        "print(ask('/plain/x', Authorization='mine'))"
    )
    assert said(call) == "200\n200\n"
    values = [value for name, value in Mirror.requests[0]["headers"] if name == "authorization"]
    assert values == [f"Bearer {VALUE.decode()}"]
    assert sent(1)["authorization"] == "mine"
    seen = [event.network for event in keyed.client().events(call.id) if event.network is not None]
    assert [event.secrets for event in seen if event.method] == [["TOKEN@1"], []]
    assert [(use.name, use.version, use.as_) for use in call.secrets] == [("TOKEN", 1, "proxy")]
    again = keyed.client().get(call.id)
    assert again.secrets == call.secrets


def test_its_value_is_in_nothing_that_the_container_or_a_record_has(keyed: Daemon) -> None:
    client = keyed.client()
    Mirror.requests.clear()
    code = f"""{ASK}
with open('file', 'w') as file: file.write(os.environ['TOKEN'])
ask('/api/quiet'); sys.stdin.read()
"""
    call = client.start(["python3", "-c", code, "that-one"], policy="keyed", stdin="stream")
    until(lambda: [each["path"] for each in Mirror.requests] == ["/api/quiet"], "the request is made")
    (process,) = [
        each for each in psutil.process_iter() if each.name() == "python3" and "that-one" in each.cmdline()
    ]
    memory = b"".join(_memory(process.pid))
    assert PLACEHOLDER in memory  # what is there is found
    assert VALUE not in memory
    assert f"TOKEN={PLACEHOLDER.decode()}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
    root = Path(f"/proc/{process.pid}/root")
    places = [
        root / "workspace",
        root / "tmp",
        root / "dev",
        root / "run",
        root / "etc",
        keyed.state,
        keyed.log,
    ]
    assert _holding(PLACEHOLDER, places)
    assert _holding(VALUE, places) == []
    for pid in psutil.pids():
        with suppress(OSError):
            environ, line = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
            assert VALUE not in environ + line
    client.write_stdin(call.id, b"", eof=True)
    client.wait(call.id)
    assert _holding(VALUE, [keyed.state, keyed.log]) == []


def _memory(pid: int) -> Iterator[bytes]:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            first, last = (int(each, 16) for each in line.split()[0].split("-"))
            if line.split()[1].startswith("r") and "[v" not in line:
                with suppress(OSError, ValueError, OverflowError):
                    memory.seek(first)
                    yield memory.read(last - first)


def _holding(value: bytes, places: list[Path]) -> list[Path]:
    found = []
    for place in places:
        for path in [place] if place.is_file() else place.rglob("*"):
            with suppress(OSError):
                if path.is_file() and not path.is_symlink() and value in path.read_bytes():
                    found.append(path)
    return found


def test_nothing_has_a_server_say_it_back(ask: Callable[..., Invocation]) -> None:
    assert said(ask("print(ask('/api/x', 'TRACE'))")) == "405\n"
    assert Mirror.requests == []


def test_it_goes_over_tls_unless_its_rule_says_otherwise(ask: Callable[..., Invocation]) -> None:
    code = f"made = http.client.HTTPConnection('{NAME}', timeout=20)\nprint(ask('/api/x'), ask('/inside'))"
    assert said(ask(code)) == "403 200\n"
    (only,) = Mirror.requests
    assert dict(only["headers"])["x-key"] == VALUE.decode()


def test_what_a_server_repeats_is_redacted_from_output(ask: Callable[..., Invocation]) -> None:
    code = "made.request('GET', '/api/x'); print(made.getresponse().read().decode())"
    call = ask(code)
    assert VALUE.decode() not in said(call)
    assert "[redacted:TOKEN]" in said(call)
    assert call.outcome is not None
    assert call.outcome.redacted == 1


def test_a_rotated_secret_is_in_the_next_request(keyed: Daemon, ask: Callable[..., Invocation]) -> None:
    del ask
    client = keyed.client()
    call = client.start(
        ["python3", "-c", ASK + "for line in sys.stdin: print(ask('/api/x'), flush=True)"],
        policy="keyed",
        stdin="stream",
    )
    lines = 0

    def asks(value: bytes) -> bool:
        nonlocal lines
        before = len(Mirror.requests)
        lines = client.write_stdin(call.id, b"\n", offset=lines, eof=False)
        until(lambda: len(Mirror.requests) > before, "a request")
        return sent()["authorization"] == f"Bearer {value.decode()}"

    assert asks(VALUE)
    client.rotate_secret("TOKEN", NEXT)
    try:
        until(lambda: asks(NEXT), "a request with the new value")
    finally:
        client.rotate_secret("TOKEN", VALUE)
    client.write_stdin(call.id, b"", offset=lines)
    ended = client.wait(call.id)
    assert {(use.name, use.version) for use in ended.secrets} >= {("TOKEN", 1), ("TOKEN", 2)}


def test_a_secret_that_is_removed_is_in_no_request(keyed: Daemon) -> None:
    client = keyed.client()
    Mirror.requests.clear()
    call = client.start(
        ["python3", "-c", ASK + "sys.stdin.readline(); print(ask('/gone'))"], policy="keyed", stdin="stream"
    )
    until(lambda: client.get(call.id).state == "running", "the call runs")
    client.remove_secret("GONE")
    try:
        client.write_stdin(call.id, b"\n", eof=True)
        assert said(client.wait(call.id)) == "502\n"
        assert Mirror.requests == []
    finally:
        client.set_secret("GONE", b"x" * 9)


def test_requests_are_signed_anew_for_aws(ask: Callable[..., Invocation]) -> None:
    code = """
import datetime, hashlib
head = {'x-amz-date': '20260131T235959Z', 'Authorization':
        'AWS4-HMAC-SHA256 Credential=none/20260131/eu-central-1/service/aws4_request, '
        'SignedHeaders=host;x-amz-date, Signature=' + '0' * 64}
print(ask('/aws/x?b=2&a=1', **head), ask('/aws/x', 'POST', b'a body', **head))
print(ask('/aws/x', Authorization='Bearer mine'), ask('/aws/x', 'POST', iter([b'a', b' body']), **head))
"""
    assert said(ask(code)) == "200 200\n403 200\n"
    for request in Mirror.requests:
        found = dict(request["headers"])["authorization"]
        assert "Credential=AKIDEXAMPLE/20260131/eu-central-1/service/aws4_request" in found
        assert re.search("Signature=[0-9a-f]{64}$", found)
        assert KEY.decode() not in str(request)
    signatures = [dict(request["headers"])["authorization"][-64:] for request in Mirror.requests]
    assert signatures[1] == signatures[2] != signatures[0]  # the body's digest, however it was framed
