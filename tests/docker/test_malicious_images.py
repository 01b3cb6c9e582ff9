"""Images made to get out, to get in, or to be in the way: none of it reaches PID 1, the tool or the host."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from archives import directory, docker_save, hardlink, member, shell_tar, symlink, tar
from daemons import until
from docker_policies import add_policies
from podman import Podman

from sandboxd import errors
from sandboxd.engine.host import instance_name

if TYPE_CHECKING:
    from daemons import Daemon
    from dockerd import Dockerd

    from sandboxd.models import Invocation

MEBI = 2**20
SETTINGS = {
    "Entrypoint": ["/usr/bin/sh", "-c", "echo entered > /usr/entered; sleep 1000"],
    "Cmd": ["--evil"],
    "User": "1234:2345",
    "WorkingDir": "/evil/deep",
    "OnBuild": ["RUN touch /built", "VOLUME /on-build"],
    "Volumes": {
        "/data": {},
        "/data/deep": {},
        "/tmp": {},
        "/workspace/": {},
        "/dev/.sandboxd": {},
        "/etc": {},
    },
    "Env": [
        "LD_PRELOAD=/evil/preload.so",
        "LD_LIBRARY_PATH=/evil",
        "LD_AUDIT=/evil/audit.so",
        "GLIBC_TUNABLES=glibc.malloc.check=3",
        "PATH=/evil",
        "PYTHONSTARTUP=/evil/start.py",
        "TMPDIR=/evil",
        "HOSTNAME=evil",
        "no-value",
        "SANDBOXD_CONTROL=9",
    ],
    "Healthcheck": {
        "Test": ["CMD-SHELL", "echo checked > /tmp/checked; echo checked > /workspace/checked"],
        "Interval": 1_000_000_000,
        "StartPeriod": 1_000_000,
    },
    "StopSignal": "SIGCONT",
    "Shell": ["/evil/shell"],
    "ExposedPorts": {"22/tcp": {}},
    "ArgsEscaped": True,
}


def nasty() -> bytes:
    """A root file system with all that one may hold."""
    shell = next((i, d) for i, d in _members(shell_tar()) if i.name == "usr/bin/dash")[1]
    return shell_tar(
        member("setuid", shell, mode=0o6755),
        member("etc/passwd", b"root:x:0:0::/evil:/bin/sh\nevil:x:1234:0:x:/:/bin/sh\n", mode=0o644),
        member("etc/group", b"root:x:0:\ndisk:x:6:root,evil\ndocker:x:999:root\n"),
        member("etc/ld.so.preload", b"/evil/none.so\n"),
        member("etc/shadow", b"root::1::::::\n", mode=0o666),
        directory("evil"),
        member("evil/preload.so", b"\x7fELF not really", mode=0o755),
        directory("data"),
        member("data/huge", bytes(64 * MEBI)),
        member("dev/sda", type=tarfile.BLKTYPE, devmajor=254, devminor=0, mode=0o666),
        member("dev/mem", type=tarfile.CHRTYPE, devmajor=1, devminor=1, mode=0o666),
        member("device", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("disk", type=tarfile.BLKTYPE, devmajor=254, devminor=0, mode=0o666),
        member("dev/.sandboxd", shell, mode=0o755),
        member("dev/.sandboxd-door", b"not a directory"),
        directory("proc/1"),
        member("proc/1/status", b"Uid:\t0\n"),
        member("proc/cmdline", b"evil\n"),
        symlink("absolute", "/etc/shadow"),
        symlink("escaping", "../../../../../../etc/shadow"),
        symlink("to-the-host", "/proc/1/root/etc/shadow"),
        hardlink("hard", "etc/shadow"),
        member("fifo", type=tarfile.FIFOTYPE, mode=0o666),
        member(".dockerenv", b"evil"),
        member("sys/evil", b"evil"),
    )


def _members(archive: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        files = [one for one in opened.getmembers() if one.isfile()]
        return [(one, (opened.extractfile(one) or io.BytesIO()).read()) for one in files]


def printed(call: Invocation) -> str:
    assert call.stdout is not None, call
    return call.stdout.text or ""


@pytest.fixture(scope="module")
def nasty_daemon(docker_daemon: Daemon, dockerd: Dockerd) -> Daemon:
    """The session's daemon, with the policy ``nasty``."""
    ours = instance_name(docker_daemon.state)
    labels = {"io.sandboxd.instance": ours, "io.sandboxd.slot": "evil"}
    dockerd.load(nasty(), "nasty:1", {**SETTINGS, "Labels": labels})
    add_policies(docker_daemon, nasty="extends: tiny\nimage: nasty:1\nprocess: {user_namespace: none}\n")
    return docker_daemon


def test_the_image_says_nothing_about_what_runs(nasty_daemon: Daemon) -> None:
    script = (
        "id; pwd; env; ls -A /workspace /tmp; test ! -e /usr/entered && echo not entered; sleep 2.5; ls /tmp"
    )
    call = nasty_daemon.run("/usr/bin/sh", "-c", script, policy="nasty")
    text = printed(call)
    assert call.outcome is not None
    assert call.outcome.cause == "exited", call.outcome
    assert "uid=1000 gid=1000 groups=1000" in text
    assert "/workspace\n" in text
    assert "not entered" in text
    for absent in ("evil", "checked", "LD_", "GLIBC", "HOSTNAME", "entered >"):
        assert absent not in text, absent
    assert call.receipt is not None
    assert all(control.enforced for control in call.receipt.controls)


