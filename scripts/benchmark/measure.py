"""Contestants, workloads, and the runner that measures them in turn."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Contestant", "Samples", "Workload", "run"]


@dataclass(frozen=True)
class Workload:
    """What everybody runs. ``image`` names the root file system that it runs in."""

    name: str
    argv: tuple[str, ...]
    image: str


class Contestant(Protocol):
    """A way to run a command. ``note`` is a clause on what it enforces, for the report."""

    name: str
    note: str

    def run(self, workload: Workload) -> None:
        """Run it to its end, its output read. Raises RuntimeError if it did not succeed."""
        ...


Samples = dict[str, dict[str, list[float]]]
"""Workload to contestant to the seconds of each round."""


def run(
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    warm_up: int,
    tell: Callable[[str], None],
) -> Samples:
    """Measure everybody once in each round, a different one first in each, after unmeasured rounds."""
    samples: Samples = {load.name: {one.name: [] for one in contestants} for load in workloads}
    for number in range(warm_up + rounds):
        first = number % len(contestants)
        for load in workloads:
            for one in (*contestants[first:], *contestants[:first]):
                began = time.perf_counter()
                one.run(load)
                took = time.perf_counter() - began
                if number >= warm_up:
                    samples[load.name][one.name].append(took)
        tell(f"\rround {number + 1} of {warm_up + rounds}")
    tell("\n")
    return samples
