"""Many callers at once: closed (each asks again when it has its answer) and open (they come when they come).

Callers are threads of as many processes as there are CPUs, so that one interpreter is not what is measured.
The processes are forked: contestants come along as they are.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

from measure import summary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from measure import Contestant, Workload

__all__ = ["closed", "open_loop"]

THREADS = 48  # of each process, when arrivals do not wait for answers
PATIENCE = 120.0

Sample = tuple[float, float]
"""When it ended (monotonic), and what it took."""


def closed(one: Contestant, workload: Workload, callers: int, seconds: float) -> dict[str, float]:
    """So many callers, each with one call at a time: calls a second, and their times. Raises RuntimeError."""
    begin = time.monotonic() + 0.2
    ramp, end = begin + 0.25 * seconds, begin + 1.25 * seconds

    def caller(found: list[Sample]) -> None:
        time.sleep(max(0.0, begin - time.monotonic()))
        while (began := time.monotonic()) < end:
            one.run(workload)
            ended = time.monotonic()
            found.append((ended, ended - began))

    processes = min(callers, os.cpu_count() or 1)
    shares = [len(range(at, callers, processes)) for at in range(processes)]
    samples = _everywhere([[caller] * share for share in shares])
    counted = [took for ended, took in samples if ramp <= ended < end]
    if not counted:
        raise RuntimeError(f"no call of {one.name} ended within {seconds:g} s")
    return {"rate": round(len(counted) / seconds, 2), **summary(counted)}


def open_loop(one: Contestant, workload: Workload, rate: float, seconds: float) -> dict[str, float]:
    """Arrivals at random at a mean rate; a call's time counts from when it should have begun."""
    dice = random.Random(1)  # noqa: S311 - the same arrivals each time
    begin, at, arrivals = time.monotonic() + 0.5, 0.0, []
    while (at := at + dice.expovariate(rate)) < seconds:
        arrivals.append(begin + at)
    processes = os.cpu_count() or 1

    def caller_of(share: list[float]) -> Callable[[list[Sample]], None]:
        left, lock = iter(share), threading.Lock()

        def caller(found: list[Sample]) -> None:
            while True:
                with lock:
                    due = next(left, None)
                if due is None:
                    return
                time.sleep(max(0.0, due - time.monotonic()))
                one.run(workload)
                ended = time.monotonic()
                found.append((ended, ended - due))

        return caller

    samples = _everywhere([[caller_of(arrivals[n::processes])] * THREADS for n in range(processes)])
    return {"rate": round(rate, 2), **summary([took for _, took in samples])}


def _everywhere(callers: Sequence[Sequence[Callable[[list[Sample]], None]]]) -> list[Sample]:
    context = multiprocessing.get_context("fork")
    children = []
    for threads in callers:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_process, args=(threads, theirs), daemon=True)
        child.start()
        theirs.close()
        children.append((child, ours))
    samples: list[Sample] = []
    failures: list[str] = []
    for child, pipe in children:
        try:
            found, failed = pipe.recv() if pipe.poll(PATIENCE) else ([], ["no answer in time"])
        except EOFError:
            found, failed = [], ["a process of callers ended early"]
        samples += found
        failures += failed
        child.join(5.0)
        if child.is_alive():
            child.kill()
    if failures:
        raise RuntimeError(f"{len(failures)} callers failed; one of them: {failures[0]}")
    return samples


def _process(threads: Sequence[Callable[[list[Sample]], None]], pipe: Any) -> None:
    found: list[Sample] = []
    failed: list[str] = []

    def guarded(caller: Callable[[list[Sample]], None]) -> None:
        try:
            caller(found)
        except Exception as error:  # noqa: BLE001 - it is raised in the process that measures
            failed.append(str(error))

    running = [threading.Thread(target=guarded, args=(caller,)) for caller in threads]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    pipe.send((found, failed))
    pipe.close()
