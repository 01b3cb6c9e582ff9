"""``run-in-sandbox --batch``: many requests in one, and a line of JSON for each as it ends."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from sandboxd import errors
from sandboxd.client import location, transport, wire

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]

OURS, OTHERS = 125, 1


def run(options: argparse.Namespace) -> int:
    """0 if every command exited with 0, 125 if a request was refused or one failed, else 1."""
    from sandboxd.cli.run import ANSWER_TIMEOUT, CONNECT_TIMEOUT, fail, print_json  # noqa: PLC0415 - it has us

    status = 0
    try:
        document: dict[str, Any] = {"requests": _requests(options.batch)}
        if options.parallel is not None:
            document["parallel"] = options.parallel
        body = json.dumps(document).encode()
        exchange = wire.Exchange("POST", wire.target("batches"), body, waits=True)
        paths = location.candidates(options.socket, os.environ)
        with transport.exchange(
            paths, exchange, connect_timeout=CONNECT_TIMEOUT, timeout=ANSWER_TIMEOUT
        ) as answer:
            for line in answer.lines():
                found = wire.parse_json(line)
                if not isinstance(found, dict):
                    raise wire.protocol_error("a result that is no object")
                print_json(found)
                status = max(status, _status(found))
    except errors.SandboxdError as error:
        return fail(error, as_json=options.json)
    return status


def _requests(name: str) -> list[Any]:
    """The requests of a file. Raises InvalidRequest."""
    try:
        if name == "-":
            lines = sys.stdin.buffer.read().splitlines()
        else:
            with open(name, "rb") as file:  # noqa: PTH123 - pathlib costs start-up
                lines = file.read().splitlines()
    except OSError as error:
        raise errors.InvalidRequest(
            f"--batch: cannot read {name!r}: {error.strerror}", field="batch"
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError:
            raise errors.InvalidRequest(
                f"--batch: line {number} of {name!r} is not JSON", field="batch"
            ) from None
    if not found:
        raise _wrong(f"no request is in {name!r}")
    return found


def _wrong(what: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"--batch: {what}", field="batch")


def _status(found: dict[str, Any]) -> int:
    outcome = (found.get("invocation") or {}).get("outcome") or {}
    if outcome.get("cause") in {None, "failed", "denied"}:
        return OURS
    return 0 if outcome.get("cause") == "exited" and not outcome.get("exit_code") else OTHERS
