"""One attempt from a parked slot to a result, where its parts fail or meet: through a real daemon."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from daemons import PATIENCE, berths_of, until

from sandboxd.engine.host import instance_name

if TYPE_CHECKING:
    from daemons import Daemon


def contained(daemon: Daemon) -> dict[int, int]:
    """The processes in containers of a daemon: by the host's numbers, the containers' own."""
    tree = f"/sandboxd-{instance_name(daemon.state)}/"
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and tree in (entry / "cgroup").read_text():
                status = (entry / "status").read_text()
                numbers = status.partition("NSpid:")[2].splitlines()[0].split()
                if len(numbers) > 1:  # else it only makes a container
                    found[int(entry.name)] = int(numbers[-1])
        except OSError:  # it ended meanwhile
            continue
    waiting = berths_of(daemon)
    return {pid: inside for pid, inside in found.items() if pid not in waiting}


def inits(daemon: Daemon) -> list[int]:
    """The PID 1 of each container of a daemon, as the host numbers them."""
    return sorted(pid for pid, inside in contained(daemon).items() if inside == 1)


def test_a_lost_pid_1_is_a_failure_of_ours(daemon: Daemon) -> None:
    client = daemon.client()
    assert inits(daemon) == []
    call = client.start(["sh", "-c", "echo before; exec sleep 1000"])
    until(lambda: client.get(call.id).state == "running", "the command runs")
    until(lambda: (out := client.get(call.id).stdout) and out.size, "it has said something")
    [pid] = inits(daemon)
    os.kill(pid, signal.SIGKILL)
    found = client.wait(call.id, timeout=20 * PATIENCE)
    assert found.outcome is not None
    assert found.outcome.cause == "failed"
    assert found.outcome.error is not None
    assert found.outcome.error.code == "engine"
    assert found.stdout is not None
    assert found.stdout.text == "before\n"  # what it said before is kept
    assert inits(daemon) == []


def test_a_deadline_that_passed_while_the_container_was_made_starts_nothing(daemon: Daemon) -> None:
    found = daemon.run("echo", "ran", deadline=1_000)
    assert found.outcome is not None
    assert found.outcome.cause == "wall_time"
    assert "deadline of 1ms" in found.outcome.message
    assert found.stdout is None or found.stdout.size == 0


def test_io_limits_do_not_forbid_to_narrow_others(daemon: Daemon) -> None:
    (daemon.policies / "slow.yaml").write_text(
        "version: 1\nname: slow\nextends: default\nlimits:\n  io: {read: 50MiB, write: 50MiB}\n"
    )
    client = daemon.client()
    until(lambda: "slow" in [policy.name for policy in client.policies()], "the policy is loaded")
    found = client.run(["true"], policy="slow", limits={"memory": "64MiB"})
    assert found.outcome is not None
    assert found.outcome.exit_code == 0, found.outcome
    assert found.receipt is not None
    [io] = [control for control in found.receipt.controls if control.name == "io"]
    assert io.enforced
    (daemon.policies / "slow.yaml").unlink()


def test_signals_amid_a_large_hand_over_do_not_mix_with_it(daemon: Daemon) -> None:
    """The command's frame is larger than the socket takes at once; a signal must wait for its end."""
    client = daemon.client()
    large = ["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.01; done", *["x" * 100_000] * 10]
    call = client.start(large)

    def signalled() -> bool:
        if client.get(call.id).state == "running":
            client.signal(call.id, 10)  # SIGUSR1 ends the shell, or is early: either way an ending of its own
            return True
        return client.get(call.id).state == "ended"

    until(signalled, "the command runs")
    found = client.wait(call.id, timeout=20 * PATIENCE)
    assert found.outcome is not None
    assert found.outcome.cause == "signalled", found.outcome


def test_what_forked_and_daemonised_dies_with_the_call(daemon: Daemon) -> None:
    found = daemon.run("sh", "-c", "setsid sh -c 'trap \"\" TERM HUP; sleep 1000' >/dev/null 2>&1 & exit 0")
    assert found.outcome is not None
    assert found.outcome.exit_code == 0
    assert set(contained(daemon).values()) <= {1}
    until(lambda: not contained(daemon), "PID 1 ends with its container")
