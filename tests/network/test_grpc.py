"""gRPC through rules that look into HTTP: trailers, streams both ways, deadlines, and what is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from daemons import until
from networked import add_policy, start_networked
from world import WEB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation

NAME = "grpc.http.test"
PORT = 50051
POLICY = f"""\
version: 1
name: grpc
extends: host
mounts:
  - {{source: {Path(grpc.__file__).parents[1]}, target: /libraries, mode: read-only}}
network:
  allow:
    - host: {NAME}
      ports: [{PORT}]
      methods: [POST]
      paths: [/echo.Echo/*]
      headers: {{content-type: application/grpc*}}
  deny:
    - {{host: {NAME}, paths: [/echo.Echo/Secret]}}
"""
SERVER = """
import sys
from concurrent.futures import ThreadPoolExecutor
import grpc
at, key, certificate = sys.argv[1:]

def unary(message, context):
    context.set_trailing_metadata((('x-trailing', 'yes'),))
    if message == b'fail': context.abort(grpc.StatusCode.FAILED_PRECONDITION, 'as it was asked to')
    return message.upper()

def slow(message, context):
    import time
    time.sleep(30)
    return message

def both(messages, context):
    for message in messages: yield message.upper()

def total(messages, context): return str(sum(len(each) for each in messages)).encode()

def count(message, context):
    for each in range(int(message)): yield bytes(100_000)

server = grpc.server(ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler('echo.Echo', {
    'Unary': grpc.unary_unary_rpc_method_handler(unary),
    'Secret': grpc.unary_unary_rpc_method_handler(unary),
    'Slow': grpc.unary_unary_rpc_method_handler(slow),
    'Both': grpc.stream_stream_rpc_method_handler(both),
    'Total': grpc.stream_unary_rpc_method_handler(total),
    'Count': grpc.unary_stream_rpc_method_handler(count),
}),))
pair = open(key, 'rb').read(), open(certificate, 'rb').read()
server.add_secure_port(at, grpc.ssl_server_credentials([pair]))
server.start()
server.wait_for_termination()
"""
CLIENT = f"""
import sys
sys.path.append('/libraries')
import grpc
channel = grpc.secure_channel('{NAME}:{PORT}', grpc.ssl_channel_credentials())
def unary(name, message): return channel.unary_unary('/echo.Echo/' + name)(message, timeout=60)
def failed(call, *arguments, **options):
    try: call(*arguments, **options)
    except grpc.RpcError as error: print(error.code().name)
    else: print('done')
"""


@pytest.fixture(scope="module")
def grpc_daemon(
    world: World, tmp_path_factory: pytest.TempPathFactory, need: Callable[[object, str], None]
) -> Iterator[Daemon]:
    """A daemon whose containers may call some methods of a server of gRPC."""
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"],
        check=True,
        capture_output=True,
        text=True,
    )
    need(version.stdout.split() == [str(part) for part in sys.version_info[:2]], "a system Python like this")
    directory = tmp_path_factory.mktemp("grpc")
    world.records[NAME] = [WEB]
    certificate = world.certificate(NAME)
    inside = ["ip", "netns", "exec", f"sandboxd-world-{os.getpid()}"]
    argv = [sys.executable, "-c", SERVER, f"{WEB}:{PORT}", f"{certificate}.key", f"{certificate}.crt"]
    with subprocess.Popen([*inside, *argv]) as server:
        try:
            until(_answers, "the server of gRPC listens")
            with start_networked(directory / "d", authorities=f"{certificate}.crt") as daemon:
                add_policy(daemon, "grpc", POLICY)
                yield daemon
        finally:
            server.kill()


def _answers() -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((WEB, PORT)) == 0


@pytest.fixture
def call(grpc_daemon: Daemon) -> Callable[[str], Invocation]:
    """Run a client in a container."""
    return lambda code: grpc_daemon.run("/usr/bin/python3", "-c", CLIENT + code, policy="grpc")


def out(call: Invocation) -> list[str]:
    """What it printed, by lines."""
    assert call.stdout is not None, call.outcome
    assert call.stderr is not None
    assert call.outcome is not None
    assert call.outcome.exit_code == 0, call.stderr.text
    return (call.stdout.text or "").splitlines()


def test_a_call_its_status_and_its_trailers(call: Callable[[str], Invocation]) -> None:
    done = call(
        "print(unary('Unary', b'hello'))\n"
        "said, whole = channel.unary_unary('/echo.Echo/Unary').with_call(b'x', timeout=60)\n"
        "print(dict(whole.trailing_metadata())['x-trailing'])\n"
        "failed(unary, 'Unary', b'fail')\n"
    )
    assert out(done) == ["b'HELLO'", "yes", "FAILED_PRECONDITION"]
    assert done.usage is not None
    assert done.usage.requests == 3
    assert done.denials == []


def test_streams(call: Callable[[str], Invocation]) -> None:
    done = call(
        "import queue\n"
        "asked = queue.SimpleQueue()\n"
        "answers = channel.stream_stream('/echo.Echo/Both')(iter(asked.get, None), timeout=60)\n"
        "for each in range(50):\n"
        "    asked.put(b'message %d' % each)\n"
        "    assert next(answers) == b'MESSAGE %d' % each\n"
        "asked.put(None)\n"
        "print(list(answers))\n"
        "print(channel.stream_unary('/echo.Echo/Total')((bytes(100_000) for _ in range(100)), timeout=60))\n"
        "print(sum(map(len, channel.unary_stream('/echo.Echo/Count')(b'100', timeout=60))))\n"
    )
    assert out(done) == ["[]", "b'10000000'", "10000000"]


def test_a_deadline_and_a_call_that_is_cancelled_end_nothing_else(call: Callable[[str], Invocation]) -> None:
    done = call(
        "slow = channel.unary_unary('/echo.Echo/Slow')\n"
        "failed(slow, b'x', timeout=1)\n"
        "begun = slow.future(b'x')\n"
        "print(begun.cancel())\n"
        "print(unary('Unary', b'after'))\n"
    )
    assert out(done) == ["DEADLINE_EXCEEDED", "True", "b'AFTER'"]


def test_other_methods_are_refused_by_a_status_that_grpc_has(call: Callable[[str], Invocation]) -> None:
    done = call(
        "failed(unary, 'Secret', b'x')\n"
        "failed(channel.unary_unary('/other.Service/Method'), b'x', timeout=60)\n"
        "print(unary('Unary', b'after'))\n"
    )
    assert out(done) == ["PERMISSION_DENIED", "PERMISSION_DENIED", "b'AFTER'"]
    assert {denial.name for denial in done.denials} == {f"{NAME}:{PORT}"}
