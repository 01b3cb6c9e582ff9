"""``run-in-sandbox``: run one command in a sandbox, as if it ran here.

Theory of operation. One connection carries the request and, as ndjson, the events of the call; output
events are written to descriptors 1 and 2 as they come, and the last event holds the invocation. With
``-i`` a thread reads descriptor 0 and sends it over connections of its own (``cli.stdin``). SIGINT and
SIGTERM start a thread that asks the daemon to cancel; the main thread goes on reading until the call has
ended, so that nothing that the tool wrote is lost. If this process dies, the daemon sees the connection
close and cancels the call, unless it has a key. If the daemon dies, this waits for the next one and goes on
from the last event that it has.

Agents start this for every tool call: only the standard library is imported, and as little of it as
possible.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from sandboxd import errors
from sandboxd.cli import usage
from sandboxd.cli.verdict import exit_status, explain
from sandboxd.client import location, packing, transport, wire
from sandboxd.client.patience import RECONNECT, Patience

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import FrameType

__all__ = ["main"]

CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 60.0  # seconds for a write, and for an answer that does not wait for a tool
CANCEL_TIMEOUT = 15.0  # seconds that a cancelled call may take to end before we leave
CANCELLED = 130
OURS = 125


def say(text: str) -> None:
    """One line on standard error; a closed standard error is no reason to fail."""
    with contextlib.suppress(OSError):
        write(2, f"run-in-sandbox: {text}\n".encode("utf-8", "backslashreplace"))


def write(fd: int, data: bytes) -> None:
    """Write all of ``data``, also to a descriptor that somebody else made non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


