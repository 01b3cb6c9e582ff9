"""Both clients against a real socket: the same calls, the same answers, the same errors."""

from __future__ import annotations

import hashlib
import inspect
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from api_server import HEX, ID, Exchange, event, invocation, output

import sandboxd
from sandboxd import AsyncClient, Client, errors, models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from api_server import ApiServer


class Both:
    """One method by name on either client; a stream becomes the list of its items."""

    def __init__(self, kind: str, path: Path, **options: Any) -> None:
        self.kind = kind
        self._path = path
        self._options = options

    def __call__(self, name: str, *arguments: Any, **fields: Any) -> Any:
        if self.kind == "sync":
            found = getattr(Client(self._path, **self._options), name)(*arguments, **fields)
            return list(found) if hasattr(found, "close") else found

        async def run() -> Any:
            client = AsyncClient(self._path, **self._options)
            found = await getattr(client, name)(*arguments, **fields)
            return [item async for item in found] if hasattr(found, "aclose") else found

        return anyio.run(run)


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, api: ApiServer) -> Both:
    return Both(request.param, api.socket, timeout=5.0, reconnect=0)


def leaves(root: type[errors.SandboxdError] = errors.SandboxdError) -> Iterator[type[errors.SandboxdError]]:
    for child in root.__subclasses__():
        yield child
        yield from leaves(child)


def test_run_sends_what_was_asked_and_gives_back_the_invocation(client: Both, api: ApiServer) -> None:
    api.json("POST", "invocations", invocation("exited"))
    found = client(
        "run",
        ["cat", b"\xff", "ü"],
        policy="python",
        inputs={"a": "text", "b": b"\xff"},
        env={"A": "1"},
        deadline="1.5s",
        stdin=b"in",
    )
    assert isinstance(found, models.Invocation)
    assert found.outcome is not None
    assert found.outcome.cause == "exited"
    seen = api.requests[0]
    assert seen.headers["Content-Type"] == "application/json"
    assert seen.json() == {
        "argv": ["cat", {"base64": "/w=="}, "ü"],
        "policy": "python",
        "inputs": [{"path": "a", "content": {"text": "text"}}, {"path": "b", "content": {"base64": "/w=="}}],
        "env": {"A": "1"},
        "deadline": 1_500_000,
        "stdin": {"text": "in"},
    }


def test_how_a_tool_ended_is_never_an_exception(client: Both, api: ApiServer) -> None:
    for cause in models.Cause:
        api.json("POST", "invocations", invocation(cause.value))
        assert client("run", ["true"]).outcome.cause == cause


def test_start_asks_for_an_answer_at_once(client: Both, api: ApiServer) -> None:
    api.json("POST", "invocations", invocation(None), 202)
    assert client("start", ["true"]).state == "running"
    assert api.requests[0].headers["Prefer"] == "respond-async"


@pytest.mark.parametrize("kind", list(leaves()), ids=lambda kind: kind.code)
def test_a_problem_becomes_its_class(client: Both, api: ApiServer, kind: type[errors.SandboxdError]) -> None:
    status = getattr(kind, "status", 500)
    api.on("GET", "health", lambda one: one.problem(status, kind.code, "why", limit=3, message="m"))
    with pytest.raises(errors.SandboxdError) as caught:
        client("health")
    assert type(caught.value) is kind
    assert str(caught.value) == "why"
    assert caught.value.details == {"limit": 3, "message": "m"}


@pytest.mark.parametrize(("status", "kind"), [(418, errors.Refused), (500, errors.SandboxdError)])
def test_a_code_of_a_newer_daemon_is_kept(
    client: Both, api: ApiServer, status: int, kind: type[Exception]
) -> None:
    api.on("GET", "health", lambda one: one.problem(status, "from_the_future", "why"))
    with pytest.raises(kind) as caught:
        client("health")
    assert type(caught.value) is kind
    assert getattr(caught.value, "details") == {"code": "from_the_future", "status": status}  # noqa: B009 - not on Exception


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "lost"),
        (b"SSH-2.0-OpenSSH_9\r\n", "protocol"),
        (b"\x00\xff" * 40_000, "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", "lost"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "protocol"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnope", "protocol"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "any"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n{", "lost"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "protocol"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 2\r\n\r\nno", "protocol"),
        (
            b"HTTP/1.1 500 X\r\nContent-Type: application/problem+json\r\nContent-Length: 2\r\n\r\n[]",
            "protocol",
        ),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", "protocol"),
    ],
)
def test_a_peer_that_is_no_daemon_is_unavailable(
    client: Both, api: ApiServer, data: bytes, reason: str
) -> None:
    api.raw("GET", "health", data)
    with pytest.raises(errors.Unavailable) as caught:
        client("health")
    assert reason in {"any", caught.value.details["reason"]}


