"""Calls through a daemon on a Docker Engine: what a plan means is the same."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from daemons import until
from docker_policies import add_policies

from sandboxd import errors

if TYPE_CHECKING:
    from daemons import Daemon
    from dockerd import Dockerd

    from sandboxd.models import Invocation

ENGINE_OF = {"engine": "docker", "runtime": "runc"}


def controls(call: Invocation) -> dict[str, str]:
    """What was in force, by control."""
    assert call.receipt is not None, call.outcome
    assert all(control.enforced for control in call.receipt.controls)
    return {control.name: control.in_force for control in call.receipt.controls}


def test_the_receipt_has_the_lines_of_the_other_engine(docker_daemon: Daemon, daemon: Daemon) -> None:
    here = docker_daemon.run("true", policy="plain")
    there = daemon.run("true", policy="default")
    found, wanted = controls(here), controls(there)
    assert here.receipt is not None
    assert (here.receipt.engine, here.receipt.runtime) == ("docker", "runc")
    of_a_namespace = {"user_namespace", "user_namespace_gids"}  # which the policy here does without
    assert wanted.keys() - found.keys() == of_a_namespace
    assert found.keys() <= wanted.keys()
    ids = {"user", "group", "user_namespace_uids", "init", "parent", "processes"}
    for name in found.keys() - ids:
        if not name.endswith("_namespace") and not name.startswith("mount "):
            assert found[name] == wanted[name], name
    assert found["user"] == "1000 1000 1000 1000"


def test_an_image_of_the_store_has_its_own_digest(docker_daemon: Daemon, daemon: Daemon) -> None:
    here, there = docker_daemon.run("true", policy="plain"), daemon.run("true")
    assert here.image == there.image
    assert here.image.name == "base"


def test_what_a_tool_sees_has_no_more_mounts(docker_daemon: Daemon) -> None:
    script = "cut -d' ' -f5 /proc/self/mountinfo; ls -A /sys; ls /dev; env; cat /proc/net/unix"
    call = docker_daemon.run("sh", "-c", script, policy="plain")
    assert call.stdout is not None
    text = call.stdout.text or ""
    assert "/sys\n" not in text.replace("/proc/sys\n", "")
    for absent in ("mqueue", "door", "/etc/hosts", "HOSTNAME", "docker"):
        assert absent not in text, absent


def test_streams_files_and_status(docker_daemon: Daemon) -> None:
    call = docker_daemon.run(
        "sh", "-c", "cat in; echo err >&2; exit 3", policy="plain", inputs={"in": b"given"}
    )
    assert call.outcome is not None
    assert (call.outcome.cause, call.outcome.exit_code) == ("exited", 3)
    assert call.stdout is not None
    assert call.stdout.text == "given"
    assert call.stderr is not None
    assert call.stderr.text == "err\n"


def test_artifacts_come_back(docker_daemon: Daemon) -> None:
    script = "import os; os.mkdir('out'); open('out/a', 'w').write('x' * 10)"
    call = docker_daemon.run("python3", "-c", script, policy="py")
    assert [(one.path, one.size) for one in call.artifacts] == [("out/a", 10)]


@pytest.mark.parametrize(
    ("script", "cause", "limits"),
    [
        ("kill -9 $$", "signalled", {}),
        ("sleep 100", "wall_time", {"wall": "3s"}),
        ("while :; do :; done", "cpu_time", {"cpu_time": "300ms"}),
        ("head -c 1G /dev/zero | tail", "memory", {}),
        ("yes", "output", {}),
        ("exec /nowhere", "exited", {}),
    ],
)
def test_each_cause_of_an_end(docker_daemon: Daemon, script: str, cause: str, limits: dict[str, str]) -> None:
    add_policies(
        docker_daemon,
        ends=(
            "extends: tiny\nprocess: {user_namespace: none}\nlimits:\n  wall: 60s\n  cpu_time: 60s\n"
            "  stdout: {size: 1MiB, on_limit: kill}\n  stderr: {size: 1MiB, on_limit: kill}\n"
        ),
    )
    call = docker_daemon.run("sh", "-c", script, policy="ends", limits=limits)
    assert call.outcome is not None
    assert call.outcome.cause == cause, call.outcome


def test_limits_that_do_not_end_a_call_are_told(docker_daemon: Daemon) -> None:
    script = "head -c 64M /dev/zero >/tmp/full; for i in $(seq 60); do sleep 2 & done 2>/dev/null; true"
    call = docker_daemon.run("sh", "-c", script, policy="small")
    assert {one.limit for one in call.limits_reached} >= {"pids", "tmp"}


def test_a_denied_call_is_told(docker_daemon: Daemon) -> None:
    call = docker_daemon.run("unshare", "-U", "true", policy="plain")
    assert "unshare" in {denial.name for denial in call.denials}


def test_what_is_lent_is_read_only(docker_daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    lent = tmp_path_factory.mktemp("lent")
    (lent / "file").write_text("lent\n")
    for path in (lent, *lent.parents):
        path.chmod(path.stat().st_mode | 0o011)
    add_policies(
        docker_daemon,
        lent=(
            "extends: tiny\nprocess: {user_namespace: none}\n"
            f"mounts:\n  - {{source: {lent}, target: /data/in, mode: read-only}}\n"
            f"  - {{source: {lent}/file, target: /data/file, mode: read-only}}\n"
        ),
    )
    call = docker_daemon.run("sh", "-c", "cat /data/in/file /data/file; touch /data/in/x", policy="lent")
    assert call.stdout is not None
    assert call.stdout.text == "lent\nlent\n"
    assert "mount /data/in" in controls(call)
    assert call.outcome is not None
    assert call.outcome.exit_code == 1


def test_io_is_limited(docker_daemon: Daemon) -> None:
    add_policies(
        docker_daemon,
        io="extends: tiny\nprocess: {user_namespace: none}\nlimits:\n  io: {read: 50MiB, write: 20MiB}\n",
    )
    assert re.search("rbps=52428800.*wbps=20971520", controls(docker_daemon.run("true", policy="io"))["io"])


def test_the_programs_of_this_host(docker_daemon: Daemon) -> None:
    add_policies(docker_daemon, own="extends: host\nprocess: {user_namespace: none}\n")
    call = docker_daemon.run("sh", "-c", "test -d /usr/share && ! touch /usr/x", policy="own")
    assert call.outcome is not None
    assert call.outcome.exit_code == 0, call
    assert "mount /usr" in controls(call)


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("extends: tiny\n", "user_namespace"),
        ("extends: tiny\nprocess: {user_namespace: engine}\n", "user_namespace"),
        (
            "extends: tiny\nprocess: {user_namespace: none}\nfilesystem: {root: overlay, size: 8MiB}\n",
            "root_overlay",
        ),
    ],
)
def test_what_the_engine_cannot_give_is_refused_before_anything_runs(
    docker_daemon: Daemon, dockerd: Dockerd, text: str, control: str
) -> None:
    add_policies(docker_daemon, wide=text)
    with pytest.raises(errors.ControlNotSupported) as found:
        docker_daemon.run("true", policy="wide")
    assert found.value.details["control"] == control
    add_policies(docker_daemon, wide="extends: tiny\n")


def test_containers_are_gone_when_their_calls_are(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    from daemons import until  # noqa: PLC0415

    docker_daemon.run("true", policy="plain")
    until(lambda: not dockerd.containers(), "the container is removed")
    assert dockerd.volumes() == []


SECRETS = (
    "extends: plain\nsecrets: [{name: FILE_SECRET, as: file}, {name: ENV_SECRET, as: env}]\n"
    'artifacts: [{path: "**"}]\n'
)
TELL = """
cat /run/secrets/FILE_SECRET; echo; base64 /run/secrets/FILE_SECRET; echo "$ENV_SECRET"; echo > "$ENV_SECRET"
stat -c '%a %u' /run/secrets/FILE_SECRET; echo x 2>&1 > /run/secrets/FILE_SECRET
"""


def test_secrets_are_given_and_not_told(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    add_policies(docker_daemon, secretive=SECRETS)
    client = docker_daemon.client()
    values = {"FILE_SECRET": b"the value of the file!", "ENV_SECRET": b"the-value-of-the-variable"}
    for name, value in values.items():
        client.set_secret(name, value)
    call = client.run(["sh", "-c", TELL], policy="secretive")
    assert call.stdout is not None
    lines = (call.stdout.text or "").splitlines()
    assert [line[:22] for line in lines[:3]] == ["[redacted:FILE_SECRET]"] * 2 + ["[redacted:ENV_SECRET]"]
    assert lines[3] == "400 1000"
    assert [one.path for one in call.artifacts] == ["[redacted:ENV_SECRET]"]
    found = controls(call)
    assert found["secrets"].endswith("ro nosuid nodev noexec")
    assert found["secret FILE_SECRET"] == "0400 1000:1000, 1 link, version 1"
    running = client.start(["sleep", "60"], policy="secretive")
    until(lambda: client.get(running.id).state == "running", "it runs")
    (container,) = dockerd.containers()
    told = str(dockerd.inspect(container)) + docker_daemon.log.read_text()
    for value in values.values():
        assert value.decode() not in told, "the engine knows nothing of it"
    client.cancel(running.id)
