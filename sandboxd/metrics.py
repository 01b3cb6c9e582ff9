"""What the daemon counts, in the text format of Prometheus.

The numbers are copied on the event loop and written in a thread: the library is imported at the first
question, and most daemons are never asked. Its global registry is not used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from sandboxd.models import Cause, SlotInfo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prometheus_client.core import Metric

__all__ = ["Numbers", "exposition"]

STATES: tuple[str, ...] = get_args(SlotInfo.model_fields["state"].annotation)


@dataclass(frozen=True)
class Numbers:
    """All that is told. ``slots`` are those of now; what is counted is counted since the daemon's start."""

    slots: Sequence[SlotInfo]
    made: int
    handed_over: Mapping[str, int]
    fates: Mapping[str, int]
    calls: Mapping[Cause, int]
    running: int
    queued: int
    memory_used: int
    memory: int


class _Collector:
    """Gives the numbers to the library."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        """Every metric with its samples."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        found = self._numbers
        depth: Counter[tuple[str, str]] = Counter((slot.policy, slot.state) for slot in found.slots)
        slots = GaugeMetricFamily(
            "sandboxd_slots", "Containers, by policy and state.", labels=["policy", "state"]
        )
        for policy in sorted({slot.policy for slot in found.slots}):
            for state in STATES:
                slots.add_metric([policy, state], depth[policy, state])
        yield slots
        yield CounterMetricFamily("sandboxd_slots_made", "Containers that were made.", found.made)
        for name, text, label, counts in (
            (
                "sandboxd_hand_overs",
                "Containers that calls got.",
                "kind",
                found.handed_over,
            ),
            ("sandboxd_pool_slots_taken", "Containers that waited and wait no more.", "fate", found.fates),
            ("sandboxd_calls", "Calls that ended, by cause.", "cause", found.calls),
        ):
            counter = CounterMetricFamily(name, text, labels=[label])
            for value, number in counts.items():
                counter.add_metric([str(value)], number)
            yield counter
        for name, text, level in (
            ("sandboxd_calls_running", "Calls that have their turn.", found.running),
            ("sandboxd_calls_queued", "Calls that wait for their turn.", found.queued),
            ("sandboxd_memory_granted_bytes", "Memory that running calls may use.", found.memory_used),
            ("sandboxd_memory_budget_bytes", "Memory that all of them may use.", found.memory),
        ):
            yield GaugeMetricFamily(name, text, level)


def exposition(numbers: Numbers) -> bytes:
    """The numbers in the text format, version 0.0.4."""
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(numbers))
    return generate_latest(registry)