def test_a_slow_daemon_times_out(api: ApiServer) -> None:
    release = threading.Event()
    api.on("GET", "health", lambda _: (release.wait(10), None)[1])
    for kind in ("sync", "async"):
        started = time.monotonic()
        with pytest.raises(errors.Unavailable, match=r"0\.2 s") as caught:
            Both(kind, api.socket, timeout=0.2)("health")
        assert caught.value.details["reason"] == "timeout"
        assert time.monotonic() - started < 5
    release.set()


def test_waiting_for_a_call_is_not_bounded_by_the_timeout(api: ApiServer) -> None:
    def route(exchange: Exchange) -> None:
        time.sleep(0.5)
        exchange.json(invocation())

    api.on("POST", "invocations", route)
    for kind in ("sync", "async"):
        assert Both(kind, api.socket, timeout=0.2)("run", ["sleep"]).id == ID


@pytest.mark.parametrize("kind", ["sync", "async"])
class TestNoDaemon:
    def test_no_socket(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(errors.Unavailable, match="sandboxd serve") as caught:
            Both(kind, tmp_path / "none")("health")
        assert caught.value.details == {"reason": "absent", "tried": [str(tmp_path / "none")]}

    def test_stale_socket(self, kind: str, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "s"))
        with pytest.raises(errors.Unavailable, match="nothing listens") as caught:
            Both(kind, tmp_path / "s")("health")
        assert caught.value.details["reason"] == "refused"

    def test_path_too_long(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(errors.Unavailable, match="too long"):
            Both(kind, tmp_path / ("x" * 120))("health")

    def test_nul_in_the_path(self, kind: str) -> None:
        with pytest.raises(errors.Unavailable):
            Both(kind, Path("/tmp/a\0b"))("health")

    def test_a_full_backlog_times_out(self, kind: str, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
            busy.bind(str(tmp_path / "s"))
            busy.listen(0)
            first.connect(str(tmp_path / "s"))
            with pytest.raises(errors.Unavailable) as caught:
                Both(kind, tmp_path / "s", connect_timeout=0.3)("health")
        assert caught.value.details["reason"] == "timeout"


def test_no_permission_names_the_group() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX) as there:
        Path(directory).chmod(0o755)
        there.bind(f"{directory}/s")
        there.listen()
        Path(f"{directory}/s").chmod(0o660)
        found = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, f"{directory}/s"], capture_output=True, text=True, check=True
        )
    assert found.stdout.startswith("permission ")
    assert "(group root, mode 0660)" in found.stdout


AS_NOBODY = """
import grp, os, sys
from sandboxd import errors
from sandboxd.client import transport
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    transport.connect([sys.argv[1]], 1)
except errors.Unavailable as error:
    print(error.details["reason"], error)
"""


def test_events_arrive_typed_and_end_with_ended(client: Both, api: ApiServer) -> None:
    api.events(
        event(1, "accepted", id=ID),
        output(2, {"base64": "/w=="})[:20],
        output(2, {"base64": "/w=="})[20:] + event(3, "ended", invocation=invocation()),
    )
    found = client("stream", ["true"])
    assert [one.type for one in found] == ["accepted", "output", "ended"]
    assert found[1].data.decode() == b"\xff"
    assert api.requests[0].headers["Accept"] == "application/x-ndjson"


