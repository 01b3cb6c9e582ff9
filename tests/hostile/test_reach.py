"""What a tool can reach from inside: PID 1, the host's files, devices, identities, terminals."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.models import Bytes, Cause, Input

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon
    from programs import Programs

    from sandboxd.models import Invocation

    Probe = Callable[..., tuple[dict[str, str], Invocation]]

ABSENT = frozenset({"ENOENT"})
CLOSED = frozenset({"EPERM", "EACCES", "EROFS"})
NOWHERE = ABSENT | CLOSED
EMPTY = NOWHERE | {"ENODATA"}

REFUSED: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ["kill 1 TERM", "kill 1 KILL", "kill 1 STOP", "kill 1 CONT", "tgkill 1", "rt_sigqueueinfo 1"],
        frozenset({"EPERM"}),
    ),
    "kill everybody": frozenset({"ESRCH"}),
    **dict.fromkeys(
        ["pidfd_send_signal 1", "prlimit64 1", "prlimit64 self raise", "core raise", "setpriority 1",
         "affinity 1", "scheduler fifo", "uid_map", "capset", "setuid 0", "setgid 0", "setgroups 0",
         "TIOCSTI", "TIOCSTI high bits", "TIOCLINUX", "TIOCSETD", "mknod character", "mknod block",
         "mknodat high bits", "chmod null", "chown null"],
        frozenset({"EPERM"}),
    ),
    "nice up": frozenset({"EACCES"}),
    "oom_score_adj down": frozenset({"EACCES"}),
    **dict.fromkeys(
        ["sysrq", "core_pattern", "hostname sysctl", "userns sysctl", "ip_forward", "drop_caches",
         "setgroups", "proc irq", "pressure", "sys uevent", "unlink null", "init write", "init unlink",
         "root write", "usr write", "etc write", "dev write", "run write", "var write", "shadow"],
        NOWHERE,
    ),
    **dict.fromkeys(
        ["kcore", "kmsg of proc", "kallsyms", "keys", "timer_list", "slabinfo", "vmallocinfo", "pagemap of 1",
         "kpagecount"],
        EMPTY,
    ),
    **dict.fromkeys(
        ["cgroupfs", "kmsg of dev", "mem", "kvm", "fuse", "net tun", "disk", "vsock dev", "root of 1",
         "root of 1 below", "environ of 1", "mem of 1", "fd of 1", "cwd of 1", "map_files of 1",
         "above root", "docker socket"],
        ABSENT,
    ),
}  # fmt: skip


def output(found: Invocation) -> str:
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, (found.outcome, found.stderr)
    assert found.stdout is not None
    assert found.stdout.text is not None
    return found.stdout.text


AS_ROOT: dict[str, frozenset[str]] = REFUSED | {
    # It has PID 1's uid, so the kernel lets it send; PID 1 of a namespace takes no signal that it has
    # not asked for, as the outcome of this very call shows.
    **dict.fromkeys([name for name in REFUSED if name.endswith(" 1")], frozenset({"0", "EPERM", "ENOENT"})),
    **dict.fromkeys([name for name in REFUSED if name.startswith("kill 1")], frozenset({"0"})),
    # The root is an overlay that is thrown away.
    **dict.fromkeys(["root write", "usr write", "etc write", "run write", "var write", "dev write"],
                    frozenset({"0"})),
    **dict.fromkeys(["setuid 0", "setgid 0"], frozenset({"0"})),
    **dict.fromkeys(["unlink null", "init unlink"], frozenset({"EBUSY"})),
}  # fmt: skip
"""The same as the container's root, which ``build`` is: it owns the image's files, and has no capability."""


@pytest.mark.parametrize(("policy", "expected"), [("default", REFUSED), ("build", AS_ROOT)])
def test_nothing_beyond_the_container_can_be_reached(
    probe: Probe, policy: str, expected: dict[str, frozenset[str]]
) -> None:
    results, _ = probe("reach", policy=policy)
    assert results.pop("controlling terminal") == "0"  # one that the tool itself opened
    assert not {name: result for name, result in results.items() if result not in expected[name]}
    assert results.keys() == expected.keys()


def test_what_root_inside_changes_is_gone_with_its_container(daemon: Daemon) -> None:
    code = "rm -rf /usr/lib/git-core /etc/* 2>/dev/null; echo x > /usr/bin/env; chmod 000 /usr; true"
    assert output(daemon.run("sh", "-c", code, policy="build")) == ""
    look = "git --version | cut -d' ' -f1; id -un; env true && echo same"
    assert output(daemon.run("sh", "-c", look, policy="build")) == "git\nroot\nsame\n"


def test_root_inside_cannot_end_or_stop_pid_1(daemon: Daemon) -> None:
    code = "for n in $(seq 64); do kill -$n 1 2>/dev/null; done; kill -9 -1; exit 42"
    found = daemon.run("bash", "-c", code, policy="build")
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 42)


def test_the_daemons_descriptors_and_its_control_socket_are_not_there(daemon: Daemon) -> None:
    found = daemon.run("sh", "-c", "ls /proc/self/fd; ls /proc/$$/fd; cat /proc/net/unix", stdin=b"x")
    # ls has the directory that it reads open too; a shell may keep none but the standard three
    assert output(found).split() == ["0", "1", "2", "3", "0", "1", "2",
        "Num", "RefCount", "Protocol", "Flags", "Type", "St", "Inode", "Path"]  # fmt: skip


def test_the_daemons_socket_is_out_of_reach(daemon: Daemon, probe: Probe) -> None:
    places = [
        str(daemon.socket),
        "/run/sandboxd/sandboxd.sock",
        "/run/docker.sock",
        "/run/dbus/system_bus_socket",
    ]
    results, _ = probe("connects", *[f"unix:{place}" for place in places])
    assert results == {f"unix:{place}": "ENOENT" for place in places}


def test_init_run_by_the_tool_harms_nobody(daemon: Daemon) -> None:
    found = daemon.run("/dev/.sandboxd")
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 125)
    code = "use Socket; socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, 0);"
    code += "$^F = 9; exec '/bin/sh', '-c', '/dev/.sandboxd 3<&0; echo $?; echo still here'"
    found = daemon.run("perl", "-e", code)
    assert output(found) == "125\nstill here\n"


def test_no_process_but_the_tools_own_is_visible(daemon: Daemon) -> None:
    found = daemon.run("sh", "-c", 'for p in /proc/[0-9]*; do tr "\\0" " " < $p/cmdline; echo; done')
    commands = [line for line in output(found).splitlines() if line]
    assert all(line.startswith(("sh -c", "tr ")) for line in commands), commands


def test_a_setuid_input_is_refused_at_the_door(daemon: Daemon) -> None:
    bad = {"path": "x", "content": {"text": "#!/bin/sh\nid -u\n"}, "mode": 0o4755}
    with pytest.raises(errors.InvalidRequest, match="mode"):
        daemon.run("./x", inputs=[bad])


def test_a_setuid_file_gives_no_other_identity(daemon: Daemon) -> None:
    code = """
    cp /usr/bin/id own && chmod 6755 own && ./own -u && ./own -g
    for mount in /tmp /workspace; do cp /usr/bin/id $mount/s; chmod 4777 $mount/s; $mount/s -ru; done
    stat -c %a own
    """
    assert output(daemon.run("sh", "-c", code)).split() == ["1000", "1000", "1000", "1000", "6755"]


@pytest.mark.parametrize("policy", ["default", "build"])
def test_setuid_root_programs_of_the_image_give_nothing(
    daemon: Daemon, programs: Programs, policy: str
) -> None:
    found = daemon.run(
        "sh",
        "-c",
        "find / -xdev -perm -4000 -type f 2>/dev/null; grep -E 'CapPrm|NoNewPriv' /proc/self/status",
        policy=policy,
    )
    text = output(found)
    assert "/usr/bin/su" in text  # there are some
    assert "CapPrm:\t0000000000000000" in text
    assert "NoNewPrivs:\t1" in text
    found = daemon.run("su", "-c", "id -u > /workspace/who", "root", policy=policy, stdin=b"\n")
    assert found.outcome is not None
    assert found.outcome.exit_code not in {None, 0}


def test_an_artifact_that_was_setuid_comes_out_plain(daemon: Daemon, tmp_path: Path) -> None:
    found = daemon.run("sh", "-c", "cp /usr/bin/id s; chmod 6777 s", policy="files")
    daemon.client().save_artifacts(found.id, tmp_path)
    assert (tmp_path / "s").stat().st_mode & 0o7002 == 0


def test_killing_everybody_leaves_the_container_to_its_end(daemon: Daemon) -> None:
    code = "sleep 100 & kill -9 -1; wait; echo alone"
    assert output(daemon.run("bash", "-c", code)) == "alone\n"
    found = daemon.run("bash", "-c", "kill -9 $$")
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.signal) == (Cause.SIGNALLED, signal.SIGKILL)


def test_the_environment_is_the_policys_and_the_requests(daemon: Daemon) -> None:
    marker = f"sandboxd-test-{os.getpid()}"
    found = daemon.run("env", "-0", env={"MINE": marker, "ODD": "a\nb=c"})
    lines = dict(item.split("=", 1) for item in output(found).split("\0") if item)
    assert lines == {
        "PATH": lines["PATH"], "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8",
        "MINE": marker, "ODD": "a\nb=c",
    }  # fmt: skip


def test_names_and_times_of_the_host_do_not_show(daemon: Daemon) -> None:
    found = daemon.run(
        "sh", "-c", "hostname; cat /proc/sys/kernel/hostname; cat /proc/self/cgroup; cat /etc/hostname"
    )
    text = output(daemon.run("sh", "-c", "hostname; cat /proc/sys/kernel/hostname"))
    assert text == "sandbox\nsandbox\n"
    assert found.stdout is not None
    assert socket.gethostname() not in (found.stdout.text or "").split()
    assert "sandboxd-" not in (found.stdout.text or "")  # the cgroup namespace shows only its own root


def test_mountinfo_tells_nothing_of_other_calls(daemon: Daemon) -> None:
    text = output(daemon.run("cat", "/proc/self/mountinfo"))
    assert "/slots/" not in text
    assert str(daemon.state) not in text
    assert str(daemon.socket) not in text


def test_a_workspace_made_unreadable_or_unlinked_is_cleaned_up(daemon: Daemon) -> None:
    code = (
        "mkdir -p a/b; cd a/b; rm -rf /workspace/a; pwd; ls; cd /workspace && chmod 000 . ; ls . 2>&1; exit 5"
    )
    found = daemon.run("sh", "-c", code, policy="files")
    assert found.outcome is not None
    assert found.outcome.exit_code == 5
    assert found.artifacts == []
    found = daemon.run("sh", "-c", "echo x > f; mkdir d; echo y > d/g; chmod 000 d f .", policy="files")
    assert {artifact.path for artifact in found.artifacts} == {"f", "d/g"}
    found = daemon.run("sh", "-c", "rmdir /workspace; mv /workspace /tmp/w; ln -s / /workspace/x; ls -A")
    assert output(found) == "x\n"


def test_the_workspace_cannot_be_swapped_for_a_link(daemon: Daemon) -> None:
    code = "echo inside > f; cd /; mv /workspace /w; rmdir /workspace; ln -sfn /etc /workspace"
    found = daemon.run("sh", "-c", code, policy="files")
    paths = {artifact.path for artifact in found.artifacts}
    assert paths == {"f"}
    assert [(w.path, w.reason) for w in found.withheld] == [("etc", "symlink")]


def test_inputs_cannot_name_what_is_outside(daemon: Daemon) -> None:
    for path in ("../x", "/etc/x", "a/../../x", "a//b", ".", "x\0y"):
        with pytest.raises(errors.Refused):
            daemon.client().run(
                ["true"], inputs=[Input.model_construct(path=path, content=Bytes(text="x"), mode=0o644)]
            )
