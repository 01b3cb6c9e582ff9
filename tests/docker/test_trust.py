"""Containers of a Docker Engine, or Podman, trust the daemon's authority where a rule looks into HTTP."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from archives import directory, member, shell_tar, symlink
from daemons import until
from docker_policies import add_policies
from trusting import DEBIAN, PLACE, PLAIN, RULES, check_absence, check_python, host_mounts, printed, trust_of

if TYPE_CHECKING:
    from daemons import Daemon
    from dockerd import Dockerd

    from sandboxd.models import Invocation

SECRET = "not for the tool\n"


def policy(image: str, more: str = RULES) -> str:
    return f"extends: tiny\nimage: {image}\nprocess: {{user_namespace: none}}\n{more}"


def test_programs_find_it(docker_daemon: Daemon) -> None:
    python = f"extends: python\nwarm: !remove\nprocess: {{user_namespace: none}}\n{RULES}"
    add_policies(docker_daemon, look=python, net=policy("base", PLAIN))
    check_python(docker_daemon, "look")
    check_absence(docker_daemon, "net")
    assert host_mounts() == []


def test_the_hosts_own_programs(docker_daemon: Daemon) -> None:
    add_policies(docker_daemon, hostly=policy("host"))
    call = docker_daemon.run("cat", PLACE, policy="hostly")
    assert trust_of(call)[1] >= {PLACE}
    before = Path(DEBIAN).read_bytes() if Path(DEBIAN).exists() else b"-----BEGIN"
    assert printed(call).encode().startswith(before)
    assert host_mounts() == []


OPT = member("opt/ca.pem", b"# its own\n")
IMAGES: dict[str, tuple[list[Any], set[str]]] = {
    "none": ([], set()),
    "own": ([member(DEBIAN[1:], b"# its own\n")], {DEBIAN}),
    "link": ([OPT, symlink("etc/ssl/cert.pem", "/opt/ca.pem")], {"/opt/ca.pem"}),
    "up": ([OPT, symlink("etc/ssl/cert.pem", "../" * 9 + "opt/ca.pem")], {"/opt/ca.pem"}),
    "absolute": ([symlink(DEBIAN[1:], "/etc/shadow")], set()),
    "escaping": ([symlink(DEBIAN[1:], "../" * 30 + "etc/shadow")], set()),
    "proc": ([symlink(DEBIAN[1:], "/proc/1/environ")], set()),
    "magic": ([symlink(DEBIAN[1:], "/proc/1/root/etc/shadow")], set()),
    "init": ([symlink(DEBIAN[1:], "/dev/.sandboxd")], set()),
    "lent": ([symlink(DEBIAN[1:], "/data/secret")], set()),
    "fifo": ([member(DEBIAN[1:], type=tarfile.FIFOTYPE, mode=0o644)], set()),
    "directory": ([directory(DEBIAN[1:])], set()),
    "loop": ([symlink(DEBIAN[1:], DEBIAN.rpartition("/")[2])], set()),
    "private": ([member(DEBIAN[1:], SECRET.encode(), mode=0o600)], set()),
    "place": ([member(PLACE[1:], b"# of the image\n")], set()),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_whatever_an_image_has_there_leads_nowhere(
    docker_daemon: Daemon, dockerd: Dockerd, tmp_path: Path, name: str
) -> None:
    members, covered = IMAGES[name]
    tmp_path.chmod(0o755)
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o600)
    dockerd.load(shell_tar(*members), f"trust-{name}:1")
    lent = f"mounts: [{{source: {tmp_path}, target: /data}}]\n"
    add_policies(docker_daemon, **{f"trust-{name}": policy(f"trust-{name}:1", lent + RULES)})
    call = docker_daemon.run("/usr/bin/cat", PLACE, *covered, policy=f"trust-{name}")
    assert trust_of(call)[1] == {PLACE, *covered}
    text = printed(call)
    assert text.count("BEGIN CERTIFICATE") == 1 + len(covered)
    assert text.count("# its own\n") == 2 * len(covered)
    assert SECRET not in text
    assert "# of the image" not in text
    for line in Path("/etc/shadow").read_text().splitlines():
        assert line not in text
    until(lambda: not dockerd.containers(), "the container is gone")
    assert host_mounts() == []


def test_a_bundle_that_is_none_is_named(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    dockerd.load(shell_tar(member(DEBIAN[1:], bytes(5 * 2**20))), "trust-large:1")
    add_policies(docker_daemon, large=policy("trust-large:1"))
    outcome = docker_daemon.run("/usr/bin/true", policy="large").outcome
    assert outcome is not None
    assert outcome.error is not None
    assert (outcome.error.code, outcome.error.details["control"]) == ("control_not_enforced", "trust")
    until(lambda: not dockerd.containers(), "the container is gone")


def test_a_volume_of_the_image_is_not_in_the_way(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    dockerd.load(
        shell_tar(member(DEBIAN[1:], b"# its own\n")), "trust-volume:1", {"Volumes": {"/etc/ssl": {}}}
    )
    add_policies(docker_daemon, volume=policy("trust-volume:1"))
    call: Invocation = docker_daemon.run("/usr/bin/cat", DEBIAN, policy="volume")
    assert trust_of(call)[1] == {PLACE, DEBIAN}
    assert printed(call).startswith("# its own\n-----BEGIN")
