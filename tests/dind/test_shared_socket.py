"""sandboxd's own container image: a daemon in a container, its socket shared with the host by a volume."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import RUN_IN_SANDBOX, until

from sandboxd import Client, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCKER = ["docker", "-H", os.environ.get("SANDBOXD_DIND_DOCKER", "")]
CALLER, GROUP = 23456, 34567
CONFIG = f"""\
socket: {{mode: "0666"}}
pool: {{min: 1, max: 2}}
callers:
  - {{match: {{uid: 0}}, role: operator, policies: ["*"]}}
  - {{match: {{gid: {GROUP}}}, role: agent, policies: [default]}}
"""


def docker(*arguments: str, check: bool = True) -> str:
    return subprocess.run([*DOCKER, *arguments], capture_output=True, text=True, check=check).stdout.strip()


class Container:
    """``docker run`` with the rights of ``scripts/dind``, as documented, and a directory for the socket."""

    def __init__(self, directory: Path) -> None:
        self.name = f"product-{directory.name}"
        self.socket = directory / "run" / "sandboxd.sock"
        self.directory = directory
        self.socket.parent.mkdir(mode=0o755)
        (directory / "sandboxd.yaml").write_text(CONFIG)

    def start(self) -> None:
        docker(
            *("run", "-d", "--init", "--network", "none", "--name", self.name),
            *os.environ["SANDBOXD_DIND_RIGHTS"].split("\n"),
            *("-v", f"{self.socket.parent}:/run/sandboxd"),
            *("-v", f"{self.directory}/sandboxd.yaml:/etc/sandboxd/sandboxd.yaml:ro"),
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

    def call(
        self, *argv: str, user: int = 0, groups: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RUN_IN_SANDBOX, "--socket", self.socket, *argv],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            user=user,
            group=user,
            extra_groups=groups,
        )


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
    """By numbers: uid, gid and groups are the same in the container, where the peer's pid reads as 0."""
    ours = container.call("--", "true", user=CALLER, groups=(GROUP,))
    assert ours.returncode == 0, ours.stderr
    strangers = container.call("--", "true", user=CALLER)
    assert strangers.returncode == 125
    assert "forbidden" in strangers.stderr or "not allowed" in strangers.stderr, strangers.stderr
    wider = container.call("--policy", "python", "--", "true", user=CALLER, groups=(GROUP,))
    assert wider.returncode == 125


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