def test_pid_1_has_nothing_of_the_image(nasty_daemon: Daemon, dockerd: Dockerd) -> None:
    client = nasty_daemon.client()
    until(lambda: not dockerd.containers(), "no other container is there")
    call = client.start(["/usr/bin/sleep", "30"], policy="nasty")
    until(lambda: client.get(call.id).state == "running", "it runs")
    [container] = dockerd.containers()
    init = Path("/proc", str(dockerd.inspect(container)["State"]["Pid"]))
    names = {entry.partition(b"=")[0] for entry in (init / "environ").read_bytes().split(b"\0")}
    assert names <= {b"", b"PATH", b"HOME", b"HOSTNAME"}, names
    assert (init / "cmdline").read_bytes().startswith(b"/dev/.sandboxd\0")
    assert b"evil" not in (init / "maps").read_bytes()
    assert "Uid:\t0\t0\t0\t0" in (init / "status").read_text()
    client.cancel(call.id)


def test_nothing_of_the_image_opens_a_device_or_raises_an_id(nasty_daemon: Daemon) -> None:
    script = """
        for node in /device /disk /dev/sda /dev/mem; do cat $node && echo opened $node; done
        /setuid -c id
        cat /proc/cmdline /proc/1/status | grep -i evil
        ls /sys
        cat /absolute /escaping /to-the-host
        true
    """
    call = nasty_daemon.run("/usr/bin/sh", "-c", script, policy="nasty")
    text = printed(call)
    assert "opened" not in text
    assert "uid=0" not in text
    assert "euid" not in text
    assert "uid=1000" in text
    # links lead to the image's own file, and nowhere else
    assert text.count("root::1::::::") == 2
    assert Path("/etc/shadow").read_text().splitlines()[0] not in text


def test_no_volume_is_made_or_filled(nasty_daemon: Daemon, dockerd: Dockerd) -> None:
    before = time.monotonic()
    script = "ls -s /data/huge && ! echo x > /data/new && ! echo x > /etc/new && ls /etc/passwd"
    call = nasty_daemon.run("/usr/bin/sh", "-c", script, policy="nasty")
    assert call.outcome is not None
    assert call.outcome.exit_code == 0, call
    assert time.monotonic() - before < 10
    assert dockerd.volumes() == []


def test_labels_of_an_image_make_no_container_ours(nasty_daemon: Daemon, dockerd: Dockerd) -> None:
    ours = {"io.sandboxd.instance": instance_name(nasty_daemon.state), "io.sandboxd.slot": "evil"}
    dockerd.load(shell_tar(), "labelled:1", {"Labels": ours})
    try:
        dockerd.docker(
            *("run", "-d", "--name", "stranger", "--network=none", "labelled:1", "/usr/bin/sleep", "60")
        )
        assert dockerd.inspect("stranger")["Config"]["Labels"] == ours
        call = nasty_daemon.run("/usr/bin/true", policy="nasty")
        assert call.outcome is not None
        assert call.outcome.exit_code == 0
        assert dockerd.containers("--filter", "name=stranger") == ["stranger"]
    finally:
        dockerd.docker("rm", "-f", "-v", "stranger")


LINKS = {
    "workspace": symlink("workspace", "/etc"),
    "workspace-up": symlink("workspace", "../../../../../../etc"),
    "workspace-host": symlink("workspace", "/proc/1/root/etc"),
    "workspace-file": member("workspace", b"a file"),
    "tmp": symlink("tmp", "/"),
    "tmp-bin": symlink("tmp", "/usr/bin"),
    "proc": symlink("proc", "/etc"),
    "dev": symlink("dev", "/etc"),
    "dev-file": member("dev", b"a file"),
    "sys": symlink("sys", "/usr"),
    "etc": symlink("etc", "/usr/bin"),
    "etc-escaping": symlink("etc", "../../../../../../../../etc"),
    "hosts": symlink("etc/hosts", "/proc/1/root/etc/hosts"),
    "hosts-escaping": symlink("etc/hosts", "../../../../../../../../../etc/hosts"),
    "resolv": symlink("etc/resolv.conf", "/dev/.sandboxd-door/s"),
    "shm": symlink("dev/shm", "/etc"),
    "mtab": directory("etc/mtab"),
}

