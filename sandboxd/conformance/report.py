"""What a run came to: a table for people, and a JSON document for ``scripts/hosts``."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import __version__
from sandboxd.conformance.host import Host

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from sandboxd.conformance.subject import Subject

__all__ = ["Report"]


@dataclass
class Result:
    """One test."""

    name: str
    area: str
    outcome: str = "passed"
    seconds: float = 0.0
    detail: str = ""
    """Why it was skipped, or how it failed."""


class Report:
    """Collects results as pytest tells of them."""

    def __init__(self, subject: Subject) -> None:
        """For a run that begins now."""
        health, options = subject.client.health(), subject.options
        self.results: dict[str, Result] = {}
        self._began = time.time()
        self._host = Host.look()
        self._head = {
            "version": __version__,
            "label": options.label or f"{health.engine} + {health.runtime}",
            "engine": health.engine,
            "runtime": health.runtime,
            "user_namespace": subject.user_namespace,
            "traits": sorted(subject.traits),
            "slow": options.slow,
            "host": asdict(self._host),
            "date": time.strftime("%Y-%m-%d", time.gmtime(self._began)),
        }

    def add(self, report: pytest.TestReport) -> None:
        """One phase of a test: a failure in any of them is the test's."""
        file, _, name = report.nodeid.partition("::")
        area = Path(file).stem.removeprefix("test_")
        result = self.results.setdefault(report.nodeid, Result(f"{area}::{name}", area))
        result.seconds += report.duration
        if report.failed:
            result.outcome, result.detail = "failed", report.longreprtext
        elif report.skipped:
            where = report.longrepr
            result.outcome = "skipped"
            result.detail = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")

    def counts(self, area: str = "") -> dict[str, int]:
        """How many passed, failed and were skipped, of one area or of all."""
        found = Counter(one.outcome for one in self.results.values() if area in {"", one.area})
        return {name: found[name] for name in ("passed", "failed", "skipped")}

    def lines(self) -> Iterator[str]:
        """The table, and what failed or was skipped."""
        host = self._host
        yield f"{self._head['label']} on Linux {host.kernel} {host.architecture}, cgroup {host.cgroup}"
        yield f"{'':<12} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}"
        for area in [*dict.fromkeys(one.area for one in self.results.values()), ""]:
            passed, failed, skipped = self.counts(area).values()
            seconds = sum(one.seconds for one in self.results.values() if area in {"", one.area})
            yield f"{area or 'all':<12} {passed:>7} {failed:>7} {skipped:>8} {seconds:>8.1f}"
        for one in self.results.values():
            if one.outcome == "skipped":
                yield f"skipped: {one.name}: {one.detail}"
        for one in self.results.values():
            if one.outcome == "failed":
                yield f"FAILED: {one.name}"

    def write(self, file: Path) -> None:
        """The JSON document."""
        seconds = round(time.time() - self._began, 1)
        head = json.dumps(self._head | {"seconds": seconds, "counts": self.counts()}, indent=1)
        results = (
            json.dumps(asdict(replace(one, seconds=round(one.seconds, 3)))) for one in self.results.values()
        )
        # a line for each test, so that two reports can be compared
        lines = ",\n  ".join(results)
        file.write_text(f'{head.removesuffix("}").rstrip()},\n "results": [\n  {lines}\n ]\n}}\n')
