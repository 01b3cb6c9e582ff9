"""The composition of ``scripts/bench``: contestants, workloads, modes, a report.

A contestant or a workload more is a line in ``contestants`` or ``WORKLOADS``; a mode more is a method of
``Bench`` and a line in ``MODES``. What each mode found goes into ``figures.json`` beside the plots, so that a
mode can be measured again without the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker_engine
import durable
import flow
import growth
import measure
import network
import page
import peers
import processes
import records
import runtimes
import sandboxes
import sessions
import waiting
from installation import Installation

from sandboxd import errors
from sandboxd.images import ImageStore
from sandboxd.kernel import mounts

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 10**6
NUMPY = "import numpy as np; print(np.arange(1000).reshape(10, 100).sum(axis=1).mean())"
TRUE = measure.Workload("true", ("true",), "base")
WORKLOADS = (
    TRUE,
    measure.Workload("sh pipeline", ("sh", "-c", "seq 1000 | grep 7 | sort -r | wc -l"), "base"),
    measure.Workload("python3 -c 'print(1)'", ("python3", "-c", "print(1)"), "python"),
    measure.Workload("python3 with numpy", ("python3", "-c", NUMPY), "python", every=4),
    measure.Workload("cat, 100 MB in and out", ("cat",), "base", stdin=100 * MIB, every=20),
)
RUNTIMES = ("builtin", "crun", "runc")
SETTLED = 0.2  # seconds: a Docker Engine takes that long to make the container of the next call
START = (measure.Workload("start", (), ""),)


class Bench:
    """One run: everybody who takes part, and how long things may take."""

    def __init__(self, asked: argparse.Namespace, stack: ExitStack) -> None:
        """Starts what the modes that were asked for need; ``stack`` ends it."""
        self.images: Path = asked.images
        self.quick: bool = asked.quick
        self.rounds: int = 10 if asked.quick else asked.rounds
        self.seconds = 1.5 if asked.quick else 6.0
        self.minutes: float = 1.0 if asked.quick else asked.minutes
        self.elsewhere: list[tuple[str, Path]] = asked.elsewhere
        self.absent: list[str] = []
        self._stack = stack
        self._everybody: list[measure.Contestant] = []

    def until(self) -> float:
        """When the mode that begins now has to be over."""
        return time.monotonic() + 60 * self.minutes

    def everybody(self) -> list[measure.Contestant]:
        """All contestants; made when a mode first asks."""
        if not self._everybody:
            found = self._find()
            self._everybody = [one for one in found if not isinstance(one, str)]
            self.absent = [one for one in found if isinstance(one, str) and one]
            for one in self.absent:
                tell(f"{one}\n")
        return self._everybody

    def _find(self) -> list[measure.Contestant | str]:
        stack, installation = self._stack, Installation()
        images = {one.image for one in WORKLOADS}
        stage = stack.enter_context(runtimes.Stage(ImageStore(self.images), images))
        cold = stack.enter_context(sandboxes.start(self.images, sandboxes.COLD))
        warm = stack.enter_context(sandboxes.start(self.images, sandboxes.WARM))
        why = warm.refusal("numeric")
        interpreter: measure.Contestant | str = f"sandboxd, warm interpreter is left out: {why}"
        if not why:
            note = "the interpreter waits in the container too, with numpy where the workload imports it"
            interpreter = sandboxes.InProcess(warm, "warm interpreter", note, interpreter=True)
        all_of_it = "everything of the shipped policies, receipt and journal included"
        return [
            processes.ForkExec(),
            runtimes.find_bubblewrap(stage),
            peers.find_nsjail(stage, installation, stack),
            peers.find_sandlock(stage, installation, stack),
            peers.find_srt(stage, installation),
            runtimes.find_runtime(stage, "crun"),
            runtimes.find_runtime(stage, "runc"),
            *docker_engine.start(stage, stack),
            sandboxes.InProcess(cold, "cold", f"{all_of_it}; the container is made when the call arrives"),
            self._cold_by_crun(all_of_it),
            sandboxes.InProcess(warm, "warm", f"{all_of_it}; containers wait, each for one call"),
            interpreter,
            sandboxes.Command(warm),
        ]

    def _cold_by_crun(self, all_of_it: str) -> measure.Contestant | str:
        """What the daemon adds to a runtime: with the one that is also measured alone."""
        try:
            daemon = self._stack.enter_context(sandboxes.start(self.images, sandboxes.CRUN))
        except RuntimeError as error:
            return f"{sandboxes.BY_CRUN} is left out: {error}"
        return sandboxes.InProcess(daemon, "cold by crun", f"{all_of_it}; crun makes the container")

    def sequential(self) -> dict[str, Any]:
        """One call at a time, everybody in turn."""
        found = measure.run(
            self.everybody(), WORKLOADS, rounds=self.rounds, warm_up=3, until=self.until(), tell=tell
        )
        notes = {one.name: one.note for one in self.everybody()}
        return {"tables": found.tables(), "failed": found.failed, "absent": self.absent, "notes": notes}

    def command(self) -> dict[str, Any]:
        """The start of ``run-in-sandbox`` and of Python."""
        starters: list[measure.Contestant] = [
            processes.Python(),
            processes.BarePython(),
            sandboxes.CommandStart(),
        ]
        found = measure.run(
            starters, START, rounds=self.rounds, warm_up=3, until=self.until(), tell=tell, settle=0.0
        )
        return {name: measure.summary(values) for name, values in found.samples["start"].items()}

    def throughput(self) -> dict[str, Any]:
        """Calls a second by number of callers."""
        several = [one for one in self.everybody() if one.name not in {"srt", "sandlock", "docker exec"}]
        several = [one for one in several if one.takes(TRUE) and one.name != sandboxes.Command.name]
        several, why = self._able(several)
        callers = (1, 4, 16) if self.quick else (1, 2, 4, 8, 16, 64)
        found = flow.throughput(
            several, TRUE, callers, seconds=self.seconds, until=self.until() + 300, tell=tell
        )
        return found | {"failed": [*why, *found["failed"]]}

    @staticmethod
    def _able(several: list[measure.Contestant]) -> tuple[list[measure.Contestant], list[str]]:
        """Those that can run ``true``, and why others cannot."""
        able, why = [], []
        for one in several:
            try:
                one.run(TRUE)
            except RuntimeError as error:
                why.append(f"{one.name} is left out: {error}")
            else:
                able.append(one)
        return able, why

    def half(self) -> dict[str, Any]:
        """The tail at half of capacity."""
        names = {"sandboxd, cold", "sandboxd, warm", "crun", "bwrap"}
        some = [one for one in self.everybody() if one.name in names]
        some, _ = self._able(some)
        return flow.at_half(some, TRUE, 4 if self.quick else 20, tell)

    def engines(self) -> dict[str, Any]:
        """The same calls by each engine and runtime of this host, and what other hosts said."""
        with ExitStack() as stack:
            several: list[measure.Contestant] = []
            failed = []
            for runtime in RUNTIMES:
                config = f"{sandboxes.WARM}runtime: {runtime}\n"
                try:
                    daemon = stack.enter_context(sandboxes.start(self.images, config))
                    several.append(sandboxes.InProcess(daemon, f"oci, {runtime}", ""))
                except RuntimeError as error:
                    failed.append(f"oci, {runtime} is left out: {error}")
            try:
                socket = stack.enter_context(docker_engine.running()).socket
                config = f"{sandboxes.WARM}engine: docker\ndocker: {{socket: {socket}, timeout: 60s}}\n"
                daemon = stack.enter_context(sandboxes.start(self.images, config))
                several.append(sandboxes.InProcess(daemon, "docker", "", policies=sandboxes.UNMAPPED))
            except (OSError, RuntimeError) as error:
                failed.append(f"docker is left out: {error}")
            found = measure.run(
                several,
                (TRUE, WORKLOADS[2]),
                rounds=self.rounds,
                warm_up=3,
                until=self.until(),
                tell=tell,
                settle=SETTLED,
            )
        elsewhere = {name: json.loads(file.read_text()) for name, file in self.elsewhere}
        return {"tables": found.tables(), "failed": [*failed, *found.failed], "elsewhere": elsewhere}

    def alive(self) -> dict[str, Any]:
        """Sandboxes alive at once."""
        return growth.alive(self.images, (1, 10, 50) if self.quick else (1, 10, 100, 500), self.until(), tell)

    def row(self) -> dict[str, Any]:
        """Calls in a row."""
        return growth.in_a_row(self.images, 200 if self.quick else 10_000, self.until(), tell)

    def policies(self) -> dict[str, Any]:
        """Many policies."""
        return growth.policies(self.images, 100 if self.quick else 1000, self.until(), tell)

    def journal(self) -> dict[str, Any]:
        """A long journal; the one mode with more time than the others, most of it to write it."""
        count = 5000 if self.quick else 1_000_000
        return growth.journal(self.images, count, self.until() + 60 * self.minutes, tell)

    def records(self) -> dict[str, Any]:
        """Checking a journal."""
        return records.records(self.images, 5000 if self.quick else 100_000, self.until(), tell)

    def search(self) -> dict[str, Any]:
        """Searching a long journal."""
        return records.search(5000 if self.quick else 1_000_000, self.until(), tell)

    def output(self) -> dict[str, Any]:
        """1 GiB through the raw stream."""
        return flow.output(self.images, 2**27 if self.quick else 2**30, tell)

    def network(self) -> dict[str, Any]:
        """Connections, bytes and calls under network rules."""
        return network.network(self.images, self.quick, self.until(), tell)

    def sessions(self) -> dict[str, Any]:
        """Calls in sessions, and what is done to these."""
        return sessions.sessions(self.images, self.quick, self.until(), tell)

    def start(self) -> dict[str, Any]:
        """The daemon's start."""
        return flow.starts(self.images, 3 if self.quick else 10, self.until(), tell)

    def durable(self) -> dict[str, Any]:
        """What the syncs of a call cost."""
        return durable.durable(self.images, self.quick, self.until(), tell)

    def queue(self) -> dict[str, Any]:
        """A long queue, across a restart."""
        return waiting.queue(self.images, 2_000 if self.quick else 100_000, tell)


