"""The OpenAPI document, and requests made from it."""

from __future__ import annotations

import socket
import warnings
from typing import Any

import requests
import schemathesis
import urllib3
from hypothesis import HealthCheck, Phase, given, settings
from requests.adapters import HTTPAdapter
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

CHECKS = (not_a_server_error, content_type_conformance, response_schema_conformance)


class UnixConnection(urllib3.connection.HTTPConnection):
    """urllib3 over a Unix socket."""

    path = ""

    def _new_conn(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(self.path)
        return sock


class UnixAdapter(HTTPAdapter):
    """requests over a Unix socket."""

    def __init__(self, path: str) -> None:
        self.pool = urllib3.HTTPConnectionPool("sandboxd")
        self.pool.ConnectionCls = type("Connection", (UnixConnection,), {"path": path})
        super().__init__()

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> Any:
        return self.pool

    def close(self) -> None:
        self.pool.close()


def test_the_document(server: Any) -> None:
    status, document, _ = server.ask("GET", "/openapi.json")
    assert status == 200
    assert document["openapi"].startswith("3.1")
    create = document["paths"]["/v1/invocations"]["post"]
    assert create["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/Request")
    assert set(create["responses"]) == {"200", "202", "default"}
    names = [each["name"] for each in document["paths"]["/v1/invocations"]["get"]["parameters"]]
    assert names == ["policy", "cause", "state", "key", "label", "before", "limit"]
    for path in ("sessions/{session}/files/{path}", "artifacts/{digest}", "invocations/{id}/stdout"):
        get = document["paths"][f"/v1/{path}"]["get"]
        assert set(get["responses"]) == {"200", "206", "304", "default"}
        assert "content" in get["responses"]["206"]
        assert "content" not in get["responses"]["304"]
        headers = {each["name"] for each in get["parameters"] if each["in"] == "header"}
        assert headers == {"Range", "If-Range", "If-Match", "If-None-Match"}
    for method in ("put", "delete"):
        parameters = document["paths"]["/v1/sessions/{session}/files/{path}"][method]["parameters"]
        headers = {each["name"] for each in parameters if each["in"] == "header"}
        assert headers == {"If-Match", "If-None-Match"}
    assert {"/v1/health", "/v1/plans", "/v1/invocations/{id}/stdin"} < set(document["paths"])


def test_requests_made_from_the_document(server: Any) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["true"]})
    schema = schemathesis.openapi.from_dict(server.ask("GET", "/openapi.json")[1])
    with requests.Session() as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the generator speak of itself
        session.mount("http://", UnixAdapter(server.path))
        count = 0
        found: Any
        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(
                max_examples=8,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def check(case: Any) -> None:
                nonlocal count
                count += 1
                response = case.call(base_url="http://sandboxd", session=session)
                case.validate_response(response, checks=CHECKS)

            check()
    assert count > 16
