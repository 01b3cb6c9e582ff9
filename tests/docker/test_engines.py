"""Docker Engines of other kinds: with userns-remap, with another runtime, with one that withholds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from daemons import SANDBOXD, until
from dockerd import ACCOUNT, FIRST, own_engine, remapping
from podman import Podman
from trusting import PLACE, RULES, trust_of

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon
    from dockerd import Dockerd

    from sandboxd.models import Invocation

ROOTLESS = (
    ACCOUNT
    + """
for word; do case $word in unix://*) home=$(dirname "${{word#unix://}}") ;; esac; done
chown 2999:2999 "$home"
export HOME="$home" XDG_RUNTIME_DIR="$home"
exec setpriv --reuid=2999 --regid=2999 --clear-groups {become} "$@"
"""
)
ROOTLESSKIT = """rootlesskit --net=host --copy-up=/etc --copy-up=/run sh -c \
  'rm -f /run/docker /run/containerd /run/xtables.lock; exec "$@"' --"""  # as dockerd-rootless.sh does it


def in_force(call: Invocation) -> dict[str, str]:
    assert call.receipt is not None, call.outcome
    assert all(control.enforced for control in call.receipt.controls)
    return {control.name: control.in_force for control in call.receipt.controls}


@pytest.fixture(scope="module")
def remapped(
    leak_session: object, need: Callable[[object, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dockerd]:
    """An engine with ids of its own, which only it sees in /etc."""
    need(shutil.which("dockerd"), "docker.io")
    at = tmp_path_factory.mktemp("remap")
    with remapping(at) as engine:
        yield engine


def test_an_engine_that_remaps_ids(
    remapped: Dockerd, start_on: Callable[..., Daemon], tmp_path: Path
) -> None:
    lent = tmp_path / "lent"
    lent.mkdir()
    for path in (lent, *lent.parents):
        path.chmod(path.stat().st_mode | 0o055)
    daemon = start_on(
        remapped,
        f"docker: {{socket: {remapped.socket}}}\nnetwork: {{host: true}}\n",
        mapped=(
            "extends: tiny\nimage: host\nprocess: {user_namespace: engine}\n"
            f"mounts: [{{source: {lent}, target: /lent, mode: read-only}}]\n"
            'artifacts: [{path: "**"}]\n'
        ),
        root="extends: tiny\nimage: host\nprocess: {user_namespace: engine, user: 0}\n",
        look=f"extends: tiny\nimage: host\nprocess: {{user_namespace: engine}}\n{RULES}",
        open="extends: mapped\nnetwork: {mode: host}\n",
    )
    assert PLACE in trust_of(daemon.run("true", policy="look"))[1]
    with pytest.raises(errors.ControlNotSupported, match="gives no container the host's network"):
        daemon.run("true", policy="open")
    call = daemon.run("sh", "-c", "id -u; cat in; echo x > made", policy="mapped", inputs={"in": b"given"})
    assert call.stdout is not None
    assert call.stdout.text == "1000\ngiven", call.outcome
    assert [one.path for one in call.artifacts if one.path == "made"]
    found = in_force(call)
    assert found["user_namespace_uids"] == found["user_namespace_gids"] == f"0 {FIRST} 65536"
    assert found["user"].startswith(str(FIRST + 1000))
    assert "another" not in found["mnt_namespace"]
    root = daemon.run("sh", "-c", "id -u; mount -t tmpfs none /mnt; unshare -U true", policy="root")
    assert in_force(root)["user"].startswith(str(FIRST))
    assert root.outcome is not None
    assert root.outcome.exit_code != 0
    with pytest.raises(errors.ControlNotSupported):
        daemon.run("true", policy="tiny")
    session = daemon.client().create_session().id  # whose files are kept with the container's ids
    for code, said in (
        ("echo x > f; chmod 600 f", ""),
        ("stat -c %u f; cat f; echo y >> f", "1000\nx\n"),
        ("cat f", "x\ny\n"),
    ):
        kept = daemon.run("sh", "-c", code, policy="mapped", session=session)
        assert kept.stdout is not None
        assert kept.stdout.text == said, kept.stderr
    assert "overlay" in in_force(kept)["workspace"]


def test_a_warm_interpreter_waits(
    docker_daemon: Daemon, dockerd: Dockerd, start_on: Callable[..., Daemon]
) -> None:
    daemon = start_on(dockerd, "pool: {min: 2, max: 2}\n", name="pooled")
    script = "import os; print(os.getuid())"
    assert daemon.run("python3", "-c", script, policy="py").outcome is not None

    def waiting() -> int:
        return sum(slot.state == "waiting" and slot.policy == "py" for slot in daemon.client().slots())

    until(lambda: waiting() == 2, "two wait", seconds=30)
    call = daemon.run("python3", "-c", script, policy="py")
    assert call.stdout is not None
    assert call.stdout.text == "1000\n"
    assert call.receipt is not None
    assert call.receipt.checked_at is not None  # it was read when the slot was made, and again
    assert call.outcome is not None
    assert call.outcome.exit_code == 0


@pytest.fixture(scope="module")
def runtimes(
    leak_session: object, need: Callable[[object, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Dockerd, Path]]:
    """An engine with crun, and with a runtime that leaves out what a file names."""
    need(shutil.which("dockerd"), "docker.io")
    need(shutil.which("crun"), "crun")
    directory = tmp_path_factory.mktemp("runtimes")
    crun, without = directory / "own-crun", directory / "without"
    # crun refuses hybrid hosts, and does not see here that this is one
    crun.write_text(
        '#!/bin/sh\nexec unshare -m sh -c \'umount /sys/fs/cgroup/unified 2>&-; exec crun "$@"\' -- "$@"\n'
    )
    without.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        f"import docker_withholding\ndocker_withholding.main({str(directory)!r})\n"
    )
    for path in (crun, without):
        path.chmod(0o755)
    with own_engine(f"--add-runtime=own-crun={crun}", f"--add-runtime=without={without}") as engine:
        yield engine, directory


def test_another_runtime_of_the_engine(
    runtimes: tuple[Dockerd, Path], start_on: Callable[..., Daemon]
) -> None:
    engine, _ = runtimes
    daemon = start_on(engine, f"docker: {{socket: {engine.socket}, runtime: own-crun}}\n")
    call = daemon.run("true", policy="small")
    assert in_force(call)
    assert call.receipt is not None
    assert call.receipt.runtime == "own-crun"


WITHHELD = {
    "net_namespace": "net_namespace",
    "ipc_namespace": "ipc_namespace",
    "uts_namespace": "uts_namespace",
    "cgroup_namespace": "cgroup_namespace",
    "tmp_size": "tmp",
    "workspace_absent": "workspace",
    "shm_absent": "shm",
    "masked_paths": "masked_paths",
    "read_only_paths": "masked_paths",
    "host_device": "devices",
    "lent_other": "mount /lent",
    "seccomp_outer": "seccomp",
    "hostname": "hostname",
}


def test_what_the_runtime_withholds_is_named(
    runtimes: tuple[Dockerd, Path], start_on: Callable[..., Daemon], tmp_path: Path
) -> None:
    engine, directory = runtimes
    (directory / "withhold").write_text("nothing")
    lent = tmp_path / "lent"
    lent.mkdir()
    daemon = start_on(
        engine,
        f"docker: {{socket: {engine.socket}, runtime: without}}\n",
        lent=(
            "extends: tiny\nimage: host\nprocess: {user_namespace: none}\n"
            f"mounts: [{{source: {lent}, target: /lent, mode: read-only}}]\n"
        ),
    )
    in_force(daemon.run("true", policy="lent"))
    found = {}
    for name in WITHHELD:
        (directory / "withhold").write_text(name)
        call = daemon.run("echo", "ran", policy="lent")
        assert call.outcome is not None
        assert call.times.started is None
        error = call.outcome.error
        assert error is not None, name
        found[name] = error.details.get("controls", error.message)
    assert {name: WITHHELD[name] in controls for name, controls in found.items()} == dict.fromkeys(
        WITHHELD, True
    ), found


class Widened(Podman):
    """One whose operator gives every container more."""

    containers_conf = """
