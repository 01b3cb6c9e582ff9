"""The figures as markdown, for a terminal and for a page: tables, and what was to be reached beside them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import goals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["machine", "markdown", "table", "versions", "write_into"]

BEGIN, END = "<!-- figures: written by scripts/bench --write -->", "<!-- end of figures -->"
BASE, ENGINE = "fork+exec", "docker run"
VERSIONS = (("crun", "--version"), ("runc", "--version"), ("bwrap", "--version"), ("dockerd", "--version"))
TIMES = ("p50", "p95", "p99")
Figures = dict[str, Any]
Rows = list[list[str]]


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


def table(head: Sequence[str], rows: Rows) -> str:
    """A markdown table: the first column is text, the others numbers."""
    lines = ["| " + " | ".join(row) + " |" for row in ([*head], *rows)]
    lines.insert(1, "|---" + "|--:" * (len(head) - 1) + "|")
    return "\n".join(lines)


def _ms(found: Figures) -> list[str]:
    return [f"{found[name]:.1f}" for name in TIMES]


def _sequential(found: Figures) -> Iterator[str]:
    for name, taken in found["tables"].items():
        base, engine = taken.get(BASE), taken.get(ENGINE)
        rows = [
            [
                one,
                *_ms(figures),
                f"{figures['p50'] / base['p50']:.1f}" if base else "-",
                f"{engine['p50'] / figures['p50']:.1f}" if engine else "-",
                str(figures["n"]),
            ]
            for one, figures in taken.items()
        ]
        head = ["", *(f"{one} ms" for one in TIMES), f"times {BASE}", f"{ENGINE} takes, times", "calls"]
        yield f"### `{name}`"
        yield table(head, rows)
    yield "### Who is who"
    said = [f"{name}: {note}." for name, note in found["notes"].items()]
    yield "\n".join(f"- {' '.join(line.split())}" for line in [*said, *found["absent"], *found["failed"]])


def _command(found: Figures) -> Iterator[str]:
    yield "### Start of the command"
    rows = [[name, *_ms(one)] for name, one in found.items() if isinstance(one, dict) and "p50" in one]
    yield table(["", *(f"{one} ms" for one in TIMES)], rows)


def _throughput(found: Figures) -> Iterator[str]:
    yield "### Fresh sandboxes a second, by callers"
    callers = sorted({number for one in found["rates"].values() for number in one}, key=int)
    rows = [
        [name, *(f"{one[number]['rate']:.0f}" if number in one else "-" for number in callers)]
        for name, one in found["rates"].items()
    ]
    yield table(["`true`", *callers], rows)
    yield from ["\n".join(f"- {' '.join(line.split())}" for line in found["failed"])] * bool(found["failed"])


def _half(found: Figures) -> Iterator[str]:
    yield "### Arrivals at random, at half of what eight callers get"
    rows = [
        [name, f"{one['rate']:.0f}", *_ms(one)]
        for name, one in found.items()
        if isinstance(one, dict) and "p50" in one
    ]
    yield table(["`true`", "a second", *(f"{one} ms" for one in TIMES)], rows)


def _engines(found: Figures) -> Iterator[str]:
    yield "### By engine"
    for name, taken in found["tables"].items():
        first = next(iter(taken.values()), None)
        rows = [
            [one, *_ms(figures), f"{figures['p50'] / first['p50']:.2f}" if first else "-"]
            for one, figures in taken.items()
        ]
        yield table([f"`{name}`, warm", *(f"{one} ms" for one in TIMES), "times the first"], rows)
    rows = []
    for host, said in found["elsewhere"].items():
        bare = {one["what"]: one["p50_ms"] for one in said["times"] if one["who"] == "fork+exec"}
        for one in said["times"]:
            if one["who"] == "sandboxd":
                times = [f"{one[f'{each}_ms']:.1f}" for each in TIMES]
                ratio = f"{one['p50_ms'] / bare[one['what']]:.1f}" if one["what"] in bare else "-"
                rows.append([host, f"`{one['what']}`", *times, ratio])
    if rows:
        yield "The same by `sandboxd bench` in other places, beside a bare process there:"
        yield table(["", "", *(f"{one} ms" for one in TIMES), f"times {BASE} there"], rows)
    yield from ["\n".join(f"- {' '.join(line.split())}" for line in found["failed"])] * bool(found["failed"])


def _alive(found: Figures) -> Iterator[str]:
    yield "### Alive at once"
    rows = [["none", "-", "-", "-", f"{found['idle']['p50']:.1f}"]]
    rows += [
        [
            str(one["alive"]),
            f"{one['mib_each']:.2f}",
            f"{one['daemon_mib']:.1f}",
            f"{one['seconds_to_start']:.1f}",
            f"{one['p50']:.1f}",
        ]
        for one in found["levels"]
    ]
    head = ["sandboxes", "MiB each, beyond the tool", "daemon grew, MiB", "s to start", "p50 of a call, ms"]
    yield table(head, rows)
    kinds = found["levels"][-1]["kib_by_kind"] if found["levels"] else {}
    shown = ", ".join(f"{name} {value}" for name, value in kinds.items())
    said = f"{found['answered']} of {found['asked']} answered. KiB each at the largest number: {shown}"
    yield f"{said}; the tool itself {found['tool_kib']}."


def _network(found: Figures) -> Iterator[str]:
    yield "### Under network rules"
    rows = [
        [who, f"{one['p50']:.2f}", f"{one['p95']:.2f}", f"{one['p99']:.2f}"]
        for who, one in found["connections"].items()
    ]
    yield table(["a connection, one byte there and back", "p50 ms", "p95 ms", "p99 ms"], rows)
    rates = ", ".join(f"{who} {rate:,} MB/s" for who, rate in found["mb_per_s"].items())
    yield f"{found['bytes'] / 2**30:.0f} GiB over one connection: {rates}."
    if (one := found.get("https")) is not None:
        said = f"{one['requests']:,} requests of HTTPS that rules look into, over one connection: "
        said += f"{one['per_second']:,} a second, with client and server on the same CPUs; "
        yield f"{said}{one['per_core']:,} for each second of CPU of the process between them."
    rows = [[who, f"{one['p50']:.1f}", f"{one['p95']:.1f}"] for who, one in found["calls"].items()]
    yield table(["`true`, warm, policy", "p50 ms", "p95 ms"], rows)


def _sessions(found: Figures) -> Iterator[str]:
    yield "### In sessions"
    for head, which in (("a call, warm", "calls"), ("`true`, warm, in a session with", "grown")):
        rows = [[who, *_ms(one)] for who, one in found[which].items()]
        yield table([head, *(f"{one} ms" for one in TIMES)], rows)
    yield f"Many files: {found['files']:,}. Many calls: {found['length']:,}, each of which changed a file."
    rows = [[who, *_ms(one)] for who, one in found["moves"].items()]
    yield table(["of the session with many files", *(f"{one} ms" for one in TIMES)], rows)


def _row(found: Figures) -> Iterator[str]:
    yield f"### {found['asked']:,} calls in a row"
    rows = [
        [f"{one['calls']:,}", f"{one['rss_mib']:.1f}", str(one["descriptors"]), f"{one['p50']:.1f}"]
        for one in found["steps"]
    ]
    yield table(["calls", "daemon RSS, MiB", "descriptors", "p50 ms"], rows)


def _others(found: Figures) -> Iterator[str]:
    rows: Rows = []
    if (one := found.get("policies")) and "p50" in one:
        text = (
            f"start {one['start_s']} s, an edit in force after {one['reload_s']} s, RSS {one['rss_mib']} MiB"
        )
        rows.append([f"{one['policies']:,} policies loaded", f"{one['p50']:.1f}", text])
    if (one := found.get("journal")) and "p50" in one:
        text = f"{one['fresh']['p50']:.1f} ms when it was empty; start {one['start_s']} s"
        text += f", a page of `ps` {one['ps_ms']} ms, {one['gib']} GiB, RSS {one['rss_mib']} MiB"
        rows.append([f"a journal of {one['calls']:,} calls", f"{one['p50']:.1f}", text])
    if (one := found.get("records")) and "verify_s" in one:
        text = f"{one['records']:,} records are checked in {one['verify_s']} s of one core"
        yield f"{text}; a record and its body take {one['bytes_each']:,} bytes."
    if (one := found.get("search")) and "ms" in one:
        yield f"### Searching {one['calls']:,} calls"
        yield table(["", "slowest of five, ms"], [[what, str(ms)] for what, ms in one["ms"].items()])
    if rows:
        yield "### As other things grow"
        yield table(["", "p50 ms of `true`", "and"], rows)
    if (one := found.get("output")) and "mb_per_s" in one:
        text = f"{one['bytes'] / 2**30:.2f} GiB of output through the raw stream: {one['mb_per_s']} MB/s"
        yield f"{text}; daemon RSS {one['rss_before_mib']} MiB before, {one['rss_peak_mib']} MiB at most."
    if (one := found.get("start")) and "first" in one:
        text = f"Daemon from start to its first answer: {one['first']['p50'] / 1000:.2f} s"
        yield f"{text}, {one['again']['p50'] / 1000:.2f} s where it ran before (medians)."
    if (one := found.get("durable")) and "disk" in one:
        text = f"`true`, warm: {one['disk']['p50']:.1f} ms"
        yield f"{text}, and {one['tmpfs']['p50']:.1f} ms where the state is on a tmpfs."
    if (one := found.get("queue")) and "start_s" in one:
        text = f"With {one['calls']:,} calls in the queue: {one['start_s']} s, {one['empty_s']} s with none"
        yield f"{text}; to join it {one['step_us']['join']} µs, a turn {one['step_us']['turn']} µs."


SECTIONS = {
    "sequential": _sequential,
    "throughput": _throughput,
    "half": _half,
    "engines": _engines,
    "alive": _alive,
    "row": _row,
    "network": _network,
    "sessions": _sessions,
    "command": _command,
}
PLOTS = {
    "sequential": ("latency", "Time of one call"),
    "throughput": ("throughput", "Fresh sandboxes a second by callers"),
    "alive": ("alive", "Memory of each and time of a call, by sandboxes alive"),
    "row": ("row", "Memory of the daemon and time of a call over many calls"),
}


def markdown(found: Figures, plots: Path | None) -> str:
    """All that was found. ``plots`` is the directory of the pictures beside the page."""
    parts = []
    for where in {one["machine"]: one for one in found.values()}.values():
        modes = [name for name, one in found.items() if one["machine"] == where["machine"]]
        days = sorted({found[name]["day"] for name in modes})
        load = max(max(found[name]["load"]) for name in modes)
        text = f"Measured on {' and '.join(days)}: {where['machine']}; {where['versions']}."
        parts.append(f"{text} Load average at most {load:.1f}.")
        if short := [name for name in modes if found[name]["quick"]]:
            parts.append(f"In short (`--quick`), so only a first look: {', '.join(short)}.")
    if rows := goals.rows(found):
        parts += ["### To be reached", table(["what", "reach", "measured", "met"], rows)]
    for name, section in SECTIONS.items():
        if name not in found:
            continue
        if "error" in found[name]:
            parts.append(f"{name} could not be measured: {found[name]['error']}")
            continue
        texts = list(section(found[name]))
        if plots is not None and name in PLOTS:
            file, text = PLOTS[name]
            if (plots / f"{file}.png").exists():
                texts.insert(1 if name != "sequential" else 0, f"![{text}]({plots.name}/{file}.png)")
        parts += texts
    return "\n\n".join([*parts, *_others(found)]) + "\n"


def write_into(page: Path, figures: str) -> None:
    """Replace what is between the marks of a page. Raises ValueError for a page without them."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no line {BEGIN!r} followed by {END!r}")
    page.write_text(f"{before}{BEGIN}\n\n{figures}\n{END}{after}")
