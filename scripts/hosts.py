"""Writes ``docs/hosts.md`` from reports of the conformance suite: ``hosts.py DIRECTORY PAGE``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HEAD = """\
# Hosts

What the [conformance suite](testing.md#conformance) came to on each engine and host. `scripts/hosts` writes
this page from the reports in [hosts/](hosts/); nothing here is written by hand.

| engine | passed | failed | skipped | seconds | kernel | machine | cgroup | ids | Python | date |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def row(report: dict[str, Any]) -> str:
    """One line of the table."""
    host, counts = report["host"], report["counts"]
    stretched = f" (stretched by {report['slow']:g})" if report["slow"] != 1 else ""
    machine = f"{host['architecture']}, {host['cpus']} CPUs, {host['memory'] >> 30} GiB"
    cells = [
        report["label"],
        str(counts["passed"]),
        str(counts["failed"]),
        str(counts["skipped"]),
        f"{report['seconds']:.0f}{stretched}",
        host["kernel"],
        machine,
        host["cgroup"],
        report["user_namespace"],
        host["python"],
        report["date"],
    ]
    return f"| {' | '.join(cells)} |\n"


def remarks(report: dict[str, Any]) -> list[str]:
    """Why tests were skipped, and which failed."""
    skipped = Counter(one["detail"] for one in report["results"] if one["outcome"] == "skipped")
    failed = [one["name"] for one in report["results"] if one["outcome"] == "failed"]
    lines = [f"- skipped, {count}: {why}\n" for why, count in sorted(skipped.items())]
    return lines + [f"- **failed**: `{name}`\n" for name in failed]


def main() -> None:
    """Read all reports of a directory and write the page."""
    directory, page = map(Path, sys.argv[1:])
    reports = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    text = HEAD + "".join(map(row, reports))
    for report in reports:
        if lines := remarks(report):
            text += f"\n## {report['label']}\n\n{''.join(lines)}"
    page.write_text(text)


if __name__ == "__main__":
    main()
