"""``sandboxd replay``: run a recorded call again, and see what differs."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from sandboxd.cli import terminal
from sandboxd.cli.calls import AlsoRemote, Id, find
from sandboxd.cli.options import REMOTE

__all__ = ["replay"]

SHOWN = 100  # characters of a value


def replay(
    call_id: Id,
    *,
    policy: Annotated[
        str | None, Parameter(help="Run it under this policy, not under that of its record.")
    ] = None,
    remote: AlsoRemote = REMOTE,
) -> int:
    """Run a recorded call again in a fresh container, and say what differs; status 1 if anything does."""
    client = remote.client()
    found = client.replay(find(client, call_id), policy=policy)
    if remote.json:
        terminal.print_json(terminal.wire(found))
        return 1 if found.differs else 0
    print(f"{found.recorded} ran again as {found.replayed.id}")
    print(f"the same: {', '.join(found.same) or 'nothing'}")
    for one in found.differs:
        print(f"differs: {one.what}: recorded {_shown(one.recorded)}, replayed {_shown(one.replayed)}")
    for text in found.not_captured:
        print(f"not captured: {text}")
    return 1 if found.differs else 0


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:SHOWN]
