"""The figures as a table for a terminal and for a page."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from measure import Samples

__all__ = ["Report", "write_into"]

BEGIN, END = "<!-- figures: written by scripts/bench --write -->", "<!-- end of figures -->"
BASE = "fork+exec"
ENGINE = "docker run"
OURS = "sandboxd, Python client"
VERSIONS = (("crun", "--version"), ("runc", "--version"), ("bwrap", "--version"), ("dockerd", "--version"))
HEAD = ("", "p50 ms", "p95 ms", "p99 ms", f"times {BASE}", f"{ENGINE} takes, times")


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def machine() -> str:
    """What this ran on, in one sentence."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = model or platform.machine()
    return (
        f"{os.cpu_count()} CPUs ({cpu}), {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def versions() -> str:
    """The first line of what each program says of its version."""
    found = []
    for name, option in VERSIONS:
        if shutil.which(name):
            said = subprocess.run([name, option], capture_output=True, text=True, check=False).stdout
            found.append(said.strip().splitlines()[0] if said.strip() else name)
    return "; ".join(found)


@dataclass(frozen=True)
class Report:
    """Everything that was measured; times in seconds."""

    samples: Samples
    starts: Samples
    rounds: int
    absent: Sequence[str]
    """A sentence for each contestant that could not take part."""
    notes: dict[str, str]
    cpu: tuple[float, float]
    """Per call: of the daemon, and of the runtimes it started."""
    runtime: str
    """The bare runtime that the daemon stands on."""
    load: tuple[float, float]
    """The load average before and after."""

    def _rows(self, taken: dict[str, list[float]], *, ratios: bool) -> list[tuple[str, ...]]:
        base, engine = (median(taken[name]) if name in taken else None for name in (BASE, ENGINE))
        rows: list[tuple[str, ...]] = [HEAD if ratios else HEAD[:4]]
        for name, values in taken.items():
            middle = median(values)
            row = [name, *(f"{percentile(values, at) * 1000:.1f}" for at in (50, 95, 99))]
            if ratios:
                row.append(f"{middle / base:.1f}" if base else "")
                row.append(f"{engine / middle:.1f}" if engine else "")
            rows.append(tuple(row))
        return rows

    def _tables(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        for name, taken in self.samples.items():
            yield name, self._rows(taken, ratios=True)
        for taken in self.starts.values():
            yield "start of the command", self._rows(taken, ratios=False)

    def _sentences(self) -> Iterator[str]:
        taken = self.samples["true"]
        if self.runtime in taken and OURS in taken:
            added = median(taken[OURS]) - median(taken[self.runtime])
            yield f"What sandboxd adds to a bare {self.runtime} for `true`, p50: {added * 1000:.1f} ms."
        own, runtimes = self.cpu
        yield (
            f"CPU time of a call: {own * 1000:.1f} ms in the daemon, {runtimes * 1000:.1f} ms in the "
            f"runtime and the container's first process."
        )
        yield from self.absent

    def text(self) -> str:
        """For a terminal."""
        parts = [
            machine(),
            versions(),
            f"{self.rounds} rounds, load {self.load[0]:.1f} to {self.load[1]:.1f}",
        ]
        for title, rows in self._tables():
            widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
            parts.append(f"\n{title}")
            for row in rows:
                first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                parts.append("  " + "  ".join([first.strip().ljust(widths[0]), *rest]))
        return "\n".join([*parts, "", *self._sentences()])

    def markdown(self) -> str:
        """For a page."""
        day = time.strftime("%Y-%m-%d", time.gmtime())
        load = f"load average {self.load[0]:.1f} before and {self.load[1]:.1f} after"
        parts = [
            f"Measured on {day}: {machine()}; {versions()}. {self.rounds} rounds, {load}.",
            "\n".join(f"- {sentence}" for sentence in self._sentences()),
        ]
        for title, rows in self._tables():
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            lines.insert(1, "|---" + "|--:" * (len(rows[0]) - 1) + "|")
            parts += [f"### `{title}`" if title in self.samples else "### Start of the command"]
            parts += ["\n".join(lines)]
        parts += ["### Who is who", "\n".join(f"- {name}: {note}." for name, note in self.notes.items())]
        return "\n\n".join(parts) + "\n"


def write_into(page: Path, figures: str) -> None:
    """Replace what is between the marks of a page. Raises ValueError for a page without them."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no line {BEGIN!r} followed by {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{figures}\n{END}{after}")
