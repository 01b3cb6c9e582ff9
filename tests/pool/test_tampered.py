"""What happens to a slot is noticed at hand-over or at its end; a call never runs in what was changed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE, POLICIES, slots_of, until, waited
from waiting import filled, processes

from sandboxd.models import Cause

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import Invocation

POOL = "pool: {min: 2, max: 4}\n"


@pytest.fixture
def pooled(daemon_factory: Callable[..., Daemon]) -> Daemon:
    return daemon_factory(config=POOL)


def in_force(call: Invocation, name: str) -> str:
    assert call.receipt is not None, call.outcome
    return {one.name: one.in_force for one in call.receipt.controls}[name]


def test_a_slot_that_a_process_was_moved_into_is_not_used(pooled: Daemon) -> None:
    pooled.run("true", policy="tiny")
    slots = filled(pooled)
    own = {str(pid) for pids in slots.values() for pid in pids}
    strangers = [subprocess.Popen(["sleep", "100"]) for _ in slots]
    try:
        for slot, stranger in zip(slots, strangers, strict=True):
            for path, _, _ in os.walk("/sys/fs/cgroup"):
                if path.endswith(f"/{slot}"):
                    (Path(path) / "cgroup.procs").write_text(str(stranger.pid))
        found = pooled.run("echo", "ran", policy="tiny")
        assert found.outcome is not None
        if found.outcome.cause is Cause.FAILED:
            assert found.outcome.error is not None
            assert found.outcome.error.code == "control_not_enforced"
        else:
            assert found.outcome.exit_code == 0
            assert not own & set(in_force(found, "processes").replace(",", " ").split())
    finally:
        for stranger in strangers:
            stranger.kill()
            stranger.wait()
    until(
        lambda: not slots.keys() & {slot.id for slot in pooled.client().slots() if slot.state == "running"},
        "gone",
    )


@pytest.mark.parametrize("victim", ["init", "tool"])
def test_a_slot_that_is_killed_while_it_runs_ends_its_call(pooled: Daemon, victim: str) -> None:
    client = pooled.client()
    pooled.run("true", policy="tiny")
    slots = filled(pooled)
    call = client.start(["sleep", "30"], policy="tiny", limits={"wall": "9s"})
    until(lambda: client.get(call.id).state == "running", "it runs")
    [slot] = [slot.id for slot in client.slots() if slot.state == "running" and slot.id in slots]
    pids = processes(pooled)[slot or ""]
    os.kill(min(pids) if victim == "init" else max(pids), signal.SIGKILL)
    found = client.wait(call.id, timeout=30 * PATIENCE)
    assert found.outcome is not None
    assert found.outcome.cause is (Cause.FAILED if victim == "init" else Cause.SIGNALLED), found.outcome
    until(lambda: slot not in {one.id for one in client.slots()}, "the slot is destroyed")
    assert pooled.run("true", policy="tiny").outcome is not None


def test_no_call_runs_under_an_older_policy_than_the_one_it_was_planned_with(pooled: Daemon) -> None:
    def edit(pids: int) -> None:
        target = pooled.policies / "tiny.yaml"
        target.with_suffix(".new").write_text(POLICIES["tiny"].replace("pids: 32", f"pids: {pids}"))
        target.with_suffix(".new").rename(target)

    def call(_: int) -> tuple[int, int]:
        asked = pooled.client().plan(["true"], policy="tiny").plan["limits"]["pids"]
        return asked, int(in_force(pooled.run("true", policy="tiny"), "pids"))

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(call, number) for number in range(80)]
        for pids in range(33, 41):
            edit(pids)
            next(done for done in running if not done.done()).result()
        found = [one.result() for one in running]
    # the numbers only rise: what runs is what was planned, or what came after
    assert all(asked <= got for asked, got in found)
    until(lambda: int(in_force(pooled.run("true", policy="tiny"), "pids")) == 40, "the last edit is in force")


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_slots_of_other_runtimes_wait_too(
    daemon_factory: Callable[..., Daemon], need: Callable[[object, str], None], runtime: str
) -> None:
    need(shutil.which(runtime), runtime)
    daemon = daemon_factory(config=f"{POOL}runtime: {runtime}\n")
    cold = daemon.run("id", policy="tiny")
    slots = filled(daemon)
    ready = daemon.run("id", policy="tiny")
    assert ready.receipt is not None
    assert cold.receipt is not None
    assert waited(ready)
    assert [one.name for one in ready.receipt.controls] == [one.name for one in cold.receipt.controls]
    assert ready.stdout == cold.stdout
    until(lambda: slots.keys() - {slot.id for slot in daemon.client().slots()}, "it was used once")
    assert daemon.stop() == 0
    assert not slots_of(daemon)


def test_slots_with_an_interpreter_are_used_once(pooled: Daemon) -> None:
    (pooled.policies / "ready.yaml").write_text(
        "version: 1\nname: ready\nextends: python\nwarm: {command: python3, preload: [json]}\n"
    )
    until(lambda: "ready" in {one.name for one in pooled.client().policies()}, "the policy is there")
    code = "import json, os; json.kept = getattr(json, 'kept', 0) + 1; print(json.kept, os.listdir('/tmp'))"
    code += "; open('/tmp/left', 'w').close()"
    pooled.run("python3", "-c", code, policy="ready")
    for _ in range(4):
        filled(pooled, "ready", 1)
        found = pooled.run("python3", "-c", code, policy="ready")
        assert waited(found)
        assert found.stdout is not None
        assert found.stdout.text == "1 []\n"


APART = """
keyctl show 2>/dev/null
ls -id /tmp /workspace /dev/shm
touch /tmp/a /workspace/a /dev/shm/a
ls -i /tmp/a /workspace/a /dev/shm/a
cat /proc/sysvipc/shm /proc/sysvipc/sem /proc/sysvipc/msg | wc -l
wc -l < /proc/net/unix
echo $$
"""


MANY = "for d in /tmp /workspace /dev/shm; do i=0; while [ $i -lt %d ]; do : > $d/$i; i=$((i+1)); done; done"


def test_numbers_that_a_call_sees_do_not_depend_on_the_one_before(pooled: Daemon) -> None:
    """Inode numbers among them: by what they count, one call could tell the next."""
    first = pooled.run("sh", "-c", APART, policy="tiny")
    assert first.outcome is not None
    assert first.outcome.exit_code == 0, first.stderr
    for files in (0, 1, 700, 1300):
        busy = pooled.run("sh", "-c", MANY % files, policy="tiny")
        assert busy.outcome is not None
        assert busy.outcome.exit_code == 0, busy.outcome
        filled(pooled, number=1)
        again = pooled.run("sh", "-c", APART, policy="tiny")
        assert waited(again)
        assert again.stdout == first.stdout