MODES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "sequential": Bench.sequential,
    "command": Bench.command,
    "throughput": Bench.throughput,
    "half": Bench.half,
    "engines": Bench.engines,
    "alive": Bench.alive,
    "row": Bench.row,
    "policies": Bench.policies,
    "journal": Bench.journal,
    "records": Bench.records,
    "search": Bench.search,
    "output": Bench.output,
    "network": Bench.network,
    "sessions": Bench.sessions,
    "start": Bench.start,
    "durable": Bench.durable,
    "queue": Bench.queue,
}
LONG = {"row", "journal", "queue"}
FIGURES = "figures.json"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("scripts/bench", description="What a call costs, beside its peers.")
    named = f"what to measure: {', '.join(MODES)}; none: all but {' and '.join(sorted(LONG))}"
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"{named}; all: everything")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of sequential (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="the most for each mode (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="everything in short, for a first look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was found")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="figures into a page, plots into the directory of its name"
    )
    parser.add_argument(
        "--elsewhere",
        type=_named_file,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="what `sandboxd bench --json` said on another host, for `engines`; may be repeated",
    )
    parser.add_argument("--images", type=Path, required=True, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if unknown := set(found.modes) - {*MODES, "all"}:
        parser.error(f"no mode {', '.join(sorted(unknown))}: there are {', '.join(MODES)}")
    if "all" in found.modes or (found.quick and not found.modes):
        found.modes = list(MODES)
    found.modes = found.modes or [name for name in MODES if name not in LONG]
    return found


def _named_file(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, with a file that is there")
    return name, Path(file)


def main() -> None:
    """Measure and report."""
    asked = arguments()
    # Before any thread: everything is mounted where only this process and its children see it.
    mounts.private_namespace()
    mounts.hide_hybrid_cgroup2()
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        bench = Bench(asked, stack)
        for name in asked.modes:
            tell(f"== {name}\n")
            load, began = os.getloadavg()[0], time.strftime("%Y-%m-%d", time.gmtime())
            try:
                result = MODES[name](bench)
            except (OSError, RuntimeError, errors.SandboxdError) as error:
                result = {"error": str(error)}
                tell(f"{name}: {error}\n")
            result |= {"day": began, "load": [round(load, 1), round(os.getloadavg()[0], 1)]}
            result |= {"machine": page.machine(), "versions": page.versions(), "quick": asked.quick}
            found[name] = result
            if asked.write is not None:
                keep(asked.write, found)  # a later mode that fails takes none of it away
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if asked.write is not None:
        whole, directory = keep(asked.write, found)
        plot(directory / FIGURES, directory)
        page.write_into(asked.write, page.markdown(whole, directory))
    print(page.markdown(found, None))
    if broken := [name for name in found if "error" in found[name]]:
        sys.exit(f"could not be measured: {', '.join(broken)}")


def keep(written: Path, found: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Put what was found beside what was found before; returns all of it, and the directory of a page."""
    directory = written.with_suffix("")
    directory.mkdir(exist_ok=True)
    kept = directory / FIGURES
    whole: dict[str, Any] = (json.loads(kept.read_text()) if kept.exists() else {}) | found
    kept.write_text(json.dumps(whole, indent=1) + "\n")
    return whole, directory


def plot(figures: Path, directory: Path) -> None:
    """Draw with the bench's own interpreter; without matplotlib there are no plots, and it says so."""
    installation = Installation()
    try:
        installation.from_pypi("matplotlib", "import matplotlib.pyplot")
    except RuntimeError as error:
        tell(f"no plots: {error}\n")
        return
    script = Path(__file__).with_name("plots.py")
    subprocess.run([str(installation.python), str(script), str(figures), str(directory)], check=True)


def tell(line: str) -> None:
    """Progress."""
    print(line, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
