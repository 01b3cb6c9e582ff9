"""What a call costs as work grows: many sandboxes alive, many calls behind, many policies, a long journal."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sandboxes
from measure import summary

from sandboxd import Client
from sandboxd.journal import Journal
from sandboxd.journal.records import Accepted, outcome_header
from sandboxd.models import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sandboxd.models import Invocation

__all__ = ["alive", "in_a_row", "journal", "policies"]

ANSWER = ["sh", "-c", 'read word; echo "$word"']
AT_ONCE = 8  # requests to the daemon while sandboxes are started or answered
# /proc/meminfo, proc(5): what processes and the kernel hold, without what is only cached
HELD = ("AnonPages", "Shmem", "Slab", "KernelStack", "PageTables", "Percpu")


def calls(client: Client, count: int, policy: str, until: float) -> list[float]:
    """The seconds of calls of ``true``, one after the other."""
    taken: list[float] = []
    while len(taken) < count and (not taken or time.monotonic() < until):
        began = time.perf_counter()
        done = client.run(["true"], policy=policy)
        taken.append(time.perf_counter() - began)
        if done.outcome is None or done.outcome.exit_code != 0:
            raise RuntimeError(f"sandboxd: {done.outcome}")
    return taken


def held() -> dict[str, int]:
    """Bytes of the whole host by kind."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in HELD:
            found[name] = int(rest.split()[0]) * 1024
    return found