@pytest.mark.parametrize("finish", [True, False])
def test_a_cut_stream_says_where_to_resume(client: Both, api: ApiServer, finish: bool) -> None:  # noqa: FBT001 - pytest passes it
    api.events(
        output(4, {"text": "x"}),
        output(7, {"text": "y"}),
        method="GET",
        path=f"invocations/{ID}/events",
        finish=finish,
    )
    with pytest.raises(errors.Unavailable) as caught:
        client("events", ID, after=3)
    assert caught.value.details == {"reason": "lost", "after": 7}
    assert api.requests[0].query == {"after": "3", "follow": "1"}


def test_events_so_far_need_no_end(client: Both, api: ApiServer) -> None:
    api.events(output(1, {"text": "x"}), method="GET", path=f"invocations/{ID}/events")
    assert len(client("events", ID, follow=False)) == 1


def test_raw_streams(client: Both, api: ApiServer) -> None:
    data = bytes(range(256)) * 10_000
    for name in ("stdout", "stderr"):
        api.on("GET", f"invocations/{ID}/{name}", lambda one: one.send(data))
        assert b"".join(client(name, ID, offset=5)) == data
    assert api.requests[0].query == {"offset": "5", "follow": "0"}


def test_wait(client: Both, api: ApiServer) -> None:
    api.json("GET", f"invocations/{ID}", invocation(None))
    api.events(event(9, "ended", invocation=invocation()), method="GET", path=f"invocations/{ID}/events")
    assert client("wait", ID).outcome.cause == "exited"
    api.json("GET", f"invocations/{ID}", invocation("memory"))
    assert client("wait", ID).outcome.cause == "memory"


def test_wait_times_out_and_the_call_runs_on(client: Both, api: ApiServer) -> None:
    release = threading.Event()

    def route(exchange: Exchange) -> None:
        exchange.chunked([event(1, "accepted", id=ID)], finish=False)
        release.wait(10)

    api.json("GET", f"invocations/{ID}", invocation(None))
    api.on("GET", f"invocations/{ID}/events", route)
    with pytest.raises(TimeoutError):
        client("wait", ID, timeout=0.2)
    release.set()


def test_stdin_is_streamed_at_its_offset(client: Both, api: ApiServer) -> None:
    api.on("POST", f"invocations/{ID}/stdin", lambda one: one.json({"offset": 7 + len(one.seen.body)}))
    data = b"x" * 300_000
    assert client("write_stdin", ID, data, offset=7, eof=False) == 7 + len(data)
    assert api.requests[0].body == data
    assert api.requests[0].query == {"offset": "7", "eof": "0"}


def test_a_body_that_is_refused_half_way_gives_the_refusal(client: Both, api: ApiServer) -> None:
    def route(exchange: Exchange) -> None:
        exchange.problem(409, "state_conflict", "it has ended")
        exchange.close_connection = True

    route.streams = True  # type: ignore[attr-defined]
    api.on("POST", f"invocations/{ID}/stdin", route)
    with pytest.raises(errors.StateConflict):
        client("write_stdin", ID, b"x" * 8_000_000)


def test_small_calls(client: Both, api: ApiServer) -> None:
    api.on("POST", f"invocations/{ID}/signal", lambda one: one.send(b"", 204))
    api.json("POST", f"invocations/{ID}/cancel", invocation("cancelled"))
    api.json("GET", "invocations", {"invocations": [invocation()], "next": ID})
    api.json("GET", "policies", {"policies": []})
    api.json(
        "POST",
        "policies/check",
        {"problems": [{"file": "f", "line": 1, "column": 2, "code": "c", "message": "m"}]},
    )
    api.json("POST", "plans", {"digest": HEX, "plan": {}, "explain": []})
    api.json("GET", "images", {"images": []})
    client("signal", ID, "SIGTERM")
    assert api.requests[-1].json() == {"signal": "SIGTERM"}
    assert client("cancel", ID).outcome.cause == "cancelled"
    assert client("list", state="running", label="a=b", limit=5).next == ID
    assert api.requests[-1].query == {"state": "running", "label": "a=b", "limit": "5"}
    assert client("policies") == []
    assert str(client("check_policy", "x: y", "n")[0]) == "f:1:2: m"
    assert client("plan", ["true"]).digest == HEX
    assert client("images") == []


