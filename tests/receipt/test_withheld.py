"""Each control taken away under the daemon's feet: the call is refused, names it, and the tool never runs.

The daemon's runtime is a script that edits the bundle, or the container that was made of it, and is
the real runtime otherwise. Limits are written by the daemon after the runtime has gone; those are
withheld in ``tests/engine/test_oci.py``.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import berths_of, needs_containers, start_daemon, until
from withheld_init import build_init

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon

TESTS = Path(__file__).parent.parent
DATA = "version: 1\nname: lent\nextends: tiny\nmounts:\n  - {source: %s, target: /data, mode: read-only}\n"


@pytest.fixture(scope="module", params=["crun", "runc"])
def robbed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    need: Callable[[object, str], None],
) -> Iterator[tuple[Daemon, Path]]:
    """A daemon whose runtime takes away what the file ``withhold`` names, and that file's directory."""
    needs_containers()
    real = shutil.which(request.param)
    need(real, request.param)
    directory = tmp_path_factory.mktemp(f"robbed-{request.param}")
    (directory / "withhold").write_text("nothing")
    runtime = directory / f"{request.param}-without"
    runtime.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nsys.path.insert(0, {str(TESTS)!r})\n"
        f"import withholding\nwithholding.main({real!r}, Path({str(directory)!r}))\n"
    )
    runtime.chmod(0o755)
    build_init(directory / "init-without")
    (directory / "lent").mkdir()
    for path in (directory, *directory.parents):  # a container's root is nobody here
        if path.stat().st_mode & 0o001 == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    with start_daemon(directory, config=f"runtime: {runtime}\n") as daemon:
        (daemon.policies / "lent.yaml").write_text(DATA % (directory / "lent"))
        yield daemon, directory


@contextmanager
def withheld(directory: Path, what: str) -> Iterator[None]:
    (directory / "withhold").write_text(what)
    try:
        yield
    finally:
        (directory / "withhold").write_text("nothing")


def children(daemon: Daemon) -> set[str]:
    """The daemon's children, those that wait for a container to make aside."""
    found: set[str] = set()
    for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
        found |= set((task / "children").read_text().split())
    return found - {str(pid) for pid in berths_of(daemon)}


# what is withheld, and the control that has to say so
CONTROLS = {
    "user_namespace": "user_namespace",
    "other_map": "user_namespace_uids",
    "net_namespace": "net_namespace",
    "ipc_namespace": "ipc_namespace",
    "uts_namespace": "uts_namespace",
    "cgroup_namespace": "cgroup_namespace",
    "other_root": "mount /",
    "tmp_size": "tmp",
    "tmp_inodes": "tmp",
    "tmp_absent": "tmp",
    "tmp_nosuid": "nosuid_nodev",
    "tmp_nodev": "nosuid_nodev",
    "shm_size": "shm",
    "shm_inodes": "shm",
    "workspace_other": "mount /workspace",
    "workspace_same_looks": "mount /workspace",
    "host_root": "mounts",
    "host_over_tmp": "mounts",
    "host_device": "devices",
    "proc_shows_all": "proc",
    "masked_paths": "masked_paths",
    "read_only_paths": "masked_paths",
    "false_mask": "masked_paths",
    "init_seccomp": "seccomp",
    "init_no_new_privs": "no_new_privs",
    "init_capabilities": "capabilities",
    "init_rlimits": "rlimit_open_files",
    "init_user": "user",
    "init_group": "group",
    "init_groups": "supplementary_groups",
    "init_umask": "umask",
    "init_oom_score_adj": "oom_score_adj",
    "every_cgroup": "cgroup",
    "one_cgroup": "cgroup",
    "interface": "network",
    "extra_process": "cgroup",
}

REFUSED = {"false_mask": "runc"}  # what a runtime itself will not do


@pytest.mark.parametrize("what", CONTROLS)
def test_a_call_without_a_control_does_not_start(robbed: tuple[Daemon, Path], what: str) -> None:
    daemon, directory = robbed
    with withheld(directory, what):
        found = daemon.run("echo", "ran", policy="tiny")
    assert found.outcome is not None
    assert found.outcome.error is not None, found.outcome
    assert found.times.started is None
    assert found.stdout is not None
    assert found.stdout.size == 0
    until(lambda: not children(daemon), "the container is cleared away")
    if what in REFUSED and REFUSED[what] in directory.name:
        assert found.outcome.error.code == "engine", found.outcome
        return
    assert found.outcome.error.code == "control_not_enforced", found.outcome
    details = found.outcome.error.details
    names = details.get("controls", [details["control"]])
    assert CONTROLS[what] in names, details
    if what.startswith("init_"):
        assert "init" in names


