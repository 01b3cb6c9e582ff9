"""``sandboxd replay``: run a recorded call, or those of a session, again, and see what differs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.calls import AlsoRemote, find
from sandboxd.cli.options import REMOTE
from sandboxd.client import wire

if TYPE_CHECKING:
    from sandboxd import models
    from sandboxd.cli.options import Remote
    from sandboxd.client import Client

__all__ = ["replay"]

SHOWN = 100  # characters of a value


def replay(
    id_: Annotated[str, Parameter(help="The id of a call, or the beginning of it; or a session.")],
    /,
    *,
    policy: Annotated[
        str | None, Parameter(help="Run it under this policy, not under that of its record.")
    ] = None,
    keep: Annotated[
        bool, Parameter(negative="", help="Of a session: keep the one that its calls ran in.")
    ] = False,
    remote: AlsoRemote = REMOTE,
) -> int:
    """Run a recorded call, or all of a session, again, and say what differs; status 1 if anything does."""
    client = remote.client()
    if _is_session(client, id_):
        return _session(client, id_, policy, remote, keep=keep)
    if keep:
        raise errors.InvalidRequest(f"--keep is of a session, and {id_!r} is none", field="keep")
    found = client.replay(find(client, id_), policy=policy)
    if remote.json:
        terminal.print_json(terminal.wire(found))
        return 1 if found.differs else 0
    _told(found)
    for text in found.not_captured:
        print(f"not captured: {text}")
    return 1 if found.differs else 0


def _is_session(client: Client, named: str) -> bool:
    try:
        client.session(named)
    except errors.NotFound:
        return False
    return True


def _session(client: Client, named: str, policy: str | None, remote: Remote, *, keep: bool) -> int:
    ended: models.SessionReplay | None = None
    with client.replay_session(named, policy=policy, keep=keep) as events:
        for event in events:
            ended = event.ended or ended
            if remote.json:
                print(json.dumps(terminal.wire(event)), flush=True)
            elif event.call is not None:
                _told_call(event.call)
    if ended is None:
        raise wire.lost("before all calls had run")
    if not remote.json:
        counts = (f"{ended.same} the same", f"{ended.differing} differing")
        more = (
            f"{ended.skipped} not run" if ended.skipped else "",
            f"{ended.failed} refused" if ended.failed else "",
        )
        print(", ".join([*counts, *filter(None, more)]))
        for one in ended.kept:
            print(f"kept: {one}")
        for text in ended.not_captured:
            print(f"not captured: {text}")
    return 1 if ended.differing or ended.failed else 0


def _told_call(call: models.ReplayedCall) -> None:
    if call.replay is not None:
        _told(call.replay)
    elif call.skipped is not None:
        print(f"{call.recorded} did not run: {call.skipped}")
    elif call.problem is not None:
        terminal.print_text(f"{call.recorded} was refused: {call.problem.detail}")


def _told(found: models.Replay) -> None:
    print(f"{found.recorded} ran again as {found.replayed.id}")
    terminal.print_text(f"the same: {', '.join(found.same) or 'nothing'}")
    for one in found.differs:
        values = f"recorded {_shown(one.recorded)}, replayed {_shown(one.replayed)}"
        terminal.print_text(f"differs: {one.what}: {values}")


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:SHOWN]
