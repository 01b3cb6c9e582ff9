"""``run-in-sandbox --batch``: many requests in one, and a line of JSON for each as it ends.

What the options say is meant for each request that does not say so itself. If the daemon dies, this waits
for the next one and asks for what is not answered.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from sandboxd import errors
from sandboxd.cli.usage import visible
from sandboxd.client import location, transport, wire
from sandboxd.client.patience import RECONNECT, Patience
from sandboxd.client.unanswered import Unanswered

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["run"]

OURS, OTHERS, CANCELLED = 125, 1, 130
MERGED = frozenset({"env", "labels", "limits"})
SHOWN = 3  # problems that are said on standard error too


def run(options: argparse.Namespace) -> int:
    """0 if every command exited with 0, 125 if a request was refused or one failed, else 1."""
    from sandboxd.cli.run import fail, print_json, say, settings  # noqa: PLC0415 - it has us

    status, problems = 0, 0
    try:
        lines, requests = _requests(options.batch)
        defaults = settings(options)
        left = Unanswered([_with(request, defaults) for request in requests], options.parallel)
        for index, found in _results(location.candidates(options.socket, os.environ), left, say):
            line = lines[index]
            problem = found.get("problem")
            if isinstance(problem, dict):
                problem["detail"] = f"line {line}: {problem.get('detail', '')}"
                problems += 1
                if problems <= SHOWN:
                    say(visible(problem["detail"]))
                    for said in _told(problem):
                        say(said)
            print_json({"index": index, "line": line} | found | {"index": index})
            status = max(status, _status(found))
    except errors.SandboxdError as error:
        return fail(error, as_json=options.json)
    except KeyboardInterrupt:
        return CANCELLED
    if problems > SHOWN:
        say(f"{problems - SHOWN} more were refused")
    return status


def _results(
    paths: Sequence[str], left: Unanswered, say: Callable[[str], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What came of each request, by its number, from however many daemons."""
    from sandboxd.cli.run import ANSWER_TIMEOUT, CONNECT_TIMEOUT  # noqa: PLC0415 - as above

    patience, known = Patience(RECONNECT), False
    while True:
        cut: errors.SandboxdError
        try:
            with transport.exchange(
                paths, left.exchange(), connect_timeout=CONNECT_TIMEOUT, timeout=ANSWER_TIMEOUT
            ) as answer:
                known = True
                for line in answer.lines():
                    found = wire.document(line, "a result")
                    index = left.told(*_numbered(found))
                    if index is not None:
                        patience.renew()
                        yield index, found
            cut = left.cut()
        except (errors.Unavailable, errors.Draining) as error:
            known = known or error.details.get("reason") == "lost"
            if not known:
                raise
            cut = error
        if not left:
            return
        patience.wait(cut, say)


def _told(problem: dict[str, Any]) -> list[str]:
    """In what a request differs from the one that its key stands for, if that is the problem."""
    if problem.get("code") != errors.KeyConflict.code or not isinstance(problem.get("details"), dict):
        return []
    from sandboxd.cli import conflict  # noqa: PLC0415 - only then

    return conflict.told(problem["details"])


def _numbered(found: dict[str, Any]) -> tuple[int, str | None]:
    """The number of a result, and the code of its problem."""
    index, problem = found.get("index"), found.get("problem")
    if not isinstance(index, int):
        raise wire.protocol_error("a result without a number")
    return index, str(problem.get("code")) if isinstance(problem, dict) else None


def _requests(name: str) -> tuple[list[int], list[Any]]:
    """The requests of a file, and the lines that they are on. Raises InvalidRequest."""
    try:
        if name == "-":
            text = sys.stdin.buffer.read().splitlines()
        else:
            with open(name, "rb") as file:  # noqa: PTH123 - pathlib costs start-up
                text = file.read().splitlines()
    except OSError as error:
        raise _wrong(f"cannot read {name!r}: {error.strerror}") from None
    lines, found = [], []
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            raise _wrong(f"line {number} of {name!r} is not JSON") from None
        lines.append(number)
    if not found:
        raise _wrong(f"no request is in {name!r}")
    return lines, found


def _with(request: Any, defaults: dict[str, Any]) -> Any:
    """A request with what it does not say itself; one that is no object the daemon refuses."""
    if not isinstance(request, dict):
        return request
    full = defaults | request
    for name in MERGED & defaults.keys():
        own = request.get(name, {})
        full[name] = defaults[name] | own if isinstance(own, dict) else own
    return full


def _wrong(what: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"--batch: {what}", field="batch")


def _status(found: dict[str, Any]) -> int:
    outcome = (found.get("invocation") or {}).get("outcome") or {}
    if outcome.get("cause") in {None, "failed", "denied"}:
        return OURS
    return 0 if outcome.get("cause") == "exited" and not outcome.get("exit_code") else OTHERS
