"""Certificates made on the way: real handshakes, and the same in a process that has given everything up."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from OpenSSL import SSL

from sandboxd.egress.leaves import Leaves, ProtocolRefused
from sandboxd.network.authority import Authority
from sandboxd.network.filter import filter_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AUTHORITY = Authority.make("a.test")
CERTIFICATE = x509.load_pem_x509_certificate(AUTHORITY.certificate.encode())
NAME = "www.example.test"
HTTP = (b"h2", b"http/1.1")
UID = 1_999_999_999


@pytest.fixture(scope="module")
def leaves() -> Leaves:
    return Leaves(AUTHORITY.certificate, AUTHORITY.key)


def client_context(authority: str | None = AUTHORITY.certificate, protocols: list[str] | None = None) -> Any:
    context = ssl.create_default_context(cadata=authority)
    context.set_alpn_protocols(protocols or ["http/1.1"])
    return context


def flush(connection: SSL.Connection, sock: socket.socket) -> None:
    with suppress(SSL.WantReadError):
        while True:
            sock.sendall(connection.bio_read(1 << 16))


def serve(connection: SSL.Connection, sock: socket.socket) -> None:
    """The end of a connection over memory: shake hands, echo until the client closes."""

    def step(function: Callable[[], Any]) -> Any:
        while True:
            try:
                with suppress(SSL.WantReadError):
                    return function()
            finally:
                flush(connection, sock)
            data = sock.recv(1 << 16)
            if not data:
                raise EOFError
            connection.bio_write(data)

    step(connection.do_handshake)
    while True:
        connection.send(step(lambda: connection.recv(1 << 16)))


@contextmanager
def talking(
    connection: SSL.Connection,
    context: ssl.SSLContext,
    name: str = NAME,
    raised: list[BaseException] | None = None,
    **options: Any,
) -> Iterator[ssl.SSLSocket]:
    """A client's end; what the server's raises is ``raised``, and may be nothing without that."""
    ours, theirs = socket.socketpair()
    unexpected: list[BaseException] = []

    def run() -> None:
        with theirs:
            try:
                serve(connection, theirs)
            except (EOFError, SSL.Error, OSError):  # a client that went away
                return
            except Exception as error:  # noqa: BLE001
                (unexpected if raised is None else raised).append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        ours.settimeout(20)
        with context.wrap_socket(ours, server_hostname=name, **options) as tls:
            yield tls
    finally:
        ours.close()
        thread.join()
        assert unexpected == []


@pytest.mark.parametrize("name", [NAME, "_a.b-c.xn--bcher-kva.test", "192.0.2.7", "2001:db8::7",
                                  ".".join(["a" * 60] * 4)])  # fmt: skip
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_that_trusts_the_authority_believes_the_name(
    leaves: Leaves, name: str, version: ssl.TLSVersion
) -> None:
    context = client_context()
    context.minimum_version = context.maximum_version = version
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with talking(leaves.connection(name, HTTP), context, name) as tls:
        tls.sendall(b"said")
        assert tls.recv(4) == b"said"
        assert tls.selected_alpn_protocol() == "http/1.1"
        assert tls.version() == version.name.replace("_", ".")


def test_no_other_name_and_no_other_authority_is_believed(leaves: Leaves) -> None:
    distrusted = pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch")
    with distrusted, talking(leaves.connection("other.test", HTTP), client_context()):
        pass
    for context in (client_context(Authority.make("a.test").certificate), client_context(None)):
        distrusted = pytest.raises(ssl.SSLCertVerificationError, match="certificate")
        with distrusted, talking(leaves.connection(NAME, HTTP), context):
            pass


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_versions_that_are_broken_are_not_spoken(leaves: Leaves, version: ssl.TLSVersion) -> None:
    context = client_context()
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    refused = pytest.raises(ssl.SSLError, match=r"(?i)protocol.version")
    with refused, talking(leaves.connection(NAME, HTTP), context):
        pass


@pytest.mark.parametrize(
    ("offered", "spoken", "chosen"),
    [
        (["h2", "http/1.1"], HTTP, "h2"),
        (["http/1.1", "h2"], HTTP, "h2"),
        (["h2", "http/1.1"], (b"http/1.1",), "http/1.1"),
        (["http/1.0", "http/1.1"], HTTP, "http/1.1"),
    ],
)
def test_each_connection_says_what_it_speaks(
    leaves: Leaves, offered: list[str], spoken: tuple[bytes, ...], chosen: str
) -> None:
    with talking(leaves.connection(NAME, spoken), client_context(protocols=offered)) as tls:
        assert tls.selected_alpn_protocol() == chosen


def test_a_client_without_alpn_is_served(leaves: Leaves) -> None:
    context = ssl.create_default_context(cadata=AUTHORITY.certificate)
    with talking(leaves.connection(NAME, HTTP), context) as tls:
        assert tls.selected_alpn_protocol() is None


def test_a_client_of_other_protocols_gets_the_alert_and_the_next_one_is_served(leaves: Leaves) -> None:
    alert = pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol")
    refused: list[BaseException] = []
    with alert, talking(leaves.connection(NAME, HTTP), client_context(protocols=["imap"]), raised=refused):
        pass
    assert [type(error) for error in refused] == [ProtocolRefused]
    test_a_client_without_alpn_is_served(leaves)


def test_no_session_is_resumed(leaves: Leaves) -> None:
    context, session = client_context(), None
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    for _ in range(2):
        with talking(leaves.connection(NAME, HTTP), context, session=session) as tls:
            assert not tls.session_reused
            session = tls.session


def leaf(context: SSL.Context) -> x509.Certificate:
    server = SSL.Connection(context, None)
    server.set_accept_state()
    found = server.get_certificate(as_cryptography=True)
    assert found is not None
    return found


def test_what_a_certificate_says(leaves: Leaves) -> None:
    found = leaf(leaves.context("www.example.test"))
    extensions = found.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["www.example.test"]
    assert len(list(names)) == 1
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    identity = CERTIFICATE.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    of = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert of.key_identifier == identity.digest
    assert found.not_valid_before_utc >= CERTIFICATE.not_valid_before_utc
    assert found.not_valid_after_utc <= CERTIFICATE.not_valid_after_utc
    found.verify_directly_issued_by(CERTIFICATE)
    other = leaf(leaves.context("other.example.test"))
    assert found.serial_number != other.serial_number
    assert found.public_key() == other.public_key()


@pytest.mark.parametrize("name", ["bücher.test", "a\udcff.test"])
def test_what_is_no_name_is_refused(leaves: Leaves, name: str) -> None:
    with pytest.raises(ValueError):
        leaves.context(name)


def test_certificates_are_kept_and_renewed() -> None:
    clock = [datetime.now(UTC)]
    leaves = Leaves(AUTHORITY.certificate, AUTHORITY.key, most=2, now=lambda: clock[0])
    first = leaves.context("a.test")
    assert leaves.context("a.test") is first
    clock[0] += timedelta(days=3)
    assert leaves.context("a.test") is first
    clock[0] += timedelta(days=1, minutes=1)
    second = leaves.context("a.test")
    assert second is not first
    clock[0] -= timedelta(days=30)  # what was made is of the future now; it is not of the authority's past
    early = leaves.context("a.test")
    assert leaves.context("a.test") is early
    assert leaf(early).not_valid_before_utc == CERTIFICATE.not_valid_before_utc
    clock[0] += timedelta(days=30)
    third = leaves.context("a.test")
    leaves.context("b.test")
    assert leaves.context("a.test") is third
    leaves.context("c.test")  # the oldest goes, and that is not what was asked for last
    assert leaves.context("a.test") is third
    assert len(leaves._made) == 2


def test_no_certificate_outlives_the_authority() -> None:
    for late in (-1, 24):
        clock = (CERTIFICATE.not_valid_after_utc + timedelta(hours=late)).timestamp(), UTC
        leaves = Leaves(AUTHORITY.certificate, AUTHORITY.key, now=partial(datetime.fromtimestamp, *clock))
        assert leaf(leaves.context("a.test")).not_valid_after_utc == CERTIFICATE.not_valid_after_utc
        assert leaves.context("a.test") is leaves.context("a.test")


def pem(key: Any) -> str:
    private = serialization.PrivateFormat.PKCS8
    return str(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()).decode())


@pytest.mark.parametrize(
    "key", [pem(ec.generate_private_key(ec.SECP256R1())), pem(rsa.generate_private_key(65537, 2048)), "", "x"]
)
def test_a_key_that_is_not_the_authoritys_is_refused(key: str) -> None:
    with pytest.raises(ValueError):
        Leaves(AUTHORITY.certificate, key)


def test_the_authority_may_sign_names_and_nothing_else() -> None:
    extensions = CERTIFICATE.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, False, False)
    assert CERTIFICATE.subject.rfc4514_string() == "CN=sandboxd CA of a.test"
    assert CERTIFICATE.not_valid_before_utc < datetime.now(UTC) - timedelta(days=1)
    assert AUTHORITY.fingerprint == f"sha256:{CERTIFICATE.fingerprint(hashes.SHA256()).hex()}"
    assert Authority.make("a.test").fingerprint != AUTHORITY.fingerprint
    long = x509.load_pem_x509_certificate(Authority.make("ä" * 300).certificate.encode())
    assert len(long.subject.rfc4514_string().encode()) in {66, 67}
    for shown in (repr(AUTHORITY), str(AUTHORITY), f"{AUTHORITY}"):
        assert AUTHORITY.key.splitlines()[1] not in shown


def test_openssl_verifies_it(leaves: Leaves, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.fail("openssl is not installed")
    (tmp_path / "ca.pem").write_text(AUTHORITY.certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}"]
        command += ["-CAfile", "ca.pem", "-verify_return_error", "-x509_strict", "-showcerts"]
        command += ["-servername", "www.example.test", "-verify_hostname", "www.example.test", "-alpn", "h2"]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        listener.settimeout(20)
        accepted, _ = listener.accept()
    with accepted:
        thread = threading.Thread(target=_quiet, args=(leaves.connection("www.example.test", HTTP), accepted))
        thread.start()
        said = process.communicate(b"Q\n", timeout=20)[0].decode()
        thread.join()
    assert process.returncode == 0, said
    assert "Verify return code: 0 (ok)" in said
    assert "ALPN protocol: h2" in said
    assert said.count("BEGIN CERTIFICATE") == 2


def _quiet(connection: SSL.Connection, sock: socket.socket) -> None:
    with pytest.raises((EOFError, SSL.ZeroReturnError, SSL.Error)):
        serve(connection, sock)


JAILED = """
import base64, os, socket, sys
sys.path.insert(0, sys.argv[1])
from sandboxd.egress.jail import give_up
from sandboxd.egress.leaves import Leaves
import test_leaves as tests
sock = socket.socket(fileno=int(sys.argv[2]))
control = socket.socket(fileno=int(sys.argv[3]))
authority, key = sys.stdin.read().split("\\n\\n")
leaves = Leaves(authority, key)
give_up(int(sys.argv[4]), 64, base64.b64decode(sys.argv[5]))
try:
    open("/etc/passwd")
