"""Who reaches a port, and when: by the policy, the caller and the state of the call."""

from __future__ import annotations

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest
from daemons import start_daemon, until
from networked import workers
from ported import (
    CALLERS,
    ECHO,
    HELLO,
    OTHER,
    OWNER,
    POLICY,
    ApiConnection,
    ask,
    become,
    ended,
    found_as,
    inward,
    raw,
    rest,
)

from sandboxd import Client, errors

if TYPE_CHECKING:
    import multiprocessing
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemons import Daemon


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with two agents beside root."""
    with start_daemon(tmp_path, config=CALLERS) as daemon:
        daemon.admit_everybody()
        (daemon.policies / "exposing.yaml").write_text(POLICY)
        until(lambda: "exposing" in [each.name for each in daemon.client().policies()], "it is in force")
        yield daemon


def as_uid(uid: int, path: str, call: str | None, queue: multiprocessing.Queue[object]) -> None:
    """Start a server as this user where no call is given, else try to reach it."""
    become(uid)
    client = Client(path)
    if call is None:
        queue.put(client.start(["python3", "-c", HELLO + "main()"], policy="exposing").id)
        return
    found: list[object] = []
    unknown = call[:-1] + "0"
    for attempt in (
        lambda: client.ports(call),
        lambda: client.connect(call, 8080).close(),
        lambda: client.connect(call, 9).close(),
        lambda: client.connect(unknown, 8080).close(),
    ):
        try:
            attempt()
            found.append("done")
        except errors.SandboxdError as error:
            found.append((error.code, str(error).replace(call[:-1], "ID")[:30]))
    queue.put(found)


def done_as(uid: int, daemon: Daemon, call: str | None = None) -> object:
    """What ``as_uid`` finds."""
    return found_as(uid, daemon, call, as_uid)


def test_another_caller_is_told_what_it_is_told_of_no_call(shared: Daemon) -> None:
    call = done_as(OWNER, shared)
    assert isinstance(call, str)
    until(lambda: b"ready" in b"".join(shared.client().stdout(call)), "it listens")
    assert done_as(OTHER, shared, call) == [("not_found", f"no call 'ID{call[-1]}' of yours"[:30])] * 3 + [
        ("not_found", "no call 'ID0' of yours"[:30])
    ]
    assert ask(shared, call)[1] == b"hello"  # an operator
    assert done_as(OWNER, shared, call)[1] == "done"  # type: ignore[index]
    uids = {worker.uids().real for worker in workers(shared)}
    assert len(uids) == 1  # the server's bytes are read with those of its caller's calls, whoever asks
    assert uids.isdisjoint({0, OWNER, OTHER})
    ended(shared, call)


def test_only_what_the_policy_exposes_is_reached(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(HELLO + "threading.Thread(target=main, kwargs={'port': 9000}).start(); main()")
    response, body = ask(exposing, call, port=9000)
    problem = json.loads(body)
    assert (response.status, problem["code"]) == (403, "port_not_exposed")
    assert problem["details"] == {"port": 9000, "exposed": [8080, 8081, 40000]}
    assert problem["detail"] == "port 9000 is not exposed; `expose` of the policy has 8080, 8081, 40000"
    assert exposing.client().ports(call) == [8080, 8081, 40000]
    plain = exposing.client().start(["sleep", "50"], policy="python")
    response, body = ask(exposing, plain.id)
    assert json.loads(body)["code"] == "port_not_exposed"
    ended(exposing, plain.id)
    ended(exposing, call)


@pytest.mark.parametrize("port", ["0", "65536", "08080", "x", "-1", "8080x", "%38080", "99999999999999"])
def test_what_is_no_port_is_refused(exposing: Daemon, serving: Callable[..., str], port: str) -> None:
    call = serving(HELLO + "main()")
    connection = ApiConnection(exposing)
    connection.request("GET", f"/v1/invocations/{call}/ports/{port}/")
    response = connection.getresponse()
    assert response.status in {400, 404}, response.read()
    assert json.loads(response.read())["code"] in {"invalid_request", "not_found"}
    connection.close()


def test_a_call_that_does_not_run_has_no_ports(exposing: Daemon) -> None:
    client = exposing.client()
    call = client.run(["true"], policy="exposing")
    response, body = ask(exposing, call.id)
    assert (response.status, json.loads(body)["code"]) == (409, "call_ended")
    with pytest.raises(errors.CallEnded):
        client.connect(call.id, 8080)
    with pytest.raises(errors.NotFound):
        client.connect("00000000-0000-7000-8000-000000000000", 8080)


def test_a_call_that_waits_is_not_there_yet(tmp_path: Path) -> None:
    with start_daemon(tmp_path, config="budget: {slots: 1}\n") as daemon:
        (daemon.policies / "exposing.yaml").write_text(POLICY)
        until(lambda: "exposing" in [each.name for each in daemon.client().policies()], "it is in force")
        client = daemon.client()
        first = client.start(["sleep", "50"], policy="exposing")
        second = client.start(["sleep", "50"], policy="exposing")
        with pytest.raises(errors.CallNotStarted, match="queued"):
            client.connect(second.id, 8080)
        until(lambda: client.get(first.id).state == "running", "it runs")
        with pytest.raises(errors.PortNotAnswering, match=r"nobody .* port 8080"):
            client.connect(first.id, 8080)
        for call in (first, second):
            client.cancel(call.id)


def _connects(client: Client, call: str) -> bool:
    try:
        client.connect(call, 8080).close()
    except errors.QueueFull:
        return False
    return True


def test_many_connections_are_bounded(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(ECHO + "main()")
    client = exposing.client()
    held = [client.connect(call, 8080) for _ in range(256)]
    with pytest.raises(errors.QueueFull, match="256"):
        client.connect(call, 8080)
    for number, sock in enumerate(held):
        sock.sendall(b"%d" % number)
    for number, sock in enumerate(held):
        assert sock.recv(10) == b"%d" % number
        sock.close()
    until(lambda: _connects(client, call), "there is room again")
    ended(exposing, call)
    assert len(inward(exposing, call)) >= 257


def test_thousands_of_requests_leave_nothing(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(HELLO + "main()")
    ask(exposing, call)
    daemon = psutil.Process(exposing.process.pid)
    (worker,) = workers(exposing)
    before = daemon.num_fds(), worker.num_fds()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: ask(exposing, call)[1], range(2000)))
    assert answers == [b"hello"] * 2000
    until(lambda: (daemon.num_fds(), worker.num_fds()) <= (before[0] + 2, before[1] + 2), "all is closed")
    ended(exposing, call)
    assert len(inward(exposing, call)) == 1000  # no more are told of


def test_a_daemon_that_stops_cuts_them(tmp_path: Path) -> None:
    with start_daemon(tmp_path) as daemon:
        (daemon.policies / "exposing.yaml").write_text(POLICY)
        until(lambda: "exposing" in [each.name for each in daemon.client().policies()], "it is in force")
        call = daemon.client().start(["python3", "-c", ECHO + "main()"], policy="exposing")
        until(lambda: b"ready" in b"".join(daemon.client().stdout(call.id)), "it listens")
        sock = daemon.client().connect(call.id, 8080)
        sock.sendall(b"there")
        assert sock.recv(10) == b"there"
        children = workers(daemon)
        daemon.process.send_signal(signal.SIGTERM)
        until(lambda: daemon.client().health().status == "draining", "it stops")  # or both are one signal
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(timeout=60) == 0
        assert rest(sock) == b""
        sock.close()
        assert psutil.wait_procs(children, timeout=10)[1] == []


def test_the_receipt_and_explain_say_so(exposing: Daemon) -> None:
    call = exposing.client().run(["true"], policy="exposing")
    assert call.receipt is not None
    (control,) = [each for each in call.receipt.controls if each.name == "expose"]
    assert control.enforced
    assert control.in_force.startswith("8080, 8081, 40000 to the caller, in net:[")
    plain = exposing.client().run(["true"], policy="python")
    assert plain.receipt is not None
    assert "expose" not in [each.name for each in plain.receipt.controls]
    lines = exposing.client().plan(["true"], policy="exposing").explain
    assert [line["value"] for line in lines if line["control"] == "expose"] == ["8080", "8081", "40000"]


def test_with_a_network_the_way_in_is_the_same(exposing: Daemon, serving: Callable[..., str]) -> None:
    text = (
        POLICY.replace("name: exposing", "name: both")
        + "network: {allow: [{host: example.org, ports: [443]}]}\n"
    )
    (exposing.policies / "both.yaml").write_text(text)
    until(lambda: "both" in [each.name for each in exposing.client().policies()], "it is in force")
    for where in ("main()", "main(socket.AF_INET6, '::1')", "main(host='')"):
        call = serving(HELLO + where, policy="both")
        assert ask(exposing, call)[1] == b"hello"
        done = ended(exposing, call)
        assert done.denials == []
        assert done.usage is not None
        assert done.usage.connections == 0


def test_the_host_is_not_reached_by_it(exposing: Daemon, serving: Callable[..., str]) -> None:
    """A server of the host on the same port answers nobody."""
    with socket.create_server(("127.0.0.1", 8081)) as listener:
        listener.setblocking(False)
        call = serving(HELLO + "main()")
        assert json.loads(ask(exposing, call, port=8081)[1])["code"] == "port_not_answering"
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_path_with_a_prefix_in_disguise_is_not_found(exposing: Daemon, serving: Callable[..., str]) -> None:
    call = serving(HELLO + "main()")
    with raw(exposing) as sock:
        target = f"/v1/invocation%73/{call}/ports/8080/"
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert rest(sock).startswith(b"HTTP/1.1 404 ")