def die_of_sigpipe() -> NoReturn:
    """End as a filter does whose reader went away; the daemon sees the connection close."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(128 + signal.SIGPIPE)  # where the signal is blocked


class Call:
    """One call from here: its connection, its id once that is known, and how we were interrupted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.paths = location.candidates(options.socket, os.environ)
        self.json: bool = options.json
        self.interrupted = False
        self.stdin_error: errors.SandboxdError | None = None
        self.error: errors.SandboxdError | None = None
        """Why there is no invocation."""
        self.invocation: dict[str, Any] | None = None
        """Once it has ended."""
        self._interactive: bool = options.interactive
        self._keyed: bool = options.key is not None
        self._after = 0
        self._id: str | None = None
        self._known = threading.Event()

    def ask(self, exchange: wire.Exchange) -> transport.Answer:
        """Perform one exchange."""
        return transport.exchange(
            self.paths, exchange, connect_timeout=CONNECT_TIMEOUT, timeout=ANSWER_TIMEOUT
        )

    def run(self, body: bytes) -> dict[str, Any]:
        """Send the request, pass its output on, and return the invocation."""
        headers = {"Accept": "application/x-ndjson"}
        asked = wire.Exchange("POST", wire.target("invocations"), body, headers, waits=True)
        exchange, patience = asked, Patience(RECONNECT)
        while True:
            try:
                with self.ask(exchange) as answer:
                    ended = self._follow(answer, patience)
                    if ended is not None:
                        return ended
                    raise wire.lost("before the call did")
            except errors.Pruned:  # since its last event that came
                if self._id is None:
                    raise
                with self.ask(wire.Exchange("GET", wire.invocation_target(self._id))) as answer:
                    return wire.document(answer.read(), "an invocation")
            except (errors.Unavailable, errors.Draining) as error:
                again = patience.waited or (self._keyed and error.details.get("reason") == "lost")
                if self._id is None and not again:
                    raise
                patience.wait(error, say)
                if self._id is not None:
                    target = wire.invocation_target(self._id, "events", after=self._after, follow=1)
                    exchange = wire.Exchange("GET", target, headers=headers, waits=True)

    def _follow(self, answer: transport.Answer, patience: Patience) -> dict[str, Any] | None:
        """Pass on the output of one answer; the invocation, if its end was told."""
        for line in answer.lines():
            event = wire.document(line, "an event")
            patience.renew()
            if "id" in event:
                self._accepted(str(event["id"]))
            if event.get("type") == "output" and not self.json:
                self._output(event)
            elif event.get("type") == "unrecorded":
                error = event.get("error")
                why = error.get("message") if isinstance(error, dict) else "the daemon could not record how"
                say(f"{why}; waiting")
            elif event.get("type") == "ended" and isinstance(event.get("invocation"), dict):
                return dict(event["invocation"])
            self._after = int(event.get("seq", self._after))
        return None

    def _accepted(self, id: str) -> None:  # noqa: A002 - the field's name
        if self._id is not None:
            return
        self._id = id
        self._known.set()
        if self._interactive:
            from sandboxd.cli import stdin  # noqa: PLC0415 - only with -i

            threading.Thread(target=stdin.send, args=(self, id), daemon=True).start()

    @staticmethod
    def _output(event: dict[str, Any]) -> None:
        try:
            carried = event["data"]
            text = carried.get("text")
            data = base64.b64decode(carried["base64"]) if text is None else text.encode()
            fd = {"stdout": 1, "stderr": 2}[event["stream"]]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise wire.protocol_error("an output event without data") from None
        try:
            write(fd, data)
        except BrokenPipeError:
            die_of_sigpipe()
        except OSError as error:
            raise errors.HostFailed(f"cannot write the tool's {event['stream']}: {error.strerror}") from None

    def interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM: the first cancels the call, the second leaves at once."""
        if self.interrupted:
            os._exit(CANCELLED)
        self.interrupted = True
        threading.Thread(target=self._cancel_and_leave, daemon=True).start()

    def _cancel_and_leave(self) -> None:
        # Without an id the request is not accepted yet, and hanging up is all there is to do.
        if self._known.wait(2.0):
            self.cancel()
            time.sleep(CANCEL_TIMEOUT)
        os._exit(CANCELLED)

    def cancel(self) -> None:
        """Ask the daemon to end the call; it may have ended meanwhile."""
        with contextlib.suppress(errors.SandboxdError):
            self.ask(wire.Exchange("POST", wire.invocation_target(self._id or "", "cancel"), b"")).close()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of a request, its command and its content aside. Raises InvalidRequest."""
    document: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("policy", "session", "cwd", "deadline", "priority")
        if getattr(options, name) is not None
    }
    if options.callback is not None:
        document["callback"] = {"unix" if options.callback.startswith("/") else "exec": options.callback}
    limits = {"wall": options.timeout, "memory": options.memory}
    document["limits"] = {name: value for name, value in limits.items() if value is not None}
    document |= {"env": dict(options.env), "labels": dict(options.label)}
    found = {key: value for key, value in document.items() if value != {}}
    _encoded(found)
    return found


def request(options: argparse.Namespace) -> tuple[bytes, list[str]]:
    """The request as JSON, and what was left out of it. Raises InvalidRequest and TooLarge."""
    packed = packing.pack(options.input)
    document: dict[str, Any] = {"argv": [_argument(item) for item in options.argv]} | settings(options)
    document |= {} if options.key is None else {"key": options.key}
    document |= {"inputs": packed.inputs} if packed.inputs else {}
    document |= {} if packed.tar is None else {"tar": packed.tar}
    document["stdin"] = "stream" if options.interactive else "none"
    return _encoded(document), packed.left_out


def _encoded(document: dict[str, Any]) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise errors.InvalidRequest("an option holds bytes that are not UTF-8", field="request") from None


def _argument(value: str) -> str | dict[str, str]:
    raw = os.fsencode(value)
    encoded = packing.encode(raw)
    return encoded.get("text", encoded) if "text" in encoded else encoded