@pytest.mark.parametrize("what", ["mnt_namespace", "pid_namespace", "host_proc", "init_other"])
def test_what_cannot_even_be_made_is_a_failure_of_the_engine(robbed: tuple[Daemon, Path], what: str) -> None:
    """These leave no container, or none that speaks: there is nothing to read a receipt from."""
    daemon, directory = robbed
    with withheld(directory, what):
        found = daemon.run("echo", "ran", policy="tiny", deadline=60_000_000)
    assert found.outcome is not None
    assert found.outcome.error is not None, found.outcome
    assert found.outcome.error.code in {"engine", "control_not_enforced"}
    assert found.times.started is None
    assert found.stdout is not None
    assert found.stdout.size == 0
    until(lambda: not children(daemon), "the container is cleared away")


@pytest.mark.parametrize("kind", ["network", "ipc"])
def test_a_namespace_of_somebody_else_is_told_from_a_fresh_one(
    robbed: tuple[Daemon, Path], kind: str
) -> None:
    daemon, directory = robbed
    name = {"network": "net", "ipc": "ipc"}[kind]
    holder = subprocess.Popen(["unshare", f"--{name}", "sleep", "60"])
    try:
        ours = Path(f"/proc/self/ns/{name}").readlink()
        while Path(f"/proc/{holder.pid}/ns/{name}").readlink() == ours:
            assert holder.poll() is None
        (directory / kind).write_text(f"/proc/{holder.pid}/ns/{name}")
        with withheld(directory, f"shared_{name}"):
            found = daemon.run("echo", "ran", policy="tiny")
    finally:
        holder.kill()
        holder.wait()
    assert found.outcome is not None
    assert found.outcome.cause == "failed"
    assert found.stdout is not None
    assert found.stdout.size == 0
    if found.outcome.error is not None and found.outcome.error.code == "control_not_enforced":
        assert f"{name}_namespace" in found.outcome.error.details["controls"]
    else:  # the runtime could not enter it from its user namespace
        assert found.outcome.error is not None
        assert found.outcome.error.code == "engine"


def test_a_lent_directory_is_the_one_that_the_policy_names(robbed: tuple[Daemon, Path]) -> None:
    daemon, directory = robbed
    (directory / "lent/name").write_text("lent")
    whole = daemon.run("cat", "/data/name", policy="lent")
    assert whole.stdout is not None
    assert whole.stdout.text == "lent", whole.outcome
    with withheld(directory, "lent_other"):
        found = daemon.run("echo", "ran", policy="lent")
    assert found.outcome is not None
    assert found.outcome.error is not None, found.outcome
    assert found.outcome.error.details["controls"] == ["mount /data"]
    assert found.stdout is not None
    assert found.stdout.size == 0


@pytest.mark.parametrize("what", ["nothing", "config_capabilities", "config_no_new_privs", "writable_root"])
def test_what_init_and_the_engine_do_themselves_needs_no_runtime(
    robbed: tuple[Daemon, Path], what: str
) -> None:
    """Capabilities and no_new_privs are PID 1's, the read-only root is the engine's mount."""
    daemon, directory = robbed
    with withheld(directory, what):
        found = daemon.run("grep", "-E", "NoNewPrivs|CapBnd|CapEff", "/proc/self/status", policy="tiny")
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, found.outcome
    assert found.receipt is not None
    assert all(control.enforced for control in found.receipt.controls)
    assert found.stdout is not None
    assert found.stdout.text is not None
    values = dict(line.split(":\t") for line in found.stdout.text.splitlines())
    assert values == {"NoNewPrivs": "1", "CapBnd": "0" * 16, "CapEff": "0" * 16}


def test_the_daemon_is_whole_after_all_that(robbed: tuple[Daemon, Path]) -> None:
    daemon, _ = robbed
    found = daemon.run("echo", "whole", policy="tiny")
    assert found.stdout is not None
    assert found.stdout.text == "whole\n"
    until(lambda: not children(daemon), "every container is cleared away")
    assert daemon.stop(signal.SIGTERM) == 0
