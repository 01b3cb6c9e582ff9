"""Contestants, workloads, and the runner that measures them in turn."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Contestant", "Rounds", "Workload", "in_turn", "percentile", "run", "summary"]

PAUSE = 0.03  # seconds after each call: see docs/benchmarks.md


@dataclass(frozen=True)
class Workload:
    """What everybody runs. ``image`` names the root file system that it runs in."""

    name: str
    argv: tuple[str, ...]
    image: str
    stdin: int = 0
    """Bytes that go in and have to come out again."""
    every: int = 1
    """It is run in each so-manieth round, since it takes long."""


class Contestant(Protocol):
    """A way to run a command. ``note`` is a clause on what it enforces, for the report."""

    name: str
    note: str

    def takes(self, workload: Workload) -> bool:
        """Whether it means to run this at all."""
        ...

    def run(self, workload: Workload) -> None:
        """Run it to its end, its output read. Raises RuntimeError if it did not succeed."""
        ...


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and tails of seconds, in milliseconds, and how many there were."""
    found = {f"p{percent}": round(percentile(values, percent) * 1000, 3) for percent in (50, 95, 99)}
    return {**found, "n": len(values)}


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, until: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each step, once in each round, another one first each time. ``until`` is monotonic."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        if time.monotonic() > until:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            steps[name]()
            taken[name].append(time.perf_counter() - began)
            time.sleep(PAUSE)
    return {name: summary(values) for name, values in taken.items() if values}


@dataclass
class Rounds:
    """What the rounds gave: workload to contestant to seconds, and a sentence for each that failed."""

    samples: dict[str, dict[str, list[float]]]
    failed: list[str] = field(default_factory=list)

    def tables(self) -> dict[str, dict[str, dict[str, float]]]:
        """Workload to contestant to ``summary``."""
        return {
            name: {one: summary(values) for one, values in taken.items() if values}
            for name, taken in self.samples.items()
        }


def run(
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    warm_up: int,
    until: float,
    tell: Callable[[str], None],
    settle: float = 0.03,
) -> Rounds:
    """Measure everybody once in each round, a different one first in each, after unmeasured rounds.

    Whoever fails at a workload is left out of it from then on. Between two of them is a pause, so that
    what one does after its answer does not meet the next. No round begins after ``until`` (monotonic).
    """
    pairs = {load: [one for one in contestants if one.takes(load)] for load in workloads}
    found = Rounds({load.name: {one.name: [] for one in pairs[load]} for load in workloads})
    for number in range(-warm_up, rounds):
        if time.monotonic() > until and number > 0:
            break
        for load in workloads:
            if number % load.every:
                continue
            first = number % max(1, len(pairs[load]))
            for one in (*pairs[load][first:], *pairs[load][:first]):
                time.sleep(settle)
                began = time.perf_counter()
                try:
                    one.run(load)
                except RuntimeError as error:
                    pairs[load].remove(one)
                    del found.samples[load.name][one.name]
                    found.failed.append(f"{one.name} is left out of `{load.name}`: {error}")
                    continue
                took = time.perf_counter() - began
                if number >= 0:
                    found.samples[load.name][one.name].append(took)
        tell(f"\rround {number + 1} of {rounds}")
    tell("\n")
    return found
