"""``network: {mode: host}``: only where the configuration allows it, and then nobody can miss it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import SANDBOXD, start_daemon, until

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import Control, Invocation

POLICY = """\
version: 1
name: open
extends: python
warm: !remove
network:
  mode: host
examples: {allows: ["connect example.org:443", "connect 127.0.0.1:22"]}
"""
ALLOWED = "network: {host: true}\n"
TALK = """
import socket, sys
host, port = sys.argv[1:]
try:
    s = socket.create_connection((host, int(port)), timeout=10); print(s.recv(99).decode())
except OSError as error: print(type(error).__name__)
"""


@contextmanager
def on_the_host() -> Iterator[tuple[int, str]]:
    """A service of this host's loopback, and one on an abstract Unix socket: port and name."""
    name = f"sandboxd-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()

        def serve(listener: socket.socket) -> None:
            while True:
                try:
                    accepted, _ = listener.accept()
                except OSError:
                    return
                with accepted:
                    accepted.sendall(b"the host's")

        threads = [threading.Thread(target=serve, args=(each,), daemon=True) for each in (tcp, abstract)]
        for thread in threads:
            thread.start()
        try:
            yield tcp.getsockname()[1], name
        finally:
            for each in (tcp, abstract):
                each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


def add(daemon: Daemon, text: str = POLICY, name: str = "open") -> None:
    """Write a policy and wait until it is in force."""
    (daemon.policies / f"{name}.yaml").write_text(text)
    until(lambda: name in [policy.name for policy in daemon.client().policies()], f"{name} is in force")


