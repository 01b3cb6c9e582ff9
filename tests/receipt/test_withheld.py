"""Each control taken away under the daemon's feet: the call is refused, names it, and the tool never runs.

Either the runtime does it, while it makes the container: a script that edits the bundle of an OCI runtime
(``withholding.py``) or the plan of the built-in one (``withheld_container.py``). Or it is done to the
container that is up, before it is used (``meddling.py``).
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import until
from meddling import LIVE, ZERO, may_raise_rlimits
from pages import code, page
from robbed_daemon import PREFIX

if TYPE_CHECKING:
    from robbed_daemon import Robbed

    from sandboxd.models import Invocation


def refused_for(call: Invocation) -> list[str]:
    """The controls that a call was refused for; its tool has not run."""
    assert call.outcome is not None
    assert call.outcome.cause == "failed", call.outcome
    assert call.outcome.error is not None
    assert call.times.started is None
    assert call.stdout is not None
    assert call.stdout.size == 0
    if call.outcome.error.code != "control_not_enforced":
        assert call.outcome.error.code == "engine", call.outcome
        return []
    details = call.outcome.error.details
    names: list[str] = details.get("controls", [details["control"]])
    return names


# what is withheld, and the control that has to say so
CONTROLS: dict[str, set[str]] = {
    "user_namespace": {"user_namespace"},
    # of a namespace of the right kind, but another's, the receipt says so too
    "other_map": {
        "user_namespace",
        "user_namespace_uids",
        "user_namespace_gids",
        "mnt_namespace",
        "pid_namespace",
    },
    "other_gid_map": {"user_namespace_gids"},
    "net_namespace": {"net_namespace"},
    "ipc_namespace": {"ipc_namespace"},
    "uts_namespace": {"uts_namespace"},
    "cgroup_namespace": {"cgroup_namespace"},
    "other_root": {"mount TARGET"},
    "other_writable_root": {"root", "mount TARGET"},
    "tmp_size": {"tmp"},
    "tmp_inodes": {"tmp"},
    "tmp_absent": {"tmp"},
    "tmp_nosuid": {"nosuid_nodev"},
    "tmp_nodev": {"nosuid_nodev"},
    "shm_size": {"shm"},
    "shm_inodes": {"shm"},
    "workspace_other": {"workspace", "mount TARGET"},
    "workspace_same_looks": {"mount TARGET"},
    "lent_other": {"mount TARGET"},
    "lent_writable": {"mount TARGET", "mounts_read_only"},
    "host_root": {"mounts"},
    "host_over_tmp": {"mounts"},
    "host_device": {"devices"},
    "masked_paths": {"masked_paths"},
    "read_only_paths": {"masked_paths"},
    "false_mask": {"masked_paths"},
    "init_seccomp": {"init", "seccomp"},
    "init_no_new_privs": {"init", "no_new_privs"},
    "init_capabilities": {"init", "capabilities"},
    "init_rlimits": {"init", "rlimit_open_files"},
    "init_user": {"init", "user"},
    "init_group": {"init", "group"},
    "init_groups": {"init", "supplementary_groups"},
    "init_umask": {"init", "umask"},
    "init_oom_score_adj": {"init", "oom_score_adj"},
    "init_parent": {"init", "parent"},
    "every_cgroup": {"cgroup"},
    "one_cgroup": {"cgroup"},
    "interface": {"network"},
    "extra_process": {"cgroup"},
}
# by the place that the mount is for
TARGETS = {"other_root": "/", "workspace_other": "/workspace", "workspace_same_looks": "/workspace"}
TARGETS |= {"other_writable_root": "/", "lent_other": "/data", "lent_writable": "/data"}
POLICY = {"lent_other": "lent", "lent_writable": "lent"}

REFUSED = {("false_mask", "runc")}  # what a runtime itself will not do
ABSENT = {
    "sockets": "cgroup v2 counts the buffers of sockets as memory",
    "swap": "a kernel without swap accounting has no limit of it",
}
WITH_A_CALL = {"secret_files", "secret NAME"}  # of what comes with it: tests/supervisor/test_secrets.py
A_FACT = {"secrets_swap"}  # the kernel can promise it or not
NOT_A_LINE = {"process"}  # a tool process that is gone: there is no receipt
# what they compare is of our own programs, and nobody changes it: test_exposed.py, tests/init/test_kept.py
ELSEWHERE = {"expose", "isolation"}


@pytest.mark.parametrize("what", CONTROLS)
def test_a_call_without_a_control_does_not_start(robbed: Robbed, what: str) -> None:
    found = refused_for(robbed.run(what, policy=POLICY.get(what, "tiny")))
    until(lambda: not robbed.children(), "the container is cleared away")
    if (what, robbed.runtime) in REFUSED:
        assert found == []
        return
    assert {name.replace("TARGET", TARGETS.get(what, "")) for name in CONTROLS[what]} <= set(found), found


@pytest.fixture(scope="module")
def there(robbed: Robbed) -> dict[str, str]:
    """The lines of the receipt of a container that nothing was taken from, and where each was read."""
    whole = robbed.daemon.run("true", policy="whole")
    assert whole.receipt is not None, whole.outcome
    return {control.name: control.read_from for control in whole.receipt.controls}


@pytest.mark.parametrize("what", LIVE)
def test_a_control_that_is_taken_from_a_container_is_missed(
    robbed: Robbed, there: dict[str, str], what: str
) -> None:
    control = LIVE[what][1]
    if control in ABSENT and (control not in there or there[control] == "/proc/swaps"):
        return
    if control in ZERO and not may_raise_rlimits():
        return  # nobody on this host can; that a receipt compares them is seen in test_waiting.py
    call = robbed.run(PREFIX + what, policy="whole")
    found = refused_for(call)
    assert control in found, (found, call.outcome)


def test_every_control_that_a_receipt_can_have_is_taken_away() -> None:
    documented = {name for row in page("docs/calls.md").rows("control") for name in code(row[0])}
    taken = set().union(*CONTROLS.values(), {control for _, control in LIVE.values()})
    assert taken - NOT_A_LINE | WITH_A_CALL | A_FACT == documented - ELSEWHERE


@pytest.mark.parametrize("what", ["mnt_namespace", "pid_namespace", "host_proc", "init_other"])
def test_what_cannot_even_be_made_is_a_failure_of_the_engine(robbed: Robbed, what: str) -> None:
    """These leave no container, or none that speaks: there is nothing to read a receipt from."""
    refused_for(robbed.run(what, policy="tiny"))
    if robbed.runtime == "builtin":  # its process, which ended by itself, is reaped with the next call's
        assert robbed.daemon.run("true", policy="tiny").outcome is not None
    until(lambda: not robbed.children(), "the container is cleared away")


@pytest.mark.parametrize("robbed", ["crun", "runc"], indirect=True)
@pytest.mark.parametrize("what", ["proc_shows_all"])
def test_what_only_an_oci_runtime_can_leave_out(robbed: Robbed, what: str) -> None:
    """To the ``/proc`` of the built-in runtime it is done when that is up: its program takes no options."""
    assert "proc" in refused_for(robbed.run(what, policy="tiny"))


@pytest.mark.parametrize("robbed", ["crun", "runc"], indirect=True)
@pytest.mark.parametrize("kind", ["network", "ipc"])
def test_a_namespace_of_somebody_else_is_told_from_a_fresh_one(robbed: Robbed, kind: str) -> None:
    name = {"network": "net", "ipc": "ipc"}[kind]
    holder = subprocess.Popen(["unshare", f"--{name}", "sleep", "60"])
    try:
        ours = Path(f"/proc/self/ns/{name}").readlink()
        while Path(f"/proc/{holder.pid}/ns/{name}").readlink() == ours:
            assert holder.poll() is None
        (robbed.directory / kind).write_text(f"/proc/{holder.pid}/ns/{name}")
        found = refused_for(robbed.run(f"shared_{name}", policy="tiny"))
    finally:
        holder.kill()
        holder.wait()
    # nothing: the runtime could not enter it from its user namespace
    assert not found or f"{name}_namespace" in found


def test_a_lent_directory_is_the_one_that_the_policy_names(robbed: Robbed) -> None:
    (robbed.directory / "lent/name").write_text("lent")
    whole = robbed.daemon.run("cat", "/data/name", policy="lent")
    assert whole.stdout is not None
    assert whole.stdout.text == "lent", whole.outcome
    assert refused_for(robbed.run("lent_other", policy="lent")) == ["mount /data"]


@pytest.mark.parametrize("what", ["nothing", "config_capabilities", "config_no_new_privs", "writable_root"])
def test_what_init_and_the_engine_do_themselves_needs_no_runtime(robbed: Robbed, what: str) -> None:
    """Capabilities and no_new_privs are PID 1's, the read-only root is the engine's mount."""
    found = robbed.run(what, "grep", "-E", "NoNewPrivs|CapBnd|CapEff", "/proc/self/status", policy="tiny")
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, found.outcome
    assert found.receipt is not None
    assert all(control.enforced for control in found.receipt.controls)
    assert found.stdout is not None
    assert found.stdout.text is not None
    values = dict(line.split(":\t") for line in found.stdout.text.splitlines())
    assert values == {"NoNewPrivs": "1", "CapBnd": "0" * 16, "CapEff": "0" * 16}


def test_the_daemon_is_whole_after_all_that(robbed: Robbed) -> None:
    found = robbed.daemon.run("echo", "whole", policy="tiny")
    assert found.stdout is not None
    assert found.stdout.text == "whole\n"
    until(lambda: not robbed.children(), "every container is cleared away")
    assert robbed.daemon.stop(signal.SIGTERM) == 0