def test_an_id_is_not_a_path(client: Both, api: ApiServer) -> None:
    for hostile in ("../policies", "", "a/b", "x?y=1", "a\r\nb", "x" * 100):
        with pytest.raises(errors.InvalidRequest):
            client("get", hostile)
    assert api.requests == []


def test_what_is_no_request_is_refused_here(client: Both, api: ApiServer) -> None:
    for argv, fields in (([], {}), ("ls -l", {}), (["a"], {"deadline": "soon"}), (["a"], {"nonsense": 1})):
        with pytest.raises(errors.InvalidRequest):
            client("run", argv, **fields)
    assert api.requests == []


def artifact(path: str, data: bytes, **changes: Any) -> dict[str, Any]:
    return {"path": path, "size": len(data), "digest": "sha256:" + hashlib.sha256(data).hexdigest()} | changes


def test_artifacts_are_saved_verified(client: Both, api: ApiServer, tmp_path: Path) -> None:
    data = b"\x00\xff" * 200_000
    names = ["out/a b?#.bin", "out/%ff", "plain", "out/line\nbreak"]
    api.json(
        "GET",
        f"invocations/{ID}",
        invocation(artifacts=[artifact(name, data, executable=True) for name in names]),
    )
    from urllib.parse import quote  # noqa: PLC0415 - only here

    for name in names:
        api.on("GET", f"invocations/{ID}/artifacts/" + quote(name), lambda one: one.send(data))
    client("save_artifacts", ID, tmp_path / "to" / "here")
    for name in names:
        saved = tmp_path / "to" / "here" / name
        assert saved.read_bytes() == data
        assert saved.stat().st_mode & 0o100
    assert sorted(one.name for one in (tmp_path / "to" / "here").iterdir()) == ["out", "plain"]


def test_an_artifact_that_is_not_what_was_announced_is_not_kept(
    client: Both, api: ApiServer, tmp_path: Path
) -> None:
    for path, sent in (("f", b"short"), ("f", b"longer than was said"), ("f", b"other....!")):
        api.json("GET", f"invocations/{ID}", invocation(artifacts=[artifact(path, b"as was said")]))
        api.on("GET", f"invocations/{ID}/artifacts/f", partial(Exchange.send, data=sent))
        with pytest.raises(errors.Unavailable):
            client("save_artifacts", ID, tmp_path / "d")
        assert list((tmp_path / "d").iterdir()) == []


def test_closing_a_stream_hangs_up(api: ApiServer) -> None:
    def route(exchange: Exchange) -> None:
        def lines() -> Iterator[bytes]:
            for number in range(1, 10_000):
                yield output(number, {"text": "x" * 10_000})

        exchange.chunked(lines())

    api.on("POST", "invocations", route)
    with Client(api.socket).stream(["yes"]) as stream:
        assert next(stream).seq == 1
    assert api.hung_up.wait(5)
    api.hung_up.clear()

    async def leave() -> None:
        with anyio.move_on_after(0.3):
            async with await AsyncClient(api.socket).stream(["yes"]) as stream:
                async for _ in stream:
                    await anyio.sleep(0.05)

    anyio.run(leave)
    assert api.hung_up.wait(5)


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[tuple[str, object, object]]]:
        """Each by its name: the names, kinds and defaults of what it takes."""
        found = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: [(one.name, one.kind, one.default) for one in inspect.signature(method).parameters.values()]
            for name, method in found
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)
    assert "create_session" in methods(Client)
    assert inspect.signature(Client) == inspect.signature(AsyncClient)
    assert set(sandboxd.__all__) <= set(dir(sandboxd))
    for name in sandboxd.__all__:
        assert getattr(sandboxd, name) is not None


@pytest.mark.parametrize(
    ("method", "route", "answer"),
    [
        ("list", "invocations", {"invocations": []}),
        ("search", "search", {"hits": []}),
        ("sessions", "sessions", {"sessions": []}),
    ],
)
def test_options_go_as_they_are_named(
    client: Both, api: ApiServer, method: str, route: str, answer: dict[str, Any]
) -> None:
    api.json("GET", route, answer)
    client(method, before="7", limit=3)
    client(method, before=None)
    assert [one.query for one in api.requests] == [{"before": "7", "limit": "3"}, {}]


