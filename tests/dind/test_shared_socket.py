"""The product's container image: a daemon in a container, whose socket the host has by a volume."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import RUN_IN_SANDBOX, until

from sandboxd import Client, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCKER = ["docker", "-H", os.environ.get("SANDBOXD_DIND_DOCKER", "")]
CALLER, STRANGER, GROUP = 23456, 23457, 34567
AS_ANOTHER = """
import grp, os, sys
from sandboxd import Client, errors
socket, user, groups, policy = sys.argv[1:]
Client(socket).run(["true"])  # while all modules can be read
os.setgroups([int(one) for one in groups.split(",") if one]); os.setgid(int(user)); os.setuid(int(user))
try:
    call = Client(socket).run(["id", "-u"], policy=policy)
    print(call.caller.uid, call.caller.gid, call.caller.role, (call.stdout.text or "").strip())
except errors.SandboxdError as error:
    print(error.code, error)
"""
CONFIG = f"""\
socket: {{mode: "0660", group: agents}}
pool: {{min: 1, max: 2}}
callers:
  - {{match: {{uid: 0}}, role: operator, policies: ["*"]}}
  - {{match: {{uid: {CALLER}, group: agents}}, role: agent, policies: [default]}}
"""


def docker(*arguments: str, check: bool = True) -> str:
    command = [*DOCKER, *arguments]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=check)
    return ran.stdout.strip()


class Container:
    """``docker run`` with the rights of ``scripts/dind``, as documented, and a directory for the socket."""

    def __init__(self, directory: Path) -> None:
        self.name = f"product-{directory.name}"
        self.socket = directory / "run" / "sandboxd.sock"
        self.directory = directory
        self.socket.parent.mkdir(mode=0o755)
        (directory / "sandboxd.yaml").write_text(CONFIG)
        (directory / "group").write_text(f"root:x:0:\nagents:x:{GROUP}:\n")

    def start(self) -> None:
        docker(
            *("run", "-d", "--init", "--network", "none", "--name", self.name),
            *os.environ["SANDBOXD_DIND_RIGHTS"].split("\n"),
            *("-v", f"{self.socket.parent}:/run/sandboxd"),
            *("-v", f"{self.directory}/sandboxd.yaml:/etc/sandboxd/sandboxd.yaml:ro"),
            *("-v", f"{self.directory}/group:/etc/group:ro"),
            *("-v", f"{os.environ['SANDBOXD_DIND_IMAGES']}:/var/lib/sandboxd/images"),
            "sandboxd",
        )
        self.ready()

    def ready(self) -> None:
        try:
            until(self._answers, "the daemon answers", 30)
        except AssertionError:
            pytest.fail(docker("logs", self.name) or "it said nothing")

    def _answers(self) -> bool:
        try:
            Client(self.socket).health()
        except errors.Unavailable:
            return False
        return True

    def call(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RUN_IN_SANDBOX, "--socket", self.socket, *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def call_as(self, user: int, *groups: int, policy: str = "default") -> str:
        """What a caller with these ids is told."""
        ran = subprocess.run(
            [sys.executable, "-c", AS_ANOTHER, self.socket, str(user), ",".join(map(str, groups)), policy],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return ran.stdout.strip() or ran.stderr


@pytest.fixture
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    directory = tmp_path_factory.mktemp("product")
    for above in (directory, *directory.parents):
        if not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    made = Container(directory)
    try:
        made.start()
        yield made
    finally:
        docker("rm", "-fv", made.name, check=False)


def test_a_call_of_the_host_runs_in_a_container_in_the_container(container: Container) -> None:
    found = container.call("--", "sh", "-c", "id -u; cat; hostname")
    assert (found.returncode, found.stdout) == (0, "1000\nsandbox\n"), found.stderr
    for call in Client(container.socket).list().invocations:
        assert call.caller is not None
        assert (call.caller.uid, call.caller.role) == (0, "operator")


def test_who_calls_is_known_across_pid_namespaces(container: Container) -> None:
    """Uid, gid and groups are the same in the container, where the peer's pid reads as 0."""
    assert container.call_as(CALLER, GROUP) == f"{CALLER} {CALLER} agent 1000"
    assert container.call_as(CALLER, GROUP, policy="python").startswith("not_permitted ")
    assert container.call_as(STRANGER, GROUP).startswith("not_identified ")
    assert container.call_as(CALLER).startswith("unavailable ")


def test_stopped_it_ends_its_calls_and_started_again_it_knows_them(container: Container) -> None:
    client = Client(container.socket)
    call = client.start(["sleep", "600"], key="long")
    until(lambda: client.get(call.id).state == "running", "it runs")
    began = time.monotonic()
    docker("kill", container.name)
    assert time.monotonic() - began < 20
    docker("start", container.name)
    container.ready()
    ended = Client(container.socket).get(call.id).outcome
    assert ended is not None
    assert (ended.cause, ended.error and ended.error.code) == ("failed", "interrupted")
    assert container.call("--", "echo", "again").stdout == "again\n"


def test_nothing_of_it_is_left_on_the_host(container: Container) -> None:
    client = Client(container.socket)
    call = client.start(["sh", "-c", "sleep 600 & sleep 600"], key="left")
    until(lambda: client.get(call.id).state == "running", "it runs")
    identity = docker("inspect", "--format", "{{.Id}}", container.name)
    cgroups = [path for path, _, _ in os.walk("/sys/fs/cgroup") if identity in path]
    assert any("/sandboxd-" in path for path in cgroups)
    docker("rm", "-fv", container.name)
    until(lambda: not [path for path in cgroups if Path(path).exists()], "its cgroups are gone")
    mounts = Path("/proc/self/mountinfo").read_text()
    assert identity not in mounts
