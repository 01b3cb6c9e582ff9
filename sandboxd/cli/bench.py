"""``sandboxd bench``: what a call costs on this machine, beside what else is installed here.

Commands are measured in turn, one of each in a round, so that other work on the machine meets all of them.
The peers run this host's own programs: they need no image, and nothing is installed for them.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.options import REMOTE, Remote

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sandboxd.client import Client

__all__ = ["bench", "percentile"]

WARM_UP = 3
CALLERS = (1, 4, 16)
PATIENCE = 30.0  # seconds for one command of a peer
TRUE = ("true",)
PYTHON = ("python3", "-c", "print(1)")
BWRAP = (
    "bwrap",
    "--unshare-all",
    "--die-with-parent",
    "--ro-bind",
    "/",
    "/",
    "--proc",
    "/proc",
    "--dev",
    "/dev",
)
Way = tuple[str, str, "Callable[[], None]"]
"""Who, what, and how it is done once; raises RuntimeError."""


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _process(argv: Sequence[str]) -> Callable[[], None]:
    def run() -> None:
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(str(error)) from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(said[-1] if said else f"exit status {done.returncode}")

    return run


def _call(client: Client, argv: Sequence[str], policy: str) -> Callable[[], None]:
    def run() -> None:
        done = client.run(list(argv), policy=policy)
        if done.outcome is None or done.outcome.exit_code != 0:
            raise RuntimeError(done.outcome.message if done.outcome else "it has no outcome")

    return run


def _ways(client: Client, policy: str) -> list[Way]:
    names = {one.name for one in client.policies()}
    found: list[Way] = []
    for title, argv, under in (("true", TRUE, policy), ("python3", PYTHON, "python")):
        found.append(("fork+exec", title, _process(argv)))
        if shutil.which("bwrap"):
            found.append(("bwrap", title, _process([*BWRAP, *argv])))
        if under in names:
            found.append(("sandboxd", title, _call(client, argv, under)))
    return found


def _rounds(ways: Sequence[Way], rounds: int) -> tuple[dict[tuple[str, str], list[float]], list[str]]:
    left, failed = list(ways), []
    taken: dict[tuple[str, str], list[float]] = {(who, what): [] for who, what, _ in ways}
    for number in range(-WARM_UP, rounds):
        for way in tuple(left):
            who, what, run = way
            began = time.perf_counter()
            try:
                run()
            except RuntimeError as error:
                if who == "sandboxd":
                    raise errors.HostFailed(f"a call of {what} did not succeed: {error}") from error
                left.remove(way)
                del taken[who, what]
                failed.append(f"{who} is left out of {what}: {error}")
                continue
            if number >= 0:
                taken[who, what].append(time.perf_counter() - began)
    return taken, failed


def _rate(run: Callable[[], None], callers: int, seconds: float) -> float:
    """Calls a second that so many callers get, each with one call at a time."""
    begin = time.monotonic()

    def caller(_: int) -> int:
        done = 0
        while time.monotonic() < begin + seconds:
            run()
            done += 1
        return done

    with ThreadPoolExecutor(callers) as several:
        total = sum(several.map(caller, range(callers)))
    return total / (time.monotonic() - begin)


def bench(
    *,
    rounds: Annotated[int, Parameter(alias="-n", help="Calls of each kind that are measured.")] = 50,
    seconds: Annotated[float, Parameter(help="How long each number of callers is measured.")] = 3.0,
    policy: Annotated[str, Parameter(help="The policy that `true` runs under.")] = "default",
    remote: Annotated[Remote, Parameter(name="*")] = REMOTE,
) -> None:
    """Measure what a call costs here, beside a bare process and bubblewrap where that is installed.

    It makes real calls, which are in the journal afterwards. Peers that fail are left out, with the reason.
    """
    if rounds < 1 or not 0 < seconds <= 600:
        raise errors.InvalidRequest("--rounds is at least 1, and --seconds above 0 and at most 600")
    client = remote.client()
    client.policy(policy)
    ways = _ways(client, policy)
    taken, failed = _rounds(ways, rounds)
    times: list[dict[str, Any]] = [
        {"what": what, "who": who, "calls": len(values)}
        | {f"p{each}_ms": round(percentile(values, each) * 1000, 2) for each in (50, 95, 99)}
        for (who, what), values in taken.items()
    ]
    run = _call(client, TRUE, policy)
    try:
        rates = [
            {"callers": number, "per_second": round(_rate(run, number, seconds), 1)} for number in CALLERS
        ]
    except RuntimeError as error:
        raise errors.HostFailed(f"a call of true did not succeed: {error}") from error
    if remote.json:
        terminal.print_json({"times": times, "throughput": rates, "left_out": failed})
        return
    bare = {one["what"]: one["p50_ms"] for one in times if one["who"] == "fork+exec"}
    rows = [
        (
            one["what"],
            one["who"],
            *(f"{one[f'p{each}_ms']:.1f}" for each in (50, 95, 99)),
            f"{one['p50_ms'] / bare[one['what']]:.1f}" if bare.get(one["what"]) else "-",
        )
        for one in times
    ]
    head = ("COMMAND", "BY", "P50 MS", "P95 MS", "P99 MS", "TIMES FORK+EXEC")
    terminal.print_rows(head, rows, empty="nothing could be measured")
    print()
    shown = [(one["callers"], f"{one['per_second']:.0f}") for one in rates]
    terminal.print_rows(("CALLERS AT ONCE", "CALLS A SECOND"), shown, empty="nothing could be measured")
    for line in failed:
        terminal.complain(line)
