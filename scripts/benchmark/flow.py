"""Throughput by callers, the tail at half of it, a stream of output, and the daemon's start."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import load
import sandboxes
from measure import summary

from sandboxd import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from measure import Contestant, Workload

__all__ = ["at_half", "output", "starts", "throughput"]


def throughput(
    contestants: Sequence[Contestant],
    workload: Workload,
    callers: Sequence[int],
    *,
    seconds: float,
    until: float,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Contestant to callers to rate and times; a sentence for each that failed."""
    found: dict[str, dict[str, Any]] = {one.name: {} for one in contestants}
    failed = []
    for number in callers:
        for one in contestants:
            if time.monotonic() > until:
                failed.append(f"{one.name} with {number} callers: the time was over.")
                continue
            try:
                found[one.name][str(number)] = load.closed(one, workload, number, seconds)
            except RuntimeError as error:
                failed.append(f"{one.name} with {number} callers: {error}")
                continue
            tell(f"{number} callers, {one.name}: {found[one.name][str(number)]}\n")
            time.sleep(1.0)  # what it does after its last answer
    return {"rates": found, "failed": failed, "seconds": seconds, "workload": workload.name}


def at_half(
    contestants: Sequence[Contestant], workload: Workload, seconds: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Open arrivals at half of what eight callers got just before."""
    found: dict[str, Any] = {}
    for one in contestants:
        try:
            most = load.closed(one, workload, 8, max(2.0, seconds / 4))["rate"]
            time.sleep(1.0)
            found[one.name] = {"capacity": most, **load.open_loop(one, workload, most / 2, seconds)}
        except RuntimeError as error:
            found[one.name] = {"failed": str(error)}
        tell(f"{one.name}: {found[one.name]}\n")
    return found


def output(images: Path, size: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """A tool's output, read through the raw stream while it is written."""
    with sandboxes.start(images, sandboxes.WARM) as daemon:
        client = Client(daemon.socket, timeout=120.0)
        client.run(["true"], policy="loud")
        daemon.forget_peak()
        before, began, received = daemon.peak(), time.perf_counter(), 0
        call = client.start(["head", "-c", str(size), "/dev/zero"], policy="loud")
        with client.stdout(call.id, follow=True) as stream:
            for data in stream:
                received += len(data)
        took = time.perf_counter() - began
        done = client.wait(call.id, timeout=60.0)
        found = {"bytes": received, "mb_per_s": round(received / took / 1e6, 1), "seconds": round(took, 2)}
        found |= {"rss_before_mib": round(before / 2**20, 1)}
        found |= {"rss_peak_mib": round(daemon.peak() / 2**20, 1)}
        if received != size or done.outcome is None or done.outcome.exit_code != 0:
            found["failed"] = f"{received} of {size} bytes, {done.outcome}"
    tell(f"{found}\n")
    return found


def starts(images: Path, rounds: int, until: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """From starting the process to its first answer, with an empty state directory and again."""
    first, again = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/var/tmp") as name:
            for taken in (first, again):
                with sandboxes.start(images, directory=Path(name)) as daemon:
                    taken.append(daemon.ready)
        if time.monotonic() > until:
            break
    found = {"first": summary(first), "again": summary(again)}
    tell(f"{found}\n")
    return found