except OSError:
    pass
else:
    raise SystemExit("it has files")
for number in range(1500):  # more than one page of whatever a callback needs
    leaves.context(f"name{number}.example.test")
try:
    leaves.connection("www.example.test", (b"imap",)), tests.serve(
        leaves.connection("www.example.test", (b"h2",)), sock)
except (EOFError, tests.SSL.ZeroReturnError):
    control.send(b"served")
control.recv(1)
os._exit(0)
"""


def test_it_works_where_everything_was_given_up(need: Callable[[object, str], None]) -> None:
    need(os.geteuid() == 0, "root")
    ours, theirs = socket.socketpair()
    control, its = socket.socketpair()
    control.settimeout(60)
    with theirs, its:
        process = subprocess.Popen(
            [sys.executable, "-c", JAILED, os.path.dirname(__file__), str(theirs.fileno()), str(its.fileno()),  # noqa: PTH120
             str(UID), base64.b64encode(filter_program()).decode()],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno(), its.fileno()],
            text=True,
        )  # fmt: skip
    assert process.stdin is not None
    with ours, control:
        process.stdin.write(f"{AUTHORITY.certificate}\n{AUTHORITY.key}")
        process.stdin.close()
        ours.settimeout(60)
        with client_context(protocols=["h2"]).wrap_socket(ours, server_hostname="www.example.test") as tls:
            tls.sendall(b"said")
            assert tls.recv(4) == b"said"
            assert tls.selected_alpn_protocol() == "h2"
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert f"Uid:\t{UID}" in status
            assert "Seccomp:\t2" in status
            assert "Threads:\t1\n" in status
        assert control.recv(16) == b"served"
    assert process.wait(20) == 0