@pytest.fixture(scope="module", params=["builtin", "crun", "runc"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose configuration allows it, for each runtime."""
    config = f"{ALLOWED}runtime: {request.param}\n"
    with start_daemon(tmp_path_factory.mktemp("opened"), config=config) as daemon:
        add(daemon)
        yield daemon


def controls(call: Invocation) -> dict[str, Control]:
    """The receipt's, by name."""
    assert call.receipt is not None, call.outcome
    return {control.name: control for control in call.receipt.controls}


def said(call: Invocation) -> str:
    """What it printed."""
    assert call.stdout is not None
    assert call.outcome is not None
    assert call.outcome.cause == "exited", (call.outcome, call.stderr)
    return call.stdout.text or ""


def test_the_hosts_loopback_is_reached_in_that_mode_alone(opened: Daemon) -> None:
    with on_the_host() as (port, name):
        assert (
            said(opened.run("python3", "-c", TALK, "127.0.0.1", str(port), policy="open")) == "the host's\n"
        )
        refused = said(opened.run("python3", "-c", TALK, "127.0.0.1", str(port), policy="python"))
        assert refused == "ConnectionRefusedError\n"
        code = (
            f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.settimeout(5)\n"
            f"try: s.connect('\\0{name}'); print(s.recv(99).decode())\n"
            "except OSError as e: print(type(e).__name__)"
        )
        assert said(opened.run("python3", "-c", code, policy="open")) == "the host's\n"
        assert said(opened.run("python3", "-c", code, policy="python")) == "ConnectionRefusedError\n"


def test_the_receipt_shouts(opened: Daemon) -> None:
    call = opened.run("true", policy="open")
    assert call.receipt is not None
    assert len(call.receipt.warnings) == 1
    assert "HOST'S OWN NETWORK" in call.receipt.warnings[0]
    found = controls(call)
    host = Path("/proc/self/ns/net").readlink()
    assert found["network"].in_force == found["network"].asked == f"NONE OF ITS OWN: the host's {host}"
    assert not {"net_namespace", "network_routes", "network_filter"} & set(found)
    others = controls(opened.run("true", policy="python"))
    # all else is in force, and no less of it
    assert set(others) - set(found) == {"net_namespace", "network_routes"}
    assert all(control.enforced for control in found.values())
    assert set(found) <= set(others)
    plain = opened.run("true", policy="python")
    assert plain.receipt is not None
    assert plain.receipt.warnings == []


def test_people_are_told(opened: Daemon) -> None:
    done = opened.cli("--policy", "open", "--", "true")
    assert done.returncode == 0
    assert b"WARNING: the call has the HOST'S OWN NETWORK" in done.stderr
    assert b"WARNING" not in opened.cli("--policy", "python", "--", "true").stderr
    call = opened.run("true", policy="open")
    shown = subprocess.run(
        [SANDBOXD, "inspect", call.id, "--socket", opened.socket], capture_output=True, timeout=60, check=True
    )
    assert shown.stdout.startswith(b"# WARNING: the call has the HOST'S OWN NETWORK")
    explained = subprocess.run(
        [SANDBOXD, "policy", "explain", "open", "--socket", opened.socket, "--json"],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    lines = {line["control"]: line for line in json.loads(explained.stdout)["explain"]}
    assert lines["network"]["value"] == "host"
    assert lines["network"]["note"].startswith("WARNING: ")
    assert lines["network"]["line"] == 6
    assert "THE HOST'S" in lines["isolation.namespaces"]["value"]


def test_it_is_no_way_to_the_hosts_network_itself(opened: Daemon) -> None:
    """The tool uses it, and changes nothing of it: it has no capability there, nor anywhere."""
    code = (
        "import socket, struct\n"
        "link = struct.pack('IHHII', 32, 16, 5, 1, 0) + struct.pack('BxHiII', 0, 0, 1, 0, 1)\n"
        "s = socket.socket(16, 3, 0); s.send(link); print(struct.unpack('i', s.recv(99)[16:20])[0])\n"
        "for make in (lambda: socket.socket(16, 3, 12), lambda: socket.socket(2, 3, 6),\n"
        "             lambda: socket.socket(17, 3, 3), lambda: socket.socket().bind(('127.0.0.1', 22)),\n"
        "             lambda: socket.socket().setsockopt(0, 19, 1),\n"
        "             lambda: socket.socket().setsockopt(1, 36, 1),\n"
        "             lambda: open('/proc/sys/net/ipv4/ip_forward', 'w')):\n"
        "    try: make(); print('done')\n"
        "    except OSError as error: print('refused')"
    )
    call = opened.run("python3", "-c", code, policy="open")
    assert said(call).split() == ["-1", *["refused"] * 7]
    code = "import os; print(os.path.ismount('/sys'), os.listdir('/sys') if os.path.exists('/sys') else [])"
    assert said(opened.run("python3", "-c", code, policy="open")) == "False []\n"


def test_a_server_inside_is_on_the_host(opened: Daemon) -> None:
    """Whoever allows it should know: also for other programs of this host."""
    code = (
        "import socket\ns = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "print(s.getsockname()[1], flush=True); s.accept()[0].sendall(b'inside')"
    )
    call = opened.client().start(["python3", "-c", code], policy="open")
    until(lambda: b"\n" in b"".join(opened.client().stdout(call.id)), "it listens")
    port = int(b"".join(opened.client().stdout(call.id)))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        assert sock.recv(10) == b"inside"
    opened.client().wait(call.id, timeout=20)


def test_without_the_configuration_it_is_refused_at_its_line(tmp_path: Path) -> None:
    with start_daemon(tmp_path) as daemon:
        file = daemon.policies / "open.yaml"
        file.write_text(POLICY)
        until(
            lambda: any("open.yaml" in each.file for each in daemon.client().health().problems), "it is read"
        )
        (problem,) = [each for each in daemon.client().health().problems if each.file == str(file)]
        assert (problem.line, problem.code) == (6, "control_not_supported")
        assert "`network: {host: true}`" in problem.message
        with pytest.raises(errors.ControlNotSupported, match="host: true"):
            daemon.run("true", policy="open")
        found = daemon.client().check_policy(POLICY, "open")
        assert [each.code for each in found] == ["control_not_supported"]


def test_it_can_be_told_before(tmp_path: Path) -> None:
    """By ``sandboxd policy check``, with the configuration that the daemon would have."""
    policy, config = tmp_path / "open.yaml", tmp_path / "sandboxd.yaml"
    policy.write_text(POLICY)
    for text, status in (("{}\n", 1), (ALLOWED, 0)):
        config.write_text(text)
        done = subprocess.run(
            [SANDBOXD, "policy", "check", policy, "--config", config],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done


@pytest.mark.parametrize(
    ("floor", "allowed"),
    [
        ("", False),
        ("network: {allow: [{cidr: 0.0.0.0/0, ports: [443]}]}\n", False),
        ("network: {mode: none}\n", False),
        ("network: {mode: host}\n", True),
    ],
)
def test_a_floor_can_forbid_it(tmp_path: Path, floor: str, *, allowed: bool) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "floor.yaml").write_text(f"version: 1\n{floor}")
    (tmp_path / "policies" / "open.yaml").write_text(POLICY)
    with start_daemon(tmp_path, config=ALLOWED) as daemon:
        assert ("open" in [policy.name for policy in daemon.client().policies()]) is allowed
        problems = [each.code for each in daemon.client().health().problems if "open" in each.file]
        assert problems == ([] if allowed else ["wider_than_floor"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("  allow: [{host: example.org, ports: [443]}]\n", "mode: host leaves nothing for allow"),
        ("  budget: {connections: 1}\n", "mode: host leaves nothing for allow"),
        ("expose: [8080]\n", "on the host's own loopback"),
        ("syscalls: {base: strict}\n", "@network-client"),
    ],
)
def test_what_makes_no_sense_with_it_is_refused(opened: Daemon, more: str, says: str) -> None:
    text = POLICY.replace("examples:", f"{more}examples:")
    found = opened.client().check_policy(text, "open")
    assert [each.code for each in found] == ["impossible"], found
    assert says in found[0].message


def test_an_example_that_denies_a_connection_is_wrong(opened: Daemon) -> None:
    text = POLICY.replace("allows:", "denies:")
    found = opened.client().check_policy(text, "open")
    assert [each.code for each in found] == ["wrong_example"] * 2
    assert "nothing is refused" in found[0].message


def test_the_doctor_says_that_it_is_allowed(tmp_path: Path) -> None:
    config = tmp_path / "sandboxd.yaml"
    config.write_text(f"{ALLOWED}state: {tmp_path}/state\n")
    done = subprocess.run(
        [SANDBOXD, "doctor", "--config", config], capture_output=True, timeout=100, check=False
    )
    assert b"WARNING: the configuration (`network: {host: true}`)" in done.stdout


def test_a_call_that_waits_is_like_a_fresh_one(tmp_path: Path) -> None:
    """The host's network changes all the time, and that is no difference of the container."""
    with start_daemon(tmp_path, config=f"{ALLOWED}pool: {{min: 1, max: 2}}\n") as daemon:
        add(daemon)
        for _ in range(5):
            call = daemon.run("true", policy="open")
            assert call.outcome is not None
            assert call.outcome.cause == "exited", call.outcome
            assert call.receipt is not None
            assert len(call.receipt.warnings) == 1