def save(call: Call, invocation: dict[str, Any], directory: str) -> None:
    """Save the released artifacts below ``directory``. Raises SandboxdError."""
    from sandboxd.client.destination import Destination  # noqa: PLC0415 - only with --artifacts

    with Destination(directory) as destination:
        for one in invocation.get("artifacts", []):
            path, size, digest = str(one["path"]), int(one["size"]), str(one["digest"])
            with destination.incoming(path, size, digest, executable=bool(one.get("executable"))) as incoming:
                target = wire.artifact_target(str(invocation["id"]), path)
                with call.ask(wire.Exchange("GET", target, headers={"Accept": "*/*"})) as answer:
                    for chunk in answer.chunks():
                        incoming.write(chunk)
                incoming.commit()


def problem(error: errors.SandboxdError) -> dict[str, Any]:
    """The problem document (RFC 9457) of an error, as the daemon writes it."""
    status = getattr(error, "status", 503 if isinstance(error, errors.Unavailable) else 500)
    document = {"type": "about:blank", "title": type(error).__name__, "status": status}
    document |= {"code": error.details.get("code", error.code), "detail": str(error)}
    details = {key: value for key, value in error.details.items() if key not in {"code", "status"}}
    return document | ({"details": details} if details else {})


def print_json(document: dict[str, Any]) -> None:
    """One JSON object and a newline on standard output."""
    try:
        write(
            1,
            json.dumps(document, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n",
        )
    except BrokenPipeError:
        die_of_sigpipe()


def fail(error: errors.SandboxdError, *, as_json: bool) -> int:
    """Say what we failed at; the status is 125 whatever it is."""
    for line in usage.visible(str(error)).split("\\n")[:8]:
        say(line)
    if isinstance(error, errors.KeyConflict):
        from sandboxd.cli import conflict  # noqa: PLC0415 - only then

        for line in conflict.told(error.details):
            say(line)
    if as_json:
        print_json(problem(error))
    return OURS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the status to exit with."""
    options = usage.parse(sys.argv[1:] if arguments is None else arguments)
    if options.batch is not None:
        from sandboxd.cli import batch  # noqa: PLC0415 - only with --batch

        return batch.run(options)
    call = Call(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, call.interrupt)
    if options.workspace is not None:
        return _run_on_directory(call, options)
    return _run(call, options)


def _run_on_directory(call: Call, options: argparse.Namespace) -> int:
    """Run in a session that stands on a directory, and say what changed in it."""
    from sandboxd.cli import standing  # noqa: PLC0415 - only with --workspace

    try:
        with standing.standing(options, say) as place:
            options.session = place.named
            status = _run(call, options)
            if call.interrupted or call.invocation is None:
                place.refused(call.error)
                return status
            brought = place.report(call.invocation)
    except errors.SandboxdError as error:
        return fail(error, as_json=options.json)
    return status or (0 if brought else OURS)


def _run(call: Call, options: argparse.Namespace) -> int:
    try:
        body, left_out = request(options)
        if left_out:
            more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
            say(f"not sent: {', '.join(usage.visible(one) for one in left_out[:3])}{more}")
        invocation = call.run(body)
    except errors.SandboxdError as error:
        if call.interrupted:
            return CANCELLED
        call.error = error
        return fail(error, as_json=options.json)
    call.invocation = invocation
    return _finish(call, invocation, options)


def _finish(call: Call, invocation: dict[str, Any], options: argparse.Namespace) -> int:
    """Save, print and explain; a failure of ours after a good end is still a failure."""
    status = exit_status(invocation)
    for line in explain(invocation, artifacts=options.artifacts is not None):
        say(line)
    if options.artifacts is not None:
        try:
            save(call, invocation, options.artifacts)
        except (errors.SandboxdError, KeyError, TypeError, ValueError) as error:
            say(f"artifacts: {usage.visible(str(error))}")
            status = status or OURS
    if options.json:
        print_json(invocation)
    if call.stdin_error is not None:
        say(f"standard input was not delivered: {usage.visible(str(call.stdin_error))}")
        return OURS
    return CANCELLED if call.interrupted else status


if __name__ == "__main__":
    sys.exit(main())