volumes = ["/etc:/mnt/of-the-host"]
env = ["LD_PRELOAD=/none.so"]
default_capabilities = ["SYS_ADMIN", "SYS_PTRACE"]
default_sysctls = ["net.ipv4.ping_group_range=0 0"]
netns = "host"
ipcns = "host"
pidns = "host"
utsns = "host"
cgroupns = "host"
userns = "auto"
init = true
http_proxy = true
"""


class WithDevice(Podman):
    """One whose containers have a device of the host."""

    containers_conf = 'devices = ["/dev/kmsg:/dev/kmsg:rwm"]\n'


@pytest.mark.parametrize("kind", ["podman"], indirect=True)
def test_what_podman_gives_to_all_no_container_of_ours_has(
    leak_session: object, kind: type[Dockerd], start_on: Callable[..., Daemon]
) -> None:
    with own_engine(kind=Widened) as engine:
        daemon = start_on(engine)
        call = daemon.run("sh", "-c", "env; find /mnt", policy="small")
        assert in_force(call)
        assert call.stdout is not None
        text = call.stdout.text or ""
        assert "LD_PRELOAD" not in text
        assert text.endswith("/mnt\n/mnt/of-the-host\n")  # where it was mounted
    with own_engine(kind=WithDevice) as engine:
        outcome = start_on(engine, name="device").run("true", policy="small").outcome
        assert outcome is not None
        assert outcome.error is not None
        assert outcome.error.code == "control_not_enforced"
        assert "devices" in str(outcome.error)


def doctor(engine: Dockerd, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What ``sandboxd doctor`` finds, by the name of the check."""
    (tmp_path / "sandboxd.yaml").write_text(f"state: {tmp_path}/state\ndocker: {{socket: {engine.socket}}}\n")
    done = subprocess.run(
        [SANDBOXD, "doctor", "--json", "--config", tmp_path / "sandboxd.yaml"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.mark.parametrize("kind", ["docker", "podman"], indirect=True)
def test_a_rootless_engine_is_refused(
    leak_session: object, need: Callable[[object, str], None], kind: type[Dockerd], tmp_path: Path
) -> None:
    need(shutil.which("rootlesskit"), "rootlesskit")
    need(shutil.which("newuidmap"), "uidmap")
    options, become = ([], "") if kind is Podman else (["--rootless"], ROOTLESSKIT)
    script = ROOTLESS.format(at=tmp_path, first=FIRST, become=become)
    with own_engine(*options, before=["unshare", "-m", "sh", "-c", script, "--"], kind=kind) as engine:
        found = doctor(engine, tmp_path)["engine docker"]
        assert not found["ok"]
        why = "can enforce no limit" if Path("/sys/fs/cgroup/memory").exists() else "maps ids in two pieces"
        assert f"this is a rootless engine, which {why}" in found["found"]
        assert engine.containers() == []


def test_the_doctor_compares_the_engines(dockerd: Dockerd, tmp_path: Path) -> None:
    found = doctor(dockerd, tmp_path)
    assert found["engine oci"]["ok"]
    assert found["engine docker"]["ok"]
    assert "user_namespace: none" in found["engine docker"]["found"]
    assert "controls in force" in found["docker runc"]["found"]
    assert dockerd.containers() == []