def test_an_option_that_there_is_not_is_refused(client: Both) -> None:
    with pytest.raises(errors.InvalidRequest, match="tll"):
        client("create_session", tll="1h")


FILE = {
    "path": "d/%FF",
    "kind": "file",
    "mode": 420,
    "uid": 0,
    "gid": 0,
    "size": 1,
    "mtime": 1,
    "digest": HEX,
}
MADE = {"id": ID, "digest": HEX, "size": 1, "inodes": 1, "created": 1}
WRITTEN = {"path": "d/%FF", "size": 6, "digest": HEX, "created": True, "checkpoint": ID}


def in_pieces(kind: str) -> Any:
    """A body that comes in pieces, as either client takes it."""

    async def pieces() -> Any:
        for piece in (b"one", b"two"):
            yield piece

    return pieces() if kind == "async" else [b"one", b"two"]


def test_files_of_sessions_go_both_ways(client: Both, api: ApiServer) -> None:
    api.json("GET", "sessions/s/files", {"files": [FILE], "truncated": True, "next": "d/%FF"})
    options: dict[str, Any] = {
        "checkpoint": "c",
        "recursive": True,
        "digest": True,
        "after": "d/a",
        "limit": 1,
    }
    found = client("session_files", "s", "d", **options)
    assert (found.next, found.files[0].digest) == ("d/%FF", HEX)
    assert api.requests[-1].query == {
        "path": "d", "checkpoint": "c", "recursive": "1", "digest": "1", "after": "d/a", "limit": "1",
    }  # fmt: skip
    api.json("PUT", "sessions/s/files/d/%25FF", WRITTEN, 201)
    assert client("write_file", "s", "d/%FF", in_pieces(client.kind), mode=0o755, match=HEX).checkpoint == ID
    seen = api.requests[-1]
    assert (seen.body, seen.headers["If-Match"], seen.query) == (b"onetwo", f'"{HEX}"', {"mode": "755"})
    api.json("PUT", "sessions/s/files/-d", WRITTEN, 201)
    assert client("make_directory", "s", "-d").created
    assert api.requests[-1].query == {"directory": "1"}
    api.json("POST", "sessions/s/import", MADE, 201)
    assert client("import_session", "s", in_pieces(client.kind), match=HEX, own=True).digest == HEX
    seen = api.requests[-1]
    assert (seen.body, seen.headers["If-Match"], seen.query) == (b"onetwo", f'"{HEX}"', {"own": "1"})
    api.raw(
        "GET", "sessions/s/export",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nsandboxd-omitted: 2\r\n\r\ntar",
    )  # fmt: skip
    assert client("export_session", "s", since="a", to="b", times=True) == [b"tar"]
    assert api.requests[-1].query == {"since": "a", "to": "b", "times": "1"}
    if client.kind == "sync":
        with Client(api.socket).export_session("s") as stream:
            assert stream.omitted == 2


def test_a_replay_of_a_session_comes_line_by_line(client: Both, api: ApiServer) -> None:
    lines = (
        {"call": {"recorded": ID, "skipped": "why"}},
        {
            "call": {
                "recorded": ID,
                "problem": {"title": "t", "status": 404, "code": "not_found", "detail": "d"},
            }
        },
        {"ended": {"recorded": ID, "skipped": 1, "failed": 1, "not_captured": ["time"]}},
    )
    api.events(*(json.dumps(line).encode() + b"\n" for line in lines), path="sessions/s/replay")
    first, second, last = client("replay_session", "s", policy="p", keep=True)
    assert (first.call.skipped, second.call.problem.code) == ("why", "not_found")
    assert (last.ended.skipped, last.ended.not_captured) == (1, ["time"])
    assert api.requests[-1].json() == {"policy": "p", "keep": True}
    client("replay_session", "s")
    assert api.requests[-1].json() == {}
    api.events(b'{"call": 7}\n', path="sessions/s/replay")
    with pytest.raises(errors.Unavailable, match="no ReplayEvent"):
        client("replay_session", "s")