FAILS = {
    "workspace": {"control_not_enforced"},
    "workspace-up": {"control_not_enforced"},
    "workspace-host": {"control_not_enforced"},
    "workspace-file": {"engine"},
    "tmp": {"engine"},
    "tmp-bin": {"control_not_enforced"},
}
"""The others are mounted over, or put right, by the engine; their receipts say so."""
FAILS_ON_PODMAN = FAILS | {
    "tmp": {"engine", "control_not_enforced"},  # what is mounted first is another thing each time
    "proc": {"engine"},
    "dev": {"control_not_enforced"},
    "dev-file": {"engine"},
    "sys": {"engine"},
    "etc-escaping": {"engine"},
    "shm": {"control_not_enforced"},
}
"""It leaves what a Docker Engine puts right as it is, and a container that is not as asked is refused."""


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_place_of_a_mount_point_leads_nowhere(
    docker_daemon: Daemon, dockerd: Dockerd, name: str
) -> None:
    """Either it does no harm, or the call fails and names what is not as asked; the host is as it was."""
    watched = [Path("/etc/hosts"), Path("/etc/hostname"), Path("/etc/resolv.conf"), Path("/etc/passwd")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in watched if path.exists()]

    def mounts() -> int:
        targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        own = f"{dockerd.directory}/data/overlay"  # Podman's, which is there and not
        return sum(target.startswith(f"{dockerd.directory}/") and target != own for target in targets)

    mounted = mounts()
    dockerd.load(shell_tar(LINKS[name]), f"link-{name}:1")
    add_policies(
        docker_daemon,
        **{f"link-{name}": f"extends: tiny\nimage: link-{name}:1\nprocess: {{user_namespace: none}}\n"},
    )
    fails = FAILS_ON_PODMAN if isinstance(dockerd, Podman) else FAILS
    call = docker_daemon.run("/usr/bin/sh", "-c", "echo x > /workspace/x; id; ls /", policy=f"link-{name}")
    assert call.outcome is not None
    if call.outcome.error is not None:
        assert call.outcome.error.code in fails.get(name, ()), call.outcome
        assert call.times.started is None
    else:
        assert name not in fails
        assert call.receipt is not None
        assert all(control.enforced for control in call.receipt.controls)
        assert "uid=1000" in printed(call)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in watched if path.exists()] == before
    until(lambda: not dockerd.containers(), "the container is gone")
    until(lambda: mounts() <= mounted, "no mount is left")


def test_many_layers(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    layers = [shell_tar(), *(tar(member(f"layer{number}", b"x" * number)) for number in range(60))]
    dockerd.docker("load", data=docker_save(*layers, tag="layers:1"))
    add_policies(docker_daemon, layers="extends: tiny\nimage: layers:1\nprocess: {user_namespace: none}\n")
    call = docker_daemon.run("/usr/bin/ls", "/", policy="layers")
    assert "layer59\n" in printed(call)
    assert call.receipt is not None
    assert all(control.enforced for control in call.receipt.controls)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("volumes", {"Volumes": {f"/volume{number}": {} for number in range(1000)}}, "1000 volumes"),
        ("variables", {"Env": [f"V{number}=" for number in range(3000)]}, "3000 variables"),
        ("nameless", {"Env": ["=x"]}, "without a name"),
    ],
)
def test_a_configuration_that_no_container_can_have_is_refused(
    docker_daemon: Daemon, dockerd: Dockerd, name: str, settings: dict[str, Any], reason: str
) -> None:
    dockerd.load(shell_tar(), f"{name}:1", settings)
    add_policies(
        docker_daemon, **{name: f"extends: tiny\nimage: {name}:1\nprocess: {{user_namespace: none}}\n"}
    )
    with pytest.raises(errors.ImageInvalid, match=reason):
        docker_daemon.run("/usr/bin/true", policy=name)


FIFO = member("etc/passwd", type=tarfile.FIFOTYPE)


@pytest.mark.parametrize(
    "members",
    [
        [FIFO],
        [member("etc/group", type=tarfile.FIFOTYPE)],
        [member("fifo", type=tarfile.FIFOTYPE), symlink("etc/passwd", "/link"), symlink("link", "fifo")],
        [member("etc/group", bytes(2 * MEBI))],
        [symlink("etc/passwd", "passwd")],
    ],
    ids=["passwd", "group", "by a link", "large", "to itself"],
)
def test_what_would_hold_the_engine_is_not_opened_by_it(
    docker_daemon: Daemon, dockerd: Dockerd, request: pytest.FixtureRequest, members: list[Any]
) -> None:
    name = f"accounts-{request.node.callspec.id}".replace(" ", "-")
    dockerd.load(shell_tar(*members), f"{name}:1")
    add_policies(
        docker_daemon, **{name: f"extends: tiny\nimage: {name}:1\nprocess: {{user_namespace: none}}\n"}
    )
    began = time.monotonic()
    outcome = docker_daemon.run("/usr/bin/true", policy=name).outcome
    assert time.monotonic() - began < 10
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.code == "engine"
    assert "no regular file" in outcome.error.message
    until(lambda: not dockerd.containers(), "the container is gone")


def test_accounts_by_a_link_are_no_fault(docker_daemon: Daemon, dockerd: Dockerd) -> None:
    link = symlink("etc/passwd", "/store/passwd"), directory("store"), member("store/passwd")
    dockerd.load(shell_tar(*link), "linked:1")
    add_policies(docker_daemon, linked="extends: tiny\nimage: linked:1\nprocess: {user_namespace: none}\n")
    assert docker_daemon.run("/usr/bin/true", policy="linked").outcome.exit_code == 0  # type: ignore[union-attr]
