"""HTTP/2 between programs of others: curl and h2load on one side, nghttpd on the other."""

from __future__ import annotations

import datetime as dt
import json
import re
import socket
import ssl
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from h2.connection import H2Connection
from http2_peers import RULES, never_asked
from OpenSSL import SSL

from sandboxd.egress.budget import Budget
from sandboxd.egress.http2 import Http2
from sandboxd.egress.relay import Cut
from sandboxd.egress.site import Exchange, Site
from sandboxd.egress.streams import Broken, Counted, Plain
from sandboxd.egress.tls import ServerTls
from sandboxd.egress.upstream import Unreachable
from sandboxd.reach import Allow, NetworkRules, Reach

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from sandboxd.egress.streams import Stream

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """The port of an nghttpd that has ``/ok/small`` and ``/ok/large``, and takes few streams at once."""
    (tmp_path / "ok").mkdir()
    (tmp_path / "ok/small").write_bytes(b"hello")
    (tmp_path / "ok/large").write_bytes(bytes(50 << 20))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--no-tls", "-a", "127.0.0.1", "-d", str(tmp_path), "--echo-upload", "-m", "20"]
    with subprocess.Popen(["nghttpd", *options, str(port)], stdout=subprocess.DEVNULL) as process:
        try:
            while True:
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
            yield port
        finally:
            process.kill()


def leaf() -> SSL.Context:
    """Of a certificate that nobody else knows."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "api.test")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate(made)
    context.use_privatekey(key)
    context.set_alpn_select_callback(lambda connection, offered: b"h2")
    return context


class Gateway:
    """Serves connections of programs at a port of this host, as one of a container's would be."""

    def __init__(self, server: int, *, tls: bool = False) -> None:
        self.told: list[tuple[str, int, int, int]] = []
        self.raised: list[Exception] = []
        self._server = server
        self._leaf = leaf() if tls else None
        self._budget = Budget({})
        self.site = Site(
            "api.test",
            443 if tls else 80,
            "https" if tls else "http",
            reach=Reach(NetworkRules((Allow("api.test", (80, 443), "policy.yaml:1", RULES),), ())),
            budget=self._budget,
            ask=never_asked,
            inject=lambda decision, request, digest: (list(request.headers), ()),
            tell=self._tell,
        )

    def _tell(self, exchange: Exchange, verdict: str, why: str) -> None:
        self.told.append((verdict, exchange.status, exchange.sent, exchange.received))

    async def serve(self, listener: socket.socket) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                try:
                    accepted, _ = listener.accept()
                except BlockingIOError:
                    await anyio.wait_readable(listener)
                    continue
                tasks.start_soon(self._one, accepted)

    async def _one(self, accepted: socket.socket) -> None:
        made: list[socket.socket] = []

        async def connect() -> Stream:
            try:
                sock = socket.create_connection(("127.0.0.1", self._server))
            except OSError as error:
                raise Unreachable(str(error)) from error
            made.append(sock)
            sock.setblocking(False)
            return Plain(sock)

        with accepted:
            accepted.setblocking(False)
            client: Stream = Counted(accepted, b"", self._budget)
            try:
                if self._leaf is not None:
                    tls = SSL.Connection(self._leaf, None)
                    tls.set_accept_state()
                    client = ServerTls(client, tls)
                    await client.handshake()
                await Http2(client, self.site, connect).run()
            except (OSError, Cut) as error:
                self.raised.append(error)
            finally:
                for sock in made:
                    sock.close()


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
async def gateway(request: pytest.FixtureRequest, server: int) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway, and the URL of it."""
    found = Gateway(server, tls=request.param)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(found.serve, listener)
            yield found, f"{found.site.scheme}://127.0.0.1:{port}"
            tasks.cancel_scope.cancel()


async def run(*argv: str | Path) -> str:
    with anyio.fail_after(100):
        done = await anyio.run_process([str(each) for each in argv], check=False)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout.decode()


def curl(*options: str | Path) -> list[str | Path]:
    return ["curl", "-sk", "--http2-prior-knowledge", "-H", "Host: api.test", *options]


async def test_curl(gateway: tuple[Gateway, str], tmp_path: Path) -> None:
    found, url = gateway
    assert await run(*curl("-w", " %{http_version} %{http_code}", f"{url}/ok/small")) == "hello 2 200"
    refused = json.loads(await run(*curl(f"{url}/secret")))
    assert (refused["status"], refused["rule"]) == (403, None)
    assert await run(*curl("-w", "%{http_code}", "-o", "/dev/null", "-I", f"{url}/ok/small")) == "200"
    assert await run(*curl("-w", "%{http_code}", "-o", "/dev/null", f"{url}/ok/none")) == "404"
    upload = tmp_path / "upload"
    upload.write_bytes(bytes(range(256)) * 200_000)
    assert await run(*curl("-o", tmp_path / "back", "--data-binary", f"@{upload}", f"{url}/ok/echo")) == ""
    assert await run(*curl("-o", tmp_path / "large", f"{url}/ok/large")) == ""
    assert (tmp_path / "back").read_bytes() == upload.read_bytes()
    assert (tmp_path / "large").stat().st_size == 50 << 20
    # a body that is refused while it comes
    assert await run(*curl("-w", "%{http_code}", "-o", "/dev/null", "-T", upload, f"{url}/ok/x")) == "403"
    assert [each[:2] for each in found.told[:4]] == [
        ("allowed", 200),
        ("denied", 0),
        ("allowed", 200),
        ("allowed", 404),
    ]
    size = upload.stat().st_size
    assert found.told[4:6] == [("allowed", 200, size, size), ("allowed", 200, 0, 50 << 20)]
    assert found.told[6:] == [("denied", 0, 0, 0)]


async def test_h2load(gateway: tuple[Gateway, str]) -> None:
    found, url = gateway
    said = await run(
        "h2load", "-n", "2000", "-c", "4", "-m", "100", "-H", ":authority: api.test", f"{url}/ok/small"
    )
    assert re.search(r"2000 succeeded, 0 failed, 0 errored", said), said
    assert found.told == [("allowed", 200, 0, 5)] * 2000


@pytest.mark.parametrize("gateway", [True], indirect=True, ids=["tls"])
async def test_a_program_that_breaks_tls_ends_its_own_connection(gateway: tuple[Gateway, str]) -> None:
    found, url = gateway
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])

    def speak() -> None:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as sock:
            there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(there, here)
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(here.read())
                    there.write(sock.recv(65536))
            http = H2Connection()
            http.initiate_connection()
            http.increment_flow_control_window(1 << 30)
            head = [
                (":method", "GET"),
                (":scheme", "https"),
                (":authority", "api.test"),
                (":path", "/ok/large"),
            ]
            http.send_headers(1, head, end_stream=True)
            http.increment_flow_control_window(1 << 30, 1)
            tls.write(http.data_to_send())
            sock.sendall(here.read())
            time.sleep(0.5)  # until no more of the answer fits between
            sock.sendall(b"\x17\3\3\0\x20" + bytes(32))  # a record that is none
            time.sleep(0.5)
            sock.settimeout(20)
            with suppress(ConnectionResetError):
                while sock.recv(65536):
                    pass

    await anyio.to_thread.run_sync(speak)
    with anyio.fail_after(20):
        while not found.raised:  # noqa: ASYNC110  (nothing says so)
            await anyio.sleep(0.01)
    assert [type(error) for error in found.raised] == [Broken]
