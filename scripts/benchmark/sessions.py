"""What a session costs: calls in it beside those in none, what is done between calls; and as it grows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import sandboxes
from measure import in_turn

from sandboxd import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sandboxd.models import Invocation

__all__ = ["sessions"]

TEN = "import os\nfor n in range(10): open(f'f{n}', 'w').write(str(os.getpid()) * 500)"
FILES = 100_000
MANY = """
import os
for directory in range(100):
    os.makedirs(f"d{directory}")
    for number in range(%d): open(f"d{directory}/f{number}", "w").close()
"""


def sessions(images: Path, quick: bool, until: float, tell: Callable[[str], None]) -> dict[str, Any]:  # noqa: FBT001
    """Milliseconds of calls in and out of sessions, in turn; and of what is done between."""
    rounds, files, long = (20, 1000, 50) if quick else (150, FILES, 1000)
    config = "pool: {min: 3, max: 6}\nbudget: {memory: 90%}\n"
    with sandboxes.start(images, config) as daemon:
        client = Client(daemon.socket)
        found: dict[str, Any] = {"calls": _calls(client, rounds, until)}
        tell(f"{found}\n")
        client.create_session("large")
        _ran(client, ["python3", "-c", MANY % (files // 100)], session="large", policy="roomy")
        client.create_session("long")
        for number in range(long):
            if time.monotonic() > until:
                break
            _ran(client, ["sh", "-c", f"echo {number} > f{number % 50}"], session="long")
        found["files"], found["length"] = files, client.session("long").calls
        found["grown"] = in_turn(
            {
                "none": lambda: _ran(client, ["true"]),
                "empty": lambda: _ran(client, ["true"], session="empty"),
                "many files": lambda: _ran(client, ["true"], session="large"),
                "many calls": lambda: _ran(client, ["true"], session="long"),
            },
            rounds,
            until,
        )
        tell(f"{found['grown']}\n")
        origin = client.checkpoints("large").checkpoints[0].id
        found["moves"] = in_turn(
            {
                "fork": lambda: client.fork_session("large"),
                "rollback": lambda: client.rollback_session("large", origin),
                "read of one": lambda: client.session("large"),
            },
            min(rounds, 60),
            until,
        )
        tell(f"{found['moves']}\n")
    return found


def _calls(client: Client, rounds: int, until: float) -> dict[str, dict[str, float]]:
    client.create_session("empty")
    client.create_session("read")
    client.create_session("written")
    write, nothing = ["python3", "-c", TEN], ["python3", "-c", "pass"]
    return in_turn(
        {
            "true": lambda: _ran(client, ["true"]),
            "true, in a session": lambda: _ran(client, ["true"], session="empty"),
            "no file": lambda: _ran(client, nothing, policy="python"),
            "no file, in a session": lambda: _ran(client, nothing, session="read", policy="python"),
            "ten files": lambda: _ran(client, write, policy="python"),
            "ten files, in a session": lambda: _ran(client, write, session="written", policy="python"),
        },
        rounds,
        until,
    )


def _ran(client: Client, argv: list[str], **options: Any) -> Invocation:
    call = client.run(argv, **options)
    if call.outcome is None or call.outcome.exit_code != 0:
        raise RuntimeError(f"{argv[:2]}: {call.outcome} {call.stderr}")
    return call