def _tool() -> float:
    """Bytes that the command holds as a bare process: private pages, proc_pid_smaps_rollup."""
    with subprocess.Popen(ANSWER, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        time.sleep(0.2)
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        process.communicate(b"\n")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def alive(images: Path, counts: Sequence[int], until: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """So many sandboxes at once, each waiting for a line: memory of each, a call among them, all answer."""
    config = f"budget: {{slots: {max(counts) + 50}, memory: 90%}}\n{sandboxes.WARM}"
    found: dict[str, Any] = {"tool_kib": round(_tool() / 1024), "levels": []}
    with sandboxes.start(images, config) as daemon, ThreadPoolExecutor(AT_ONCE) as several:
        client = Client(daemon.socket, timeout=120.0)
        calls(client, 20, "small", until)
        time.sleep(2.0)
        found["idle"] = summary(calls(client, 100, "small", until))
        time.sleep(1.0)
        before, daemon_before = held(), daemon.memory()
        started: list[Invocation] = []
        for count in counts:
            began = time.monotonic()
            if began > until:
                found["cut"] = f"the time was over before {count}"
                break
            missing = count - len(started)

            def begin(_: int) -> Invocation:
                return client.start(ANSWER, policy="small", stdin="stream")

            started += several.map(begin, range(missing))
            for call in started[
                -missing:
            ]:  # health() counts from the grant of a turn, not from the hand-over
                while (state := client.get(call.id).state) is not State.RUNNING:
                    if state is State.ENDED or time.monotonic() > until:
                        raise RuntimeError(f"{call.id} of {count} sandboxes is {state.value}")
                    time.sleep(0.02)
            took = time.monotonic() - began
            time.sleep(1.0)
            now = held()
            grown = {name: round((now[name] - before[name]) / count / 1024) for name in before}
            found["levels"].append(
                {
                    "alive": count,
                    "seconds_to_start": round(took, 2),
                    "mib_each": round((sum(grown.values()) - found["tool_kib"]) / 1024, 3),
                    "kib_by_kind": grown,
                    "daemon_mib": round((daemon.memory() - daemon_before) / 2**20, 1),
                    **summary(calls(client, 50, "small", until)),
                }
            )
            tell(f"{count} alive: {found['levels'][-1]}\n")

        def answers(call: Invocation) -> bool:
            client.write_stdin(call.id, f"{call.id}\n".encode())
            done = client.wait(call.id, timeout=60.0)
            return done.stdout is not None and (done.stdout.text or "").strip() == call.id

        found["answered"] = sum(several.map(answers, started))
        found["asked"] = len(started)
    return found


def in_a_row(images: Path, count: int, until: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Calls one after the other; after each tenth of them what the daemon holds."""
    step = max(1, count // 10)
    found: list[dict[str, Any]] = []
    with sandboxes.start(images, sandboxes.WARM) as daemon:
        client = Client(daemon.socket)
        for number in range(step, count + 1, step):
            taken = calls(client, step, "default", until)
            mib = round(daemon.memory() / 2**20, 2)
            open_files = daemon.descriptors()
            found.append({"calls": number, "rss_mib": mib, "descriptors": open_files, **summary(taken)})
            tell(f"{found[-1]}\n")
            if time.monotonic() > until:
                break
    return {"steps": found, "asked": count}


def policies(images: Path, count: int, until: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """So many policies: start, a call under one of them, and how long until an edit is in force."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        sandboxes.prepare(directory, images, sandboxes.WARM)

        def write(number: int, wall: int) -> None:
            text = f"version: 1\nname: p{number}\nextends: default\nlimits: {{wall: {wall}s}}\n"
            (directory / "policies" / f"p{number}.yaml").write_text(text)

        for number in range(count):
            write(number, 20)
        with sandboxes.start(images, sandboxes.WARM, directory=directory) as daemon:
            client = Client(daemon.socket)
            loaded = len(client.policies())
            taken = calls(client, 100, f"p{count // 2}", until)
            digest = client.policy("p0").digest
            write(0, 21)
            began = time.monotonic()
            while client.policy("p0").digest == digest and time.monotonic() < until:
                time.sleep(0.02)
            reload = time.monotonic() - began
            found = {"policies": loaded, "start_s": round(daemon.ready, 2), "reload_s": round(reload, 2)}
            found |= {"rss_mib": round(daemon.memory() / 2**20, 1), **summary(taken)}
    tell(f"{found}\n")
    return found


def journal(images: Path, count: int, until: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """A journal with so many ended calls: start, a call, and the list that ``ps -a`` shows."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        with sandboxes.start(images, directory=directory) as daemon:
            client = Client(daemon.socket)
            fresh = summary(calls(client, 100, "default", until))
            pattern = client.run(["true"])
        written = asyncio.run(_fill(directory / "state", pattern, count, until, tell))
        size = (directory / "state" / "journal.sqlite3").stat().st_size
        with sandboxes.start(images, directory=directory) as daemon:
            client = Client(daemon.socket)
            taken = calls(client, 100, "default", until)
            began = time.perf_counter()
            client.list(limit=50)
            listed = time.perf_counter() - began
            found = {"calls": written, "start_s": round(daemon.ready, 2), "ps_ms": round(listed * 1000, 1)}
            found |= {"gib": round(size / 2**30, 2), "rss_mib": round(daemon.memory() / 2**20, 1)}
            found |= {"fresh": fresh, **summary(taken)}
    tell(f"{found}\n")
    return found


async def _fill(
    state: Path, pattern: Invocation, count: int, until: float, tell: Callable[[str], None]
) -> int:
    """Copies of a call through the journal's own writer, many in each of its transactions."""
    written, batch = 0, 2000
    async with Journal.open(state) as store:

        async def one(number: int) -> None:
            times = pattern.times.model_copy(update={"accepted": pattern.times.accepted + number})
            call = pattern.model_copy(update={"id": store.new_id(), "times": times})
            begun = call.model_copy(update={"state": State.ACCEPTED, "outcome": None, "receipt": None})
            await store.accept(Accepted(begun, pattern.plan))
            await store.ended(call, outcome_header(call))

        while written < count and time.monotonic() < until:
            numbers = range(written, min(count, written + batch))
            await asyncio.gather(*map(one, numbers))
            written += len(numbers)
            tell(f"\rjournal: {written} of {count}")
    tell("\n")
    return written
