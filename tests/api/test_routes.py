"""Each route over a real socket: what it takes, what it gives, and what it refuses."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

TRUE = {"argv": ["true"]}


def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_run_and_wait(server: Any) -> None:
    status, body, headers = server.ask("POST", "/v1/invocations", TRUE)
    assert status == 200
    assert body["outcome"]["cause"] == "exited"
    assert "signal" not in body["outcome"]  # null members are left out
    assert headers["location"] == f"/v1/invocations/{body['id']}"
    assert server.service.calls[body["id"]].tied


def test_respond_async(server: Any) -> None:
    status, body, headers = server.ask(
        "POST", "/v1/invocations", {"argv": ["wait"]}, {"Prefer": "respond-async, wait=0.2"}
    )
    assert (status, body["state"]) == (202, "running")
    assert headers["preference-applied"] == "respond-async, wait=0.2"
    assert not server.service.calls[body["id"]].tied
    assert server.ask("GET", headers["location"])[1] == body
    assert server.ask("POST", headers["location"] + "/cancel", b"")[1]["outcome"]["cause"] == "cancelled"


def test_run_as_a_stream_of_events(server: Any) -> None:
    connection = server.connect()
    connection.request("POST", "/v1/invocations", json.dumps({"argv": ["wait"]}),
                       {"Content-Type": "application/json", "Accept": "application/x-ndjson"})  # fmt: skip
    response = connection.getresponse()
    assert response.headers["content-type"] == "application/x-ndjson"
    first = json.loads(response.readline())
    assert first == {"seq": 1, "at": 1, "type": "accepted", "id": "call-0"}
    server.tell(lambda: server.service.end("call-0", "exited"))
    last = json.loads(response.readline())
    assert last["type"] == "ended"
    assert last["invocation"]["state"] == "ended"
    assert response.read() == b""
    connection.close()


def test_events_resume(server: Any) -> None:
    found = server.ask("POST", "/v1/invocations", TRUE)[1]["id"]
    lines = server.ask("GET", f"/v1/invocations/{found}/events?after=1&follow=1")
    assert lines[1]["seq"] == 2
    assert server.ask("GET", f"/v1/invocations/{found}/events?after=2")[1] == b""


def test_a_caller_that_goes_away_cancels_its_call(server: Any) -> None:
    for headers in ({}, {"Accept": "application/x-ndjson"}):
        number = len(server.service.calls)
        connection = server.connect()
        connection.request("POST", "/v1/invocations", json.dumps({"argv": ["wait"]}), headers)
        until(lambda number=number: len(server.service.calls) > number)
        connection.close()
        until(lambda number=number: server.service.calls[f"call-{number}"].cancelled)


def test_a_caller_with_a_key_may_go_away(server: Any) -> None:
    connection = server.connect()
    connection.request("POST", "/v1/invocations", json.dumps({"argv": ["wait"], "key": "k"}))
    until(lambda: server.service.calls)
    connection.close()
    time.sleep(0.2)
    assert not server.service.calls["call-0"].cancelled
    server.tell(lambda: server.service.end("call-0", "exited"))
    status, body, _ = server.ask("POST", "/v1/invocations", {"argv": ["wait"], "key": "k"})
    assert (status, body["id"]) == (200, "call-0")
    status, body, _ = server.ask("POST", "/v1/invocations", {"argv": ["other"], "key": "k"})
    assert (status, body["code"]) == (409, "key_conflict")


def test_list_with_filters(server: Any) -> None:
    for number in range(3):
        server.ask("POST", "/v1/invocations", {"argv": ["true"], "labels": {"n": str(number), "a": "b=c"}})
    assert len(server.ask("GET", "/v1/invocations?limit=2")[1]["invocations"]) == 2
    found = server.ask("GET", "/v1/invocations?label=n%3D1&label=a%3Db%3Dc&state=ended&policy=default")[1]
    assert [each["labels"]["n"] for each in found["invocations"]] == ["1"]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=x", "limit=1&limit=2", "wat=1", "state=none", "label=x", "cause=%FF", "a" * 20_000,
     "&".join(f"label=k{n}=v" for n in range(200))],
    ids=range(9),
)  # fmt: skip
def test_wrong_query_parameters(server: Any, query: str) -> None:
    status, body, headers = server.ask("GET", f"/v1/invocations?{query}")
    assert (status, body["code"]) == (400, "invalid_request")
    assert headers["content-type"] == "application/problem+json"


def test_parameters_where_none_are_taken(server: Any) -> None:
    assert server.ask("GET", "/v1/health?x=1")[0] == 400
    assert server.ask("POST", "/v1/invocations?async=1", TRUE)[1]["code"] == "invalid_request"


def test_raw_output(server: Any) -> None:
    found = server.ask("POST", "/v1/invocations", TRUE)[1]["id"]
    status, body, headers = server.ask("GET", f"/v1/invocations/{found}/stderr?offset=7")
    assert (status, body) == (200, b"of call-0")
    assert headers["content-type"] == "application/octet-stream"
    assert headers["x-content-type-options"] == "nosniff"
    assert server.ask("GET", "/v1/invocations/none/stdout")[1]["code"] == "not_found"
    assert server.ask("GET", f"/v1/invocations/{found}/stdout?offset=-1")[0] == 400


def test_a_reader_that_goes_away_ends_its_stream(server: Any) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["wait"]}, {"Prefer": "respond-async"})
    server.ask("POST", "/v1/invocations", {"argv": ["zeros", str(10**12)]})
    for target in ("call-0/stdout?follow=1", "call-1/stdout", "call-0/events?follow=1"):
        before = server.service.closed_streams
        connection = server.connect()
        connection.request("GET", f"/v1/invocations/{target}")
        assert connection.getresponse().read(5)
        connection.close()
        until(lambda before=before: server.service.closed_streams > before)
    assert not server.service.calls["call-0"].cancelled  # a reader is not the caller


def test_a_stream_that_fails_is_not_taken_for_whole(server: Any) -> None:
    import http.client  # noqa: PLC0415

    server.ask("POST", "/v1/invocations", {"argv": ["broken"]})
    connection = server.connect()
    connection.request("GET", "/v1/invocations/call-0/stdout")
    response = connection.getresponse()
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    connection.close()
    assert server.ask("GET", "/v1/health")[0] == 200


@pytest.mark.parametrize("path", ["out/short", "out/long"])
def test_a_body_of_another_length_than_its_head_says_ends_the_connection(server: Any, path: str) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["true"]})
    with server.raw() as sock:
        sock.settimeout(10)
        sock.sendall(f"GET /v1/invocations/call-0/artifacts/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while piece := sock.recv(65536):  # up to the end of the connection
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert len(body) < (9 if path == "out/short" else 7)


def test_stdin(server: Any) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["wait"], "stdin": "stream"}, {"Prefer": "respond-async"})
    target = "/v1/invocations/call-0/stdin"
    assert server.ask("POST", f"{target}?eof=0", b"abc")[1] == {"offset": 3}
    assert server.ask("POST", f"{target}?offset=2", b"x")[1]["code"] == "state_conflict"
    big = bytes(range(256)) * 40_000
    assert server.ask("POST", f"{target}?offset=3", big)[1] == {"offset": 3 + len(big)}
    assert server.service.calls["call-0"].stdin == b"abc" + big
    assert server.ask("POST", f"{target}?offset=3", b"")[1]["code"] == "state_conflict"


def test_stdin_that_is_cut_off(server: Any) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["wait"], "stdin": "stream"}, {"Prefer": "respond-async"})
    with server.raw() as sock:
        sock.sendall(
            b"POST /v1/invocations/call-0/stdin HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc"
        )
        until(lambda: server.service.calls["call-0"].stdin == b"abc")
    time.sleep(0.1)
    assert not server.service.calls["call-0"].stdin_closed


@pytest.mark.parametrize(("given", "number"), [(15, 15), ("SIGKILL", 9), ("term", 15), (64, 64)])
def test_signal(server: Any, given: object, number: int) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["wait"]}, {"Prefer": "respond-async"})
    assert server.ask("POST", "/v1/invocations/call-0/signal", {"signal": given})[:2] == (204, b"")
    assert server.service.calls["call-0"].signals == [number]


@pytest.mark.parametrize("given", [0, 65, -1, True, "SIGWAT", 1.5, None, "9" * 1000])
def test_wrong_signals(server: Any, given: object) -> None:
    status, body, _ = server.ask("POST", "/v1/invocations/call-0/signal", {"signal": given})
    assert (status, body["code"]) == (400, "invalid_request")


def test_artifacts(server: Any) -> None:
    server.ask("POST", "/v1/invocations", TRUE)
    assert server.ask("GET", "/v1/invocations/call-0/artifacts")[1] == {"artifacts": [], "withheld": []}
    status, body, headers = server.ask("GET", "/v1/invocations/call-0/artifacts/out/a%20b%25FF")
    assert (status, body, headers["content-length"]) == (200, b"12345678", "8")
    assert headers["content-disposition"] == "attachment"
    assert headers["etag"].startswith('"sha256:')
    assert server.ask("GET", "/v1/invocations/call-0/artifacts/..%2f..%2fetc%2fpasswd")[0] == 404


def test_the_catalogue(server: Any) -> None:
    assert server.ask("GET", "/v1/policies")[1]["policies"][0]["name"] == "default"
    assert server.ask("GET", "/v1/policies/default")[1]["image"] == "host"
    assert server.ask("GET", "/v1/policies/none")[1]["code"] == "not_found"
    checked = server.ask("POST", "/v1/policies/check", {"text": "a: b", "name": "n"})[1]
    assert checked == {"problems": [{"file": "n", "line": 1, "column": 1, "code": "c", "message": "a: b"}]}
    assert server.ask("POST", "/v1/plans", TRUE)[1]["plan"] == {"argv": ["true"]}
    assert server.ask("GET", "/v1/images")[1] == {"images": []}
    assert server.ask("GET", "/v1/slots")[1]["slots"][0]["state"] == "creating"
    status, text, headers = server.ask("GET", "/metrics")
    assert (status, text, headers["content-type"]) == (
        200,
        b"# EOF",
        "text/plain; version=0.0.4; charset=utf-8",
    )
    assert server.ask("GET", "/v1/health")[1]["status"] == "ready"


def test_nothing_there_and_not_allowed(server: Any) -> None:
    for method, target, status, code in [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/invocations/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("PUT", "/v1/invocations", 405, "invalid_request"),
        ("BREW", "/v1/health", 405, "invalid_request"),
        ("GET", "/v1/invocations/a%00b", 404, "not_found"),
    ]:
        found, body, headers = server.ask(method, target)
        assert (found, body["code"], body["status"]) == (status, code, status)
        assert headers["content-type"] == "application/problem+json"


def test_refusals_are_recorded_with_names_and_without_content(server: Any) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["full", "secret"], "env": {"A": "secret"}})
    server.ask("POST", "/v1/invocations", b"{", {"Content-Type": "application/json"})
    (caller, code, summary), (_, second, nothing) = server.service.refusals
    assert (caller.uid, code, second, nothing) == (0, "queue_full", "invalid_request", {})
    assert summary["argv0"] == "full"
    assert "secret" not in str(summary)


def test_retry_after(server: Any) -> None:
    status, body, headers = server.ask("POST", "/v1/invocations", {"argv": ["full"]})
    assert (status, headers["retry-after"], body["details"]) == (429, "2", {"retry_after": 2})


def test_a_fault_of_ours_says_nothing_of_our_insides(server: Any) -> None:
    status, body, _ = server.ask("POST", "/v1/invocations", {"argv": ["crash"]})
    assert (status, body["code"]) == (500, "internal")
    assert "secret" not in str(body)
    assert server.ask("GET", "/v1/health")[0] == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "argv"),
        ({"argv": []}, "argv"),
        ({"argv": ["a"], "wat": 1}, "wat"),
        ({"argv": ["a"], "limits": {"memory": "12QiB"}}, "limits.memory"),
        ({"argv": ["a"], "cwd": "relative"}, "cwd"),
        ({"argv": ["a\0b"]}, "argv.0"),
        ([1], ""),
    ],
)
def test_wrong_requests_name_their_field(server: Any, body: object, field: str) -> None:
    status, found, _ = server.ask("POST", "/v1/invocations", body)
    assert (status, found["code"]) == (400, "invalid_request")
    assert found["details"]["field"].startswith(field)
    assert len(json.dumps(found)) < 4000


@pytest.mark.parametrize(
    ("change", "field", "limit", "counted"),
    [
        ({"argv": ["a"] * 5000}, "argv", 4096, "items"),
        ({"argv": ["a" * 200_000]}, "argv.0", 131_071, "characters"),
        ({"env": {f"A{number}": "" for number in range(1025)}}, "env", 1024, "members"),
        ({"env": {"A": "x" * 200_000}}, "env.A", 131_071, "characters"),
        ({"inputs": [{"path": "x" * 4096, "content": {"text": ""}}]}, "inputs.0.path", 4095, "characters"),
        ({"artifacts": ["x"] * 65}, "artifacts", 64, "items"),
        ({"labels": {"a": "b" * 1025}}, "labels.a", 1024, "characters"),
        ({"key": "k" * 257, "wat": 1}, "key", 256, "characters"),
        ({"policy": "p" * 129}, "policy", 128, "characters"),
    ],
    ids=range(9),
)
def test_a_field_over_its_bound_is_413_and_named(
    server: Any, change: dict[str, object], field: str, limit: int, counted: str
) -> None:
    status, found, _ = server.ask("POST", "/v1/invocations", TRUE | change)
    assert (status, found["code"]) == (413, "too_large")
    assert (found["details"]["field"], found["details"]["limit"]) == (field, limit)
    assert found["detail"] == f"{field}: has more than {limit} {counted}"
    assert len(json.dumps(found)) < 4000


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe{}", b'{"argv": ["a"], "argv": ["b"]}', b'{"argv": ["a"], "deadline": NaN}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"argv": ["a"], "x": "\\u12"}',
         b'{"argv": ["\\ud800"]}', b'{"argv": ["a"], "deadline": 1' + b"0" * 5000 + b"}",
        b'{"argv": [' + b"1," * 300_000 + b"1]}", b'{"argv": ["a"], "x": "' + b"y" * 1_000_000 + b'"}',
    ],
    ids=range(12),
)  # fmt: skip
def test_hostile_json(server: Any, body: bytes) -> None:
    status, found, _ = server.ask("POST", "/v1/invocations", body, {"Content-Type": "application/json"})
    assert (status, found["code"]) == (400, "invalid_request")
    assert len(json.dumps(found)) < 8000


def test_wrong_content_types(server: Any) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"):
        status, body, _ = server.ask("POST", "/v1/invocations", b'{"argv": ["a"]}', {"Content-Type": kind})
        assert (status, body["code"]) == (415, "invalid_request")
    kind = "application/json; charset=utf-8"
    assert server.ask("POST", "/v1/invocations", b'{"argv": ["a"]}', {"Content-Type": kind})[0] == 200
