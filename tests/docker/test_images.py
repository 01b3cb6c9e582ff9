"""Images of the Docker Engine by reference: pinned by the first use, moved by ``image pull --update``."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from archives import member, shell_tar
from daemons import SANDBOXD, until
from docker_policies import add_policies
from registry import running_registry

from sandboxd import errors
from sandboxd.engine.docker.images import is_reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon
    from dockerd import Dockerd

    from sandboxd.models import Invocation


def of(image: str) -> str:
    """A policy with an image."""
    return f"extends: tiny\nimage: {image}\nprocess: {{user_namespace: none}}\n"


def said(call: Invocation) -> str:
    """What a call printed; it has to have ended well."""
    assert call.outcome is not None
    assert call.outcome.exit_code == 0, call
    assert call.stdout is not None
    return call.stdout.text or ""


def image(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``sandboxd image`` with the daemon's configuration."""
    config = daemon.socket.parent / "sandboxd.yaml"
    return subprocess.run(
        [SANDBOXD, "image", *arguments, "--config", config], capture_output=True, text=True, check=False
    )


def test_what_is_a_reference() -> None:
    assert not any(map(is_reference, ("python", "base", "a.b-c_d", "sha256:" + "0" * 64)))
    assert all(map(is_reference, ("python:3", "library/python", "host:5000/a/b@sha256:" + "0" * 64)))


def test_a_reference_is_pinned_by_its_first_use(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    dockerd.load(shell_tar(member("version", b"one\n")), "pinned:1")
    add_policies(docker_daemon, pinned=of("pinned:1"))
    first = docker_daemon.run("cat", "/version", policy="pinned")
    assert said(first) == "one\n"
    assert first.image.name == "pinned:1"
    assert first.image.digest == dockerd.inspect("pinned:1")["Id"]
    dockerd.load(shell_tar(member("version", b"two\n")), "pinned:1")
    again = docker_daemon.run("cat", "/version", policy="pinned")
    assert said(again) == "one\n"
    assert again.image == first.image
    assert "pinned:1" in {one.name for one in docker_daemon.client().images()}


def test_an_image_that_is_missing_is_refused_with_the_command(docker_daemon: Daemon) -> None:
    add_policies(docker_daemon, missing=of("nowhere/missing:7"))
    with pytest.raises(errors.NotFound, match="sandboxd image pull nowhere/missing:7"):
        docker_daemon.run("true", policy="missing")


def test_an_image_that_was_removed_is_told_with_the_command(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    dockerd.load(shell_tar(member("removed", b"")), "removed:1")
    add_policies(docker_daemon, removed=of("removed:1"))
    said(docker_daemon.run("true", policy="removed"))
    until(lambda: not dockerd.containers(), "its container is gone")
    dockerd.docker("rmi", "-f", "removed:1")
    call = docker_daemon.run("true", policy="removed")
    assert call.outcome is not None
    assert call.outcome.error is not None
    assert call.outcome.error.code == "engine"
    assert "sandboxd image pull removed:1" in call.outcome.message


def test_what_was_imported_and_is_gone_is_imported_again(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    said(docker_daemon.run("true", policy="small"))
    until(lambda: not dockerd.containers(), "its container is gone")
    pins = json.loads((docker_daemon.state / "docker-images.json").read_text())
    for imported in pins["imported"].values():
        dockerd.docker("rmi", "-f", imported)
    said(docker_daemon.run("true", policy="small"))


def test_only_an_id_of_ours_is_used_for_an_image_of_the_store(
    docker_daemon: Daemon, dockerd: Dockerd
) -> None:
    """A stranger's image under the tag that ours have is nobody's."""
    said(docker_daemon.run("true", policy="small"))
    tags = dockerd.docker("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.decode().split()
    for tag in [tag for tag in tags if tag.startswith("sandboxd-")]:
        dockerd.load(shell_tar(member("stranger", b"")), tag)
    call = docker_daemon.run("sh", "-c", "test ! -e /stranger && ls /usr/lib/os-release", policy="small")
    assert "/usr/lib/os-release" in said(call)


def test_an_image_for_another_machine_is_refused(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    from archives import docker_save  # noqa: PLC0415

    foreign = docker_save(shell_tar(member("f", b"")), tag="foreign:1", architecture="s390x")
    dockerd.docker("load", data=foreign)
    add_policies(docker_daemon, foreign=of("foreign:1"))
    with pytest.raises(errors.ImageInvalid, match="linux/s390x"):
        docker_daemon.run("true", policy="foreign")


def test_pull_pins_and_update_moves_the_pin(
    docker_daemon: Daemon, dockerd: Dockerd, tmp_path: Path, need: Callable[[object, str], None]
) -> None:
    need(shutil.which("docker-registry"), "docker-registry")
    with running_registry(tmp_path) as registry:
        name = f"{registry}/tools/pulled:1"

        def publish(text: bytes) -> None:
            dockerd.load(shell_tar(member("version", text)), name)
            dockerd.docker("push", "-q", name)
            dockerd.docker("rmi", "-f", name)

        publish(b"one\n")
        add_policies(docker_daemon, pulled=of(name))
        with pytest.raises(errors.NotFound, match=f"sandboxd image pull {name}"):
            docker_daemon.run("true", policy="pulled")
        done = image(docker_daemon, "pull", f"docker://{name}")
        assert done.returncode == 0, done.stderr
        assert said(docker_daemon.run("cat", "/version", policy="pulled")) == "one\n"
        publish(b"two\n")
        assert image(docker_daemon, "pull", name).returncode == 0
        assert said(docker_daemon.run("cat", "/version", policy="pulled")) == "one\n"
        assert image(docker_daemon, "pull", "--update", name).returncode == 0
        assert said(docker_daemon.run("cat", "/version", policy="pulled")) == "two\n"
        assert name in image(docker_daemon, "ls").stdout
        done = image(docker_daemon, "rm", name)
        assert done.returncode != 0
        assert "used by" in done.stderr
        lacking = image(docker_daemon, "pull", f"{registry}/tools/none:1")
        assert lacking.returncode != 0
        assert "tools/none" in lacking.stderr
