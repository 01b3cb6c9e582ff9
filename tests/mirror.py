"""A server of HTTP/1.1 that says what it was asked."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any


class Mirror(BaseHTTPRequestHandler):
    """Says what it was asked, but for paths that end in ``/quiet``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    requests: list[dict[str, Any]] = []  # noqa: RUF012

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        told = {
            "method": self.command,
            "path": self.path,
            "headers": [[name.lower(), value] for name, value in self.headers.items()],
            "body": body.decode("latin-1"),
        }
        self.requests.append(told)
        data = b"" if self.path.endswith("/quiet") else json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = answer  # noqa: N815

    def log_message(self, *_: object) -> None: ...
