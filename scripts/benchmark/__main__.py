"""The composition of ``scripts/bench``: contestants, workloads, a run, a report.

A contestant or a workload more is a line in ``contestants`` or ``WORKLOADS``.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import docker_engine
import measure
import processes
import report
import runtimes
import sandboxes

from sandboxd.images import ImageStore
from sandboxd.kernel import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKLOADS = (
    measure.Workload("true", ("true",), "base"),
    measure.Workload("sh -c 'echo hi'", ("sh", "-c", "echo hi"), "base"),
    measure.Workload("python3 -c 'print(1)'", ("python3", "-c", "print(1)"), "python"),
)
START = (measure.Workload("start", (), ""),)


def contestants(
    stage: runtimes.Stage, daemon: sandboxes.Daemon, stack: ExitStack
) -> Iterator[measure.Contestant | str]:
    """Everybody who takes part, or a sentence about who cannot."""
    yield processes.ForkExec()
    yield runtimes.find_bubblewrap(stage)
    yield runtimes.find_runtime(stage, "crun")
    yield runtimes.find_runtime(stage, "runc")
    yield docker_engine.start(stage, stack)
    yield sandboxes.InProcess(daemon)
    yield sandboxes.Command(daemon)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("scripts/bench", description="What a call costs, beside its peers.")
    parser.add_argument("--rounds", type=int, default=200, help="measured rounds (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="rounds before those (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 rounds, for a first look")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the figures between the marks of a page"
    )
    parser.add_argument("--images", type=Path, required=True, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.quick:
        found.rounds = 20
    return found


def main() -> None:
    """Measure and report."""
    asked = arguments()
    # Before any thread: everything is mounted where only this process and its children see it.
    mounts.private_namespace()
    mounts.hide_hybrid_cgroup2()
    images = ImageStore(asked.images)
    with ExitStack() as stack:
        stage = stack.enter_context(runtimes.Stage(images, {one.image for one in WORKLOADS}))
        daemon = stack.enter_context(sandboxes.start(asked.images))
        found = list(contestants(stage, daemon, stack))
        ready = [one for one in found if not isinstance(one, str)]
        absent = [one for one in found if isinstance(one, str)]
        load = os.getloadavg()[0]
        runtime = daemon.runtime()
        samples = measure.run(ready, WORKLOADS, rounds=asked.rounds, warm_up=asked.warm_up, tell=_tell)
        starts: list[measure.Contestant] = [
            processes.Python(),
            processes.BarePython(),
            sandboxes.CommandStart(),
        ]
        started = measure.run(starts, START, rounds=asked.rounds, warm_up=asked.warm_up, tell=_tell)
        made = report.Report(
            samples=samples,
            starts=started,
            rounds=asked.rounds,
            absent=absent,
            notes={one.name: one.note for one in [*ready, *starts]},
            cpu=daemon.cpu_per_call(),
            runtime=runtime,
            load=(load, os.getloadavg()[0]),
        )
    print(made.text())
    if asked.write is not None:
        report.write_into(asked.write, made.markdown())


def _tell(line: str) -> None:
    print(line, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
