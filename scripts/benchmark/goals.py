"""What is to be reached, beside what was measured. A row whose mode was not run is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["rows"]

WARM, COLD, INTERPRETER = "sandboxd, warm", "sandboxd, cold", "sandboxd, warm interpreter"
BY_CRUN = "sandboxd, cold by crun"
PYTHON = "python3 -c 'print(1)'"
Figures = dict[str, Any]
Goal = tuple[str, str, str, bool]


def rows(found: Figures) -> list[list[str]]:
    """What, reach, measured, met."""
    good = {name: one for name, one in found.items() if "error" not in one}
    made = [*_latency(good), *_load(good), *_growth(good), *_network(good), *_sessions(good), *_records(good)]
    return [[what, reach, measured, "yes" if met else "**no**"] for what, reach, measured, met in made]


def _latency(found: Figures) -> Iterator[Goal]:
    tables = found.get("sequential", {}).get("tables", {})
    true, python = tables.get("true", {}), tables.get(PYTHON, {})
    if WARM in true:
        ours = true[WARM]["p50"]
        for name in ("bwrap", "sandlock"):
            if name in true:
                peer = true[name]["p50"]
                yield f"`true`, p50, faster than {name}", f"< {peer:.1f} ms", f"{ours:.1f} ms", ours < peer
        yield "`true`, client to outcome, p50", "4 ms (aim 3)", f"{ours:.1f} ms", ours <= 4
        if "docker run" in true:
            times = true["docker run"]["p50"] / ours
            yield "the same against `docker run`", "75 times (aim 120)", f"{times:.0f} times", times >= 75
    for name in (BY_CRUN, COLD):
        if name in true and "crun" in true:
            more = true[name]["p50"] - true["crun"]["p50"]
            yield f"`true`, {name}, more than bare crun, p50", "6 ms", f"{more:.1f} ms", more <= 6
    if INTERPRETER in python:
        ours = python[INTERPRETER]["p50"]
        yield f"`{PYTHON}`, warm interpreter, p50", "6 ms (aim 4)", f"{ours:.1f} ms", ours <= 6
    if "run-in-sandbox" in found.get("command", {}):
        ours = found["command"]["run-in-sandbox"]["p50"]
        yield "start of `run-in-sandbox`, p50", "80 ms", f"{ours:.0f} ms", ours <= 80


def _load(found: Figures) -> Iterator[Goal]:
    if "p99" in (half := found.get("half", {}).get(WARM, {})):
        yield "p99 at half of capacity", "15 ms (aim 8)", f"{half['p99']:.1f} ms", half["p99"] <= 15
    rates = found.get("throughput", {}).get("rates", {})
    ours = [one["rate"] for name in (WARM, COLD) for one in rates.get(name, {}).values()]
    if ours:
        what = "fresh containers a second, sustained"
        yield what, "100 (aim 200)", f"{max(ours):.0f}", max(ours) >= 100


def _growth(found: Figures) -> Iterator[Goal]:
    alive = found.get("alive", {})
    if alive.get("levels"):
        last = alive["levels"][-1]
        number, times = last["alive"], last["p50"] / alive["idle"]["p50"]
        said = f"{alive['answered']} of {alive['asked']}"
        yield f"{number} alive: all answer", str(number), said, alive["answered"] == alive["asked"] == number
        each = last["mib_each"]
        yield f"{number} alive: each, beyond the tool", "3 MiB", f"{each:.2f} MiB", each <= 3
        yield f"{number} alive: p50 of a call among them", "at most 2 times", f"{times:.1f} times", times <= 2
    steps = found.get("row", {}).get("steps", [])
    if len(steps) > 1:
        sizes = [one["rss_mib"] for one in steps]
        flat = max(abs(size / sizes[0] - 1) for size in sizes)
        what = f"{steps[-1]['calls']:,} calls in a row: daemon RSS after the first {steps[0]['calls']:,}"
        yield (
            what,
            "flat within 5 %, under 150 MiB",
            f"{flat:.1%}, {max(sizes):.0f} MiB",
            (flat <= 0.05 and max(sizes) < 150),
        )
    output = found.get("output", {})
    if "mb_per_s" in output:
        rate = output["mb_per_s"]
        yield "output through the raw stream", "400 MB/s (aim 1000)", f"{rate:.0f} MB/s", rate >= 400
        grown = output["rss_peak_mib"] - output["rss_before_mib"]
        yield "daemon RSS meanwhile", "bounded", f"{grown:+.0f} MiB", grown <= 64
    if "first" in (start := found.get("start", {})):
        seconds = start["first"]["p50"] / 1000
        yield "daemon from start to ready", "1.5 s (aim 0.7)", f"{seconds:.2f} s", seconds <= 1.5


def _network(found: Figures) -> Iterator[Goal]:
    one = found.get("network", {})
    if not one.get("calls"):
        return
    direct, few, many = (one["connections"][f"{who}, by address"]["p50"] for who in one["mb_per_s"])
    more = few - direct
    yield "a connection under network rules, more than direct, p50", "1 ms", f"{more:.2f} ms", more <= 1
    yield f"the same with {one['rules']:,} rules", "1 ms", f"{many - direct:.2f} ms", many - direct <= 1
    rate = one["mb_per_s"]["two rules"]
    yield "one connection under network rules", "1000 MB/s", f"{rate} MB/s", rate >= 1000
    if "https" in one:
        rate = one["https"]["per_core"]
        what = "HTTPS that rules look into, on one core of the process that serves it"
        yield what, "1000 requests/s", f"{rate:,} requests/s", rate >= 1000
    plain, ruled = one["calls"]["plain"]["p50"], one["calls"]["two-rules"]["p50"]
    what = "`true`, warm, with a network, more than without, p50"
    yield what, "1 ms", f"{ruled - plain:.1f} ms", ruled - plain <= 1


def _sessions(found: Figures) -> Iterator[Goal]:
    one = found.get("sessions", {})
    if not one.get("moves"):
        return
    taken = {name: figures["p50"] for name, figures in (one["calls"] | one["grown"] | one["moves"]).items()}
    more = {name: taken[f"{name}, in a session"] - taken[name] for name in ("true", "no file", "ten files")}
    commit = more["ten files"] - more["no file"]
    for name, said in (("true", "`true`"), ("no file", "a Python that writes nothing")):
        yield f"{said}, more in a session than out of one, p50", "-", f"{more[name]:.1f} ms", True
    what = "commit of ten files: a Python that writes them, more than that"
    yield what, "3 ms", f"{commit:.1f} ms", commit <= 3
    for name in ("fork", "rollback"):
        what = f"{name} of a session with {one['files']:,} files, p50"
        yield what, "5 ms", f"{taken[name]:.1f} ms", taken[name] <= 5
    for name in ("many files", "many calls"):
        times = taken[name] / taken["empty"]
        yield f"`true` in a session with {name}, times one that is empty", "1.1", f"{times:.2f}", times <= 1.1


def _records(found: Figures) -> Iterator[Goal]:
    if "disk" in (one := found.get("durable", {})):
        more = one["disk"]["p50"] - one["tmpfs"]["p50"]
        yield "`true`, warm, on disk, more than without a disk, p50", "1 ms", f"{more:.2f} ms", more <= 1
    if "start_s" in (one := found.get("queue", {})):
        rate, ready, calls = one["accepted_per_s"], one["start_s"], f"{one['calls']:,}"
        yield "acceptances by the journal alone", "2,000 a second", f"{rate:,} a second", rate >= 2000
        yield f"restart with {calls} calls in the queue, to ready", "2 s", f"{ready:.2f} s", ready < 2
    if "verify_s" in (one := found.get("records", {})):
        taken = one["verify_s"]
        yield f"`journal verify` of {one['records']:,} records", "5 s", f"{taken:.2f} s", taken <= 5
    if "ms" in (one := found.get("search", {})):
        slowest = max(one["ms"].values())
        yield (
            f"a search among {one['calls']:,} calls, the slowest",
            "100 ms",
            f"{slowest:.0f} ms",
            slowest < 100,
        )
